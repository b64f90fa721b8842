"""Subclasses of torch.Tensor: which reach our ops, and which need torch's own operators.

A subclass that holds its own numbers, as MONAI's MetaTensor, reaches a kernel as a plain tensor
(`torch_private.as_plain`); torch gives the result its class again, as it does for nn.Linear. A
subclass that decides by `__torch_dispatch__` what an operator does, as DTensor, knows torch's
operators and not ours.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from .torch_private import decides, is_exporting

_TRACING = "torch._subclasses."  # the tensors of torch's tracers, which take any operator


def foreign(*tensors: Tensor | None) -> str | None:
    """The class of the first tensor that knows torch's own operators alone; None if none is one."""
    for t in tensors:
        if decides(type(t)) and not type(t).__module__.startswith(_TRACING):
            return type(t).__name__
    return None


def as_compiled(x: Tensor) -> Tensor:
    """x as a compiled graph of our ops can take it: plain, unless under torch.no_grad.

    torch 2.13 can neither keep a subclass for backward, not of nn.LayerNorm either, nor show one to
    our ops in inference mode. Making it plain breaks the graph once.
    """
    if type(x) in (Tensor, Parameter) or is_exporting() or foreign(x) is not None:
        return x
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return x.as_subclass(Tensor)
    return x
