"""The ops of a backend, registered with torch.library: schema, fake, autograd.

Every backend registers the schemas of `contract` in a namespace of its own, so that a profile or a
compiled graph names the backend that ran: torch.ops.epa_kernels_<backend>.<op>.

    <op>       inputs, seed, options                       -> result, what is kept for backward
    <op>_bwd   gradient of the result, inputs, kept, seed  -> gradient of each input

An absent optional input has a gradient of size 0 in the op, and None in autograd. Other derivatives
(second, forward-mode, torch.func) raise and name the reference backend. The ops check nothing, as
`functional` does. An implementation is given plain tensors, whatever subclass the caller has.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from . import flops
from .backends.gradients import empty_gradient
from .contract import OPS, Op
from .torch_private import as_plain, register_autograd


def _register_op(library: torch.library.Library, backend: str, op: Op) -> Callable[..., Tensor]:
    for schema in op.schema():
        library.define(schema)
    namespace = getattr(torch.ops, library.ns)
    forward_op = getattr(namespace, op.name).default
    backward_op = getattr(namespace, f"{op.name}_bwd").default
    count = len(op.inputs)

    def fake(*tensors, **options):
        inputs, _, options = op.forward(tensors, options)
        result, kept = op.allocate(inputs, options)
        return result, *kept

    def fake_backward(dout, *tensors, **_):
        return tuple(empty_gradient(t, tensors[0]) for t in tensors[:count])

    def save(ctx, inputs, options, results):
        *tensors, seed = inputs
        ctx.save_for_backward(*tensors, *results[1:], seed)
        ctx.mark_non_differentiable(*results[1:])
        ctx.options = options

    def gradients(ctx, dout, *_):
        found = backward_op(dout, *ctx.saved_tensors, **ctx.options)
        needed = ctx.needs_input_grad[-count - 1 :]  # the seed comes last
        return *(g if n else None for g, n in zip(found, needed, strict=False)), None

    def save_nothing(*_):
        pass

    def second_gradients(ctx, *_):
        raise RuntimeError(
            f"{op.name}: backend {backend!r} has no second derivative; differentiate twice under "
            f"epa_kernels.use_backend('reference')."
        )

    torch.library.register_fake(forward_op.name(), fake, lib=library)
    torch.library.register_fake(backward_op.name(), fake_backward, lib=library)
    register_autograd(library, forward_op, save, gradients)
    register_autograd(library, backward_op, save_nothing, second_gradients)

    def run(*inputs, seed, **options):
        return forward_op(*inputs, seed, **options)[0]

    return run


def _on_plain_tensors(implementation: Callable) -> Callable:
    return lambda *tensors, **options: implementation(*as_plain(tensors), **options)


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
    for name, op in OPS.items():
        functions[name] = _register_op(library, backend, op)
        for schema in (name, f"{name}_bwd"):
            run = _on_plain_tensors(getattr(implementation, schema))
            library.impl(schema, run, dispatch_key)
    flops.register(getattr(torch.ops, library.ns))
    return functions
