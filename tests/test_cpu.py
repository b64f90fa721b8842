"""The CPU kernels: every instruction set, any threads and strides, and nothing but their own."""

import contextlib
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from cases import KINDS, LAYOUTS, shape_id

import epa_kernels
from epa_kernels import rng
from epa_kernels.backends import cpu
from epa_kernels.testing import (
    Errors,
    kept_for_backward,
    make_layer,
    relative_l2,
    run_layer,
    strided,
)

pytestmark = pytest.mark.skipif(cpu.module is None, reason=str(cpu.missing))

ISAS = cpu.module.isas().split(",") if cpu.module else ()
# B, N, C, H, P: N that C divides and not, N = 1, no whole vector, D = 1 and 128, P = 1 and 513,
# and, where N < 2C, the direct plan.
SHAPES = (
    (2, 256, 32, 4, 33),
    (1, 320, 64, 4, 20),
    (1, 131, 20, 4, 9),
    (1, 1, 8, 2, 4),
    (2, 67, 24, 24, 5),
    (1, 300, 128, 1, 1),
    (1, 100, 128, 1, 6),
    (1, 70, 8, 2, 513),
    (2, 63, 40, 2, 5),
)
PLANS = pytest.mark.parametrize("N, C", ((64, 16), (48, 40)), ids=("two_pass", "direct"))


@pytest.fixture(params=ISAS)
def isa(request):
    cpu.module.use_isa(request.param)
    yield request.param
    cpu.module.use_isa(cpu.isa)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.isfinite().all(), name
        assert torch.equal(found[name], value), name


