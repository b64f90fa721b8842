"""Spatial and channel attention on their own: every backend against the reference."""

import pytest
import torch
from cases import (
    BACKENDS,
    COMPILED_BACKENDS,
    DRAWS,
    FUSED_BACKENDS,
    INTERPRETED,
    daily_if_interpreted,
    draws,
)

import epa_kernels
from epa_kernels import channel_attention, spatial_attention
from epa_kernels.backends import two_pass
from epa_kernels.testing import DEVICE, Errors, relative_l2, strided

# B, N, P, H, D
SHAPES = ((2, 1, 3, 2, 1), (1, 65, 33, 3, 8), (2, 513, 1, 1, 20), (1, 90, 70, 2, 65))


def shape_id(shape):
    return "B{}N{}P{}H{}D{}".format(*shape)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setitem(two_pass.TILE_ELEMENTS, DEVICE, 1)


def make_inputs(op, shape, dtype, per_head=True, draw=1):
    """The op's differentiable inputs, slices of larger tensors, and the gradient of its output."""
    B, N, P, H, D = shape
    generator = torch.Generator().manual_seed(draw)
    keys = (B, P, H, D) if op is spatial_attention else (B, N, H, D)
    q, k, v, dout = (
        strided(*s, dtype=dtype, generator=generator)
        for s in ((B, N, H, D), keys, keys, (B, N, H, D))
    )
    temperature = 2 * torch.rand(H if per_head else 1, 1, 1, generator=generator) + 0.5
    return [t.requires_grad_() for t in (q, k, v, temperature.to(DEVICE, dtype))], dout


def run(op, inputs, dout, backend, dtype, **options):
    inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    out = op(*inputs, backend=backend, **options)
    gradients = torch.autograd.grad(out, inputs, dout.to(dtype))
    return dict(zip(("out", "q", "k", "v", "temperature"), (out.detach(), *gradients), strict=True))


DROPOUT = {"dropout_p": 0.2, "seed": torch.tensor(5, device=DEVICE)}
OPTIONS = (
    (channel_attention, {}),
    (channel_attention, DROPOUT),
    (spatial_attention, {"normalize": False}),
    (spatial_attention, {"normalize": True}),
    (spatial_attention, {"normalize": True, **DROPOUT}),
)
OPTION_IDS = ("channel", "channel-dropout", "spatial", "spatial-normalize", "spatial-dropout")


@daily_if_interpreted({"per_head": (True,)}, {"shape": (SHAPES[1],)})
@pytest.mark.parametrize("per_head", (True, False), ids=("per-head", "one-temperature"))
@pytest.mark.parametrize("op, options", OPTIONS, ids=OPTION_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_matches_the_reference_in_float64(backend, shape, op, options, per_head):
    inputs, dout = make_inputs(op, shape, torch.float64, per_head)
    exact = run(op, inputs, dout, "reference", torch.float64, **options)
    found = run(op, inputs, dout, backend, torch.float64, **options)
    for name, truth in exact.items():
        # Where N = 1 the normalised q has no gradient: zero against rounding.
        scale = max(truth.abs().max().item(), 1e-3 * exact["out"].abs().max().item())
        assert (found[name] - truth).abs().max() <= 1e-11 * scale, name


def is_daily(backend, shape, options, dtype, op):
    """Of an interpreted backend every option in 16 bits, and each op in float32."""
    if backend not in INTERPRETED:
        return True
    if dtype == torch.float32:
        return shape == SHAPES[1] and "seed" in options
    return shape == (SHAPES[1] if dtype == torch.bfloat16 else SHAPES[3])


@pytest.mark.daily.with_args(is_daily)
@pytest.mark.parametrize("dtype", DRAWS)
@pytest.mark.parametrize("op, options", OPTIONS, ids=OPTION_IDS)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=shape_id)
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_low_precision_is_as_accurate_as_the_reference(backend, shape, op, options, dtype):
    errors = Errors()
    for draw in draws(dtype, backend):
        inputs, dout = make_inputs(op, shape, dtype, draw=draw)
        exact = run(op, inputs, dout, "reference", torch.float64, **options)
        same_dtype = run(op, inputs, dout, "reference", dtype, **options)
        errors.add(run(op, inputs, dout, backend, dtype, **options), same_dtype, exact)
    errors.check()


