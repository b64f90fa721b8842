"""Every name of torch's private API that the package uses, and what serves where torch lacks it.

tests/test_torch_private.py looks for each name in the torch at hand, and tries each fallback.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# What `register_autograd` needs.
AUTOGRAD_NAMES = (
    "_C._AutoDispatchBelowAutograd",
    "_C._after_autograd_keyset",
    "_C._any_requires_grad",
    "_C._are_functorch_transforms_active",
    "autograd.forward_ad._current_level",
)
SLEEP = "cuda._sleep"
CONSTANT_MARK = "_dynamo_marked_constant"  # what torch.compiler.assume_constant_result sets


def find(path: str) -> Any:
    """torch.<path>, None where it is missing."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def busy_gpu(cycles: int) -> None:
    """Keep the current stream busy for so many clock cycles, or for as many products of rows."""
    sleep = find(SLEEP)
    if sleep is not None:
        sleep(cycles)
        return
    matrix = torch.randn(2048, 2048, device="cuda")
    for _ in range(max(1, cycles // 4_000_000)):
        matrix = torch.tanh(matrix @ matrix)


def constant_result(function: Callable) -> Callable:
    """torch.compile takes the function's result as a constant and does not look inside.

    torch.compiler.assume_constant_result does the same, but imports the compiler.
    """
    setattr(function, CONSTANT_MARK, True)
    return function


def _has_tangent(t: Tensor | None) -> bool:
    return t is not None and forward_ad.unpack_dual(t).tangent is not None


def register_autograd(
    library: torch.library.Library,
    op: torch._ops.OpOverload,
    save: Callable[[Any, tuple, dict, Any], None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """torch.library.register_autograd, without its reading of the schema at each call.

    That takes 0.1 ms for an op of twenty inputs, as long as a small layer. Forward-mode derivatives
    and those of torch.func raise, since a tangent that got lost would be a derivative of zero.

    Args:
        op: an op that `library` defines.
        save: (ctx, inputs, options, results), keeps what `gradients` needs.
        gradients: (ctx, *gradients of the results) -> a gradient for each input.
    """
    name = op.name().partition("::")[2]
    if any(find(path) is None for path in AUTOGRAD_NAMES):

        def setup_context(ctx, inputs, keyword_only_inputs, output):
            save(ctx, inputs, keyword_only_inputs, output)

        torch.library.register_autograd(
            op.name(), gradients, setup_context=setup_context, lib=library
        )
        return

    def below(keyset, inputs, options):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs, **options)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, options, *inputs):
            results = below(keyset, inputs, options)
            save(ctx, inputs, options, results)
            return results

        @staticmethod
        def backward(ctx, *douts):
            return None, None, *gradients(ctx, *douts)

    def autograd(keyset, *inputs, **options):
        is_forward = forward_ad._current_level >= 0 and any(map(_has_tangent, inputs))
        is_backward = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
        if is_forward or (is_backward and torch._C._are_functorch_transforms_active()):
            raise RuntimeError(
                f"{name}: this backend has neither forward-mode derivatives nor those of "
                f"torch.func; take them under epa_kernels.use_backend('reference')."
            )
        if is_backward:
            return Function.apply(keyset, options, *inputs)
        return below(keyset, inputs, options)

    library.impl(name, autograd, "Autograd", with_keyset=True)
