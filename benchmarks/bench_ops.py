"""Time of paired attention, forward and forward + backward, for every backend.

A row is refused if the backend is not as accurate there as the spec (tests/cases.py). Beside the
time stand the bytes kept for backward and the ratio to the reference of the same run.
"""

import copy
from typing import NamedTuple

import pytest
import torch
from cases import assert_as_accurate, kept_for_backward, make_layer, run_layer

from epa_kernels import dispatch


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


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def setting(request):
    """A case's layer, its input and output gradient, and its exact and float32 results."""
    case, config = request.param, request.config
    batch, dropout = config.getoption("--batch"), config.getoption("--dropout")
    shape = (batch, case.tokens, case.channels, 4, case.projected)
    layer = make_layer(shape, case.kind, bias=False, dropout=dropout)
    generator = torch.Generator().manual_seed(0)
    x, gy = (torch.randn(batch, *shape[1:3], generator=generator) for _ in range(2))
    exact = run_layer(layer, x, gy, backend="reference", dtype=torch.float64)
    definition = run_layer(layer, x, gy, backend="reference", dtype=torch.float32)
    return case, layer, x, gy, exact, definition


@pytest.mark.parametrize("backend", sorted(dispatch.BACKENDS, key="reference".__ne__))
@pytest.mark.parametrize("direction", ("forward", "forward+backward"))
def bench_paired_attention(setting, direction, backend, benchmark):
    case, layer, x, gy, exact, definition = setting
    if reasons := dispatch.BACKENDS[backend].why_not("paired_attention", x):
        pytest.skip("; ".join(reasons))
    found = run_layer(layer, x, gy, backend=backend, dtype=torch.float32)
    assert_as_accurate(found, definition, exact)

    layer = copy.deepcopy(layer).float()
    layer.backend = backend
    benchmark.group = f"{case.name} {direction}"
    benchmark.extra_info |= {"backend": backend, "kept_bytes": kept_for_backward(layer, x)}
    if direction == "forward":
        with torch.no_grad():
            benchmark(layer, x)
        return
    x = x.clone().requires_grad_()
    benchmark(lambda: layer(x).backward(gy))
