"""Time of one attention layer: every backend, the reference, compiled or not, and SDPA.

Low precision is what autocast leaves: x in bfloat16 or float16, parameters in float32. A backend
that is not as accurate as the reference (tests/cases.py) is not timed; of a peer it is said.

    warm, cold    one call, queued behind another; cold: behind a write of more than the L2 holds
    host_us       until the call returns, on an idle device: what launching costs
    graph, graph_cold     the same from a CUDA graph, without the launches
    gbps, share_of_floor  from graph_cold, or cold without it: counted bytes, benchmarks/floor.py
"""

import copy
import functools
import statistics
from typing import NamedTuple

import torch
from torch.nn import functional as F

import epa_kernels
from benchmarks import floor
from benchmarks.bench_ops import CASES, Case
from benchmarks.report import COMPILED, REFERENCE
from epa_kernels import dispatch
from epa_kernels.contract import call_on
from epa_kernels.layout import from_heads
from epa_kernels.testing import assert_as_accurate, kept_for_backward, make_layer, run_layer

from . import device as devices
from .steps import Refused

SDPA = "sdpa"
DIRECTIONS = ("forward", "forward+backward")
GPU_CASES = (*CASES, Case("tumor/stage1", 32768, 32, 64, "sum"))
DRY_CASE = Case("synapse/stage1", 40, 8, 3, "shared")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MEASURED_SECONDS, FEWEST_CALLS, MOST_CALLS = 0.04, 5, 40


class Row(NamedTuple):
    case: Case
    batch: int
    dtype: torch.dtype
    heads: int = 4

    @property
    def shape(self):
        return self.batch, self.case.tokens, self.case.channels, self.heads, self.case.projected

    @property
    def name(self):
        return f"{self.case.name}, B={self.batch}, {str(self.dtype).removeprefix('torch.')}"


def rows(dry_run):
    """The most important first: B = 2 and in it bfloat16, then other dtypes, then other B."""
    if dry_run:
        return [Row(DRY_CASE, 2, torch.bfloat16, 1)]
    every = [Row(c, b, d) for d in DTYPES for b in (2, 1, 8) for c in GPU_CASES]
    return sorted(every, key=lambda row: (row.batch != 2, row.dtype != torch.bfloat16))


def backends(device, dtype):
    """Names of the backends that can run on the device, the reference last."""
    x = torch.empty(0, dtype=dtype, device=device.kind)
    able = [
        n for n, b in dispatch.BACKENDS.items() if not b.why_not(call_on("paired_attention", x))
    ]
    return sorted(able, key=lambda name: name == REFERENCE)


class Sdpa(epa_kernels.EPA):
    """The layer as one would write it with torch's fused attention for the spatial branch."""

    def forward(self, x):
        B, N, C = x.shape
        q, k, vc, vs = (
            F.linear(x, self.qkvv.weight.to(x.dtype))
            .view(B, N, 4, self.num_heads, C // self.num_heads)
            .permute(2, 0, 3, 1, 4)
        )  # (B, H, N, D) each
        k_weight, k_bias, v_weight, v_bias = (
            None if t is None else t.to(x.dtype) for t in self._projections()
        )
        k_proj = k_weight @ k if k_bias is None else k_weight @ k + k_bias.unsqueeze(1)
        v_proj = v_weight @ vs if v_bias is None else v_weight @ vs + v_bias.unsqueeze(1)
        q, k = F.normalize(q, dim=2), F.normalize(k, dim=2)
        out_s = F.scaled_dot_product_attention(
            q * self.temperature2.to(x.dtype), k_proj, v_proj, scale=1.0
        )
        attention = ((q.mT @ k) * self.temperature.to(x.dtype)).softmax(-1)  # (B, H, D, D)
        out_c = (attention @ vc.mT).permute(0, 3, 1, 2).reshape(B, N, C)
        out_s = from_heads(out_s.transpose(1, 2), self.layout)
        if self.kind == "sum":
            return out_c + out_s
        y_s, y_c = (
            F.linear(out, linear.weight.to(x.dtype), linear.bias.to(x.dtype))
            for out, linear in ((out_s, self.out_proj), (out_c, self.out_proj2))
        )
        return torch.cat((y_s, y_c), dim=-1)

    def _projections(self):
        if self.kind == "sum":
            return self.EF.T, None, self.EF.T, None
        return self.E.weight, self.E.bias, self.F.weight, self.F.bias


class Setting(NamedTuple):
    """A row's layer, input, output gradient, and results in float64 and in its own dtype."""

    layer: torch.nn.Module
    x: torch.Tensor
    gy: torch.Tensor
    exact: dict[str, torch.Tensor]
    definition: dict[str, torch.Tensor]


@functools.lru_cache(maxsize=1)
def make_setting(kind, row):
    layer = make_layer(row.shape, row.case.kind, bias=False)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter.to(row.dtype))
    generator = torch.Generator().manual_seed(0)
    x, gy = (torch.randn(row.shape[:3], generator=generator).to(kind, row.dtype) for _ in range(2))
    exact = run_layer(layer, x, gy, backend=REFERENCE, dtype=torch.float64)
    layer.float()
    definition = run_layer(
        layer, x, gy, backend=REFERENCE, dtype=row.dtype, parameter_dtype=torch.float32
    )
    return Setting(layer, x, gy, exact, definition)


