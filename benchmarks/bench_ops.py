"""Time of paired attention, forward and forward + backward, for every backend.

A backend's row is refused if it is not as accurate there as the spec (tests/cases.py). Beside the
time stand the bytes kept for backward, the floor, and the ratios to the reference of the same run,
eager and compiled. The compiled reference is a peer, not a backend: it is timed as torch.compile
makes it.
"""

import copy
import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from benchmarks import floor
from benchmarks.report import COMPILED, REFERENCE
from epa_kernels import contract, dispatch
from epa_kernels.testing import assert_as_accurate, kept_for_backward, make_layer, run_layer

PROVIDERS = (REFERENCE, COMPILED, *(name for name in dispatch.BACKENDS if name != REFERENCE))


class Case(NamedTuple):
    """One attention layer of a published network."""

    name: str
    tokens: int
    channels: int
    projected: int
    kind: str


CASES = (
    Case("synapse/stage1", 32768, 32, 64, "shared"),
    Case("synapse/stage2", 4096, 64, 64, "shared"),
    Case("synapse/stage3", 512, 128, 64, "shared"),
    Case("synapse/stage4", 64, 256, 32, "shared"),
    Case("acdc/stage1", 25600, 32, 64, "split"),
)


class Setting(NamedTuple):
    """A case's layer in float64, input, output gradient, exact and float32 results, and floor."""

    layer: torch.nn.Module
    x: torch.Tensor
    gy: torch.Tensor
    exact: dict[str, torch.Tensor]
    definition: dict[str, torch.Tensor]
    floor_ms: dict[str, float]  # by direction


@functools.lru_cache(maxsize=1)
def make_setting(case, batch, dropout):
    shape = (batch, case.tokens, case.channels, 4, case.projected)
    layer = make_layer(shape, case.kind, bias=False, dropout=dropout)
    generator = torch.Generator().manual_seed(0)
    x, gy = (torch.randn(batch, *shape[1:3], generator=generator) for _ in range(2))
    definition = run_layer(layer, x, gy, backend=REFERENCE, dtype=torch.float32)
    exact = run_layer(layer, x, gy, backend=REFERENCE, dtype=torch.float64)
    forward, backward = (floor.seconds(work) * 1e3 for work in floor.work(shape, case.kind))
    floor_ms = {"forward": forward, "forward+backward": forward + backward}
    return Setting(layer, x.requires_grad_(), gy, exact, definition, floor_ms)


@pytest.fixture(
    scope="module",
    params=itertools.product(CASES, PROVIDERS),
    ids=lambda pair: f"{pair[0].name}-{pair[1]}",
)
def provided(request):
    """Case, setting, provider, and the provider's layer: compiled, warm and accurate."""
    (case, provider), option = request.param, request.config.getoption
    setting = make_setting(case, option("--batch"), option("--dropout"))
    layer = copy.deepcopy(setting.layer).float()
    layer.backend = REFERENCE if provider == COMPILED else provider
    if reasons := dispatch.BACKENDS[layer.backend].why_not(
        contract.call_on("paired_attention", setting.x)
    ):
        pytest.skip("; ".join(reasons))
    if provider == COMPILED:
        torch.compiler.reset()  # the graphs of earlier cases count against a limit
        layer.compile(dynamic=False, fullgraph=True)  # whole, or not at all
    try:
        found = run_layer(layer, setting.x, setting.gy, backend=layer.backend, dtype=torch.float32)
        with torch.no_grad():
            layer(setting.x)
    except TorchDynamoException as error:
        pytest.skip(str(error).splitlines()[0])
    if provider != COMPILED:
        assert_as_accurate(found, setting.definition, setting.exact)
    return case, setting, provider, layer


@pytest.mark.parametrize("direction", ("forward", "forward+backward"))
def bench_paired_attention(provided, direction, benchmark):
    case, setting, provider, layer = provided
    benchmark.extra_info |= {
        "case": case.name,
        "direction": direction,
        "backend": provider,
        "floor_ms": setting.floor_ms[direction],
        "kept_bytes": kept_for_backward(layer, setting.x),
    }
    if direction == "forward":
        with torch.no_grad():
            benchmark(layer, setting.x)
        return
    inputs = (setting.x, *layer.parameters())
    # As after zero_grad(): gradients are returned, not added to those of the call before.
    benchmark(lambda: torch.autograd.grad(layer(setting.x), inputs, setting.gy))
