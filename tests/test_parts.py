"""A layer whose parts are not plain calls them, with the same numbers."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from cases import KINDS, LAYOUTS
from torch import nn
from torch.nn.utils import parametrizations, prune

import epa_kernels
from epa_kernels import EPA, parts

X = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
PARTS = ("qkvv", "E", "F", "out_proj", "out_proj2")


def make(kind="shared", drop=0.0, **options):
    torch.manual_seed(0)
    layer = EPA(64, 32, 16, channel_attn_drop=drop, spatial_attn_drop=drop, kind=kind, **options)
    with torch.no_grad():
        layer.temperature.mul_(3)
        layer.temperature2.mul_(20)
    return layer


class Adapter(nn.Module):
    """As libraries write it: the base layer's weight is still visible."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def hook(*_):
    return None


def own_forward(layer):
    """As accelerate hangs its hooks in."""
    layer.qkvv.forward = layer.qkvv.forward


class Stochastic(nn.Dropout):
    """Monte Carlo dropout, in eval mode, too."""

    def forward(self, x):
        return nn.functional.dropout(x, self.p, training=True)


SAME = {
    "forward hook": (lambda m: m.qkvv.register_forward_hook(hook), "qkvv has forward hooks"),
    "forward pre-hook": (
        lambda m: m.out_proj.register_forward_pre_hook(hook),
        "out_proj has forward pre hooks",
    ),
    "backward hook": (
        lambda m: m.out_proj2.register_full_backward_hook(hook),
        "out_proj2 has backward hooks",
    ),
    "backward pre-hook": (
        lambda m: m.E.register_full_backward_pre_hook(hook),
        "E has backward pre hooks",
    ),
    "hook on dropout": (
        lambda m: m.attn_drop_2.register_forward_hook(hook),
        "attn_drop_2 has forward hooks",
    ),
    "own forward": (own_forward, "qkvv has a forward of its own"),
    "weight norm": (lambda m: parametrizations.weight_norm(m.E), "E is a ParametrizedLinear"),
    "old weight norm": (lambda m: nn.utils.weight_norm(m.qkvv), "qkvv has forward pre hooks"),
    "identity prune": (lambda m: prune.identity(m.qkvv, "weight"), "qkvv has forward pre hooks"),
    "sequential": (lambda m: setattr(m, "qkvv", nn.Sequential(m.qkvv)), "qkvv is a Sequential"),
}


@pytest.mark.parametrize("change, reason", SAME.values(), ids=SAME)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_those_of_the_fused_layer(change, reason, layout, capsys):
    fused, layer = make("split", layout=layout), make("split", layout=layout)
    change(layer)
    with pytest.warns(UserWarning, match=f"{reason}.* calls its modules") as told:
        y = layer(X)
    layer(X)
    assert len(told) == 1
    torch.testing.assert_close(y, fused(X))
    with epa_kernels.use_backend("reference"):
        torch.testing.assert_close(layer(X), fused(X))
    y.square().sum().backward()
    fused(X).square().sum().backward()
    torch.testing.assert_close(layer.temperature2.grad, fused.temperature2.grad)
    capsys.readouterr()
    epa_kernels.explain(layer, X)
    printed = capsys.readouterr().out
    assert f"the layer calls its modules and is not fused: {reason}" in printed
    assert "channel_attention on cpu float32, B = 2, N = 64, C = 32, H = 4, D = 8\n" in printed
    assert ("spatial_attention on" in printed) == ("attn_drop_2" not in reason)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_those_of_the_fused_layer(kind):
    fused, layer = make(kind, 0.3), make(kind, 0.3)
    layer.qkvv.register_forward_hook(hook)
    results = []
    for each in (fused, layer):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(each(X))
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0], fused(X))


def test_a_plain_layer_is_fused_and_says_nothing(monkeypatch):
    monkeypatch.setattr(parts, "call", lambda *_: pytest.fail("modules are called"))
    layer = make()
    layer.register_forward_hook(hook)  # hooks on the layer itself do not concern its parts
    layer.attn_drop = nn.Identity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(X)
        pickle.loads(pickle.dumps(layer.eval()))(X)
        copy.deepcopy(layer.requires_grad_(False))(X)


def test_every_hook_fires_as_often_as_in_the_published_layer():
    layer, seen = make(), []
    for name, module in layer.named_modules():
        if name:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with pytest.warns(UserWarning):
        y = layer(X)
    expected = ["qkvv", "E", "E", "attn_drop", "attn_drop_2", "out_proj", "out_proj2"]
    assert seen == expected
    torch.testing.assert_close(y, make()(X))


