"""The layer: parameters, autocast, strides, errors, and the drop-in for published models."""

import pytest
import torch
from cases import BACKENDS, KINDS
from torch import nn

import epa_kernels
from epa_kernels import EPA
from epa_kernels.testing import DEVICE, make_layer

KEYS = {
    "shared": [
        "temperature", "temperature2", "qkvv.weight", "E.weight", "E.bias", "F.weight", "F.bias",
        "out_proj.weight", "out_proj.bias", "out_proj2.weight", "out_proj2.bias",
    ],
    "sum": ["temperature", "temperature2", "EF", "qkvv.weight"],
}  # fmt: skip
KEYS["split"] = KEYS["shared"]


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_is_the_published_one(kind):
    layer = EPA(20, 8, 5, kind=kind)
    assert list(layer.state_dict()) == KEYS[kind]
    assert (kind == "shared") == (getattr(layer, "E", 0) is getattr(layer, "F", 1))
    other = EPA(20, 8, 5, kind=kind)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 20, 8)
    assert torch.equal(layer.eval()(x), other.eval()(x))


@pytest.mark.parametrize("N", (20, 70), ids=("direct", "two_pass"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_of_x(backend, N):
    """Tokens as transposed views of NCDHW and of channels-last volumes, as networks have them."""
    layer = EPA(N, 8, 5, backend=backend, device=DEVICE).eval()
    volume = torch.randn(2, 8, N, 1, 1, device=DEVICE)
    expected = layer(volume.flatten(2).transpose(1, 2).contiguous())
    channels_last = volume.to(memory_format=torch.channels_last_3d)
    for v in (volume, channels_last):
        v = v.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(v.flatten(2).transpose(1, 2))
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        assert v.grad.isfinite().all() and v.grad.abs().sum() > 0
    expanded = torch.randn(1, 1, 8, device=DEVICE).expand(2, N, 8)
    torch.testing.assert_close(layer(expanded), layer(expanded.contiguous()))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, kind, dtype):
    layer = make_layer((2, 70, 16, 2, 9), kind).float()
    layer.backend = backend
    x = torch.randn(2, 70, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact = layer(x)
    with torch.autocast(DEVICE, dtype):
        y = layer(x.requires_grad_())
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters()
    )
    assert (y.float() - exact).norm() <= 8 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_float64_alone(backend):
    layer = EPA(20, 8, 5, backend=backend, device=DEVICE).double()
    x = torch.randn(1, 20, 8, dtype=torch.float64, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer(x).dtype == torch.float64


def test_dropout_follows_mode_and_torch_s_seed():
    layer = EPA(30, 8, 5, channel_attn_drop=0.5, spatial_attn_drop=0.5)
    x = torch.randn(1, 30, 8)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.attn_drop_2.train()  # Monte Carlo dropout: only the dropout modules are in train mode
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    "call, message",
    (
        (lambda: EPA(20, 9, 5), "multiple of num_heads, got 9 and 4"),
        (lambda: EPA(20, 9, 5, 3), "hidden_size must be even"),
        (lambda: EPA(0, 8, 5), "input_size must be at least 1"),
        (lambda: EPA(20, 8, 5, kind="both"), "kind must be one of shared, split, sum"),
        (lambda: EPA(20, 8, 5, layout="heads"), "layout must be one of official, tokens"),
        (
            lambda: EPA(20, 8, 5)(torch.randn(2, 21, 8)),
            r"\(P, N\) = \(5, 21\), got \(5, 20\); a layer is bound",
        ),
        (lambda: EPA(20, 8, 5)(torch.randn(2, 20, 12)), r"qkvv_weight must have shape"),
        (lambda: EPA(20, 8, 5)(torch.randn(0, 20, 8)), "must not be empty"),
        (lambda: EPA(20, 8, 5)(torch.randn(2, 8, 20, 1, 1)), "becomes tokens by"),
        (lambda: EPA(20, 8, 5)(torch.randn(2, 20, 8).double()), "float32 but x is torch.float64"),
        (lambda: EPA(20, 8, 5)(torch.randn(2, 20, 8, device="meta")), "is on cpu but x is on meta"),
        (lambda: EPA(20, 8, 5)(torch.ones(2, 20, 8).int()), "floating tensor"),
    ),
)
def test_bad_input_is_refused_with_the_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "change, message",
    (
        ({"kind": "split"}, "kind 'split' needs proj_v_weight, got None"),
        (
            {"kind": "sum"},
            "kind 'sum' takes no out_proj_weight, as kind shared or split does; pass None",
        ),
        ({"out_proj2_weight": None}, "kind 'shared' needs out_proj2_weight"),
        ({"proj_v_bias": torch.ones(5)}, "kind 'shared' takes no proj_v_bias, as kind split does"),
        (
            {"proj_k_weight": torch.ones(0, 20)},
            "must have at least one projected token",
        ),
        ({"num_heads": 3}, "num_heads must divide the 8 channels"),
        ({"temperature": torch.ones(4)}, "temperature must have shape"),
        ({"channel_dropout_p": -0.1}, r"channel_dropout_p must be in \[0, 1\)"),
        ({"spatial_dropout_p": 0.1, "seed": torch.tensor(1.0)}, "seed must be an int64"),
        ({"out_proj_bias": torch.ones(8)}, "out_proj_bias must have shape"),
    ),
)
def test_functional_refuses_what_contradicts(change, message):
    layer = EPA(20, 8, 5)
    arguments = {
        "qkvv_weight": layer.qkvv.weight, "qkvv_bias": None, "proj_k_weight": layer.E.weight,
        "proj_k_bias": layer.E.bias, "proj_v_weight": None, "proj_v_bias": None,
        "temperature": layer.temperature, "temperature2": layer.temperature2,
        "out_proj_weight": layer.out_proj.weight, "out_proj_bias": layer.out_proj.bias,
        "out_proj2_weight": layer.out_proj2.weight, "out_proj2_bias": layer.out_proj2.bias,
        "num_heads": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        epa_kernels.paired_attention(torch.randn(2, 20, 8), **arguments | change)


class PublishedEPA(nn.Module):
    """A layer with the attributes of the published one; its forward is the reference's."""

    def __init__(self, N, C, P, H, kind):
        super().__init__()
        ours = EPA(N, C, P, H, channel_attn_drop=0.2, spatial_attn_drop=0.3, kind=kind)
        for name, value in (*ours.named_parameters(recurse=False), *ours._modules.items()):
            setattr(self, name, value)
        self.ours = [ours]  # in a list, so that it is no submodule

    def forward(self, x):
        with epa_kernels.use_backend("reference"):
            return self.ours[0].train(self.training)(x)


class PublishedNetwork(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.Sequential(*(PublishedEPA(40, 8, 5, 2, kind) for _ in range(2)))
        self.again = self.blocks[0]
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.again(self.blocks(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_patched_model_gives_the_same_and_trains_the_same(kind):
    model = PublishedNetwork(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 40, 8)
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    before = model.eval()(x)
    expected = torch.autograd.grad(before.square().sum(), list(model.parameters()))

    assert epa_kernels.patch_model(model) == 2
    assert all(type(block) is EPA and block.kind == kind for block in model.blocks)
    assert model.again is model.blocks[0]
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    after = model(x)
    torch.testing.assert_close(after, before)
    after.square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    optimizer.step()
    assert not torch.equal(model(x), after)
    assert (model.again.attn_drop.p, model.again.attn_drop_2.p) == (0.2, 0.3)
    assert not model.again.training and model.train().again.training


def test_patch_model_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="Linear contains no published EPA layer"):
        epa_kernels.patch_model(nn.Linear(2, 2))

    for change, reason in (
        (lambda layer: setattr(layer, "E", nn.Linear(40, 6)), "unknown shape: F (40, 5) instead"),
        (lambda layer: setattr(layer, "gate", nn.Linear(8, 8)), "it has besides gate"),
        (lambda layer: delattr(layer, "attn_drop"), "it lacks attn_drop"),
        (lambda layer: setattr(layer, "forward", layer.forward), "was replaced on the object"),
        (lambda layer: setattr(layer, "num_heads", 3) or layer.ours.clear(), "forward failed on"),
    ):
        model = PublishedNetwork("shared")
        change(model.blocks[1])
        with pytest.warns(UserWarning, match="1 layers were replaced and 1 left alone: blocks.1"):
            patched = epa_kernels.patch_model(model)
        assert patched == 1 and list(patched.left) == ["blocks.1"]
        assert reason in patched.left["blocks.1"]
        assert [type(block) for block in model.blocks] == [EPA, PublishedEPA]


def test_patch_model_twice_finds_nothing_more():
    model = PublishedNetwork("sum")
    epa_kernels.patch_model(model)
    with pytest.raises(
        ValueError, match="PublishedNetwork holds [0-9] layer.s. of epa_kernels already"
    ):
        epa_kernels.patch_model(model)
