"""Time of one attention layer: every backend, the reference, compiled or not, and SDPA.

warm, cold    one call, queued behind another; cold: behind a write of more than the L2 holds
host_us       until the call returns, on an idle device: what launching costs
graph, graph_cold     the same from a CUDA graph, without the launches
gbps, share_of_floor  from graph_cold, or cold without it: counted bytes, benchmarks/floor.py
"""

import functools
import statistics

import torch

from benchmarks import device as devices
from benchmarks.layers import (
    CASES,
    DIRECTIONS,
    DRY_CASE,
    SDPA,
    Row,
    counted,
    inaccuracy,
    make_call,
    make_provider,
    make_setting,
)
from benchmarks.report import COMPILED, REFERENCE
from epa_kernels import dispatch
from epa_kernels.contract import call_on
from epa_kernels.testing import kept_for_backward, make_layer

from .lines import Refused

MEASURED_SECONDS, MOST_CALLS = 0.04, 40


def rows(dry_run):
    """The most important first: B = 2 and in it bfloat16, then other dtypes, then other B."""
    if dry_run:
        return [Row(DRY_CASE, 2, torch.bfloat16, 1)]
    every = [Row(c, b, d) for d in devices.DTYPES for b in (2, 1, 8) for c in CASES]
    return sorted(every, key=lambda row: (row.batch != 2, row.dtype != torch.bfloat16))


def backends(device, dtype):
    """Names of the backends that can run on the device, the reference last."""
    x = torch.empty(0, dtype=dtype, device=device.kind)
    able = [
        n for n, b in dispatch.BACKENDS.items() if not b.why_not(call_on("paired_attention", x))
    ]
    return sorted(able, key=lambda name: name == REFERENCE)


def times(device, function, dry_run):
    """What one call costs."""
    count = 1
    if not dry_run:
        count = devices.calls_within(MEASURED_SECONDS, device, function, MOST_CALLS)
    return {
        "warm": devices.summary(device.seconds(function, count)),
        "cold": devices.summary(device.seconds(function, count, device.flush)),
        "host_us": statistics.median(device.host_seconds(function, count)) * 1e6,
        "calls": count,
    }


def graph_times(device, function, count):
    replay, _result = device.capture(function)
    return {
        "graph": devices.summary(device.seconds(replay, count)),
        "graph_cold": devices.summary(device.seconds(replay, count, device.flush)),
    }


def measure(device, row, name, direction, peaks, dry_run):
    """One row of the table; refuses a backend that is not accurate."""
    setting = make_setting(device.kind, row)
    layer = make_provider(device.kind, row, name, dry_run)
    result = counted(row, direction, peaks)
    result |= dict.fromkeys(("inaccuracy", "graph", "graph_cold", "peak_bytes", "kept_bytes"))
    reasons = result["reasons"]
    if name == COMPILED and direction == "forward":
        reasons["inaccuracy"] = "told with the backward, which takes longer to compile"
    elif name != REFERENCE:
        result["inaccuracy"] = inaccuracy(device.kind, row, name, dry_run)
    if result["inaccuracy"] and name in dispatch.BACKENDS:
        raise Refused(result["inaccuracy"])
    function = make_call(layer, setting, name, direction)
    result |= times(device, function, dry_run)
    if name == COMPILED:
        reasons["graph"] = "max-autotune replays CUDA graphs of its own"
    else:
        try:
            result |= graph_times(device, function, result["calls"])
        except Exception as error:
            reasons["graph"] = f"{type(error).__name__}: {error}"[:500]
    best = (result["graph_cold"] or result["cold"])["median_us"]
    result["gbps"] = result["bytes"] / best / 1e3
    floor_us = result["floor_us"]
    result["share_of_floor"] = None if floor_us is None else floor_us / best
    before, peak = device.allocated_bytes(), device.peak_bytes(function)
    if peak is None:
        reasons["peak_bytes"] = "a CPU does not count it"
    elif name == COMPILED:
        reasons["peak_bytes"] = "CUDA graphs hold their memory from call to call"
    else:
        result["peak_bytes"] = peak - before
    if direction == "forward" or name == COMPILED:
        reasons["kept_bytes"] = "a question for forward+backward, uncompiled"
    else:
        result["kept_bytes"] = kept_for_backward(layer, setting.x.detach().clone())
    return result


def items(device, dry_run, peaks, *, compiled):
    """(key, function) of each row of the table; the compiled reference is a step of its own."""
    device.settle()
    for row in rows(dry_run):
        if compiled and (row.batch, row.dtype) != (2, torch.bfloat16):
            continue
        for name in (COMPILED,) if compiled else (*backends(device, row.dtype), SDPA):
            for direction in DIRECTIONS:
                key = f"{row.name}, {direction}, {name}"
                yield key, functools.partial(measure, device, row, name, direction, peaks, dry_run)


def first_calls(device, dry_run):
    """(key, function) of first calls, which compile: of every layer that ops and network time.

    Triton compiles a kernel in one thread in a second; several processes fill its cache for the one
    that measures.
    """
    plain = [(row, 0.0) for row in rows(dry_run) if row.batch != 8]
    trained = [
        (row, 0.15) for row, _ in plain
        if row.dtype == torch.bfloat16 and row.case.name.startswith("synapse")
    ]  # fmt: skip

    def call(row, dropout, name):
        layer = make_layer(row.shape, row.case.kind, bias=False, dropout=dropout).float()
        layer.backend = name
        x = torch.randn(row.shape[:3], device=device.kind).to(row.dtype).requires_grad_()
        layer(x).sum().backward()
        device.synchronize()

    for row, dropout in sorted(plain + trained, key=lambda pair: pair[0].dtype == torch.float32):
        for name in backends(device, row.dtype):
            if name not in ("cuda", "two_pass", REFERENCE):
                yield (
                    f"{row.name}, dropout {dropout}, {name}",
                    functools.partial(call, row, dropout, name),
                )
