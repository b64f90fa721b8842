"""patch_model tries the layer before the swap, and leaves the network as it was."""

import copy
import pickle
import warnings

import pytest
import torch
from cases import KINDS, LAYOUTS
from torch import nn
from torch.nn.utils import prune

import epa_kernels
from epa_kernels import EPA, patch_model

N, C, P, H = 48, 16, 6, 4
X = torch.randn(2, N, C, generator=torch.Generator().manual_seed(0))


class Published(nn.Module):
    """The formulas, written anew, with the choices in which forks differ."""

    layout, scale_keys, norm = "official", True, True

    def __init__(self, kind="shared", **choices):
        super().__init__()
        vars(self).update(choices)
        self.num_heads, self.kind = H, kind
        self.temperature = nn.Parameter(torch.ones(H, 1, 1))
        self.temperature2 = nn.Parameter(torch.ones(H, 1, 1))
        self.qkvv = nn.Linear(C, 4 * C, bias=False)
        if kind == "sum":
            self.EF = nn.Parameter(torch.randn(N, P) * N**-0.5)
        else:
            self.E = nn.Linear(N, P)
            self.F = self.E if kind == "shared" else nn.Linear(N, P)
            self.out_proj, self.out_proj2 = nn.Linear(C, C // 2), nn.Linear(C, C // 2)
        self.attn_drop, self.attn_drop_2 = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x):
        B, tokens, channels = x.shape
        q, k, vc, vs = self.qkvv(x).unflatten(2, (4, self.num_heads, -1)).permute(2, 0, 3, 4, 1)
        if self.kind == "sum":
            kp, vp = k @ self.EF, vs @ self.EF
        else:
            kp, vp = self.E(k), self.F(vs)
        if self.norm:
            q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        channel = self.attn_drop((q @ k.mT * self.temperature).softmax(-1)) @ vc
        logits = q.mT @ kp
        if self.scale_keys:
            logits = logits * self.temperature2
        spatial = self.attn_drop_2(logits.softmax(-1)) @ vp.mT  # (B, H, N, D)
        if self.layout == "official":
            spatial = spatial.permute(0, 3, 1, 2).reshape(B, tokens, channels)
        else:
            spatial = spatial.transpose(1, 2).flatten(2)
        channel = channel.flatten(1, 2).mT
        if self.kind == "sum":
            return spatial + channel
        return torch.cat((self.out_proj(spatial), self.out_proj2(channel)), -1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_is_swapped_with_the_layout_that_it_has(kind, layout):
    model = nn.Sequential(Published(kind, layout=layout)).eval()
    before = model(X)
    assert patch_model(model) == 1
    assert (type(model[0]), model[0].kind, model[0].layout) == (EPA, kind, layout)
    torch.testing.assert_close(model(X), before)


FORKS = {
    # With temperatures of 1, as a new network has them, this fork gives the same.
    "a temperature is not used": {"scale_keys": False},
    "nothing is normalised": {"norm": False},
}


@pytest.mark.parametrize("choices", FORKS.values(), ids=FORKS)
@pytest.mark.parametrize("zero", (False, True), ids=("weights", "zeros"))
def test_a_fork_that_computes_something_else_is_left_alone_and_named(choices, zero):
    model = nn.ModuleDict({"a": Published(), "b": nn.Sequential(Published(**choices))})
    if zero:
        for p in model.parameters():
            nn.init.zeros_(p)
    fork = model["b"][0]
    with pytest.warns(UserWarning, match="1 layers were replaced and 1 left alone: b.0: its forw"):
        patched = patch_model(model)
    assert patched == 1 and "computes something else" in patched.left["b.0"]
    assert model["b"][0] is fork and type(model["a"]) is EPA
    assert pickle.loads(pickle.dumps(patched)).left == copy.copy(patched).left == patched.left


def test_all_are_left_alone_without_an_error():
    with pytest.warns(UserWarning, match="0 layers were replaced and 1 left alone"):
        assert patch_model(nn.Sequential(Published(norm=False))) == 0


def test_a_layer_without_a_forward_has_nothing_to_compare():
    class Bare(Published):
        forward = nn.Module.forward

    assert patch_model(nn.Sequential(Bare())) == 1


def networks():
    yield "training mode", lambda m: m.train()
    yield "half precision", lambda m: m.half()
    yield "bfloat16", lambda m: m.bfloat16()
    yield "meta", lambda m: m.to("meta")
    yield "frozen", lambda m: m.requires_grad_(False)
    yield "zeros", lambda m: [p.data.zero_() for p in m.parameters()] and m
    yield "compiled", lambda m: torch.compile(m)
    yield "data parallel", lambda m: nn.DataParallel(m)


@pytest.mark.parametrize("change", dict(networks()).values(), ids=dict(networks()))
def test_the_network_stays_as_it_was(change):
    model = change(nn.Sequential(Published(), nn.Sequential(Published("sum"))))
    modes = [m.training for m in model.modules()]
    told = [(name, p.data_ptr(), p.requires_grad, p.dtype) for name, p in model.named_parameters()]
    generator = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert patch_model(model) == 2
    assert torch.equal(torch.get_rng_state(), generator)
    assert [m.training for m in model.modules()] == modes
    now = [(name, p.data_ptr(), p.requires_grad, p.dtype) for name, p in model.named_parameters()]
    assert sorted(now) == sorted(told)
    assert all(p.grad is None for p in model.parameters())


def test_hooks_are_carried_over_and_none_fires_in_the_trial():
    model, seen = nn.Sequential(Published()).eval(), []
    layer = model[0]
    layer.note = "mine"
    handles = [
        m.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, m in model.named_modules()
        if name
    ]
    layer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(type(m)), with_kwargs=True)
    layer.register_state_dict_pre_hook(lambda *_: seen.append("saved"))
    before = model(X)
    expected = [Published if each is EPA else each for each in seen]
    seen.clear()
    patch_model(model)
    assert seen == [] and model[0].note == "mine"
    with pytest.warns(UserWarning, match="has forward hooks"):
        torch.testing.assert_close(model(X), before)
    assert [Published if each is EPA else each for each in seen] == expected
    seen.clear()
    model.state_dict()
    assert seen == ["saved"]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(X)
    assert seen == [EPA]


@pytest.mark.filterwarnings("ignore")
def test_what_hangs_on_parts_keeps_its_effect():
    model = nn.Sequential(Published()).eval()
    prune.l1_unstructured(model[0].qkvv, "weight", 0.5)
    nn.utils.parametrizations.weight_norm(model[0].E)
    model[0].last_map = model(X) * 1  # a map kept for a picture cannot be copied
    before = model(X)
    assert patch_model(model) == 1
    torch.testing.assert_close(model(X), before)


def test_the_backend_that_is_forced_does_not_matter_to_the_trial():
    with epa_kernels.use_backend("two_pass"):
        assert patch_model(nn.Sequential(Published())) == 1


class DropsItsResult(Published):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def test_a_fork_that_trains_another_way_is_left_alone():
    model = nn.Sequential(DropsItsResult())
    with pytest.warns(UserWarning, match="something else in training mode"):
        assert patch_model(model) == 0


def test_a_wrapper_that_hands_out_attributes_is_no_layer():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    model = nn.Sequential(Wrapper(Published()))
    patched = patch_model(model)
    assert patched == 1 and patched.left == {} and type(model[0].inner) is EPA