def run_branch(op, inputs, dout, **options):
    """Result and gradients of one branch, by name."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = op(*inputs, backend="cpu", **options)
    gradients = torch.autograd.grad(out, inputs, dout)
    return dict(zip(("out", "dq", "dk", "dv", "dtemperature"), (out, *gradients), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_instruction_set_matches_the_reference_in_float64(isa, shape, kind, layout):
    B, N, C, _, _ = shape
    generator = torch.Generator().manual_seed(1)
    x, gy = (strided(B, N, C, dtype=torch.float64, generator=generator) for _ in range(2))
    layer = make_layer(shape, kind, layout, bias=layout == "tokens", dropout=0.3)
    exact = run_layer(layer, x, gy, backend="reference", dtype=torch.float64)
    found = run_layer(layer, x, gy, backend="cpu", dtype=torch.float64)
    for name, truth in exact.items():
        # One token has unit norm in every channel, so |q| has no gradient: zero against rounding.
        scale = max(truth.abs().max().item(), 1e-3 * exact["y"].abs().max().item())
        assert (found[name] - truth).abs().max() <= 1e-11 * scale, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", (SHAPES[2], SHAPES[-1]), ids=("two_pass", "direct"))
def test_every_instruction_set_is_as_accurate_as_the_reference(isa, shape, kind):
    B, N, C, _, _ = shape
    errors = Errors()
    for draw in range(24):
        x, gy = normal(2, B, N, C, seed=draw)
        layer = make_layer(shape, kind, seed=draw)
        exact = run_layer(layer, x, gy, backend="reference", dtype=torch.float64)
        same_dtype = run_layer(layer, x, gy, backend="reference", dtype=torch.float32)
        errors.add(run_layer(layer, x, gy, backend="cpu", dtype=torch.float32), same_dtype, exact)
    errors.check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@PLANS
def test_half_precision_beside_float32_parameters(isa, N, C, dtype, kind):
    """Activations are rounded once; gradients of the parameters never."""
    if dtype == torch.float16 and not cpu.module.has_float16:
        pytest.skip("the compiler of the extension has no _Float16")
    layer = make_layer((2, N, C, 2, 9), kind)
    x, gy = (t.to(dtype) for t in normal(2, 2, N, C))
    exact = run_layer(layer, x, gy, backend="reference", dtype=torch.float64)
    layer.float().zero_grad()
    layer.backend = "cpu"
    y = layer(x.requires_grad_())
    y.backward(gy)
    assert y.dtype == x.grad.dtype == dtype
    assert relative_l2(y.detach(), exact["y"]) <= torch.finfo(dtype).eps
    assert relative_l2(x.grad, exact["x"]) <= torch.finfo(dtype).eps
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert relative_l2(parameter.grad, exact[name]) <= 1e-5, name


# Large enough that several threads run; the last is the direct plan.
@pytest.mark.parametrize(
    "N, C, kind, layout, dtype",
    (
        (4096, 64, "shared", "official", torch.float32),
        (4096, 64, "split", "tokens", torch.bfloat16),
        (4096, 64, "sum", "official", torch.float32),
        (500, 256, "shared", "official", torch.float32),
    ),
    ids=("shared", "split", "sum", "direct"),
)
def test_paired_attention_has_the_same_bits_for_any_number_of_threads(N, C, kind, layout, dtype):
    layer = make_layer((1, N, C, 4, 64), kind, layout, dropout=0.2)
    x, gy = normal(2, 1, N, C)
    results = []
    for count in (1, 2, 3, 3):
        with threads(count):
            results.append(run_layer(layer, x, gy, backend="cpu", dtype=dtype))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("normalize", (None, False, True), ids=("channel", "spatial", "normalize"))
def test_branches_have_the_same_bits_for_any_number_of_threads(normalize):
    q, k, v, dout = normal(4, 1, 4096, 4, 16)
    options, op = {"dropout_p": 0.2, "seed": torch.tensor(9)}, epa_kernels.channel_attention
    if normalize is not None:
        op, k, v = epa_kernels.spatial_attention, k[:, :64], v[:, :64]
        options["normalize"] = normalize
    results = []
    for count in (1, 2, 3, 3):
        with threads(count):
            results.append(run_branch(op, (q, k, v, torch.ones(4)), dout, **options))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_masks_of_forward_and_backward_are_the_spec_s_bit_for_bit(isa):
    """Uniform attention: one-hot values show it in forward, one-hot gradients in backward."""
    B, H, D, P, p, seed = 2, 3, 67, 61, 0.3, torch.tensor(-(2**40) - 7)
    options, zero = {"dropout_p": p, "seed": seed}, torch.zeros(B, D, H, D)

    def one_hot(rows):
        return torch.eye(D)[:rows].view(1, rows, 1, D).expand(B, rows, H, D)

    def mask(columns, map_index):
        rows = torch.arange(B * H * D).view(B, H, D)
        return rng.dropout_multiplier(seed, rows, columns, p, map_index, torch.float32)

    # As many tokens as channels, so that a row of the map is seen whole. Maps are (B, H, row, col).
    inputs = zero, zero[:, :P], one_hot(P), torch.ones(1)
    result = run_branch(epa_kernels.spatial_attention, inputs, one_hot(D), **options)
    expected = mask(P, rng.SPATIAL_MAP)
    torch.testing.assert_close(result["out"].transpose(1, 2)[..., :P] * P, expected)
    assert torch.equal(result["out"].transpose(1, 2)[..., :P] != 0, expected != 0)
    assert torch.equal(result["dv"].permute(0, 2, 3, 1) != 0, expected != 0)

    inputs = zero, zero, one_hot(D), torch.ones(1)
    result = run_branch(epa_kernels.channel_attention, inputs, one_hot(D), **options)
    expected = mask(D, rng.CHANNEL_MAP)
    torch.testing.assert_close(result["out"].permute(0, 2, 3, 1) * D, expected)
    assert torch.equal(result["out"].permute(0, 2, 3, 1) != 0, expected != 0)
    assert torch.equal(result["dv"].permute(0, 2, 1, 3) != 0, expected != 0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", KINDS)
@PLANS
def test_tokens_of_a_volume_give_the_bits_of_their_copy(N, C, kind, dtype):
    """x as networks have it, channels before space; dx comes back in the same order."""
    layer = make_layer((2, N, C, 2, 9), kind, dropout=0.2).to(dtype)
    layer.backend = "cpu"
    x = normal(2, C, N // 4, 2, 2, dtype=dtype).flatten(2).transpose(1, 2)
    results = []
    for tokens in (x, x.contiguous()):
        tokens = tokens.detach().requires_grad_()
        torch.manual_seed(0)
        y = layer(tokens)
        # The gradient of a sum is expanded from one number.
        gradients = torch.autograd.grad(y.sum(), (tokens, *layer.parameters()))
        assert gradients[0].stride() == tokens.stride()
        results.append(dict(enumerate((y.detach(), *gradients))))
    assert_same_bits(*results)


@pytest.mark.parametrize(
    "laid_out",
    (
        lambda t: t.t().contiguous().t(),
        lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
        lambda t: torch.stack((t, t), -1)[..., 1],
    ),
    ids=("transposed", "slice", "stepped"),
)
@PLANS
def test_projections_of_any_strides_give_the_bits_of_their_copy(N, C, laid_out):
    H, P = 2, 9
    layer = make_layer((2, N, C, H, P), "split", dropout=0.2).float()
    x, gy = normal(2, 2, N, C)
    results = []
    for change in (laid_out, torch.Tensor.contiguous):
        inputs = [x, layer.qkvv.weight, layer.qkvv.bias, change(layer.E.weight), layer.E.bias,
                  change(layer.F.weight), layer.F.bias, layer.temperature, layer.temperature2,
                  layer.out_proj.weight, layer.out_proj.bias, layer.out_proj2.weight,
                  layer.out_proj2.bias]  # fmt: skip
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = epa_kernels.paired_attention(
            *inputs, num_heads=H, kind="split", channel_dropout_p=0.2, spatial_dropout_p=0.2,
            seed=torch.tensor(3), backend="cpu",
        )  # fmt: skip
        results.append(dict(enumerate((y, *torch.autograd.grad(y, inputs, gy)))))
    assert_same_bits(*results)


@pytest.mark.parametrize("normalize", (None, True), ids=("channel", "spatial"))
def test_branches_of_any_strides_give_the_bits_of_their_copy(normalize):
    B, N, H, D = 2, 130, 3, 10
    op = epa_kernels.channel_attention if normalize is None else epa_kernels.spatial_attention
    options = {} if normalize is None else {"normalize": normalize}
    # Heads of one linear layer; the published order; and every other channel.
    q, k, _ = normal(B, N, 3, H, D).unbind(2)
    v = normal(B, D, H, N).permute(0, 3, 2, 1)
    dout = normal(B, N, H, 2 * D)[..., ::2]
    results = [
        run_branch(op, (*map(change, (q, k, v)), torch.ones(H)), change(dout), **options)
        for change in (lambda t: t, torch.Tensor.contiguous)
    ]
    assert_same_bits(*results)


@pytest.fixture
def poisoned():
    """New memory is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def surrounded(values):
    """The values as a slice of a larger tensor of NaN, and that tensor."""
    larger = torch.full([n + 3 for n in values.shape], math.nan, dtype=values.dtype)
    part = larger[tuple(slice(1, n + 1) for n in values.shape)]
    return part.copy_(values), larger


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize(
    "shape", ((2, 67, 18, 3, 5), (2, 31, 18, 3, 5)), ids=("two_pass", "direct")
)
def test_memory_outside_of_the_tensors_does_not_matter(isa, shape, dtype, kind, poisoned):
    B, N, C, H, P = shape
    layer = make_layer(shape, kind, dropout=0.2).to(dtype)
    layer.backend = "cpu"
    x, gy = normal(2, B, N, C, dtype=dtype)
    projections = ("EF",) if kind == "sum" else ("E.weight", "F.weight")[: 1 + (kind == "split")]
    results, larger = [], []
    for place in (lambda t: t, surrounded):
        parameters = dict(layer.named_parameters())
        tokens, dy = x, gy
        if place is surrounded:
            tokens, dy, *placed = (
                place(t.detach()) for t in (x, gy, *(parameters[name] for name in projections))
            )
            larger = [(whole, whole.clone()) for _, whole in (tokens, dy, *placed)]
            tokens, dy = tokens[0], dy[0]
            parameters |= dict(zip(projections, (part for part, _ in placed), strict=True))
        tokens = tokens.detach().requires_grad_()
        parameters = {name: t.detach().requires_grad_() for name, t in parameters.items()}
        torch.manual_seed(0)
        # E and F of kind "shared" are one module: one name stands for both.
        y = torch.func.functional_call(layer, parameters, tokens, tie_weights=True)
        gradients = torch.autograd.grad(y, (tokens, *parameters.values()), dy)
        results.append(dict(zip(("y", "x", *parameters), (y.detach(), *gradients), strict=True)))
    assert_same_bits(*results)
    for after, before in larger:
        assert torch.equal(after.isnan(), before.isnan())
        assert torch.equal(after.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("dropout_p", (0.0, 0.2))
@pytest.mark.parametrize("normalize", (None, False, True), ids=("channel", "spatial", "normalize"))
def test_memory_outside_of_a_branch_does_not_matter(isa, normalize, dropout_p, poisoned):
    B, N, H, D, P = 2, 67, 3, 11, 5
    op = epa_kernels.channel_attention if normalize is None else epa_kernels.spatial_attention
    options = {} if normalize is None else {"normalize": normalize}
    options |= {"dropout_p": dropout_p, "seed": torch.tensor(3)}
    q, dout = normal(2, B, N, H, D)
    k, v = normal(2, B, N if normalize is None else P, H, D, seed=1)
    plain = run_branch(op, (q, k, v, torch.ones(H)), dout, **options)
    (q, k, v, dout), larger = zip(*map(surrounded, (q, k, v, dout)), strict=True)
    before = [t.clone() for t in larger]
    assert_same_bits(run_branch(op, (q, k, v, torch.ones(H)), dout, **options), plain)
    for whole, other in zip(larger, before, strict=True):
        assert torch.equal(whole.nan_to_num(), other.nan_to_num())
        assert torch.equal(whole.isnan(), other.isnan())


@pytest.mark.parametrize("bits", (0x7FC12345, 0x7F800001, -1), ids=("quiet", "signalling", "ones"))
@pytest.mark.parametrize("kind", KINDS)
@PLANS
def test_a_nan_with_a_payload_propagates(isa, N, C, kind, bits):
    """Bits of a NaN that went into an exponent would come out as numbers."""
    layer = make_layer((2, N, C, 2, 9), kind)
    x, gy = normal(2, 2, N, C)
    x[1, N // 2, 3] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
    expected, found = (
        run_layer(layer, x, gy, backend=name, dtype=torch.float32) for name in ("reference", "cpu")
    )
    assert expected["y"][1].isnan().any() and expected["y"][0].isfinite().all()
    for name, value in expected.items():
        assert torch.equal(found[name].isnan(), value.isnan()), name


def test_python_threads_run_at_once_and_get_the_same_bits():
    shapes = ((1, 1031, 32, 4, 17), (2, 63, 40, 2, 5), (1, 513, 64, 4, 64), (2, 300, 24, 24, 9))
    layers = [make_layer(shape, dropout=0.2).float() for shape in shapes]
    for layer in layers:
        layer.backend = "cpu"

    def run(index):
        (B, N, C, _, _), layer = shapes[index], layers[index]
        x, gy = normal(2, B, N, C)
        inputs = (x.requires_grad_(), *layer.parameters())
        seed = torch.tensor(index)
        y = epa_kernels.functional.paired_attention(
            x, layer.qkvv.weight, layer.qkvv.bias, layer.E.weight, layer.E.bias, None, None,
            layer.temperature, layer.temperature2, layer.out_proj.weight, layer.out_proj.bias,
            layer.out_proj2.weight, layer.out_proj2.bias, num_heads=shapes[index][3],
            channel_dropout_p=0.2, spatial_dropout_p=0.2, seed=seed, backend="cpu",
        )  # fmt: skip
        return dict(enumerate((y.detach(), *torch.autograd.grad(y, inputs, gy))))

    expected = [run(index) for index in range(len(shapes))]
    barrier = Barrier(len(shapes))

    def run_with_the_others(index):
        barrier.wait()
        return [run(index) for _ in range(5)]

    with ThreadPoolExecutor(len(shapes)) as pool:
        for index, results in enumerate(pool.map(run_with_the_others, range(len(shapes)))):
            for result in results:
                assert_same_bits(result, expected[index])


def test_keeps_x_and_little_else_for_backward():
    """Stage 1 of Synapse, dropout on."""
    layer = epa_kernels.EPA(32768, 32, 64, 4, False, 0.15, 0.15, backend="cpu")
    x = torch.randn(1, 32768, 32, requires_grad=True)
    assert x.nbytes <= kept_for_backward(layer, x) <= x.nbytes + 2**20


@pytest.mark.parametrize("threads", (1, 2))
def test_memory_that_cannot_be_had_is_an_exception(threads):
    if not Path("/proc/self/statm").is_file():
        pytest.skip("needs Linux")
    code = f"""
import resource, torch, epa_kernels
torch.set_num_threads({threads})
q, k = torch.zeros(1, 64, 1, 64), torch.zeros(1, 10**6, 1, 64)
epa_kernels.spatial_attention(q, k[:, :4], k[:, :4], torch.ones(1), backend="cpu")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, -1))
try:
    epa_kernels.spatial_attention(q, k, k, torch.ones(1), backend="cpu")
except MemoryError as error:
    print("caught")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "caught\n", result.stderr


def test_kept_tensors_may_have_any_strides():
    op = torch.ops.epa_kernels_cpu
    q, k, v, dout = torch.randn(4, 1, 50, 2, 8, generator=torch.Generator().manual_seed(3))
    temperature = torch.ones(2)
    out, *kept = op.channel_attention(q, k, v, temperature, None, dropout_p=0.0)
    turned = [t.mT.contiguous().mT for t in kept]
    expected, found = (
        op.channel_attention_bwd(dout, q, k, v, temperature, *t, None, dropout_p=0.0)
        for t in (kept, turned)
    )
    assert not turned[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
