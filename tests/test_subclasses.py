"""Subclasses of torch.Tensor go through the layer and the ops as they do through nn.Linear."""

import pytest
import torch
from cases import BACKENDS
from torch import nn
from torch.utils._pytree import tree_map

import epa_kernels
from epa_kernels import EPA, channel_attention, spatial_attention
from epa_kernels.testing import DEVICE


class Named(torch.Tensor):
    """A name and nothing else."""


class Described(torch.Tensor):
    """Its methods take other arguments than torch's."""

    def new_empty(self, size, dtype=None, device=None):
        return super().new_empty(tuple(size), dtype=dtype, device=device)

    def contiguous(self):
        raise AssertionError("kernels are not to call methods of a subclass")


class Unwrapped(torch.Tensor):
    """Gives plain results, as torchvision's tensors do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """Wraps a tensor and knows torch's own operators alone, as DTensor does."""

    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace != "aten":
            raise NotImplementedError(f"no rule for {func}")

        def inner(t):
            return t.inner if isinstance(t, Wrapped) else t

        result = func(*tree_map(inner, args), **tree_map(inner, kwargs or {}))
        return tree_map(lambda t: Wrapped(t) if isinstance(t, torch.Tensor) else t, result)


def meta_tensor(t):
    return pytest.importorskip("monai.data").MetaTensor(t, meta={"filename": "a.nii.gz"})


CLASSES = {
    "Parameter": nn.Parameter,
    "Buffer": nn.Buffer,
    "Named": lambda t: t.as_subclass(Named),
    "Described": lambda t: t.as_subclass(Described),
    "Unwrapped": lambda t: t.as_subclass(Unwrapped),
    "MetaTensor": meta_tensor,
    "Parameter of a MetaTensor": lambda t: nn.Parameter(meta_tensor(t)),
}


@pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_of_the_class_that_linear_gives(backend, make):
    N = 20
    layer, linear = EPA(N, 8, 5, 2, backend=backend, device=DEVICE).eval(), nn.Linear(8, 8)
    linear.to(DEVICE)
    x, q, k = (torch.randn(1, *shape, device=DEVICE) for shape in ((N, 8), (N, 2, 4), (5, 2, 4)))
    temperature = torch.ones(2, 1, 1, device=DEVICE)
    for dtype in (None, torch.bfloat16):
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            given = make(x.clone()).requires_grad_()
            like, y, expected = linear(given), layer(given), layer(x)
            heads, projected = make(q.clone()), make(k.clone())
            others = (
                spatial_attention(heads, projected, projected, temperature, backend=backend),
                channel_attention(heads, heads, heads, temperature, backend=backend),
            )
        assert {type(y), *map(type, others)} == {type(like)}
        assert y.dtype == like.dtype
        assert getattr(y, "meta", None) == getattr(like, "meta", None)
        assert torch.equal(y.as_subclass(torch.Tensor), expected)
        y.sum().backward()
        assert given.grad.isfinite().all()


def test_a_class_that_decides_on_operators_gets_plain_ones(capsys):
    layer, x = EPA(20, 8, 5, 2, device=DEVICE).eval(), torch.randn(1, 20, 8, device=DEVICE)
    y = layer(Wrapped(x))
    assert type(y) is type(nn.Linear(8, 8, device=DEVICE)(Wrapped(x))) is Wrapped
    with epa_kernels.use_backend("reference"):
        torch.testing.assert_close(y.inner, layer(x))
    epa_kernels.explain(layer, Wrapped(x))
    printed = capsys.readouterr().out
    assert "Wrapped decides itself what an operator does" in printed
    assert "reference  runs" in printed
    with pytest.raises(NotImplementedError, match="no rule for"):  # no fall back from a forced one
        layer.backend = "two_pass"
        layer(Wrapped(x))


def test_weights_that_decide_on_operators_are_left_to_their_modules():
    layer, x = EPA(20, 8, 5, 2, device=DEVICE).eval(), torch.randn(1, 20, 8, device=DEVICE)
    expected = layer(x)
    layer.qkvv.weight = nn.Parameter(Wrapped(layer.qkvv.weight.detach()), requires_grad=False)
    with torch.no_grad(), pytest.warns(UserWarning, match="qkvv has parameters of class Wrapped"):
        torch.testing.assert_close(layer(x).inner, expected)


def test_a_compiled_layer_takes_meta_tensors():
    x = meta_tensor(torch.randn(1, 20, 8))
    torch.compiler.reset()
    layer = EPA(20, 8, 5, 2).eval()
    compiled, expected = torch.compile(layer), layer(x).as_tensor()
    with torch.no_grad():
        y = compiled(x)
        if not torch.__version__.startswith("2.8."):  # which compiles nn.Linear with the class kept
            assert type(y) is type(torch.compile(nn.Linear(8, 8))(x))
    torch.testing.assert_close(torch.Tensor(y), expected)
    y = compiled(x)  # trains, with a plain result; nn.LayerNorm fails
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert layer.qkvv.weight.grad.abs().sum() > 0


def test_monai_s_trainer_trains_the_layer():
    engines = pytest.importorskip("monai.engines")
    pytest.importorskip("ignite", reason="MONAI's trainer needs pytorch-ignite")
    layer = EPA(20, 8, 5, 2)
    before = layer.qkvv.weight.detach().clone()
    batch = {"image": meta_tensor(torch.randn(1, 20, 8)), "label": torch.zeros(1, 20, 8)}
    trainer = engines.SupervisedTrainer(
        torch.device("cpu"), 1, [batch], layer, torch.optim.SGD(layer.parameters(), 0.1),
        nn.MSELoss(), epoch_length=1,
    )  # fmt: skip
    trainer.run()
    assert not torch.equal(layer.qkvv.weight, before)


def test_derivatives_of_torch_func_need_no_setting():
    # Not "shared": functional_call itself does not put back a module that is held twice.
    layer = EPA(20, 8, 5, 2, kind="split", device=DEVICE).eval()
    x = torch.randn(2, 20, 8, device=DEVICE)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(each[name].sum(0), p.grad, rtol=1e-3, atol=1e-3)
    tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]
    assert tangent.abs().sum() > 0
