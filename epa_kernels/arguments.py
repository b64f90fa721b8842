"""Tensors and options as kernels take them; their numbers are those of csrc/kernels.h."""

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
KINDS = {"shared": 0, "split": 1, "sum": 2}
LAYOUTS = {"official": 0, "tokens": 1}
# Inputs of paired_attention: those that the kernels take as views, and those as dense weights.
VIEWS, WEIGHTS = (0, 3, 5), (1, 2, 4, 6, 7, 8, 9, 10, 11, 12)


def unknown_dtype(x: Tensor) -> list[str]:
    """The reason why kernels cannot run on x, if its dtype is one."""
    known = ", ".join(map(str, DTYPES))
    return [] if x.dtype in DTYPES else [f"dtype {x.dtype} is none of {known}"]


def view(t: Tensor | None) -> tuple[int, ...] | None:
    """Address, dtype, strides in elements."""
    return None if t is None else (t.data_ptr(), DTYPES[t.dtype], *t.stride())


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def dense(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype).contiguous()
