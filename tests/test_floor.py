"""The benchmarks' floor: its counts against the design's numbers and against code that runs."""

import pytest
import torch
from cases import KINDS
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import floor
from epa_kernels import dispatch
from epa_kernels.backends import two_pass
from epa_kernels.testing import make_layer


@pytest.mark.parametrize(
    "tokens, channels, million_multiply_adds, million_exponentials",
    [(32768, 32, 302, 8.4), (4096, 64, 101, 1.0), (512, 128, 38, 0.13)],
)
def test_forward_of_synapse(tokens, channels, million_multiply_adds, million_exponentials):
    shape = (1, tokens, channels, 4, 64)
    multiply_adds, _ = floor.token_multiply_adds(shape, "shared")
    assert round(multiply_adds / 1e6) == million_multiply_adds
    forward, backward = floor.work(shape, "shared")
    assert forward.exponentials == pytest.approx(million_exponentials * 1e6, rel=0.05)
    assert forward.multiply_adds > multiply_adds and backward.multiply_adds > 2 * multiply_adds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 2048, 64, 4, 32), (1, 300, 128, 4, 64), (2, 64, 256, 4, 32)])
def test_counts_what_two_pass_multiplies(shape, kind, monkeypatch):
    layer = make_layer(shape, kind, bias=False).float()
    layer.backend = "reference"
    arguments = {}

    def keep(*tensors, **options):
        arguments.update(tensors=tensors, options=options)
        return tensors[0]

    monkeypatch.setitem(dispatch.BACKENDS["reference"].functions, "paired_attention", keep)
    x = torch.randn(shape[:3])
    layer(x)
    tensors, options = arguments["tensors"], arguments["options"]
    seed = options.pop("seed")
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        _, *kept = two_pass.paired_attention(*tensors, seed, **options)
    with torch.no_grad(), FlopCounterMode(display=False) as backward:
        two_pass.paired_attention_bwd(torch.ones_like(x), *tensors, *kept, seed, **options)
    # The count leaves out O(C^2 + CP) between the passes.
    for counter, counted in zip((forward, backward), floor.work(shape, kind), strict=True):
        assert counter.get_total_flops() == pytest.approx(2 * counted.multiply_adds, rel=0.005)


def test_memory_of_autocast():
    """x and y in bfloat16, the projection in float32: megabytes in the design's table."""
    forward, _ = floor.work((1, 32768, 32, 4, 64), "shared", element_bytes=2)
    assert forward.bytes / 1e6 == pytest.approx(6.3 + 8.4, rel=0.01)
    whole, _ = floor.work((1, 32768, 32, 4, 64), "shared")
    assert whole.bytes - forward.bytes == 2 * 3 * 32768 * 32


def test_on_a_gpu_the_slowest_unit_is_the_floor():
    work = floor.Work(multiply_adds=3e9, exponentials=4e9, bytes=5e9)
    seconds = floor.gpu_seconds(work, floor.GpuPeaks(1e12, 1e12, 1e12))
    assert seconds == {"memory": 5e-3, "matrix products": 6e-3, "exponentials": 4e-3}