@daily_if_interpreted({"projected": (70,)}, {"op": (channel_attention,)})
@pytest.mark.parametrize(
    "op, options, projected",
    [
        pytest.param(op, options, projected, id=f"{name}-P{projected}")
        for name, (op, options) in zip(OPTION_IDS, OPTIONS, strict=True)
        for projected in ((33, 70) if op is spatial_attention else (33,))
    ],
)
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_small_gradients_keep_their_digits_in_float16(backend, op, options, projected):
    inputs, dout = make_inputs(op, (1, 500, projected, 2, 8), torch.float16)
    dout = dout * 1e-5
    exact = run(op, inputs, dout, "reference", torch.float64, **options)
    same_dtype = run(op, inputs, dout, "reference", torch.float16, **options)
    found = run(op, inputs, dout, backend, torch.float16, **options)
    # The gradient of a normalised q is rounded twice.
    for name, factor in (("q", 1.5), ("k", 1.1), ("v", 1.1)):
        allowed = relative_l2(same_dtype[name], exact[name])
        assert relative_l2(found[name], exact[name]) <= factor * allowed, name


@daily_if_interpreted({"dtype": (torch.bfloat16,)})
@pytest.mark.parametrize("dtype, factor", ((torch.float32, 2), (torch.bfloat16, 1)))
@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_temperature_gradient_of_peaked_softmax(backend, dtype, factor):
    """Its terms cancel: it asks for logits' gradients that add up to nothing and are not rounded.

    Too few numbers for `Errors` to hold but by their cosine.
    """
    squares = {"reference": 0, backend: 0}
    for draw in range(4):
        inputs, dout = make_inputs(spatial_attention, (1, 64, 70, 4, 65), dtype, draw=draw)
        call = (spatial_attention, inputs, dout)
        exact = run(*call, "reference", torch.float64, normalize=False)["temperature"]
        for name in squares:
            found = run(*call, name, dtype, normalize=False)["temperature"]
            squares[name] += (found - exact).square().sum().item()
    assert squares[backend] <= factor**2 * squares["reference"], squares


@pytest.mark.parametrize("op, options", OPTIONS, ids=OPTION_IDS)
@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_gradcheck(backend, op, options):
    inputs, _ = make_inputs(op, (1, 5, 3, 2, 2), torch.float64)

    def call(*tensors):
        return op(*tensors, backend=backend, **options)

    assert torch.autograd.gradcheck(call, inputs)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_paired_attention_is_made_of_the_two(backend):
    """EPA of kind "sum" is the two branches on the heads of one linear layer."""
    B, N, C, H, P = 1, 90, 16, 2, 7
    layer = epa_kernels.EPA(N, C, P, H, False, 0, 0, kind="sum", layout="tokens", backend=backend)
    layer.to(DEVICE)
    x = torch.randn(B, N, C, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    q, k, vc, vs = layer.qkvv(x).view(B, N, 4, H, C // H).unbind(2)
    k_proj, v_proj = (torch.einsum("np,bnhd->bphd", layer.EF, t) for t in (k, vs))
    out_s = spatial_attention(q, k_proj, v_proj, layer.temperature2, normalize=True)
    out_c = channel_attention(q, k, vc, layer.temperature)
    torch.testing.assert_close(layer(x), (out_s + out_c).flatten(2))


@pytest.mark.parametrize(
    "call, message",
    (
        (lambda q, k: spatial_attention(q[0], k, k, torch.ones(1)), "q must have shape"),
        (
            lambda q, k: spatial_attention(q, k[..., :3], k, torch.ones(1)),
            r"k_proj must have shape \(B, P, H, D\) = \(1, 5, 2, 4\), got \(1, 5, 2, 3\)",
        ),
        (lambda q, k: spatial_attention(q, k, k, torch.ones(3)), "1 or H = 2 elements"),
        (lambda q, k: spatial_attention(q, k.double(), k, torch.ones(1)), "float64"),
        (lambda q, k: spatial_attention(q[:0], k[:0], k[:0], torch.ones(1)), "must not be empty"),
        (lambda q, k: spatial_attention(q.int(), k, k, torch.ones(1)), "floating tensor"),
        (
            lambda q, k: channel_attention(q, k, k, torch.ones(1)),
            r"k must have shape \(B, N, H, D\) = \(1, 6, 2, 4\), got \(1, 5, 2, 4\)",
        ),
        (lambda q, k: channel_attention(q, q, q, torch.ones(1), dropout_p=1.0), r"\[0, 1\)"),
        (
            lambda q, k: channel_attention(
                q, q, q, torch.ones(1), dropout_p=0.1, seed=torch.ones(1)
            ),
            "seed must be an int64",
        ),
    ),
)
def test_bad_input_is_refused_with_the_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 6, 2, 4), torch.randn(1, 5, 2, 4))
