"""Launches: block sizes, warps and pipeline stages of every kernel, by shape alone; and the limits.

A block is a power of two of at least 16, the least that a matrix product takes. What T, BC and the
other sizes mean, and their units, says the docstring of the package.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...contract import Call
from ..compiled import float32_is_exact

# Beyond these sizes nothing was ever compiled, and there are no registers.
LIMITS = {"B": 65535, "D": 128, "P": 512}
LARGEST_OFFSET = 2**31 - 1  # of a channel within its token, in elements: kernels take 32 bits
# Up to so many tokens are one chunk: a launch that adds up chunks costs more than a longer loop.
# Where that launch would be one too many, up to FEW_TOKENS are.
ONE_CHUNK, FEW_TOKENS = 128, 512
# Projected tokens of a block, where they make several; WIDE in float32 and float64, where D > 16.
SEVERAL_PROJECTED, WIDE_PROJECTED = 32, 16
# These kernels spill where float32 factors are split into TF32 parts, so they multiply in float32.
IN_FLOAT32 = ("paired_output_bwd", "spatial_output_bwd", "spatial_query_bwd")


class Launch(NamedTuple):
    """Launch shape of a kernel; a tensor that is smaller takes smaller blocks."""

    rows: int  # of a block: tokens of a tile, rows of a matrix, or elements of a vector
    columns: int = 0  # channels of a block
    warps: int = 4  # of a program
    stages: int = 1  # of the pipeline of loads
    chunks: int = 0  # most per sample, for a kernel that leaves sums


# (architecture, kernel, head dim, projected tokens, `numbers`) -> launch shape, where another one
# than `rule`'s fits better: chosen by what compiles without spilling, no GPU has timed
# them. `python -m benchmarks.tune` makes the lines anew.
TABLE: dict[tuple[str, str, int, int, str], Launch] = {
    ("gfx942", "paired_output_bwd", 64, 32, "half"): Launch(16, 128, 4, 1, 64),
    ("sm_100", "paired_mix_bwd", 16, 64, "half"): Launch(32, 32, 8, 1, 16),
    ("sm_120", "paired_output_bwd", 8, 64, "half"): Launch(32, 64, 8, 1, 64),
    ("sm_120", "paired_output_bwd", 16, 64, "half"): Launch(32, 64, 8, 1, 64),
    ("sm_120", "paired_summary_bwd", 16, 64, "half"): Launch(64, 64, 8, 2, 0),
    ("sm_120", "paired_summary_fwd", 32, 64, "half"): Launch(64, 32, 8, 2, 128),
    ("sm_80", "paired_output_bwd", 8, 64, "half"): Launch(32, 64, 8, 1, 64),
    ("sm_80", "paired_output_bwd", 16, 64, "half"): Launch(32, 64, 8, 1, 64),
    ("sm_80", "paired_output_fwd", 32, 64, "half"): Launch(128, 32, 8, 1, 0),
    ("sm_80", "paired_summary_bwd", 16, 64, "half"): Launch(64, 64, 8, 2, 0),
    ("sm_80", "paired_summary_fwd", 32, 64, "half"): Launch(64, 32, 8, 2, 128),
    ("sm_80", "spatial_output_bwd", 32, 512, "half"): Launch(64, 0, 4, 1, 64),
    ("sm_86", "paired_gather_bwd", 15, 64, "half"): Launch(16, 32, 8, 1, 0),
    ("sm_86", "paired_gather_bwd", 15, 64, "tf32x3"): Launch(16, 32, 8, 1, 0),
    ("sm_86", "paired_output_bwd", 8, 64, "half"): Launch(32, 64, 8, 1, 64),
    ("sm_86", "paired_output_bwd", 16, 64, "half"): Launch(32, 64, 8, 1, 64),
    ("sm_86", "paired_output_bwd", 64, 32, "ieee"): Launch(32, 16, 8, 1, 64),
    ("sm_86", "paired_output_fwd", 32, 64, "half"): Launch(128, 32, 8, 1, 0),
    ("sm_86", "paired_summary_bwd", 15, 64, "tf32x3"): Launch(32, 32, 8, 2, 0),
    ("sm_86", "paired_summary_bwd", 16, 64, "half"): Launch(64, 64, 8, 2, 0),
    ("sm_86", "paired_summary_fwd", 32, 64, "half"): Launch(64, 32, 8, 2, 128),
    ("sm_89", "paired_output_bwd", 8, 64, "half"): Launch(32, 64, 8, 1, 64),
    ("sm_89", "paired_output_bwd", 16, 64, "half"): Launch(32, 64, 8, 1, 64),
    ("sm_89", "paired_output_bwd", 64, 32, "ieee"): Launch(32, 16, 8, 1, 64),
    ("sm_89", "paired_output_fwd", 32, 64, "half"): Launch(128, 32, 8, 1, 0),
    ("sm_89", "paired_summary_bwd", 16, 64, "half"): Launch(64, 64, 8, 2, 0),
    ("sm_89", "paired_summary_fwd", 32, 64, "half"): Launch(64, 32, 8, 2, 128),
    ("sm_90", "paired_gather_bwd", 128, 64, "ieee"): Launch(16, 16, 8, 1, 0),
    ("sm_90", "paired_gather_bwd", 128, 512, "ieee"): Launch(16, 16, 8, 1, 0),
    ("sm_90", "paired_mix_bwd", 8, 64, "half"): Launch(32, 32, 8, 1, 16),
    ("sm_90", "paired_summary_fwd", 8, 64, "ieee"): Launch(64, 64, 8, 2, 64),
}


def block(size: int, largest: int = 2**30) -> int:
    """The least power of two that holds size, within 16 and largest."""
    return min(max(16, 1 << (size - 1).bit_length()), largest)


def projected_block(head_dim: int, projected: int, element_size: int) -> int:
    """Projected tokens that a tile of tokens meets at a time.

    With more, paired_output_bwd would spill or not fit 99 KB of shared memory.
    """
    if projected <= 64 and head_dim <= 64 and element_size <= 4:
        return block(projected)
    is_wide = element_size > 2 and head_dim > 16
    return block(projected, WIDE_PROJECTED if is_wide else SEVERAL_PROJECTED)


def rule(kernel: str, channels: int, head_dim: int, projected: int, numbers: str) -> Launch:
    """Launch shape for any shape: of those that do not spill, the one with the fewest machine
    instructions a token on sm_90, where they were counted (docs/internals/triton_kernels.md)."""
    wide, exact, in_parts = numbers != "half", numbers == "ieee", numbers == "tf32x3"
    C, D = block(channels), block(head_dim)
    P = projected_block(head_dim, projected, 4 if wide else 2)  # float64 as float32
    few = 4 if D <= 16 else 8  # warps
    mixing = 16 if D > 64 else few
    tokens = max(16, min(128, 8192 // P, 16384 // min(C, 256)))
    channel_gram = Launch(32 if wide else 64, warps=8 if wide or D > 64 else 4, chunks=64)
    if wide:
        output = Launch(max(16, min(tokens // 4, 4096 // min(C, 128))), 64, 8)
        output_bwd = Launch(32 if D <= 32 else 16, 32 if C > 64 else 64, 8, 1, 64)
        summary = Launch(64 if C <= 32 else 32, 64, 4 if C <= 32 else 8, 2, 64)
        summary_bwd = Launch(32, 64, 4 if C <= 32 else 8, 2)
        channel_output_bwd = Launch(64, 16, 8 if D <= 32 else 16)
    else:
        output = Launch(min(tokens, 64) if C == 64 else tokens, 64, few)
        output_bwd = Launch(
            min(tokens, 64 if D <= 16 else 32 if D <= 64 else 16),
            128 if C == 256 else 64,
            few,
            1,
            64,
        )
        summary = Launch(128 if C <= 32 else 64, 64, 4 if C <= 32 else 8, 2, 128)
        summary_bwd = Launch(128 if C <= 32 else 64, 64, 4)
        channel_output_bwd = Launch(64, 32, 8 if D > 64 else 4)
    if in_parts:  # each factor is two
        output, summary = Launch(16, 32, 8), Launch(32, 32, 4, 2, 64)
        summary_bwd, channel_output_bwd = Launch(32, 64, 8, 2), Launch(32, 16)
    if projected > P:  # in several blocks
        output_bwd = output_bwd._replace(rows=16, warps=8)
    return {
        "paired_summary_fwd": summary,
        "paired_merge_fwd": Launch(128),
        "paired_mix_fwd": Launch(
            16 if D > 64 else 32, 16 if D > 32 else 32, max(8, mixing) if wide else mixing
        ),
        "paired_output_fwd": output,
        "paired_product_fwd": Launch(64, 32 if in_parts else 64),
        "paired_output_bwd": output_bwd,
        "paired_merge_bwd": Launch(256),
        "paired_mix_bwd": Launch(32, 32, max(8, mixing) if in_parts else mixing, 1, 16),
        "paired_gather_bwd": Launch(16, 16 if exact and D > 32 else 32, 4 if exact else few),
        "paired_summary_bwd": summary_bwd,
        "spatial_norm_fwd": Launch(64 if D > 64 else 128, chunks=64),
        "spatial_output_fwd": Launch(max(16, tokens // 2) if wide else tokens, warps=8),
        "spatial_query_bwd": Launch(16 if wide else min(tokens, 64), warps=8),
        "spatial_output_bwd": Launch(
            max(16, tokens // 4) if wide else min(tokens, 64), warps=8, chunks=64
        ),
        "spatial_merge_bwd": Launch(32),
        "spatial_norm_bwd": Launch(64 if D > 64 else 128),
        "channel_gram_fwd": channel_gram,
        "channel_gram_bwd": channel_gram,
        "channel_mix_fwd": Launch(0, warps=4 if D <= 32 else 8),
        "channel_output_fwd": Launch(64, 16 if wide else 64),
        "channel_mix_bwd": Launch(0, warps=mixing if D > 32 else 4),
        "channel_output_bwd": channel_output_bwd,
    }[kernel]


def pick(kernel: str, x: Tensor, channels: int, head_dim: int, projected: int) -> Launch:
    """Launch shape of a kernel on the device of x, from TABLE or by `rule`."""
    where, kind = architecture(x), numbers(x, kernel)
    launch = TABLE.get((where, kernel, head_dim, projected, kind))
    if launch is None:
        launch = rule(kernel, channels, head_dim, projected, kind)
        if where.startswith("gfx"):  # a warp has 64 threads
            launch = launch._replace(warps=launch.warps // 2)
    return launch


def prepare(
    kernel: str, x: Tensor, channels: int, head_dim: int, projected: int
) -> tuple[Launch, dict[str, Any]]:
    """Launch shape of a kernel, and the arguments that every kernel takes."""
    from triton import language as tl

    launch = pick(kernel, x, channels, head_dim, projected)
    accumulate = tl.float64 if x.dtype == torch.float64 else tl.float32
    return launch, {"ACC": accumulate, "num_warps": launch.warps, "num_stages": launch.stages}


def prepare_heads(kernel: str, q: Tensor, projected: int = 0) -> tuple[Launch, dict[str, Any]]:
    """`prepare` on q (B, N, H, D), with the arguments that every kernel on heads takes."""
    H, D = q.shape[2:]
    launch, common = prepare(kernel, q, H * D, D, projected)
    return launch, {"H": H, "D": D, "BD": block(D)} | common


def chunks(num_tokens: int, launch: Launch, *, spare_launch: bool = False) -> tuple[int, int]:
    """(number of chunks, tokens of a chunk, a multiple of the tile)."""
    tiles = -(-num_tokens // launch.rows)
    most = 1 if num_tokens <= (FEW_TOKENS if spare_launch else ONE_CHUNK) else launch.chunks
    size = -(-tiles // most) * launch.rows
    return -(-num_tokens // size), size


@functools.cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def architecture(x: Tensor) -> str:
    """Of the GPU that holds x: "sm_90", "gfx942", ...; "" in the interpreter."""
    return _architecture(x.device.index) if x.device.type == "cuda" else ""


def precision(x: Tensor, kernel: str = "") -> str:
    """How float32 factors of a kernel multiply: torch's setting for matrix products decides.

    "highest" is float32 arithmetic; "high" and "medium" use the tensor cores of NVIDIA GPUs three
    times on TF32 parts, which loses no more than float32 does over some hundred terms. So do the
    small float32 matrices between tokens of 16 bits.
    """
    is_exact = x.dtype == torch.float64
    if x.dtype == torch.float32:
        is_exact = kernel in IN_FLOAT32 or float32_is_exact()
    return "ieee" if is_exact or architecture(x).startswith("gfx") else "tf32x3"


def numbers(x: Tensor, kernel: str) -> str:
    """Of 16 bits, "half", or how float32 factors multiply: what decides over registers."""
    return "half" if x.element_size() == 2 else precision(x, kernel)


def offset(t: Tensor, axes: int) -> int:
    """Largest offset that the last axes of a tensor span, in elements."""
    steps = zip(t.shape[-axes:], t.stride()[-axes:], strict=True)
    return sum([(n - 1) * step for n, step in steps])


def largest_offset(call: Call) -> int:
    """Of a channel within a token, or within the projected tokens, of a call's activations."""
    largest = 0
    for i, t in enumerate(call.activations):
        # Behind batch and tokens; kernels walk projected tokens as they walk channels.
        axes = t.dim() - (1 if i > 0 and call.op == "spatial_attention" else 2)
        largest = max(largest, offset(t, axes))
    return largest


def within_reach(t: Tensor) -> Tensor:
    """t (B, N, H, D), dense if an offset of a channel within a token would not fit 32 bits."""
    return t if offset(t, 2) <= LARGEST_OFFSET else t.contiguous()
