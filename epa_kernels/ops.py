"""The ops of a backend, registered with torch.library: schema, fake, autograd.

Every backend registers the same schemas in a namespace of its own, so that a profile or a
compiled graph names the backend that ran: torch.ops.epa_kernels_<backend>.<op>.

    <op>       inputs, seed, options                       -> result, what is kept for backward
    <op>_bwd   gradient of the result, inputs, kept, seed  -> gradient of each input

An absent optional input has a gradient of size 0 in the op, and None in autograd. Other derivatives
(second, forward-mode, torch.func) raise and name the reference backend. The ops check nothing, as
`functional` does.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .reference import accumulate_dtype


def plan(num_tokens: int, channels: int) -> str:
    """Plan of paired_attention: "two_pass", or "direct" where C x C algebra costs more than tokens.

    The direct plan keeps nothing but x for backward; its other kept tensors have size 0.
    """
    return "direct" if num_tokens < 2 * channels else "two_pass"


def mean_dtype(device: torch.device) -> torch.dtype:
    """dtype of the token mean that paired_attention keeps: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def float32_is_exact() -> bool:
    """Whether torch multiplies float32 matrices on a GPU in float32: new setting, or old one."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # once the new setting was used, torch refuses the old one
        return torch.backends.cuda.matmul.fp32_precision not in ("tf32", "bf16")


class Op(NamedTuple):
    inputs: str  # differentiable, in the order of reference.<op>
    options: str
    kept: tuple[str, ...]  # outputs beside the result, saved for backward
    fake: Callable[..., tuple[Tensor, ...]]


def _fake_paired_attention(x, _, __, proj_k_weight, ___, proj_v_weight, *____, **_____):
    B, N, C = x.shape
    kept = accumulate_dtype(x.dtype)
    y = x.new_empty(B, N, C)
    if plan(N, C) == "direct":
        return y, *(x.new_empty(0) for _ in range(3))
    projections = 1 if proj_v_weight is None else 2
    return (
        y,
        x.new_empty(B, C, dtype=mean_dtype(x.device)),
        x.new_empty(B, C, C, dtype=kept),
        x.new_empty(B, projections, proj_k_weight.shape[0], C, dtype=kept),
    )


def _fake_spatial_attention(q, *_, **__):
    B, N, H, D = q.shape
    return q.new_empty(B, N, H, D), q.new_empty(B, H, D, dtype=accumulate_dtype(q.dtype))


def _fake_channel_attention(q, *_, **__):
    B, N, H, D = q.shape
    kept = accumulate_dtype(q.dtype)
    norms = (q.new_empty(B, H, D, dtype=kept) for _ in range(2))
    return q.new_empty(B, N, H, D), q.new_empty(B, H, D, D, dtype=kept), *norms


OPS = {
    "paired_attention": Op(
        "Tensor x, Tensor qkvv_weight, Tensor? qkvv_bias, Tensor proj_k_weight, "
        "Tensor? proj_k_bias, Tensor? proj_v_weight, Tensor? proj_v_bias, Tensor temperature, "
        "Tensor temperature2, Tensor? out_proj_weight, Tensor? out_proj_bias, "
        "Tensor? out_proj2_weight, Tensor? out_proj2_bias",
        "int num_heads, str kind, str layout, float channel_dropout_p, float spatial_dropout_p",
        ("mean", "gram", "projected"),
        _fake_paired_attention,
    ),
    "spatial_attention": Op(
        "Tensor q, Tensor k_proj, Tensor v_proj, Tensor temperature",
        "bool normalize, float dropout_p",
        ("q_norm",),
        _fake_spatial_attention,
    ),
    "channel_attention": Op(
        "Tensor q, Tensor k, Tensor v, Tensor temperature",
        "float dropout_p",
        ("gram", "q_norm", "k_norm"),
        _fake_channel_attention,
    ),
}


def empty_gradient(t: Tensor | None, like: Tensor) -> Tensor:
    """Uninitialised gradient of an input: with its strides where dense, of size 0 where absent."""
    return like.new_empty(0) if t is None else torch.empty_like(t)


def per_head(temperature: Tensor) -> tuple[Tensor, int]:
    """A temperature of H elements or one as a row, and its stride over heads."""
    row = temperature.flatten()
    return row, row.stride(0) if row.numel() > 1 else 0


def temperature_gradient(dtemperature: Tensor, temperature: Tensor) -> Tensor:
    """From one value a head (H), in shape and dtype of a temperature of H elements or one."""
    total = dtemperature.sum() if temperature.numel() == 1 else dtemperature
    return empty_gradient(temperature, temperature).copy_(total.view_as(temperature))


class ParameterGradients:
    """Gradients of parameters from kernels that write densely, in `dtype` or each one's own."""

    def __init__(
        self, tensors: list[Tensor | None], like: Tensor, dtype: torch.dtype | None = None
    ) -> None:
        self.results = [empty_gradient(t, like) for t in tensors]
        self.dense = [
            None
            if t is None
            else result
            if result.dtype == (dtype or t.dtype) and result.is_contiguous()
            else torch.empty(t.shape, dtype=dtype or t.dtype, device=like.device)
            for t, result in zip(tensors, self.results, strict=True)
        ]

    def finish(self) -> list[Tensor]:
        for result, dense in zip(self.results, self.dense, strict=True):
            if dense is not None and dense is not result:
                result.copy_(dense)
        return self.results


