"""Fused Triton kernels for GPUs. Triton itself is imported with the first tensor that they run on.

Environment variable TRITON_INTERPRET=1, Triton's own: the kernels run in Python on CPU tensors, for
tests.
"""

import functools
import importlib
import os

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@functools.cache
def missing() -> str | None:
    """Why Triton cannot be used, None if it can."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation fails in many ways
        return f"Triton cannot be imported ({error}); pip install triton"
    return None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(op: str, x: Tensor) -> list[str]:
    """Every reason why the kernels cannot run `op` on x."""
    reasons = []
    if x.device.type != "cuda" and not (x.device.type == "cpu" and _is_interpreted()):
        reasons.append(f"x is on {x.device.type}, the kernels run on GPUs")
    elif not torch.compiler.is_compiling() and (reason := missing()):  # inductor needs it itself
        reasons.append(reason)
    if x.dtype not in _DTYPES:
        reasons.append(f"dtype {x.dtype} is none of {', '.join(map(str, _DTYPES))}")
    return reasons


def paired_attention(*tensors, **options):
    """Op `paired_attention`, see `ops`."""
    from .paired import forward

    return forward(*tensors, **options)


def paired_attention_bwd(*tensors, **options):
    """Op `paired_attention_bwd`, see `ops`."""
    from .paired import backward

    return backward(*tensors, **options)


def spatial_attention(*tensors, **options):
    """Op `spatial_attention`, see `ops`."""
    from .spatial import forward

    return forward(*tensors, **options)


def spatial_attention_bwd(*tensors, **options):
    """Op `spatial_attention_bwd`, see `ops`."""
    from .spatial import backward

    return backward(*tensors, **options)


def channel_attention(*tensors, **options):
    """Op `channel_attention`, see `ops`."""
    from .channel import forward

    return forward(*tensors, **options)


def channel_attention_bwd(*tensors, **options):
    """Op `channel_attention_bwd`, see `ops`."""
    from .channel import backward

    return backward(*tensors, **options)