@functools.lru_cache(maxsize=1)
def make_provider(kind, row, name, dry_run):
    """A copy of the row's layer that computes as `name` does."""
    layer = copy.deepcopy(make_setting(kind, row).layer)
    layer.backend = name if name in dispatch.BACKENDS else REFERENCE
    if name == SDPA:
        layer.__class__ = Sdpa
    if name == COMPILED:
        torch.compiler.reset()  # the graphs of earlier rows count against a limit
        options = {"backend": "aot_eager"} if dry_run else {"mode": "max-autotune"}
        layer.compile(dynamic=False, fullgraph=True, **options)
    return layer


@functools.lru_cache(maxsize=1)
def inaccuracy(kind, row, name, dry_run):
    """What breaks the tolerance rule of tests/cases.py, None if nothing does."""
    setting, layer = make_setting(kind, row), make_provider(kind, row, name, dry_run)
    found = run_layer(
        layer, setting.x, setting.gy,
        backend=layer.backend, dtype=row.dtype, parameter_dtype=torch.float32,
    )  # fmt: skip
    layer.zero_grad()
    try:
        assert_as_accurate(found, setting.definition, setting.exact)
    except AssertionError as error:
        return f"tensor, its error and the reference's, or its cosine: {error}"
    return None


def make_call(layer, setting, direction):
    """The call that is timed."""
    # As after zero_grad(): gradients are returned, not added to those of the call before.
    x = setting.x.detach().requires_grad_()
    inputs = (x, *layer.parameters())

    def forward():
        with torch.no_grad():
            return (layer(x),)

    def both():
        return torch.autograd.grad(layer(x), inputs, setting.gy)

    return forward if direction == "forward" else both


def times(device, function, dry_run):
    """What one call costs."""
    count = 1
    if not dry_run:
        device.seconds(function, FEWEST_CALLS)  # warm
        estimate = statistics.median(device.seconds(function, FEWEST_CALLS))
        count = max(FEWEST_CALLS, min(MOST_CALLS, int(MEASURED_SECONDS / estimate)))
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


def counted(row, direction, peaks):
    """Counted work, and the floor that the measured peaks give it."""
    forward, backward = floor.work(row.shape, row.case.kind, element_bytes=row.dtype.itemsize)
    both = floor.Work(*map(sum, zip(forward, backward, strict=True)))
    work = forward if direction == "forward" else both
    needed = ("memory", str(row.dtype).removeprefix("torch."), "exponentials")
    missing = [name for name in needed if peaks.get(name, {}).get("value") is None]
    if missing:
        reasons = {"floor_us": f"no peak was measured for {', '.join(missing)}"}
        return {**work._asdict(), "floor_us": None, "bound": None, "reasons": reasons}
    rates = floor.GpuPeaks(*(peaks[name]["value"] for name in needed))
    seconds = floor.gpu_seconds(work, rates)
    bound = max(seconds, key=seconds.get)
    return {**work._asdict(), "floor_us": seconds[bound] * 1e6, "bound": bound, "reasons": {}}


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
    function = make_call(layer, setting, direction)
    if name == COMPILED:
        function = _marked(function)
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


def _marked(function):
    """A call that may overwrite the results of the one before, as CUDA graphs do."""

    def call():
        torch.compiler.cudagraph_mark_step_begin()
        return function()

    return call


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
