"""Time of paired attention, forward and forward + backward, for every backend and its peers.

A backend is timed only where it is as accurate as the reference (epa_kernels.testing.Errors).
Beside the time stand the bytes kept for backward, the floor, and the ratios to the reference of the
same run, eager and compiled. Peers are no backends: the reference as torch.compile makes it, and
the layer written with torch's fused attention (`layers.sdpa_forward`).

On a CPU in float32. On a GPU in float32, bfloat16 and float16, between two events of its stream,
each call behind a write of more than the L2 cache holds.
"""

import functools
import itertools

import pytest

from benchmarks import device as devices
from benchmarks import floor, layers
from benchmarks.layers import DIRECTIONS, SDPA, Row
from benchmarks.report import COMPILED, REFERENCE
from epa_kernels import dispatch
from epa_kernels.contract import OPS
from epa_kernels.testing import kept_for_backward

PAIRED = OPS["paired_attention"]
PROVIDERS = (REFERENCE, COMPILED, SDPA, *(name for name in dispatch.BACKENDS if name != REFERENCE))
MEASURED_SECONDS, MOST_CALLS, WARM_UP = 1.0, 200, 2


def pytest_generate_tests(metafunc):
    config = metafunc.config
    device, batch, dropout = config.device, config.getoption("batch"), config.getoption("dropout")
    rows = [
        Row(case, batch, dtype, dropout=dropout)
        for case, dtype in itertools.product(layers.CASES, device.dtypes)
    ]
    metafunc.parametrize(
        "provided", itertools.product(rows, PROVIDERS), indirect=True, scope="module",
        ids=lambda pair: f"{pair[0].case.name}-{pair[0].dtype_name}-{pair[1]}",
    )  # fmt: skip
    metafunc.parametrize("direction", DIRECTIONS)


@pytest.fixture(scope="module")
def provided(request, device):
    """Row, setting, provider, and the provider's layer: compiled, warm and accurate."""
    row, provider = request.param
    if provider == SDPA and row.dropout:
        pytest.skip("the peer has no dropout of the channel attention")
    setting = layers.make_setting(device.kind, row)
    layer = layers.make_provider(device.kind, row, provider, dry_run=False)
    if provider in dispatch.BACKENDS:
        call = PAIRED.call(*layer.arguments(setting.x))
        if reasons := dispatch.BACKENDS[provider].why_not(call):
            pytest.skip("; ".join(reasons))
        if reason := layers.inaccuracy(device.kind, row, provider, dry_run=False):
            pytest.fail(f"not as accurate as the reference: {reason}", pytrace=False)
        return row, setting, provider, layer
    try:
        for direction in DIRECTIONS:
            layers.make_call(layer, setting, provider, direction)()
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    return row, setting, provider, layer


@functools.lru_cache(maxsize=1)
def _peaks(device):
    from benchmarks import gpu_peaks

    return {name: measure() for name, measure in gpu_peaks.items(device, dry_run=False)}


def _floor_ms(device, row, direction):
    if device.is_gpu:
        floor_us = layers.counted(row, direction, _peaks(device))["floor_us"]
        return None if floor_us is None else floor_us / 1e3
    forward, backward = map(floor.seconds, floor.work(row.shape, row.case.kind))
    return 1e3 * (forward if direction == "forward" else forward + backward)


def bench_paired_attention(provided, direction, device, benchmark):
    row, setting, provider, layer = provided
    function = layers.make_call(layer, setting, provider, direction)
    benchmark.extra_info |= {
        "case": row.case.name,
        "dtype": row.dtype_name,
        "direction": direction,
        "backend": provider,
        "floor_ms": _floor_ms(device, row, direction),
        "kept_bytes": kept_for_backward(layer, setting.x),
    }
    rounds = devices.calls_within(MEASURED_SECONDS, device, function, MOST_CALLS)
    benchmark.pedantic(function, setup=device.flush, rounds=rounds, warmup_rounds=WARM_UP)
