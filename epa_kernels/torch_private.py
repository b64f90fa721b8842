"""Every name of torch's private API that the package uses, and what serves where torch lacks it.

tests/test_torch_private.py looks for each name in the torch at hand, and tries each fallback.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
# Hooks of a module, and those of every module, which torch has no function to ask for.
MODULE_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
GLOBAL_HOOKS = tuple(f"nn.modules.module._global{name}" for name in MODULE_HOOKS)
WITHOUT_MODES = "_C._DisableTorchDispatch"
TRANSFORMS = "_C._are_functorch_transforms_active"
EXPORTING = "compiler._is_exporting_flag"
GRAPH_TASK = "_C._current_graph_task_id"
STORE = "distributed.distributed_c10d._get_default_store"
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


# Found once: torch fills these tables, and never replaces them.
_global_hooks: list[dict[int, Callable]] = [
    {} if (table := find(name)) is None else table for name in GLOBAL_HOOKS
]
_are_transforms_active: Callable[[], bool] = find(TRANSFORMS) or (lambda: False)


def global_hooks() -> list[Callable]:
    """Every hook on all modules."""
    if not any(_global_hooks):
        return []
    return [hook for table in _global_hooks for hook in table.values()]


def in_transform() -> bool:
    """Whether torch.func transforms the call, or forward-mode derivatives are taken of it."""
    return _are_transforms_active() or forward_ad._current_level >= 0


_has_exporting = find(EXPORTING) is not None


def is_exporting() -> bool:
    """torch.compiler.is_exporting, which torch 2.8 answers with yes in every compiled function."""
    return torch.compiler._is_exporting_flag if _has_exporting else torch.compiler.is_exporting()


_graph_task: Callable[[], int] = find(GRAPH_TASK) or (lambda: -1)


def in_backward() -> bool:
    """Whether this thread is in a backward pass of autograd."""
    return _graph_task() != -1


def default_store() -> Any:
    """The store that the processes of a group share; None where there is no group, or no store."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    store = find(STORE)
    return store() if store is not None and distributed.get_world_size() > 1 else None


# Classes of tensors that any code takes.
_PLAIN = (Tensor, torch.nn.Parameter, type(None))
_PLAIN_SET = frozenset(_PLAIN)  # faster, but torch.compile of torch 2.8 cannot trace one
_NO_DISPATCH = Tensor.__torch_dispatch__
_without_modes: Callable[[], AbstractContextManager] = find(WITHOUT_MODES) or nullcontext


def decides(cls: type) -> bool:
    """Whether a class of tensors says itself what an operator does, by `__torch_dispatch__`."""
    return cls not in _PLAIN and getattr(cls, "__torch_dispatch__", None) != _NO_DISPATCH


def as_plain(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers without the methods of subclasses, for the code around kernels."""
    if _PLAIN_SET.issuperset(map(type, tensors)):
        return tensors
    with _without_modes():  # those of a compiled graph refuse even this of a subclass
        # Not t.as_subclass: that is one of the methods.
        return tuple(
            t if type(t) in _PLAIN_SET or decides(type(t)) else Tensor.as_subclass(t, Tensor)
            for t in tensors
        )


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
        inputs = as_plain(inputs)  # the modes that torch runs a compiled graph in take no other
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
