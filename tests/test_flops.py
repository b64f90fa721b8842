"""Every backend counts the floating-point operations that the reference counts."""

import subprocess
import sys

import pytest
import torch
from cases import CHILD_ENVIRONMENT, FUSED_BACKENDS, KINDS, daily_if_interpreted

import epa_kernels
from epa_kernels.testing import DEVICE, make_layer

N, C, H, P = 40, 16, 2, 6


def count(call, backend):
    from torch.utils.flop_counter import FlopCounterMode

    with epa_kernels.use_backend(backend), FlopCounterMode(display=False) as counter:
        y = call()
        forward = counter.get_total_flops()
        if y.requires_grad:
            y.square().sum().backward()
    return forward, counter.get_total_flops() - forward


FROZEN = ((), ("qkvv",), ("E", "F"), ("temperature2", "out_proj"), ("qkvv", "temperature"))


@daily_if_interpreted({"kind": ("split",), "grad": (True,), "frozen": ((),)})
@pytest.mark.parametrize("frozen", FROZEN, ids="-".join)
@pytest.mark.parametrize("grad", (False, True))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_the_layer_counts_as_the_reference(backend, kind, grad, frozen):
    layer = make_layer((2, N, C, H, P), kind).float()
    x = torch.randn(2, N, C, device=DEVICE, requires_grad=grad)
    for name in frozen:
        if hasattr(layer, name):
            getattr(layer, name).requires_grad_(False)
    expected = count(lambda: layer(x), "reference")
    assert count(lambda: layer(x), backend) == expected
    assert expected[0] > 0 and expected[1] > 0
    with torch.no_grad():
        assert count(lambda: layer(x), backend) == (expected[0], 0)


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_ops_on_heads_count_as_the_reference(backend):
    q, k, k_proj = (torch.randn(2, n, H, 8, device=DEVICE) for n in (N, N, P))
    temperature = torch.ones(H, 1, 1, device=DEVICE, requires_grad=True)
    for tensors in ((), (q,), (k, k_proj), (q, k, k_proj)):
        for t in (q, k, k_proj):
            t.requires_grad_(any(t is each for each in tensors))
        for call in (
            lambda: epa_kernels.channel_attention(q, k, k, temperature),
            lambda: epa_kernels.spatial_attention(q, k_proj, k_proj, temperature, normalize=True),
        ):
            assert count(call, backend) == count(call, "reference")


@pytest.mark.parametrize("ours_first", (True, False))
def test_the_order_of_imports_does_not_matter(ours_first):
    imports = ["import epa_kernels", "from torch.utils.flop_counter import FlopCounterMode"]
    code = "\n".join(
        (
            "import sys, torch; finders = list(sys.meta_path)",
            *(imports if ours_first else imports[::-1]),
            "layer, x = epa_kernels.EPA(40, 16, 6), torch.randn(1, 40, 16)",
            "with FlopCounterMode(display=False) as counter: layer(x)",
            "print(counter.get_total_flops() > 0, sys.meta_path == finders)",
        )
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=CHILD_ENVIRONMENT
    )
    assert run.stdout.split() == ["True", "True"], run.stderr
