"""Fused C++ kernels for CPUs, of csrc/cpu: allocation and addresses, nothing else.

Threads are torch's own (`torch.get_num_threads`); a result has the same bits for any number of
them. The instruction set is the best that the processor has, or the one EPA_KERNELS_ISA names.
"""

import os

import torch
from torch import Tensor

from ..ops import ParameterGradients, empty_gradient, mean_dtype, plan, temperature_gradient
from ..reference import accumulate_dtype
from ..rng import threshold
from .compiled import (
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

module, missing = load("_C", "EPA_KERNELS_CPU", "GCC or Clang")

# The instruction set is one for the process, chosen before the first kernel runs.
isa = None
if module is not None:
    isa = os.environ.get("EPA_KERNELS_ISA") or module.isas().split(",")[0]
    module.use_isa(isa)


def describe() -> str:
    """The instruction set that runs, of those that could, or why there are no kernels."""
    if module is None:
        return f"none: {missing}"
    threads = "torch's OpenMP threads" if module.has_openmp else "one thread, built without OpenMP"
    return f"{isa} of {module.isas().replace(',', ', ')} (EPA_KERNELS_ISA), {threads}"


def why_not(op: str, x: Tensor) -> list[str]:
    """Every reason why the kernels cannot run `op` on x."""
    reasons = []
    if missing is not None:
        reasons.append(missing)
    if x.device.type != "cpu":
        reasons.append(f"x is on {x.device.type}, the kernels run on the CPU")
    reasons += unknown_dtype(x)
    if x.dtype == torch.float16 and module and not module.has_float16:
        reasons.append("dtype torch.float16: the compiler of the extension has no _Float16")
    return reasons


def _dropout(p: float, seed: Tensor | None) -> tuple[int, int]:
    """Threshold and seed, 0 and 0 without dropout."""
    return (threshold(p), int(seed)) if p > 0 else (0, 0)


def _paired_arguments(inputs, seed, kept, num_heads, kind, layout, channel_dropout_p,
                      spatial_dropout_p):  # fmt: skip
    """Arguments of the kernels, and the tensors that must outlive the call."""
    x = inputs[0]
    B, N, C = x.shape
    weights = [dense(inputs[i], accumulate_dtype(x.dtype)) for i in WEIGHTS]
    channel_threshold, channel_seed = _dropout(channel_dropout_p, seed)
    spatial_threshold, spatial_seed = _dropout(spatial_dropout_p, seed)
    arguments = (
        (B, N, C, num_heads, inputs[3].shape[0]),
        KINDS[kind],
        LAYOUTS[layout],
        plan(N, C) == "direct",
        (channel_threshold, spatial_threshold),
        channel_seed or spatial_seed,
        torch.get_num_threads(),
        tuple(view(inputs[i]) for i in VIEWS),
        tuple(map(address, weights)),
        tuple(map(address, kept)),
    )
    return arguments, weights


def paired_attention(*tensors, **options):
    """Op `paired_attention`, see `ops`."""
    *inputs, seed = tensors
    x = inputs[0]
    B, N, C = x.shape
    y = x.new_empty(B, N, C)
    if plan(N, C) == "direct":
        kept = tuple(x.new_empty(0) for _ in range(3))
    else:
        dtype, projections = accumulate_dtype(x.dtype), 1 if inputs[5] is None else 2
        kept = (
            x.new_empty(B, C, dtype=mean_dtype(x.device)),
            x.new_empty(B, C, C, dtype=dtype),
            x.new_empty(B, projections, inputs[3].shape[0], C, dtype=dtype),
        )
    arguments, _alive = _paired_arguments(inputs, seed, kept, **options)
    module.paired_attention_fwd(*arguments, view(y))
    return y, *kept


def paired_attention_bwd(dy, *tensors, **options):
    """Op `paired_attention_bwd`, see `ops`."""
    *inputs, mean, gram, projected, seed = tensors
    x = inputs[0]
    dy = dy.contiguous()
    kept = dense(mean, mean.dtype), dense(gram, gram.dtype), dense(projected, gram.dtype)
    arguments, _alive = _paired_arguments(inputs, seed, kept, **options)
    views = {i: empty_gradient(inputs[i], x) for i in VIEWS}
    weights = ParameterGradients([inputs[i] for i in WEIGHTS], x, accumulate_dtype(x.dtype))
    module.paired_attention_bwd(
        *arguments,
        view(dy),
        tuple(None if inputs[i] is None else view(t) for i, t in views.items()),
        tuple(map(address, weights.dense)),
    )
    gradients = views | dict(zip(WEIGHTS, weights.finish(), strict=True))
    return tuple(gradients[i] for i in range(len(inputs)))


def _per_head(temperature: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    return temperature.to(dtype).flatten().expand(num_heads).contiguous()


def _spatial_arguments(q, k_proj, v_proj, temperature, q_norm, seed, normalize, dropout_p):
    B, N, H, D = q.shape
    dropout_threshold, dropout_seed = _dropout(dropout_p, seed)
    return (
        (B, N, H, D, k_proj.shape[1]),
        normalize,
        dropout_threshold,
        dropout_seed,
        torch.get_num_threads(),
        tuple(map(view, (q, k_proj, v_proj))),
        address(temperature),
        address(q_norm),
    )


def spatial_attention(q, k_proj, v_proj, temperature, seed, *, normalize, dropout_p):
    """Op `spatial_attention`, see `ops`."""
    B, N, H, D = q.shape
    dtype = accumulate_dtype(q.dtype)
    out, q_norm = q.new_empty(B, N, H, D), q.new_empty(B, H, D, dtype=dtype)
    per_head = _per_head(temperature, H, dtype)
    module.spatial_attention_fwd(
        *_spatial_arguments(q, k_proj, v_proj, per_head, q_norm, seed, normalize, dropout_p),
        view(out),
    )
    return out, q_norm


def spatial_attention_bwd(
    dout, q, k_proj, v_proj, temperature, q_norm, seed, *, normalize, dropout_p
):
    """Op `spatial_attention_bwd`, see `ops`."""
    q_norm = q_norm.contiguous()
    per_head = _per_head(temperature, q.shape[2], q_norm.dtype)
    gradients = tuple(empty_gradient(t, q) for t in (q, k_proj, v_proj))
    dtemperature = torch.empty_like(per_head)
    module.spatial_attention_bwd(
        *_spatial_arguments(q, k_proj, v_proj, per_head, q_norm, seed, normalize, dropout_p),
        view(dout),
        tuple(map(view, gradients)),
        address(dtemperature),
    )
    return *gradients, temperature_gradient(dtemperature, temperature)


def _channel_arguments(q, k, v, temperature, kept, seed, dropout_p):
    dropout_threshold, dropout_seed = _dropout(dropout_p, seed)
    return (
        tuple(q.shape),
        dropout_threshold,
        dropout_seed,
        torch.get_num_threads(),
        tuple(map(view, (q, k, v))),
        address(temperature),
        tuple(map(address, kept)),
    )


def channel_attention(q, k, v, temperature, seed, *, dropout_p):
    """Op `channel_attention`, see `ops`."""
    B, N, H, D = q.shape
    dtype = accumulate_dtype(q.dtype)
    out = q.new_empty(B, N, H, D)
    kept = (
        q.new_empty(B, H, D, D, dtype=dtype),
        q.new_empty(B, H, D, dtype=dtype),
        q.new_empty(B, H, D, dtype=dtype),
    )
    per_head = _per_head(temperature, H, dtype)
    module.channel_attention_fwd(
        *_channel_arguments(q, k, v, per_head, kept, seed, dropout_p), view(out)
    )
    return out, *kept


def channel_attention_bwd(dout, q, k, v, temperature, gram, q_norm, k_norm, seed, *, dropout_p):
    """Op `channel_attention_bwd`, see `ops`."""
    gram, q_norm, k_norm = gram.contiguous(), q_norm.contiguous(), k_norm.contiguous()
    per_head = _per_head(temperature, q.shape[2], gram.dtype)
    gradients = tuple(empty_gradient(t, q) for t in (q, k, v))
    dtemperature = torch.empty_like(per_head)
    module.channel_attention_bwd(
        *_channel_arguments(q, k, v, per_head, (gram, q_norm, k_norm), seed, dropout_p),
        view(dout),
        tuple(map(view, gradients)),
        address(dtemperature),
    )
    return *gradients, temperature_gradient(dtemperature, temperature)
