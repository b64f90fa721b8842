"""The public functions: checks against the contract, autocast and seed; the math is `reference`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from . import dispatch
from .contract import (
    KINDS,
    LAYOUTS,
    OPS,
    PER_HEAD,
    Call,
    ChannelInputs,
    ChannelOptions,
    Input,
    Op,
    PairedInputs,
    PairedOptions,
    SpatialInputs,
    SpatialOptions,
    by_name,
    shape_getter,
)
from .rng import draw_seed

PAIRED, SPATIAL, CHANNEL = OPS.values()
# op -> name, contract and shape of each input.
_RULES = {
    op.name: [
        (name, rule, None if rule.axes == PER_HEAD else shape_getter(rule.axes))
        for name, rule in op.inputs.items()
    ]
    for op in OPS.values()
}


def check_choice(function: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{function}: {name} must be one of {', '.join(choices)}, got {value!r}.")


def _check_dropout(function: str, name: str, p: float) -> None:
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{function}: {name} must be in [0, 1), got {p}.")


def _missing(function: str, name: str) -> ValueError:
    return ValueError(f"{function}: {name} must be a tensor, got None.")


def _check_rank(function: str, name: str, t: Tensor | None, rule: Input) -> None:
    if t is None:
        raise _missing(function, name)
    if t.dim() != len(rule.axes):
        raise _wrong_shape(function, name, t, rule, {})


def _check_heads(op: Op, *activations: Tensor | None) -> None:
    """Four axes, before sizes are read from them."""
    for name, t in zip(op.view_names, activations, strict=True):
        if t is None or t.dim() != 4:
            _check_rank(op.name, name, t, op.inputs[name])


def _wrong_shape(
    function: str, name: str, t: Tensor, rule: Input, sizes: Mapping[str, int]
) -> ValueError:
    axes = ", ".join(rule.axes)
    numbers = f" = {tuple(sizes[axis] for axis in rule.axes)}" if sizes else ""
    hint = f"; {rule.hint}" if rule.hint else ""
    return ValueError(
        f"{function}: {name} must have shape ({axes}){numbers}, got {tuple(t.shape)}{hint}."
    )


def _check_dtype(
    function: str, name: str, t: Tensor, rule: Input, first_name: str, first: Tensor
) -> None:
    """One floating dtype, but float32 parameters may go with a bfloat16 or float16 input."""
    if rule.role == "activation":
        raise ValueError(
            f"{function}: {name} is {t.dtype} but {first_name} is {first.dtype}; convert one of "
            f"them, activations share a dtype."
        )
    if first.dtype not in (torch.float16, torch.bfloat16) or t.dtype != torch.float32:
        raise ValueError(
            f"{function}: {name} is {t.dtype} but {first_name} is {first.dtype}; use one "
            f"dtype, or float32 parameters with a bfloat16 or float16 activation."
        )


def _check_first(function: str, name: str, t: Tensor) -> None:
    if not t.is_floating_point():
        raise ValueError(
            f"{function}: {name} must be a floating tensor, got {t.dtype}; "
            f"convert it with .float()."
        )
    if t.numel() == 0:
        raise ValueError(
            f"{function}: {name} must not be empty, got shape {tuple(t.shape)}; "
            f"skip the layer when a batch has no sample."
        )


def check_tokens(op: Op, x: Tensor) -> None:
    """Hold the tokens x (B, N, C) alone to the contract of an op."""
    name = op.view_names[0]
    _check_rank(op.name, name, x, op.inputs[name])
    _check_first(op.name, name, x)


def _check_kind(function: str, name: str, t: Tensor | None, rule: Input, kind: str) -> None:
    """Each kind of paired attention has weights of its own."""
    if t is None and kind in rule.kinds and not rule.optional:
        raise ValueError(f"{function}: kind {kind!r} needs {name}, got None.")
    if t is not None and kind not in rule.kinds:
        raise ValueError(
            f"{function}: kind {kind!r} takes no {name}, as kind {' or '.join(rule.kinds)} does; "
            f"pass None."
        )


def _check(op: Op, inputs: Any, options: Any) -> Call:
    """Hold inputs to the contract; ValueError names input, rule, value and remedy."""
    function = op.name
    first_name, first = op.view_names[0], inputs[0]
    _check_first(function, first_name, first)
    sizes = op.sizes(inputs, options)
    call = op.call(inputs, options, sizes)
    if call.P == 0 and op is not CHANNEL:
        raise ValueError(
            f"{function}: {op.view_names[1]} must have at least one projected token, got P = 0."
        )
    device, dtype, kind = call.device, call.dtype, call.kind
    for (name, rule, shape), t in zip(_RULES[function], inputs, strict=True):
        if rule.kinds and (t is None) == (kind in rule.kinds):
            _check_kind(function, name, t, rule, kind)
        if t is None:
            if not (rule.optional or rule.kinds):
                raise _missing(function, name)
            continue
        if t.device != device:
            raise ValueError(
                f"{function}: {name} is on {t.device} but {first_name} is on {device}; "
                f"move both to one device."
            )
        if t.dtype != dtype:
            _check_dtype(function, name, t, rule, first_name, first)
        if shape is None:
            if t.numel() not in (1, call.H):
                raise ValueError(
                    f"{function}: {name} must have 1 or H = {call.H} elements, got shape "
                    f"{tuple(t.shape)}."
                )
        elif t.shape != shape(sizes):
            raise _wrong_shape(function, name, t, rule, sizes)
    return call


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


def _autocast_dtype(t: Tensor) -> torch.dtype | None:
    """What autocast computes in on the device of t; None where it is off."""
    device_type = t.device.type
    # torch 2.11 cannot compile the question; what is compiled for has autocast.
    is_available = torch.compiler.is_compiling() or is_autocast_available(device_type)
    if is_available and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def _cast(dtype: torch.dtype | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Activations in the autocast dtype, as nn.Linear takes them; float64 is left alone."""
    if dtype is None:
        return tensors
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def _run(
    op: Op, call: Call, backend: str | None, inputs: Any, options: Any, seed: Tensor | None,
    autocast: torch.dtype | None,
) -> Tensor:  # fmt: skip
    run = dispatch.BACKENDS[dispatch.select(call, backend)].functions[op.name]
    if autocast is None:
        return run(*inputs, seed=seed, **by_name(options))
    # Inside, dtypes are chosen explicitly.
    with torch.autocast(call.device.type, enabled=False):
        return run(*inputs, seed=seed, **by_name(options))


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
    function = PAIRED.name
    check_choice(function, "kind", kind, KINDS)
    check_choice(function, "layout", layout, LAYOUTS)
    _check_dropout(function, "channel_dropout_p", channel_dropout_p)
    _check_dropout(function, "spatial_dropout_p", spatial_dropout_p)
    for name, t in (("x", x), ("proj_k_weight", proj_k_weight)):
        _check_rank(function, name, t, PAIRED.inputs[name])
    autocast = _autocast_dtype(x)
    (x,) = _cast(autocast, x)
    C = x.shape[2]
    if num_heads < 1 or C % num_heads:
        raise ValueError(
            f"{function}: num_heads must divide the {C} channels of x, got {num_heads}."
        )
    if kind != "sum" and C % 2:
        raise ValueError(
            f"{function}: x must have an even number of channels for kind {kind!r}, got {C}; "
            f"kind 'sum' takes odd ones."
        )
    inputs = PairedInputs(
        x, qkvv_weight, qkvv_bias, proj_k_weight, proj_k_bias, proj_v_weight, proj_v_bias,
        temperature, temperature2, out_proj_weight, out_proj_bias, out_proj2_weight,
        out_proj2_bias,
    )  # fmt: skip
    options = PairedOptions(num_heads, kind, layout, channel_dropout_p, spatial_dropout_p)
    call = _check(PAIRED, inputs, options)
    seed = _seed_for(function, x, max(channel_dropout_p, spatial_dropout_p), seed)
    return _run(PAIRED, call, backend, inputs, options, seed, autocast)


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
    function = SPATIAL.name
    _check_dropout(function, "dropout_p", dropout_p)
    _check_heads(SPATIAL, q, k_proj, v_proj)
    autocast = _autocast_dtype(q)
    q, k_proj, v_proj = _cast(autocast, q, k_proj, v_proj)
    inputs = SpatialInputs(q, k_proj, v_proj, temperature)
    options = SpatialOptions(normalize, dropout_p)
    call = _check(SPATIAL, inputs, options)
    seed = _seed_for(function, q, dropout_p, seed)
    return _run(SPATIAL, call, backend, inputs, options, seed, autocast)


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
    function = CHANNEL.name
    _check_dropout(function, "dropout_p", dropout_p)
    _check_heads(CHANNEL, q, k, v)
    autocast = _autocast_dtype(q)
    q, k, v = _cast(autocast, q, k, v)
    inputs = ChannelInputs(q, k, v, temperature)
    options = ChannelOptions(dropout_p)
    call = _check(CHANNEL, inputs, options)
    seed = _seed_for(function, q, dropout_p, seed)
    return _run(CHANNEL, call, backend, inputs, options, seed, autocast)
