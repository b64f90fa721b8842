"""CUDA C++ kernels of csrc/cuda: allocation, streams and addresses, nothing else.

The compiled module is loaded with the first tensor that they are asked about.
"""

import contextlib
import functools

import torch
from torch import Tensor

from ..ops import (
    OPS,
    ParameterGradients,
    empty_gradient,
    float32_is_exact,
    per_head,
    plan,
    temperature_gradient,
)
from ..reference import accumulate_dtype
from ..rng import threshold
from .compiled import (
    DTYPES,
    KINDS,
    LAYOUTS,
    VIEWS,
    WEIGHTS,
    address,
    dense,
    load,
    unknown_dtype,
    view,
)


class _Module:
    """The module `_C_cuda`, loaded at the first look at it; `missing` says why it is absent."""

    @functools.cached_property
    def _loaded(self):
        return load("_C_cuda", "EPA_KERNELS_CUDA", "nvcc")

    @property
    def missing(self) -> str | None:
        return self._loaded[1]

    def __getattr__(self, name: str):
        if self.missing is not None:
            raise RuntimeError(self.missing)
        return getattr(self._loaded[0], name)


module = _Module()
# Sizes that bound a grid or a block, see csrc/cuda/cuda_kernels.h.
_HEADS = {"batch size": 65535, "number of heads": 65535, "head dim": 1024}
_LIMITS = {
    "paired_attention": {"batch size": 65533, "channels": 1024, "head dim": 512, "P": 512},
    "spatial_attention": _HEADS | {"P": 512},
    "channel_attention": _HEADS | {"head dim": 256},
}


def describe() -> str:
    """The architectures that the kernels are compiled for, or why there are none."""
    if module.missing is not None:
        return f"none: {module.missing}"
    names = ", ".join(f"sm_{number}" for number in module.architectures)
    return f"{names} and PTX of sm_{module.ptx}, compiled with CUDA {_version(module.cuda_version)}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _once(function):
    """Ask once; torch.compile takes the answer as a constant and does not look inside.

    torch.compiler.assume_constant_result sets that attribute too, but imports the compiler.
    """
    known = {}

    def answer(*question):
        if question not in known:
            known[question] = function(*question)
        return known[question]

    answer.known = known
    answer._dynamo_marked_constant = True
    return answer


@_once
def _why_not_here() -> list[str]:
    """Every reason that has nothing to do with a tensor."""
    reasons = []
    if module.missing is not None:
        reasons.append(module.missing)
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__}, which is built without CUDA")
    return reasons


