"""The least time that paired attention can take here: counted work over peaks measured here.

    on a CPU   max(copy of as many bytes, 2 multiply-adds / FLOP rate + exponentials / exp rate)
    on a GPU   max(bytes / bandwidth, 2 multiply-adds / FLOP rate, exponentials / exp rate)

A CPU's vector unit that multiplies also computes exponentials, so these two add up; a GPU has units
for each. Memory overlaps. Counted are the matrix products, exponentials and memory of the form in
`epa_kernels.backends.two_pass`; the softmax's divisions, dropout's bits and all else that is
elementwise come on top.

Axes: B batch, N tokens, C channels, H heads, D = C/H, P projected tokens.
"""

import functools
import time
from typing import NamedTuple

import torch

from epa_kernels.contract import plan

REPETITIONS = 20


class Work(NamedTuple):
    """What one direction of one call must do, over the whole batch."""

    multiply_adds: float
    exponentials: float
    bytes: float


def token_multiply_adds(shape, kind):
    """Multiply-adds over the tokens of one sample, (forward, backward).

    two-pass  forward    N (C^2 + J CP          summary: gram, E x; J = 2 if "split", or 1
                           + C^2 + 2CP          output pass: q, spatial attention,
                           + C^2)               channel matrix and output projection
              backward   N (5C^2 + 6CP          output pass, q and S computed again
                           + C^2 + 2J CP)       summary pass
    direct    forward    N ((4 + O) C^2 + 4CP + 2CD)       O = 0 output projections if "sum", or 1
              backward   N ((12 + 2O) C^2 + 12CP + 6CD)
    """
    _, N, C, H, P = shape
    D, J, O = C // H, 1 + (kind == "split"), kind != "sum"
    if plan(N, C) == "direct":
        forward = (4 + O) * C * C + 4 * C * P + 2 * C * D
        backward = (12 + 2 * O) * C * C + 12 * C * P + 6 * C * D
    else:
        forward = 3 * C * C + (2 + J) * C * P
        backward = 6 * C * C + (6 + 2 * J) * C * P
    return N * forward, N * backward


def mix_multiply_adds(shape, kind):
    """Multiply-adds between the passes of one sample, (forward, backward); 0 in the direct plan.

    forward    2C^3 + O C^3 / 2 + 2C^2 D + 2PC^2    Wq M, Wk M; Wo2 (A Wvc); heads; k_proj, v_proj
    backward   the same again, + (2 + O) C^3 + 6C^2 D + 4PC^2

    What is O(C^2 + CP) is left out.
    """
    _, N, C, H, P = shape
    if plan(N, C) == "direct":
        return 0, 0
    D, O = C // H, kind != "sum"
    forward = C * C * (2 * C + O * C / 2 + 2 * D + 2 * P)
    return forward, forward + C * C * ((2 + O) * C + 6 * D + 4 * P)


def work(shape, kind, *, element_bytes=4, parameter_bytes=4):
    """(forward, backward) as Work; bytes an element of x and y, and of the parameters.

    exponentials           B (NHP + CD) each way: backward computes both maps again
    elements of memory     JPN + W, W = (4 + O) C^2, are parameters
      two-pass  forward    3BNC + JPN + W          x twice, y; E
                backward   6BNC + 2 (JPN + W)      x twice, dy, dx written, read, written; E, dE
      direct    forward    2BNC + JPN + W          x, y
                backward   3BNC + 2 (JPN + W)      x, dy, dx; E, dE
    """
    B, N, C, H, P = shape
    traffic = (2, 3) if plan(N, C) == "direct" else (3, 6)
    matrices = (1 + (kind == "split")) * P * N + (4 + (kind != "sum")) * C * C
    tokens, mix = token_multiply_adds(shape, kind), mix_multiply_adds(shape, kind)
    return tuple(
        Work(
            B * (tokens[i] + mix[i]),
            B * (N * H * P + C * C // H),
            element_bytes * traffic[i] * B * N * C + parameter_bytes * (1 + i) * matrices,
        )
        for i in range(2)
    )


class Peaks(NamedTuple):
    """Of all threads that torch uses."""

    flops: float  # a second
    exponentials: float  # a second
    source: str


def _seconds(function):
    """Fastest of some calls: a peak is what the machine can do, not what it does on average."""
    times = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def peaks():
    """Peaks of the C++ kernels' instruction set; of torch where the extension is not built."""
    threads = torch.get_num_threads()
    try:
        from epa_kernels import _C
    except ImportError:
        return Peaks(_mm_flops(), _exponentials(threads), "torch.mm and torch.exp2")
    peak = _C.peak()
    return Peaks(
        threads * peak["fma_gflops"] * 1e9,
        threads * peak["exp2_gexps"] * 1e9,
        "epa_kernels._C.peak()",
    )


def _mm_flops():
    best = 0
    for size in (256, 512, 1024):
        a = torch.randn(size, size)
        best = max(best, 2 * size**3 / _seconds(lambda a=a: torch.mm(a, a)))
    return best


def _exponentials(threads):
    x = torch.randn(2**16 * threads)  # in and out fit a second-level cache
    out = torch.empty_like(x)
    return x.numel() / _seconds(lambda: torch.exp2(x, out=out))


@functools.cache
def copy_seconds(num_bytes):
    """Time of a copy that moves so many bytes, half read, half written, in the cache they fit."""
    source = torch.zeros(int(num_bytes) // 8)
    target = torch.zeros_like(source)
    return _seconds(lambda: target.copy_(source))


def seconds(work):
    """The floor of a Work on this CPU."""
    flops, exponentials, _ = peaks()
    compute = 2 * work.multiply_adds / flops + work.exponentials / exponentials
    return max(copy_seconds(work.bytes), compute)


class GpuPeaks(NamedTuple):
    """Of a GPU, a second; `gpu_check.peaks` measures them."""

    bytes: float  # of device memory, read and written
    flops: float  # of matrix products in the dtype of x
    exponentials: float


def gpu_seconds(work, peaks):
    """{what bounds it: seconds that it takes at least} of a Work; the largest is the floor."""
    return {
        "memory": work.bytes / peaks.bytes,
        "matrix products": 2 * work.multiply_adds / peaks.flops,
        "exponentials": work.exponentials / peaks.exponentials,
    }


def describe():
    """One line that says what the floor was computed from."""
    flops, exponentials, source = peaks()
    line = (
        f"floor from {flops / 1e9:.0f} GFLOP/s and {exponentials / 1e9:.2f} Gexp/s "
        f"({source}), and from copies of as many bytes"
    )
    if source.startswith("torch"):
        line += "; torch may stay far below the processor's peaks, and the floor then is too high"
    return line
