"""What a device can do, measured on it: bandwidth, matrix products, exponentials.

Each is the fastest of some calls: a peak is what the device can do, not what it does on average.
"""

import torch
import triton
import triton.language as tl

from benchmarks.device import DTYPES

CALLS = 12


def copy_bytes(device, size):
    """Bytes a second, read plus written, of copies that move `size` bytes."""
    source = torch.randn(size // 8, device=device.kind)
    target = torch.empty_like(source)
    seconds = device.seconds(lambda: target.copy_(source), CALLS)
    return 2 * source.nbytes / min(seconds)


def matmul_flops(device, size, dtype):
    """Operations a second of a square matrix product on random numbers."""
    a, b = (torch.randn(size, size, device=device.kind, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / min(device.seconds(lambda: torch.mm(a, b, out=out), CALLS))


@triton.jit
def _exponentials(out, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = offsets.to(tl.float32) / (tl.num_programs(0) * BLOCK)
    for _ in range(COUNT):
        x = tl.exp2(x) - 1.5  # converges, so that no number leaves the range
    tl.store(out + offsets, x)


def exponentials(device, programs, count):
    """exp2 a second of a kernel that does nothing else, `count` of them an element."""
    block = 1024
    out = torch.full((programs * block,), torch.nan, device=device.kind)
    seconds = device.seconds(
        lambda: _exponentials[(programs,)](out, COUNT=count, BLOCK=block, num_warps=4), CALLS
    )
    if not out.isfinite().all():
        raise RuntimeError("the kernel of exponentials did not write all of its result")
    return programs * block * count / min(seconds)


def items(device, dry_run):
    """(key, function) of each peak, for `steps`."""
    facts = device.describe()
    large, product = (2**16, 64) if dry_run else (min(2**31, facts["memory_bytes"] // 8), 8192)
    cached = (facts["l2_bytes"] or 2**17) // 2

    def rate(value, unit):
        return {"value": value, "unit": unit}

    def exponential_rate():
        programs, count = (2, 4) if dry_run else (32 * facts["multiprocessors"], 512)
        try:
            return rate(exponentials(device, programs, count), "exp2/s") | {"source": "measured"}
        except Exception as error:
            if not facts["multiprocessors"] or not facts["most_mhz"]:
                raise
            counted = 16 * facts["multiprocessors"] * facts["most_mhz"] * 1e6
            source = f"counted, 16 a clock and multiprocessor, not measured: {error}"
            return rate(counted, "exp2/s") | {"source": source}

    yield "memory", lambda: rate(copy_bytes(device, large), "B/s")
    yield "L2", lambda: rate(copy_bytes(device, cached), "B/s")
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        size = product if dtype != torch.float32 else product // 2
        yield name, lambda size=size, dtype=dtype: rate(matmul_flops(device, size, dtype), "FLOP/s")
    yield "exponentials", exponential_rate
