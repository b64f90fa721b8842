"""CUDA C++ kernels of csrc/cuda: allocation, streams and addresses, nothing else.

Not registered in `dispatch` yet: paired_attention and channel_attention are missing.
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


def _workspace(size, q: Tensor) -> Tensor:
    return q.new_empty(size, dtype=torch.uint8)


def _spatial(run, workspace, q, k_proj, v_proj, temperature, q_norm, seed, normalize, dropout_p):
    """Calls `run`, forward or backward, with what both take and then what it is given."""
    size = (*q.shape, k_proj.shape[1])
    memory = _workspace(workspace(size, normalize, _DTYPES[q.dtype]), q)
    temperature = temperature.flatten().to(q_norm.dtype)

    def call(*arguments):
        with _device(q):
            run(
                size,
                normalize,
                threshold(dropout_p),
                _address(seed if dropout_p > 0 else None),
                tuple(map(_view, (q, k_proj, v_proj))),
                _address(temperature),
                temperature.stride(0) if temperature.numel() > 1 else 0,
                _address(q_norm),
                _address(memory),
                _stream(q),
                *arguments,
            )

    return call


def spatial_attention(q, k_proj, v_proj, temperature, seed, *, normalize, dropout_p):
    """Op `spatial_attention`, see `ops`."""
    B, N, H, D = q.shape
    out, q_norm = q.new_empty(B, N, H, D), q.new_empty(B, H, D, dtype=accumulate_dtype(q.dtype))
    run = _spatial(
        module.spatial_attention_fwd, module.spatial_attention_fwd_workspace,
        q, k_proj, v_proj, temperature, q_norm, seed, normalize, dropout_p,
    )  # fmt: skip
    run(_view(out))
    return out, q_norm


def spatial_attention_bwd(
    dout, q, k_proj, v_proj, temperature, q_norm, seed, *, normalize, dropout_p
):
    """Op `spatial_attention_bwd`, see `ops`."""
    q_norm = q_norm.contiguous()
    gradients = tuple(empty_gradient(t, q) for t in (q, k_proj, v_proj))
    dtemperature = q_norm.new_empty(q.shape[0], q.shape[2])
    run = _spatial(
        module.spatial_attention_bwd, module.spatial_attention_bwd_workspace,
        q, k_proj, v_proj, temperature, q_norm, seed, normalize, dropout_p,
    )  # fmt: skip
    run(_view(dout), tuple(map(_view, gradients)), _address(dtemperature))
    return *gradients, temperature_gradient(dtemperature.sum(0), temperature)
