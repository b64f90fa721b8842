"""The networks as the benchmark runs them for comparison, in the published order, are the same."""

import golden
import pytest
import torch

from benchmarks.published import published_order
from epa_kernels.testing import relative_l2
from unetrpp.models import create_model


@pytest.mark.parametrize("name", ["segformer3d", "slim_unetr"])
def test_published_order_of_the_benchmark_is_the_same_function(name):
    torch.manual_seed(0)
    model = create_model(name, "brats", img_size=(64, 32, 64)).double()
    model.load_state_dict(golden.fill_sibling(golden.entries_of(model), name))
    model.eval()
    x = torch.randn(2, 4, 64, 32, 64, dtype=torch.float64)

    def gradients():
        model.zero_grad()
        y = model(x)
        y.square().mean().backward()
        return y.detach(), [p.grad.clone() for p in model.parameters()]

    y, grads = gradients()
    with published_order():
        published_y, published_grads = gradients()
    assert relative_l2(y, published_y) < 1e-12
    assert not torch.equal(y, published_y), "nothing was exchanged"
    for ours, theirs in zip(grads, published_grads, strict=True):
        assert (ours - theirs).norm() <= 1e-10 * theirs.norm() + 1e-14
