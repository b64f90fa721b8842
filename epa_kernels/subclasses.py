"""Subclasses of torch.Tensor: which reach our ops, and which need torch's own operators.

A subclass that holds its own numbers, as MONAI's MetaTensor, reaches a kernel as a plain tensor
(`torch_private.as_plain`); torch gives the result its class again, as it does for nn.Linear. A
subclass that decides by `__torch_dispatch__` what an operator does, as DTensor, knows torch's
operators and not ours.
"""

from torch import Tensor

from .torch_private import decides

_TRACING = "torch._subclasses."  # the tensors of torch's tracers, which take any operator


def foreign(*tensors: Tensor | None) -> str | None:
    """The class of the first tensor that knows torch's own operators alone; None if none is one."""
    for t in tensors:
        if decides(type(t)) and not type(t).__module__.startswith(_TRACING):
            return type(t).__name__
    return None
