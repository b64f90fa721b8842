"""Fused C++ kernels for CPUs, of csrc/cpu: allocation and addresses, nothing else.

Threads are torch's own (`torch.get_num_threads`); a result has the same bits for any number of
them. The instruction set is the best that the processor has, or the one EPA_KERNELS_ISA names.
"""

import os

import torch
from torch import Tensor

from ..contract import OPS, Call, accumulate_dtype, plan
from ..rng import threshold
from .compiled import (
    KIND_NUMBERS,
    LAYOUT_NUMBERS,
    address,
    dense,
    load,
    unknown_dtype,
    view,
)
from .gradients import ParameterGradients, empty_gradient, temperature_gradient

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


def why_not(call: Call) -> list[str]:
    """Every reason why the kernels cannot run a call."""
    reasons = []
    if missing is not None:
        reasons.append(missing)
    if call.device.type != "cpu":
        reasons.append(f"x is on {call.device.type}, the kernels run on the CPU")
    reasons += unknown_dtype(call)
    if call.dtype == torch.float16 and module and not module.has_float16:
        reasons.append("dtype torch.float16: the compiler of the extension has no _Float16")
    return reasons


PAIRED, SPATIAL, CHANNEL = OPS.values()


def _dropout(p: float, seed: Tensor | None) -> tuple[int, int]:
    """Threshold and seed, 0 and 0 without dropout."""
    if p == 0:
        return 0, 0
    assert seed is not None
    return threshold(p), int(seed)


def _paired_arguments(inputs, kept, seed, options):
    """Arguments of the kernels, and the tensors that must outlive the call."""
    x = inputs.x
    B, N, C = x.shape
    parameters = [dense(t, accumulate_dtype(x.dtype)) for t in PAIRED.addresses(inputs)]
    channel_threshold, channel_seed = _dropout(options.channel_dropout_p, seed)
    spatial_threshold, spatial_seed = _dropout(options.spatial_dropout_p, seed)
    arguments = (
        (B, N, C, options.num_heads, inputs.proj_k_weight.shape[0]),
        KIND_NUMBERS[options.kind],
        LAYOUT_NUMBERS[options.layout],
        plan(N, C) == "direct",
        (channel_threshold, spatial_threshold),
        channel_seed or spatial_seed,
        torch.get_num_threads(),
        tuple(map(view, PAIRED.views(inputs))),
        tuple(map(address, parameters)),
        tuple(map(address, kept)),
    )
    return arguments, parameters


def paired_attention(*tensors, **options):
    """Op `paired_attention`, see `ops`."""
    inputs, seed, options = PAIRED.forward(tensors, options)
    y, kept = PAIRED.allocate(inputs, options)
    arguments, _alive = _paired_arguments(inputs, kept, seed, options)
    module.paired_attention_fwd(*arguments, view(y))
    return y, *kept


def paired_attention_bwd(dy, *tensors, **options):
    """Op `paired_attention_bwd`, see `ops`."""
    inputs, kept, seed, options = PAIRED.backward(tensors, options)
    x, dy = inputs.x, dy.contiguous()
    kept = [t.contiguous() for t in kept]
    arguments, _alive = _paired_arguments(inputs, kept, seed, options)
    views = [empty_gradient(t, x) for t in PAIRED.views(inputs)]
    parameters = ParameterGradients(PAIRED.addresses(inputs), x, accumulate_dtype(x.dtype))
    module.paired_attention_bwd(
        *arguments,
        view(dy),
        tuple(view(t) if t.numel() else None for t in views),
        tuple(map(address, parameters.dense)),
    )
    gradients = zip(
        PAIRED.view_names + PAIRED.address_names, views + parameters.finish(), strict=True
    )
    return tuple(inputs._replace(**dict(gradients)))


def _per_head(temperature: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """A temperature of H elements or one as H dense elements."""
    row = dense(temperature, dtype)
    return row if row.numel() == num_heads else row.flatten().expand(num_heads).contiguous()


def _spatial_arguments(inputs, row, kept, seed, options):
    q = inputs.q
    return (
        (*q.shape, inputs.k_proj.shape[1]),
        options.normalize,
        *_dropout(options.dropout_p, seed),
        torch.get_num_threads(),
        tuple(map(view, SPATIAL.views(inputs))),
        address(row),
        address(kept.q_norm),
    )


def _channel_arguments(inputs, row, kept, seed, options):
    return (
        tuple(inputs.q.shape),
        *_dropout(options.dropout_p, seed),
        torch.get_num_threads(),
        tuple(map(view, CHANNEL.views(inputs))),
        address(row),
        tuple(map(address, kept)),
    )


def _heads_fwd(op, arguments, run, tensors, options):
    """An op on heads: `run` of the module with what `arguments` makes of inputs and kept."""
    inputs, seed, options = op.forward(tensors, options)
    out, kept = op.allocate(inputs, options)
    row = _per_head(inputs.temperature, out.shape[2], kept.q_norm.dtype)
    run(*arguments(inputs, row, kept, seed, options), view(out))
    return out, *kept


def _heads_bwd(op, arguments, run, dout, tensors, options):
    """Its backward, likewise."""
    inputs, kept, seed, options = op.backward(tensors, options)
    kept = kept._make(t.contiguous() for t in kept)
    row = _per_head(inputs.temperature, dout.shape[2], kept.q_norm.dtype)
    gradients = tuple(empty_gradient(t, dout) for t in op.views(inputs))
    dtemperature = torch.empty_like(row)
    run(
        *arguments(inputs, row, kept, seed, options),
        view(dout),
        tuple(map(view, gradients)),
        address(dtemperature),
    )
    return *gradients, temperature_gradient(dtemperature, inputs.temperature)


def spatial_attention(*tensors, **options):
    """Op `spatial_attention`, see `ops`."""
    return _heads_fwd(SPATIAL, _spatial_arguments, module.spatial_attention_fwd, tensors, options)


def spatial_attention_bwd(dout, *tensors, **options):
    """Op `spatial_attention_bwd`, see `ops`."""
    run = module.spatial_attention_bwd
    return _heads_bwd(SPATIAL, _spatial_arguments, run, dout, tensors, options)


def channel_attention(*tensors, **options):
    """Op `channel_attention`, see `ops`."""
    return _heads_fwd(CHANNEL, _channel_arguments, module.channel_attention_fwd, tensors, options)


def channel_attention_bwd(dout, *tensors, **options):
    """Op `channel_attention_bwd`, see `ops`."""
    run = module.channel_attention_bwd
    return _heads_bwd(CHANNEL, _channel_arguments, run, dout, tensors, options)
