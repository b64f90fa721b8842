"""CUDA C++ kernels of csrc/cuda: allocation, streams and addresses, nothing else.

Not registered in `dispatch` yet: paired_attention is missing.
"""

import contextlib

import torch
from torch import Tensor

from .cpp import _DTYPES, _address, _view
from .ops import empty_gradient, temperature_gradient
from .reference import accumulate_dtype
from .rng import threshold

try:
    from . import _C_cuda as module
except ImportError:
    module = None


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