def test_a_hook_on_every_module_fires_but_torch_s_own_watch_only(monkeypatch):
    layer, seen = make(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        with pytest.warns(UserWarning, match="every module has a hook of test_parts"):
            layer(X)
    finally:
        handle.remove()
    assert {layer.qkvv, layer.E, layer.out_proj, layer.out_proj2} <= set(seen)
    monkeypatch.setattr(parts, "call", lambda *_: pytest.fail("modules are called"))
    layer(X)
    from torch.utils.module_tracker import ModuleTracker

    with ModuleTracker():
        layer(X)


@pytest.mark.parametrize("name", PARTS)
def test_an_adapter_has_its_effect_and_trains(name):
    layer = make("split").requires_grad_(False)
    before = layer(X)
    setattr(layer, name, Adapter(getattr(layer, name)))
    with pytest.warns(UserWarning, match=f"{name} is a Adapter"):
        y = layer(X)
    assert (y - before).abs().max() > 1e-4
    y.sum().backward()
    assert getattr(layer, name).up.weight.grad.abs().sum() > 0
    assert getattr(layer, name).base.weight.grad is None


@pytest.mark.filterwarnings("ignore")
def test_what_torch_does_to_linear_layers_has_its_effect():
    layer = make()
    before = layer(X).detach()
    prune.l1_unstructured(layer.qkvv, "weight", 0.5)
    for _ in range(2):
        layer(X).square().mean().backward()
    assert not torch.equal(layer(X), before)

    layer = make()
    nn.utils.weight_norm(layer.qkvv)
    torch.testing.assert_close(layer(X), before)
    layer.qkvv.weight_g.data.mul_(3)
    assert not torch.allclose(layer(X), before)

    layer = make()
    parametrizations.spectral_norm(layer.E)
    assert not torch.allclose(layer(X), before)

    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(make().eval()), {nn.Linear})
    assert (quantized(X) - before).norm() < 0.1 * before.norm()


@pytest.mark.filterwarnings("ignore")
def test_other_dropout_modules_are_called_with_the_map():
    layer = make(drop=0.2).eval()
    expected = layer(X)
    for name in ("attn_drop", "attn_drop_2"):
        setattr(layer, name, Stochastic(0.0))
    torch.testing.assert_close(layer(X), expected)
    layer.attn_drop_2.p = 0.5
    assert not torch.equal(layer(X), layer(X))
    layer = make(drop=1.0).train()  # every weight is dropped, which leaves the biases
    y = layer(X)
    torch.testing.assert_close(y[..., :16], layer.out_proj.bias.expand(2, 64, 16))


def test_a_second_token_projection_counts():
    layer = make()
    layer.F = nn.Linear(64, 16)
    split = make("split")
    split.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(X), split(X))


@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_calls_its_modules_compiles_and_exports():
    layer = make().eval()
    layer.qkvv = Adapter(layer.qkvv)
    expected = layer(X)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected)
    program = torch.export.export(layer, (X,))
    assert not [node for node in program.graph.nodes if "epa_kernels" in str(node.target)]
    torch.testing.assert_close(program.module()(X), expected)


def test_a_compiled_layer_notices_an_adapter():
    layer = make().eval()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    before = compiled(X)
    layer.qkvv = Adapter(layer.qkvv)
    assert not torch.allclose(compiled(X), before)


def test_bad_tokens_are_refused_as_by_the_fused_layer():
    layer = make()
    layer.qkvv.register_forward_hook(hook)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="becomes tokens by"):
        layer(torch.randn(2, 32, 4, 4, 4))


def test_torchscript_is_refused_in_words():
    with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile .*torch.jit.trace"):
        torch.jit.script(nn.Sequential(make()))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_drawn_anew_as_at_construction(kind):
    torch.manual_seed(3)
    expected = EPA(20, 8, 5, 2, qkv_bias=True, kind=kind)
    layer = EPA(20, 8, 5, 2, qkv_bias=True, kind=kind, device="meta").to_empty(device="cpu")
    assert kind != "shared" or layer.E is layer.F
    torch.manual_seed(3)
    layer.reset_parameters()
    for name, value in expected.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value), name
    assert all(p.requires_grad for p in layer.parameters())
    layer.qkvv = Adapter(layer.qkvv)
    before = layer.qkvv.base.weight.detach().clone()
    layer.reset_parameters()
    assert torch.equal(layer.qkvv.base.weight, before)


def test_a_saved_layer_loads_whole():
    buffer = io.BytesIO()
    layer = make().eval()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(X), layer(X))


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_that_was_replaced_on_nn_linear_counts(kind, monkeypatch):
    layer = make(kind)
    plain, forward = layer(X), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda part, t: 2 * forward(part, t))
    with pytest.warns(UserWarning, match="nn.Linear.forward was replaced"):
        assert not torch.allclose(layer(X), plain, atol=0.1)
    monkeypatch.undo()
    torch.testing.assert_close(layer(X), plain)
