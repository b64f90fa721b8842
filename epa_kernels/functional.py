"""The public functions: contract, checks, autocast and seed; the math is `reference`."""

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from . import dispatch
from .rng import draw_seed

KINDS = ("shared", "split", "sum")
LAYOUTS = ("official", "tokens")


def check_choice(function: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{function}: {name} must be one of {', '.join(choices)}, got {value!r}.")


def _check_shape(function: str, name: str, t: Tensor, shape: tuple[int, ...], axes: str) -> None:
    if tuple(t.shape) != shape:
        raise ValueError(
            f"{function}: {name} must have shape {axes} = {shape}, got {tuple(t.shape)}."
        )


def _check_tensors(function: str, first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """One device; one floating dtype, but float32 parameters may go with a bf16 or fp16 input."""
    if not first.is_floating_point():
        raise ValueError(
            f"{function}: {first_name} must be a floating tensor, got {first.dtype}; "
            f"convert it with .float()."
        )
    if first.numel() == 0:
        raise ValueError(
            f"{function}: {first_name} must not be empty, got shape {tuple(first.shape)}; "
            f"skip the layer when a batch has no sample."
        )
    low_precision = first.dtype in (torch.float16, torch.bfloat16)
    for name, t in others.items():
        if t is None:
            continue
        if t.device != first.device:
            raise ValueError(
                f"{function}: {name} is on {t.device} but {first_name} is on {first.device}; "
                f"move both to one device."
            )
        if t.dtype != first.dtype and not (low_precision and t.dtype == torch.float32):
            raise ValueError(
                f"{function}: {name} is {t.dtype} but {first_name} is {first.dtype}; use one "
                f"dtype, or float32 parameters with a bfloat16 or float16 input."
            )


def _check_dropout(function: str, name: str, p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{function}: {name} must be in [0, 1), got {p}.")


def _seed_for(function: str, x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    if dropout_p == 0.0:
        return None
    if seed is None:
        return draw_seed(x.device)
    if seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != x.device:
        raise ValueError(
            f"{function}: seed must be an int64 tensor of shape () on {x.device}, got {seed.dtype} "
            f"{tuple(seed.shape)} on {seed.device}."
        )
    return seed


def _autocasts(device_type: str) -> bool:
    # torch 2.11 cannot compile the question; what is compiled for has autocast.
    is_available = torch.compiler.is_compiling() or is_autocast_available(device_type)
    return is_available and torch.is_autocast_enabled(device_type)


def _to_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Activations in the autocast dtype, as nn.Linear takes them; float64 is left alone."""
    device_type = tensors[0].device.type
    if not _autocasts(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def _run(op: str, backend: str | None, *tensors: Tensor | None, **options) -> Tensor:
    run = dispatch.BACKENDS[dispatch.select(op, tensors[0], backend)].functions[op]
    device_type = tensors[0].device.type
    if not _autocasts(device_type):
        return run(*tensors, **options)
    # Inside, dtypes are chosen explicitly.
    with torch.autocast(device_type, enabled=False):
        return run(*tensors, **options)


def paired_attention(
    x: Tensor,
    qkvv_weight: Tensor,
    qkvv_bias: Tensor | None,
    proj_k_weight: Tensor,
    proj_k_bias: Tensor | None,
    proj_v_weight: Tensor | None,
    proj_v_bias: Tensor | None,
    temperature: Tensor,
    temperature2: Tensor,
    out_proj_weight: Tensor | None,
    out_proj_bias: Tensor | None,
    out_proj2_weight: Tensor | None,
    out_proj2_bias: Tensor | None,
    *,
    num_heads: int,
    kind: str = "shared",
    layout: str = "official",
    channel_dropout_p: float = 0.0,
    spatial_dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Efficient paired attention: spatial and channel attention with shared queries and keys.

        q, k, vc, vs = heads of x qkvv_weight^T + qkvv_bias                       each (B, N, H, D)
        k_proj = E k + e,  v_proj = F vs + f        E = proj_k_weight, F = proj_v_weight or E
        A = dropout(softmax_j(temperature <q^_i, k^_j>))     out_c[n,i] = sum_j A[i,j] vc[n,j]
        S = dropout(softmax_p(temperature2 q^_n . k_proj_p)) out_s[n] = sum_p S[n,p] v_proj[p]
        y = concat(out_s' out_proj_weight^T + out_proj_bias,
                   out_c out_proj2_weight^T + out_proj2_bias)      kind "sum":  y = out_c + out_s'

    q^ = q / max(|q|, 1e-12) and k^ likewise, the norm of each channel taken over the N tokens;
    out_s' is out_s in `layout`.

    Args:
        x (B, N, C): activations, any strides.
        qkvv_weight (4C, C), qkvv_bias (4C) or None: rows q, k, v channel, v spatial, each H x D.
        proj_k_weight (P, N), proj_k_bias (P) or None: token projection of the keys, any strides, so
            the published EF (N, P) goes in as EF.t().
        proj_v_weight (P, N) or None, proj_v_bias (P) or None: of the values; None means the same as
            for the keys. Given for kind "split", None for "shared" and "sum".
        temperature (H, 1, 1): of the channel branch.
        temperature2 (H, 1, 1): of the spatial branch.
        out_proj_weight (C/2, C), out_proj_bias (C/2) or None: output projection of the spatial
            branch; None for kind "sum".
        out_proj2_weight (C/2, C), out_proj2_bias (C/2) or None: of the channel branch; the same.
        num_heads: H, divides C.
        kind: "shared", "split" or "sum", default "shared"; see `EfficientPairedAttention`.
        layout: "official" (published order, what checkpoints need) or "tokens", default "official".
        channel_dropout_p, spatial_dropout_p: dropout of A and S, in [0, 1), default 0.
        seed (): int64, decides both masks (`rng`); drawn from torch's generator if None.
        backend: forces a backend for this call, default None: the one set or the fastest.

    Returns:
        y (B, N, C) in the dtype of x; under autocast in the autocast dtype.

    Raises:
        ValueError: a shape, dtype, device or option breaks the contract above.
        RuntimeError: the forced backend cannot run, with every reason; or a second derivative was
            asked of a backend other than "reference".

    Notes:
        Parameters may be float32 beside a bfloat16 or float16 x. Sums over tokens, norms and
        softmaxes run in float32 (float64 for float64). Every backend but "reference" is
        deterministic, keeps x and a few small matrices for backward, and is once differentiable.

    Example:
        >>> x, w, e = torch.randn(2, 64, 32), torch.randn(128, 32), torch.randn(16, 64)
        >>> t = torch.ones(4, 1, 1)
        >>> paired_attention(x, w, None, e, None, None, None, t, t, None, None, None, None,
        ...                  num_heads=4, kind="sum").shape
        torch.Size([2, 64, 32])

    Source: Shaker et al., "UNETR++", TMI 2024.
    """
    function = "paired_attention"
    check_choice(function, "kind", kind, KINDS)
    check_choice(function, "layout", layout, LAYOUTS)
    _check_dropout(function, "channel_dropout_p", channel_dropout_p)
    _check_dropout(function, "spatial_dropout_p", spatial_dropout_p)
    if x.dim() != 3:
        raise ValueError(
            f"{function}: x must have shape (B, N, C), got {tuple(x.shape)}; a volume "
            f"(B, C, X, Y, Z) becomes tokens by x.flatten(2).transpose(1, 2)."
        )
    (x,) = _to_autocast(x)
    _check_tensors(
        function,
        "x",
        x,
        qkvv_weight=qkvv_weight,
        qkvv_bias=qkvv_bias,
        proj_k_weight=proj_k_weight,
        proj_k_bias=proj_k_bias,
        proj_v_weight=proj_v_weight,
        proj_v_bias=proj_v_bias,
        temperature=temperature,
        temperature2=temperature2,
        out_proj_weight=out_proj_weight,
        out_proj_bias=out_proj_bias,
        out_proj2_weight=out_proj2_weight,
        out_proj2_bias=out_proj2_bias,
    )
    _, N, C = x.shape
    if num_heads < 1 or C % num_heads:
        raise ValueError(
            f"{function}: num_heads must divide the {C} channels of x, got {num_heads}."
        )
    _check_shape(function, "qkvv_weight", qkvv_weight, (4 * C, C), "(4C, C)")
    if proj_k_weight.dim() != 2 or proj_k_weight.shape[1] != N:
        raise ValueError(
            f"{function}: proj_k_weight must have shape (P, N) with N = {N} tokens as x has, got "
            f"{tuple(proj_k_weight.shape)}; a layer is bound to the token count it was made for."
        )
    P = proj_k_weight.shape[0]
    if P == 0:
        raise ValueError(f"{function}: proj_k_weight must have at least one row, got P = 0.")
    if (proj_v_weight is not None) != (kind == "split"):
        raise ValueError(
            f"{function}: kind {kind!r} takes proj_v_weight "
            f"{'of its own' if kind == 'split' else 'None: keys and values share a projection'}."
        )
    if proj_v_weight is None and proj_v_bias is not None:
        raise ValueError(f"{function}: proj_v_bias was given without proj_v_weight.")
    for name, t in (("out_proj_weight", out_proj_weight), ("out_proj2_weight", out_proj2_weight)):
        if (t is None) != (kind == "sum"):
            rule = "adds the branches: pass None as" if kind == "sum" else "needs"
            raise ValueError(f"{function}: kind {kind!r} {rule} {name}.")
    optional = (
        ("qkvv_bias", qkvv_bias, (4 * C,), "(4C)"),
        ("proj_k_bias", proj_k_bias, (P,), "(P)"),
        ("proj_v_weight", proj_v_weight, (P, N), "(P, N)"),
        ("proj_v_bias", proj_v_bias, (P,), "(P)"),
        ("temperature", temperature, (num_heads, 1, 1), "(H, 1, 1)"),
        ("temperature2", temperature2, (num_heads, 1, 1), "(H, 1, 1)"),
        ("out_proj_weight", out_proj_weight, (C // 2, C), "(C/2, C)"),
        ("out_proj_bias", out_proj_bias, (C // 2,), "(C/2)"),
        ("out_proj2_weight", out_proj2_weight, (C // 2, C), "(C/2, C)"),
        ("out_proj2_bias", out_proj2_bias, (C // 2,), "(C/2)"),
    )
    for name, t, shape, axes in optional:
        if t is not None:
            _check_shape(function, name, t, shape, axes)
            if kind == "sum" and name.startswith("out_proj"):
                raise ValueError(
                    f"{function}: kind 'sum' has no output projection: pass {name}=None."
                )
    if kind != "sum" and C % 2:
        raise ValueError(
            f"{function}: x must have an even number of channels for kind {kind!r}, got {C}; "
            f"kind 'sum' takes odd ones."
        )
    return _run(
        function,
        backend,
        x,
        qkvv_weight,
        qkvv_bias,
        proj_k_weight,
        proj_k_bias,
        proj_v_weight,
        proj_v_bias,
        temperature,
        temperature2,
        out_proj_weight,
        out_proj_bias,
        out_proj2_weight,
        out_proj2_bias,
        num_heads=num_heads,
        kind=kind,
        layout=layout,
        channel_dropout_p=channel_dropout_p,
        spatial_dropout_p=spatial_dropout_p,
        seed=_seed_for(function, x, max(channel_dropout_p, spatial_dropout_p), seed),
    )


def _check_attention(
    function: str, q: Tensor, k_name: str, k: Tensor, v_name: str, v: Tensor, temperature: Tensor
) -> None:
    for name, t in (("q", q), (k_name, k), (v_name, v)):
        if t.dim() != 4:
            raise ValueError(
                f"{function}: {name} must have shape (B, tokens, H, D), got {tuple(t.shape)}."
            )
    _check_tensors(function, "q", q, **{k_name: k, v_name: v}, temperature=temperature)
    B, _, H, D = q.shape
    if (k.shape[0], *k.shape[2:]) != (B, H, D) or k.shape != v.shape or k.shape[1] == 0:
        raise ValueError(
            f"{function}: {k_name} and {v_name} must have one shape, with the batch, heads and "
            f"head dim of q {tuple(q.shape)}, got {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"{function}: q, {k_name} and {v_name} must share a dtype, got {q.dtype}, {k.dtype} "
            f"and {v.dtype}."
        )
    if temperature.numel() not in (1, H):
        raise ValueError(
            f"{function}: temperature must have 1 or H = {H} elements, got shape "
            f"{tuple(temperature.shape)}."
        )


def spatial_attention(
    q: Tensor,
    k_proj: Tensor,
    v_proj: Tensor,
    temperature: Tensor,
    *,
    normalize: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """N tokens attend to P projected ones: EPA's spatial branch, SCA's, SegFormer3D's attention.

        out[n] = sum_p S[n,p] v_proj[p],   S = dropout(softmax_p(temperature q^_n . k_proj_p))
        q^ = q / max(|q|, 1e-12), the norm of each channel over the tokens, if normalize; else q

    Args:
        q (B, N, H, D); k_proj, v_proj (B, P, H, D): one dtype and device, any strides.
        temperature (H, 1, 1) or one element: a fixed scale is a tensor without gradient.
        normalize: L2-normalise q over its tokens first, default False.
        dropout_p: dropout of S, in [0, 1), default 0.
        seed (): int64, decides the mask (`rng`); drawn from torch's generator if None.
        backend: forces a backend for this call, default None: the one set or the fastest.

    Returns:
        out (B, N, H, D), dtype of q (the autocast dtype under autocast).

    Raises, notes: as `paired_attention`.

    Example:
        >>> q, k, v = torch.randn(1, 100, 4, 8), torch.randn(1, 16, 4, 8), torch.randn(1, 16, 4, 8)
        >>> spatial_attention(q, k, v, torch.tensor(8 ** -0.5)).shape
        torch.Size([1, 100, 4, 8])
    """
    q, k_proj, v_proj = _to_autocast(q, k_proj, v_proj)
    _check_attention("spatial_attention", q, "k_proj", k_proj, "v_proj", v_proj, temperature)
    _check_dropout("spatial_attention", "dropout_p", dropout_p)
    return _run(
        "spatial_attention",
        backend,
        q,
        k_proj,
        v_proj,
        temperature,
        normalize=normalize,
        dropout_p=dropout_p,
        seed=_seed_for("spatial_attention", q, dropout_p, seed),
    )


def channel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Channels attend to channels over all tokens: EPA's channel branch, SCA's, XCiT's attention.

        out[n,i] = sum_j A[i,j] v[n,j],   A = dropout(softmax_j(temperature <q^_i, k^_j>))
        q^ = q / max(|q|, 1e-12), k^ likewise; norms and <.,.> over the N tokens, per head

    Args:
        q, k, v (B, N, H, D): one dtype and device, any strides.
        temperature (H, 1, 1) or one element.
        dropout_p: dropout of A, in [0, 1), default 0.
        seed (): int64, decides the mask (`rng`); drawn from torch's generator if None.
        backend: forces a backend for this call, default None: the one set or the fastest.

    Returns:
        out (B, N, H, D), dtype of q (the autocast dtype under autocast).

    Raises, notes: as `paired_attention`.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 4, 8).unbind(0)
        >>> channel_attention(q, k, v, torch.ones(4, 1, 1)).shape
        torch.Size([1, 100, 4, 8])
    """
    q, k, v = _to_autocast(q, k, v)
    _check_attention("channel_attention", q, "k", k, "v", v, temperature)
    if q.shape != k.shape:
        raise ValueError(
            f"channel_attention: q and k must have one shape, got {tuple(q.shape)} and "
            f"{tuple(k.shape)}."
        )
    _check_dropout("channel_attention", "dropout_p", dropout_p)
    return _run(
        "channel_attention",
        backend,
        q,
        k,
        v,
        temperature,
        dropout_p=dropout_p,
        seed=_seed_for("channel_attention", q, dropout_p, seed),
    )
