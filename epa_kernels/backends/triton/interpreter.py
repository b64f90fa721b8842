"""Triton's interpreter, for tests on a CPU.

`repair` makes results round as on a GPU. `speed_up` leaves out checks. `enlarge_blocks` launches
fewer programs.

The interpreter holds bfloat16 as bits: a product multiplies the bits, and a conversion from float32
truncates (triton 3.6 and 3.7, triton-lang/triton#4972). After `repair()` both round as a GPU does.
Arithmetic on bfloat16 is still wrong, so a kernel converts before it computes, as it should on a
GPU. Sums of a block run in one chain down its rows; a GPU adds in a tree, with an error that is
several times smaller.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    """To nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _tree_sum(values: np.ndarray, axis: int) -> np.ndarray:
    while values.shape[axis] > 1:  # a power of two, as all blocks
        values = np.add(*np.split(values, 2, axis))
    return values


def prepare() -> None:
    """All of it, once a process."""
    repair()
    speed_up()
    enlarge_blocks()


def repair() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    if create_dot.__module__ == __name__:
        return

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(_widen(handle.data), tl.float32)

    def repaired_dot(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    def repaired_cast(self, source, target):
        types = source.dtype.scalar, target.scalar
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(_round(source.data), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(_widen(source.data), tl.float32)
        return cast(self, source, target)

    def repaired_sum(self, input):
        values = input.handle.data
        if self.axis is None:
            values, axis = values.reshape(-1), 0
        else:
            axis = self.axis
        total = _tree_sum(values, axis)
        return self.to_tensor(total if self.keep_dims else total.squeeze(axis), input.dtype)

    ReduceOps.sum = repaired_sum
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = repaired_dot, repaired_cast


def speed_up() -> None:
    """Leave out what took 60 % of the interpreter's time and changes nothing.

    It replaced the functions of triton.language at every call of a function, now once; and it
    looked for overflow of every integer, whose result is asserted in Triton's debug mode alone.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang, scopes = interpreter._patch_lang, {}
    if patch_lang.__module__ == __name__:
        return

    def patch_once(fn):
        modules = frozenset(v.__name__ for v in fn.__globals__.values() if v in (tl, tl.core))
        if modules not in scopes:
            scopes[modules] = patch_lang(fn)
            scopes[modules].restore = lambda: None
        return scopes[modules]

    interpreter._patch_lang = patch_once
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


# What `enlarge_blocks` replaced: name in `launch` -> what users run with.
_OF_USERS: dict[str, Any] = {}


def enlarge_blocks() -> None:
    """Few large blocks, since a program costs milliseconds, but several chunks of several tiles."""
    from . import launch

    if _OF_USERS:
        return
    rows = {"paired_merge_fwd": 4096, "paired_gather_bwd": 64, "paired_merge_bwd": 8192}
    pick = launch.pick

    def enlarged(kernel, *shape):
        picked = pick(kernel, *shape)
        return picked._replace(rows=rows.get(kernel, picked.rows), chunks=2)

    replacements = {"pick": enlarged, "ONE_CHUNK": 40, "FEW_TOKENS": 100,
                    "SEVERAL_PROJECTED": 64, "WIDE_PROJECTED": 64}  # fmt: skip
    for name, value in replacements.items():
        _OF_USERS[name] = getattr(launch, name)
        setattr(launch, name, value)


@contextmanager
def launch_shapes_of_users() -> Iterator[None]:
    """Undo `enlarge_blocks` for a while."""
    from . import launch

    with mock.patch.multiple(launch, **_OF_USERS):
        yield
