"""Random bits for attention dropout: Philox4x32-10, stateless, the same in every backend.

    row      of the attention map, its axes but the last flattened row-major: (b, h, i), (b, h, n)
    counter  (column // 8, row mod 2^32, row // 2^32, map)    key (seed mod 2^32, seed // 2^32)
    bits     a counter gives four 32-bit words = eight 16-bit halves, word by word, low half first;
             a column takes half (column mod 8)
    keep     half >= threshold = round(p * 65536);  multiplier = 65536 / (65536 - threshold)

A mask depends on the seed and the logical position only, so any tiling and the backward pass
rebuild it. Eight columns share a counter because Philox would otherwise cost more than the
exponentials that it masks; starting each row at a new counter lets a tile own whole rows.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

CHANNEL_MAP, SPATIAL_MAP = 0, 1
COLUMNS_PER_COUNTER = 8

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors that broadcast, each word in [0, 2^32).
        seed (): int64, the 64-bit key.

    Returns:
        Four int64 tensors of the broadcast shape, each word in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # A product wraps in int64; its high word counts once the bits above 32 are masked, its low
        # word keeps its upper bits, which the next round's mask or the last one takes off.
        product0, product1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1 = ((product1 >> 32) ^ (c1 ^ key0)) & _MASK, product1
        c2, c3 = ((product0 >> 32) ^ (c3 ^ key1)) & _MASK, product0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def threshold(p: float) -> int:
    """Halves below this value are dropped: round(p * 65536), at most 65535 for p < 1."""
    return min(round(p * 65536), 65535)


def dropout_multiplier(
    seed: Tensor, rows: Tensor, columns: int, p: float, map_index: int, dtype: torch.dtype
) -> Tensor:
    """Dropout multipliers of some rows of an attention map: 0 or 65536 / (65536 - threshold(p)).

    Args:
        seed (): int64.
        rows (...): int64 flat row numbers in the logical map, so a tile passes just its own.
        columns: length of the map's last axis (D of the channel map, P of the spatial map).
        p: probability of a zero, 0 <= p < 1, used in steps of 1/65536.
        map_index: CHANNEL_MAP or SPATIAL_MAP; the two maps of a layer share one seed.
        dtype: of the result.

    Returns:
        (..., columns).
    """
    group = torch.arange(-(-columns // COLUMNS_PER_COUNTER), device=rows.device)
    row = rows.unsqueeze(-1)
    words = philox(
        (group, row & _MASK, (row >> 32) & _MASK, torch.full_like(group, map_index)), seed
    )
    least = threshold(p)  # that is kept
    # Both halves compare as they lie in their word: w >> 16 >= least as w >= least << 16.
    keep = [half >= c for w in words for half, c in ((w & 0xFFFF, least), (w, least << 16))]
    multiplier = torch.stack(keep, dim=-1).flatten(-2)[..., :columns]
    return multiplier.to(dtype) * (65536 / (65536 - least))


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed () int64 from torch's default generator of `device`, without a host sync."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
