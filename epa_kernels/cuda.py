"""CUDA C++ kernels of csrc/cuda: allocation, streams and addresses, nothing else.

The compiled module is loaded with the first tensor that they are asked about.
"""

import contextlib
import functools

import torch
from torch import Tensor

from . import native
from .cpp import _DTYPES, _address, _view
from .ops import empty_gradient, temperature_gradient
from .reference import accumulate_dtype
from .rng import threshold


class _Module:
    """The module `_C_cuda`, loaded at the first look at it; `missing` says why it is absent."""

    @functools.cached_property
    def _loaded(self):
        return native.load("_C_cuda", "EPA_KERNELS_CUDA", "nvcc")

    @property
    def missing(self) -> str | None:
        return self._loaded[1]

    def __getattr__(self, name: str):
        if self.missing is not None:
            raise RuntimeError(self.missing)
        return getattr(self._loaded[0], name)


module = _Module()
# Sizes that bound a grid or a block; P, which is bounded too, is not seen in the first tensor.
_LIMITS = {"batch size": 65535, "number of heads": 65535, "head dim": 1024}


def describe() -> str:
    """The architectures that the kernels are compiled for, or why there are none."""
    if module.missing is not None:
        return f"none: {module.missing}"
    names = ", ".join(f"sm_{number}" for number in module.architectures)
    return f"{names} and PTX of the last, compiled with CUDA {_version(module.cuda_version)}"


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
    if not runs and number < max(module.architectures):
        reasons.append(f"compute capability {major}.{minor}, the extension has {describe()}")
    if driver // 1000 < module.cuda_version // 1000:
        reasons.append(
            f"a driver of CUDA {_version(driver)}, the extension is of CUDA "
            f"{_version(module.cuda_version)}"
        )
    return reasons


def why_not(op: str, x: Tensor) -> list[str]:
    """Every reason why the kernels cannot run `op` on x."""
    reasons = list(_why_not_here())
    if op == "paired_attention":
        reasons.append("paired_attention is not implemented")
    if x.device.type != "cuda":
        reasons.append(f"x is on {x.device.type}, the kernels run on NVIDIA GPUs")
    elif torch.cuda.is_initialized():  # not for a fake tensor, on a machine without a GPU
        reasons += _why_not_on(x.device.index)
    if x.dtype not in _DTYPES:
        reasons.append(f"dtype {x.dtype} is none of {', '.join(map(str, _DTYPES))}")
    axes = ("batch size", "tokens")
    axes += () if op == "paired_attention" else ("number of heads", "head dim")
    for axis, size in zip(axes, x.shape, strict=False):
        if axis in _LIMITS and size > _LIMITS[axis]:
            reasons.append(f"{axis} {size} > {_LIMITS[axis]}")
    return reasons


def _device(t: Tensor):
    """The kernels run on the current device: make it that of t."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def _stream(t: Tensor) -> int:
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


def _workspace(size: int, q: Tensor) -> Tensor:
    return q.new_empty(size, dtype=torch.uint8)


def _per_head(temperature: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """A temperature of H elements or one, and its stride over heads."""
    temperature = temperature.flatten().to(dtype)
    return temperature, temperature.stride(0) if temperature.numel() > 1 else 0


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[int, int]:
    """Threshold and address of the seed, which stays on the device."""
    return (threshold(dropout_p), _address(seed)) if dropout_p > 0 else (0, 0)


def _spatial(name, q, k_proj, v_proj, temperature, q_norm, seed, normalize, dropout_p, *results):
    size = (*q.shape, k_proj.shape[1])
    size_in_bytes = getattr(module, f"{name}_workspace")(size, normalize, _DTYPES[q.dtype])
    workspace = _workspace(size_in_bytes, q)
    temperature, stride = _per_head(temperature, q_norm.dtype)
    views = tuple(map(_view, (q, k_proj, v_proj)))
    with _device(q):
        getattr(module, name)(
            size, normalize, *_dropout(dropout_p, seed), views, _address(temperature), stride,
            _address(q_norm), _address(workspace), _stream(q), *results,
        )  # fmt: skip


def spatial_attention(q, k_proj, v_proj, temperature, seed, *, normalize, dropout_p):
    """Op `spatial_attention`, see `ops`."""
    B, N, H, D = q.shape
    out, q_norm = q.new_empty(B, N, H, D), q.new_empty(B, H, D, dtype=accumulate_dtype(q.dtype))
    _spatial(
        "spatial_attention_fwd", q, k_proj, v_proj, temperature, q_norm, seed, normalize,
        dropout_p, _view(out),
    )  # fmt: skip
    return out, q_norm


def spatial_attention_bwd(
    dout, q, k_proj, v_proj, temperature, q_norm, seed, *, normalize, dropout_p
):
    """Op `spatial_attention_bwd`, see `ops`."""
    q_norm = q_norm.contiguous()
    gradients = tuple(empty_gradient(t, q) for t in (q, k_proj, v_proj))
    dtemperature = q_norm.new_empty(q.shape[0], q.shape[2])
    _spatial(
        "spatial_attention_bwd", q, k_proj, v_proj, temperature, q_norm, seed, normalize,
        dropout_p, _view(dout), tuple(map(_view, gradients)), _address(dtemperature),
    )  # fmt: skip
    return *gradients, temperature_gradient(dtemperature.sum(0), temperature)


def _channel(name, q, k, v, temperature, kept, seed, dropout_p, *results):
    size_in_bytes = getattr(module, f"{name}_workspace")(tuple(q.shape), _DTYPES[q.dtype])
    workspace = _workspace(size_in_bytes, q)
    temperature, stride = _per_head(temperature, kept[0].dtype)
    with _device(q):
        getattr(module, name)(
            tuple(q.shape), *_dropout(dropout_p, seed), tuple(map(_view, (q, k, v))),
            _address(temperature), stride, tuple(map(_address, kept)), _address(workspace),
            _stream(q), *results,
        )  # fmt: skip


def channel_attention(q, k, v, temperature, seed, *, dropout_p):
    """Op `channel_attention`, see `ops`."""
    B, N, H, D = q.shape
    out = q.new_empty(B, N, H, D)
    shapes = (B, H, D, D), (B, H, D), (B, H, D)
    kept = tuple(q.new_empty(shape, dtype=accumulate_dtype(q.dtype)) for shape in shapes)
    _channel("channel_attention_fwd", q, k, v, temperature, kept, seed, dropout_p, _view(out))
    return out, *kept


def channel_attention_bwd(dout, q, k, v, temperature, gram, q_norm, k_norm, seed, *, dropout_p):
    """Op `channel_attention_bwd`, see `ops`."""
    kept = tuple(t.contiguous() for t in (gram, q_norm, k_norm))
    gradients = tuple(empty_gradient(t, q) for t in (q, k, v))
    dtemperature = gram.new_empty(q.shape[0], q.shape[2])
    _channel(
        "channel_attention_bwd", q, k, v, temperature, kept, seed, dropout_p,
        _view(dout), tuple(map(_view, gradients)), _address(dtemperature),
    )  # fmt: skip
    return *gradients, temperature_gradient(dtemperature.sum(0), temperature)


def paired_attention(*_, **__):
    raise NotImplementedError("paired_attention is not implemented")


paired_attention_bwd = paired_attention
