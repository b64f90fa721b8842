"""Each name of torch's private API exists, and where it does not, something else serves."""

import pytest
import torch

from epa_kernels import torch_private
from epa_kernels.torch_private import (
    AUTOGRAD_NAMES,
    CONSTANT_MARK,
    EXPORTING,
    GLOBAL_HOOKS,
    GRAPH_TASK,
    MODULE_HOOKS,
    SLEEP,
    STORE,
    TRANSFORMS,
    WITHOUT_MODES,
)


def test_modules_have_their_hooks_under_these_names():
    assert set(MODULE_HOOKS) <= set(vars(torch.nn.Module()))


@pytest.mark.parametrize(
    "name",
    (
        *AUTOGRAD_NAMES,
        SLEEP,
        *GLOBAL_HOOKS,
        TRANSFORMS,
        WITHOUT_MODES,
        GRAPH_TASK,
        STORE,
        EXPORTING,
    ),
)
def test_torch_has_the_name(name):
    assert torch_private.find(name) is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", (SLEEP, "cuda.no_such_name"))
def test_a_gpu_is_kept_busy(name, monkeypatch):
    monkeypatch.setattr(torch_private, "SLEEP", name)
    end = torch.cuda.Event()
    torch_private.busy_gpu(40_000_000)
    end.record()
    assert not end.query()


def test_the_mark_is_that_of_assume_constant_result():
    def answer():
        return 3

    assert not hasattr(answer, CONSTANT_MARK)
    torch.compiler.assume_constant_result(answer)
    assert getattr(answer, CONSTANT_MARK) is True
    assert getattr(torch_private.constant_result(lambda: 3), CONSTANT_MARK) is True


@pytest.mark.parametrize("missing", (None, *AUTOGRAD_NAMES))
def test_autograd_is_registered_with_and_without_each_name(missing, monkeypatch):
    """y = a x and what is kept, in a library of its own."""
    find = torch_private.find
    monkeypatch.setattr(torch_private, "find", lambda name: None if name == missing else find(name))
    namespace = f"epa_kernels_test_{'none' if missing is None else missing.replace('.', '_')}"
    library = torch.library.Library(namespace, "DEF")
    library.define("scale(Tensor x, Tensor? seed, *, float a) -> (Tensor, Tensor)")
    library.impl("scale", lambda x, seed, *, a: (a * x, x.new_tensor([a])), "CPU")
    op = getattr(torch.ops, namespace).scale.default

    def save(ctx, inputs, options, results):
        ctx.save_for_backward(results[1])
        ctx.mark_non_differentiable(results[1])
        ctx.options = options

    def gradients(ctx, dout, _):
        (kept,) = ctx.saved_tensors
        assert kept.item() == ctx.options["a"]
        return dout * kept, None

    torch_private.register_autograd(library, op, save, gradients)
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y, kept = op(x, None, a=2.5)
    assert torch.equal(y, 2.5 * x) and not kept.requires_grad
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.5))
    with torch.no_grad():
        assert not op(x, None, a=2.5)[0].requires_grad
    if missing is None:
        with pytest.raises(RuntimeError, match="scale: .* neither forward-mode"):
            torch.func.grad(lambda t: op(t, None, a=2.5)[0].sum())(x.detach())


@pytest.mark.parametrize("has_flag", (True, False))
def test_an_export_is_told_from_compiling(has_flag, monkeypatch):
    if not has_flag and torch.__version__.startswith("2.8."):
        pytest.skip("torch 2.8 says yes to both")
    monkeypatch.setattr(torch_private, "_has_exporting", has_flag)

    class Told(torch.nn.Module):
        def forward(self, x):
            return x + 2 if torch_private.is_exporting() else x + 1

    zero = torch.zeros(1)
    torch._dynamo.reset()
    assert torch.compile(Told(), backend="eager", fullgraph=True)(zero) == 1
    for strict in (True, False):
        assert torch.export.export(Told(), (zero,), strict=strict).module()(zero) == 2
