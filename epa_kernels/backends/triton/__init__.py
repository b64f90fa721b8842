"""Fused Triton kernels for GPUs. Triton itself is imported with the first tensor that they run on.

    launch       launch shapes, limits, and the arguments that every kernel takes
    primitives   what kernels share: products, softmax, norms, dropout
    paired       launches of paired attention; its kernels: paired_summary, paired_mix,
                 paired_output, paired_product, paired_gather, each forward beside backward
    spatial, channel   the two other ops, kernels and launches
    interpreter  repairs of Triton's interpreter, for tests

No module is named like an op, because importing it would hide the op of this package.

A kernel is `<op>_<pass>_<fwd|bwd>`, as paired_output_bwd; a function that kernels call has neither
prefix nor suffix. A pass that adds up what chunks left is called merge. Paired attention runs

    forward   paired_summary_fwd, [paired_merge_fwd,] paired_mix_fwd, paired_output_fwd,
              [paired_product_fwd]
    backward  [paired_summary_fwd, paired_merge_fwd,] paired_mix_fwd, paired_output_bwd,
              [paired_merge_bwd,] paired_mix_bwd, paired_gather_bwd, paired_summary_bwd

Sizes in kernels. A block is a power of two of at least 16; what lies beyond a tensor is masked.

    B, N, C, H, D, P   samples, tokens, channels, heads, channels of a head, projected tokens
    J          token projections: 2 of kind "split", else 1
    O          output channels of a branch: C of kind "sum", else C / 2
    ROWS       rows of a head's share of the channel branch's matrix: ceil(O / H)
    SIZE       numbers that a head leaves in the sums of a chunk
    chunk      tokens that one program walks, a multiple of T; chunks is how many a sample has
    T          tokens of a tile, the step of a walk
    BC         channels in a block of x
    BD         channels in a block of a head, which holds all D
    BP         projected tokens in a block
    BO         output channels in a block of a branch, which holds all O
    BR         output channels of the channel branch that one program makes
    BW         output channels in a block of dWo1, in MODE rows
    BM         rows in a block of a matrix: output channels, or rows of a gradient
    BK         terms in a block of the inner axis of a product
    BT         terms of a sum that are loaded at a time: chunks, samples or heads
    BLOCK      elements in a block of a vector

Environment variable TRITON_INTERPRET=1, Triton's own: the kernels run in Python on CPU tensors, for
tests.
"""

import functools
import importlib
import os
import re
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ...contract import Call
from ..compiled import unknown_dtype
from .launch import LARGEST_OFFSET, LIMITS, largest_offset

# The oldest Triton whose language has all that the kernels use; torch 2.10 and later bring it.
OLDEST = (3, 6)


@functools.cache
def missing() -> str | None:
    """Why Triton cannot be used, None if it can."""
    try:
        version = importlib.import_module("triton").__version__
    except Exception as error:  # a broken installation fails in many ways
        return f"Triton cannot be imported ({error}); pip install triton"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        return f"Triton {version} is older than 3.6, which torch 2.10 brings; install a newer torch"
    return None


@functools.cache
def no_launcher() -> str | None:
    """Why Triton cannot compile the C code that launches kernels, None if it can."""
    import triton

    if triton.knobs.build.impl:
        return None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler to build its launcher; install gcc, or set CC"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        return f"Triton's launcher needs {header}; install the headers of Python"
    return None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(call: Call) -> list[str]:
    """Every reason why the kernels cannot run a call."""
    device, reasons = call.device.type, []
    if device != "cuda" and not (device == "cpu" and _is_interpreted()):
        reasons.append(f"x is on {device}, the kernels run on GPUs")
    elif not torch.compiler.is_compiling() and (reason := missing()):  # inductor needs it itself
        reasons.append(reason)
    elif not (torch.compiler.is_compiling() or _is_interpreted()) and (reason := no_launcher()):
        reasons.append(reason)
    reasons += unknown_dtype(call) + call.beyond(LIMITS)
    if (offset := largest_offset(call)) > LARGEST_OFFSET:
        reasons.append(f"offset of a channel of a token {offset} > {LARGEST_OFFSET}")
    return reasons


def _implementation(module: str, function: str) -> Callable[..., tuple[Tensor, ...]]:
    """A function of a module that imports Triton, on the device of its first tensor.

    Triton launches on the current device, and the dispatcher sets none for an op in Python.
    """

    def run(*tensors, **options):
        implementation = getattr(importlib.import_module(f".{module}", __package__), function)
        with torch.cuda.device_of(tensors[0]):
            return implementation(*tensors, **options)

    return run


# The ops, see `ops`.
paired_attention = _implementation("paired", "forward")
paired_attention_bwd = _implementation("paired", "backward")
spatial_attention = _implementation("spatial", "forward")
spatial_attention_bwd = _implementation("spatial", "backward")
channel_attention = _implementation("channel", "forward")
channel_attention_bwd = _implementation("channel", "backward")