@_once
def _why_not_on(index: int | None) -> list[str]:
    """Every reason that the GPU itself gives."""
    major, minor = torch.cuda.get_device_capability(index)
    number = 10 * major + minor
    if number < 80:
        return [f"compute capability {major}.{minor} < 8.0"]
    if module.missing is not None:
        return []
    reasons, driver = [], torch._C._cuda_getDriverVersion()
    runs = any(n // 10 == major and n <= number for n in module.architectures)
    if not runs and number < module.ptx:
        reasons.append(f"compute capability {major}.{minor}, the extension has {describe()}")
    # Any driver of the same major version runs binaries; PTX takes one as new as nvcc.
    needed = module.cuda_version // 1000 * 1000 if runs else module.cuda_version
    if driver < needed:
        reasons.append(
            f"a driver of CUDA {_version(driver)}, the extension is of CUDA "
            f"{_version(module.cuda_version)}"
        )
    return reasons


def why_not(op: str, x: Tensor) -> list[str]:
    """Every reason why the kernels cannot run `op` on x."""
    reasons = list(_why_not_here())
    if x.device.type != "cuda":
        reasons.append(f"x is on {x.device.type}, the kernels run on NVIDIA GPUs")
    elif torch.cuda.is_initialized():  # not for a fake tensor, on a machine without a GPU
        reasons += _why_not_on(x.device.index)
    reasons += unknown_dtype(x)
    axes = ("channels",) if op == "paired_attention" else ("number of heads", "head dim")
    return reasons + _beyond(op, dict(zip(("batch size", "tokens", *axes), x.shape, strict=False)))


def _beyond(op: str, sizes: dict[str, int]) -> list[str]:
    limits = _LIMITS[op]
    return [f"{name} {n} > {limits[name]}" for name, n in sizes.items() if n > limits.get(name, n)]


def _check(op: str, **sizes: int) -> None:
    """Refuse what only the other tensors tell; `why_not` sees the first one."""
    if reasons := _beyond(op, {name.replace("_", " "): n for name, n in sizes.items()}):
        raise NotImplementedError(
            f"{op}: backend 'cuda' cannot run: {', '.join(reasons)}; use backend 'two_pass'."
        )


def _device(t: Tensor):
    """The kernels run on the current device: make it that of t."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def _stream(t: Tensor) -> int:
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


def _launch(op, name: str, like: Tensor, *results) -> None:
    """Run method `name` of an op's arguments, with a workspace that lives as long as its stream."""
    workspace = like.new_empty(getattr(op, f"{name}_workspace")(), dtype=torch.uint8)
    op.workspace = address(workspace)
    with _device(like):
        getattr(op, name)(*results)


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[int, int]:
    """Threshold and address of the seed, which stays on the device."""
    return (threshold(dropout_p), address(seed)) if dropout_p > 0 else (0, 0)


def _parameter_dtype(x: Tensor, parameters: list[Tensor | None]) -> torch.dtype:
    """What the kernels take all parameters in: their own dtype where that is x's or wider."""
    is_own = all(t is None or t.dtype == x.dtype for t in parameters)
    return x.dtype if is_own else accumulate_dtype(x.dtype)


def _paired(inputs, seed, kept, num_heads, kind, layout, channel_dropout_p, spatial_dropout_p):
    """Arguments of the kernels, the dtype of parameters, and the tensors that must outlive both."""
    x, P = inputs[0], inputs[3].shape[0]
    B, N, C = x.shape
    _check("paired_attention", batch_size=B, channels=C, head_dim=C // num_heads, P=P)
    dtype = _parameter_dtype(x, inputs[1:])
    projections = [None if inputs[i] is None else inputs[i].to(dtype) for i in VIEWS[1:]]
    weights = [dense(inputs[i], dtype) for i in WEIGHTS]
    channel_threshold, channel_seed = _dropout(channel_dropout_p, seed)
    spatial_threshold, spatial_seed = _dropout(spatial_dropout_p, seed)
    op = module.PairedAttention(
        (B, N, C, num_heads, P), KINDS[kind], LAYOUTS[layout],
        plan(N, C) == "direct", (channel_threshold, spatial_threshold),
        channel_seed or spatial_seed, DTYPES[dtype], not float32_is_exact(),
        tuple(map(view, (x, *projections))), tuple(map(address, weights)),
        tuple(map(address, kept)), _stream(x),
    )  # fmt: skip
    return op, dtype, (projections, weights)


def paired_attention(*tensors, **options):
    """Op `paired_attention`, see `ops`."""
    *inputs, seed = tensors
    y, *kept = OPS["paired_attention"].fake(*inputs)
    op, _, _alive = _paired(inputs, seed, kept, **options)
    _launch(op, "fwd", y, address(y))
    return y, *kept


def paired_attention_bwd(dy, *tensors, **options):
    """Op `paired_attention_bwd`, see `ops`."""
    *inputs, mean, gram, projected, seed = tensors
    x, dy = inputs[0], dy.contiguous()
    kept = [t.contiguous() for t in (mean, gram, projected)]
    op, dtype, _alive = _paired(inputs, seed, kept, **options)
    gradients = {i: empty_gradient(inputs[i], x) for i in VIEWS}
    views = {
        i: t if i == 0 or t.dtype == dtype else torch.empty_like(t, dtype=dtype)
        for i, t in gradients.items()
    }
    weights = ParameterGradients([inputs[i] for i in WEIGHTS], x, dtype)
    _launch(
        op, "bwd", x, address(dy),
        tuple(None if inputs[i] is None else view(t) for i, t in views.items()),
        tuple(map(address, weights.dense)),
    )  # fmt: skip
    for i, t in views.items():
        if t is not gradients[i]:
            gradients[i].copy_(t)
    gradients |= dict(zip(WEIGHTS, weights.finish(), strict=True))
    return tuple(gradients[i] for i in range(len(inputs)))


def _spatial(q, k_proj, v_proj, temperature, q_norm, seed, normalize, dropout_p):
    """Arguments of the kernels, and the tensor that must outlive them."""
    _check("spatial_attention", head_dim=q.shape[3], P=k_proj.shape[1])
    row, stride = per_head(temperature.to(q_norm.dtype))
    op = module.SpatialAttention(
        (*q.shape, k_proj.shape[1]), normalize, not float32_is_exact(), _dropout(dropout_p, seed),
        tuple(map(view, (q, k_proj, v_proj))), (address(row), stride), address(q_norm),
        _stream(q),
    )  # fmt: skip
    return op, row


def spatial_attention(q, k_proj, v_proj, temperature, seed, *, normalize, dropout_p):
    """Op `spatial_attention`, see `ops`."""
    B, N, H, D = q.shape
    out, q_norm = q.new_empty(B, N, H, D), q.new_empty(B, H, D, dtype=accumulate_dtype(q.dtype))
    op, _alive = _spatial(q, k_proj, v_proj, temperature, q_norm, seed, normalize, dropout_p)
    _launch(op, "fwd", q, view(out))
    return out, q_norm


def spatial_attention_bwd(
    dout, q, k_proj, v_proj, temperature, q_norm, seed, *, normalize, dropout_p
):
    """Op `spatial_attention_bwd`, see `ops`."""
    q_norm = q_norm.contiguous()
    gradients = tuple(empty_gradient(t, q) for t in (q, k_proj, v_proj))
    dtemperature = q_norm.new_empty(q.shape[0], q.shape[2])
    op, _alive = _spatial(q, k_proj, v_proj, temperature, q_norm, seed, normalize, dropout_p)
    _launch(op, "bwd", q, view(dout), tuple(map(view, gradients)), address(dtemperature))
    return *gradients, temperature_gradient(dtemperature.sum(0), temperature)


def _channel(q, k, v, temperature, kept, seed, dropout_p):
    """Arguments of the kernels, and the tensor that must outlive them."""
    _check("channel_attention", head_dim=q.shape[3])
    row, stride = per_head(temperature.to(kept[0].dtype))
    op = module.ChannelAttention(
        tuple(q.shape), not float32_is_exact(), _dropout(dropout_p, seed),
        tuple(map(view, (q, k, v))), (address(row), stride),
        tuple(map(address, kept)), _stream(q),
    )  # fmt: skip
    return op, row


def channel_attention(q, k, v, temperature, seed, *, dropout_p):
    """Op `channel_attention`, see `ops`."""
    B, N, H, D = q.shape
    out = q.new_empty(B, N, H, D)
    shapes = (B, H, D, D), (B, H, D), (B, H, D)
    kept = tuple(q.new_empty(shape, dtype=accumulate_dtype(q.dtype)) for shape in shapes)
    op, _alive = _channel(q, k, v, temperature, kept, seed, dropout_p)
    _launch(op, "fwd", q, view(out))
    return out, *kept


def channel_attention_bwd(dout, q, k, v, temperature, gram, q_norm, k_norm, seed, *, dropout_p):
    """Op `channel_attention_bwd`, see `ops`."""
    kept = tuple(t.contiguous() for t in (gram, q_norm, k_norm))
    gradients = tuple(empty_gradient(t, q) for t in (q, k, v))
    dtemperature = gram.new_empty(q.shape[0], q.shape[2])
    op, _alive = _channel(q, k, v, temperature, kept, seed, dropout_p)
    _launch(op, "bwd", q, view(dout), tuple(map(view, gradients)), address(dtemperature))
    return *gradients, temperature_gradient(dtemperature.sum(0), temperature)
