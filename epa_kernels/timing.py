"""Time backends on one shape, interleaved, with numbers of their own."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .admission import Case, Question, draw
from .contract import OPS, by_name

WARM_UP, ROUNDS = 2, 5


def measure(
    implementations: Mapping[str, Any], question: Question, B: int, N: int, device: torch.device
) -> dict[str, float]:
    """Return microseconds by name: the median of a forward pass, with backward if it is asked for.

    Args:
        implementations: by name, each with a function for each schema of `contract.OPS`.
        B, N: samples and tokens.
    """
    drawn = draw(question, Case(B, N, "dense", "all"), torch.Generator(device).manual_seed(0))
    op, options = OPS[question.op], by_name(drawn.options)

    def run(implementation: Any) -> None:
        _, *kept = getattr(implementation, op.name)(*drawn.inputs, drawn.seed, **options)
        if question.backward:
            backward = getattr(implementation, f"{op.name}_bwd")
            backward(drawn.dout, *drawn.inputs, *kept, drawn.seed, **options)

    found: dict[str, list[float]] = {name: [] for name in implementations}
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what the caller has queued would be timed as well
    with torch.no_grad():
        for number in range(WARM_UP + ROUNDS):
            for name, implementation in implementations.items():
                seconds = _seconds(functools.partial(run, implementation), device)
                if number >= WARM_UP:
                    found[name].append(seconds)
    return {name: 1e6 * statistics.median(times) for name, times in found.items()}


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
