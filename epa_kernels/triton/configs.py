"""Launch shapes: block sizes, warps and pipeline stages of every kernel, by shape alone.

A block is a power of two of at least 16, the least that a matrix product takes.
"""

import torch
from torch import Tensor

# Chunks of tokens a sample is cut into at most; each leaves its sums in memory.
MAX_CHUNKS = 64
# Rows of a block, and elements of one, where a kernel adds up what chunks or samples left.
MERGE_ROWS, SUM_BLOCK = 16, 1024
# Elements of the (T, P) map of a tile of tokens and of other large blocks: what registers hold.
MAP_ELEMENTS = 8192


def block(size: int, largest: int = 2**30) -> int:
    """The least power of two that holds size, within 16 and largest."""
    return min(max(16, 1 << (size - 1).bit_length()), largest)


def tile(projected: int, channels: int) -> int:
    """Tokens T of a tile of an output pass."""
    return max(16, min(128, MAP_ELEMENTS // block(projected), 16384 // block(channels)))


def chunks(num_tokens: int, tile_size: int) -> tuple[int, int]:
    """(number of chunks, tokens of a chunk, a multiple of the tile)."""
    tiles = -(-num_tokens // tile_size)
    size = -(-tiles // MAX_CHUNKS) * tile_size
    return -(-num_tokens // size), size


def precision(x: Tensor) -> str:
    """How float32 factors multiply: torch.set_float32_matmul_precision decides.

    "highest" is float32 arithmetic; "high" and "medium" use the tensor cores of NVIDIA GPUs three
    times on TF32 parts, which loses no more than float32 does over some hundred terms.
    """
    highest = torch.get_float32_matmul_precision() == "highest"
    return "ieee" if highest or torch.version.hip or x.dtype == torch.float64 else "tf32x3"