def _define(library: torch.library.Library, backend: str, name: str) -> tuple[str, str]:
    """Define the schemas of an op and of its backward; returns their qualified names."""
    op = OPS[name]
    kept = ", ".join(f"Tensor {k}" for k in op.kept)
    results = ", ".join(["Tensor"] * (1 + len(op.kept)))
    gradients = ", ".join(["Tensor"] * op.inputs.count("Tensor"))
    library.define(f"{name}({op.inputs}, Tensor? seed, *, {op.options}) -> ({results})")
    library.define(
        f"{name}_bwd(Tensor dout, {op.inputs}, {kept}, Tensor? seed, *, {op.options})"
        f" -> ({gradients})"
    )
    return f"epa_kernels_{backend}::{name}", f"epa_kernels_{backend}::{name}_bwd"


def _below_autograd(op, keyset, inputs, options):
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs, **options)


def _has_tangent(t: Tensor | None) -> bool:
    return t is not None and forward_ad.unpack_dual(t).tangent is not None


def _register_autograd(library, op, function: type[torch.autograd.Function]) -> None:
    """What torch.library.register_autograd does, but for its reading of the schema at each call.

    That takes 0.1 ms for an op of twenty arguments, as long as a small layer.
    """

    def autograd(keyset, *inputs, **options):
        is_forward = forward_ad._current_level >= 0 and any(map(_has_tangent, inputs))
        is_backward = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
        if is_forward or (is_backward and torch._C._are_functorch_transforms_active()):
            raise RuntimeError(
                f"{op._opname}: this backend has neither forward-mode derivatives nor those of "
                f"torch.func; take them under epa_kernels.use_backend('reference')."
            )
        if is_backward:
            return function.apply(keyset, options, *inputs)
        return _below_autograd(op, keyset, inputs, options)

    library.impl(op._opname, autograd, "Autograd", with_keyset=True)


def _register_op(library: torch.library.Library, backend: str, name: str) -> Callable[..., Tensor]:
    forward_name, backward_name = _define(library, backend, name)
    count = OPS[name].inputs.count("Tensor")
    forward_op = getattr(getattr(torch.ops, library.ns), name).default
    backward_op = getattr(getattr(torch.ops, library.ns), f"{name}_bwd").default

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, options, *inputs):
            result = _below_autograd(forward_op, keyset, inputs, options)
            *tensors, seed = inputs
            ctx.save_for_backward(*tensors, *result[1:], seed)
            ctx.mark_non_differentiable(*result[1:])
            ctx.options = options
            return result

        @staticmethod
        def backward(ctx, dout, *_):
            gradients = backward_op(dout, *ctx.saved_tensors, **ctx.options)
            pairs = zip(gradients, ctx.needs_input_grad[2:], strict=False)
            return None, None, *(g if needed else None for g, needed in pairs), None

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, options, *inputs):
            return _below_autograd(backward_op, keyset, inputs, options)

        @staticmethod
        def backward(ctx, *_):
            raise RuntimeError(
                f"{name}: backend {backend!r} has no second derivative; differentiate twice under "
                f"epa_kernels.use_backend('reference')."
            )

    def fake_backward(dout, *inputs, **_):
        return tuple(empty_gradient(t, inputs[0]) for t in inputs[:count])

    register_fake = torch.library.register_fake
    register_fake(forward_name, OPS[name].fake, lib=library)
    register_fake(backward_name, fake_backward, lib=library)
    _register_autograd(library, forward_op, Forward)
    _register_autograd(library, backward_op, Backward)

    def run(*tensors, seed, **options):
        return forward_op(*tensors, seed, **options)[0]

    return run


_libraries: list[torch.library.Library] = []  # a registration lives as long as its Library


def register(
    backend: str, dispatch_key: str = "CompositeExplicitAutograd"
) -> dict[str, Callable[..., Tensor]]:
    """Register every op of a backend.

    Args:
        backend: name of the backend and of the module in `backends` that implements it with a
            function for each schema, named like it.
        dispatch_key: where the implementation runs; the default is every device.

    Returns:
        op name -> function with the signature of `reference.<op>`.
    """
    implementation = importlib.import_module(f".backends.{backend}", __package__)
    library = torch.library.Library(f"epa_kernels_{backend}", "DEF")
    _libraries.append(library)
    functions = {}
    for name in OPS:
        functions[name] = _register_op(library, backend, name)
        for schema in (name, f"{name}_bwd"):
            library.impl(schema, getattr(implementation, schema), dispatch_key)
    return functions
