"""The CUDA kernels on a CPU, under the emulator, against the spec."""

import pytest
import torch

from epa_kernels import reference
from epa_kernels.backends import cuda
from epa_kernels.contract import call_on
from epa_kernels.testing import Errors, assert_as_accurate, relative_l2, strided

NAMES = ("out", "q", "k", "v", "temperature")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# B, N, P, H, D. Odd and prime on purpose; the last for float64 and the generic kernels alone.
SHAPES = ((2, 1, 3, 2, 1), (1, 67, 33, 3, 8), (2, 131, 1, 1, 20), (1, 83, 67, 2, 65))
# Where the specialised kernels run: tiles and more, N below a warp's rows, P below and at its most.
SPECIALISED = ((2, 131, 64, 2, 8), (1, 67, 33, 2, 16), (1, 15, 9, 3, 32), (1, 259, 64, 1, 64))
DROPOUT = {"dropout_p": 0.2, "seed": torch.tensor(-5)}
# Op, options.
SPATIAL, CHANNEL = "spatial_attention", "channel_attention"
CASES = {
    "spatial": (SPATIAL, {"normalize": False}),
    "spatial-normalize": (SPATIAL, {"normalize": True}),
    "spatial-dropout": (SPATIAL, {"normalize": False, **DROPOUT}),
    "spatial-normalize-dropout": (SPATIAL, {"normalize": True, **DROPOUT}),
    "channel": (CHANNEL, {}),
    "channel-dropout": (CHANNEL, DROPOUT),
}


pytestmark = pytest.mark.usefixtures("emulated_cuda")


def shape_id(shape):
    return "B{}N{}P{}H{}D{}".format(*shape)


def make_inputs(op, shape, dtype, per_head=True, draw=1, dense=False):
    """q, k, v, temperature and the gradient of out; slices unless dense."""
    B, N, P, H, D = shape
    generator = torch.Generator().manual_seed(draw)
    keys = (B, P if op == SPATIAL else N, H, D)
    sizes = ((B, N, H, D), keys, keys, (B, N, H, D))
    q, k, v, dout = (strided(*size, dtype=dtype, generator=generator) for size in sizes)
    if dense:
        q, k, v, dout = (t.contiguous() for t in (q, k, v, dout))
    temperature = 2 * torch.rand(H if per_head else 1, 1, 1, generator=generator) + 0.5
    return [q, k, v, temperature.to(dtype)], dout


def run_cuda(op, inputs, dout, *, seed=None, dropout_p=0.0, **options):
    options["dropout_p"] = dropout_p
    out, *kept = getattr(cuda, op)(*inputs, seed, **options)
    gradients = getattr(cuda, f"{op}_bwd")(dout, *inputs, *kept, seed, **options)
    return dict(zip(NAMES, (out, *gradients), strict=True))


def run_spec(op, inputs, dout, dtype, **options):
    inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    out = getattr(reference, op)(*inputs, **options)
    gradients = torch.autograd.grad(out, inputs, dout.to(dtype))
    return dict(zip(NAMES, (out.detach(), *gradients), strict=True))


@pytest.mark.parametrize("per_head", (True, False), ids=("per-head", "one-temperature"))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_matches_spec_in_float64(shape, case, per_head):
    op, options = CASES[case]
    inputs, dout = make_inputs(op, shape, torch.float64, per_head)
    exact = run_spec(op, inputs, dout, torch.float64, **options)
    found = run_cuda(op, inputs, dout, **options)
    for name, truth in exact.items():
        # Where N = 1 the normalised q has no gradient: zero against rounding.
        scale = max(truth.abs().max().item(), 1e-3 * exact["out"].abs().max().item())
        assert (found[name] - truth).abs().max() <= 1e-11 * scale, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "shape, dtype",
    [(shape, torch.float32) for shape in SHAPES[1:]]
    + [(shape, dtype) for shape in SPECIALISED + SHAPES[3:] for dtype in DTYPES[1:]],
    ids=lambda value: shape_id(value) if isinstance(value, tuple) else str(value),
)
def test_low_precision_is_as_accurate_as_spec(shape, dtype, case):
    op, options = CASES[case]
    errors = Errors()
    for draw in range(4 if dtype == torch.float32 else 2):
        # Rows that are aligned, and rows that are not: the kernels load them differently.
        inputs, dout = make_inputs(op, shape, dtype, draw=draw, dense=draw % 2)
        exact = run_spec(op, inputs, dout, torch.float64, **options)
        same_dtype = run_spec(op, inputs, dout, dtype, **options)
        if dtype == torch.bfloat16 and case == "spatial-dropout":
            # A sum that cancels: the definition's own cosine there is below the bound.
            del exact["temperature"]
        errors.add(run_cuda(op, inputs, dout, **options), same_dtype, exact)
    errors.check()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SPECIALISED[:2], ids=shape_id)
def test_three_products_in_tf32_are_as_accurate_as_float32(shape, case, tf32, emulated_cuda):
    op, options = CASES[case]
    errors = Errors()
    emulated_cuda()
    for draw in range(4):
        inputs, dout = make_inputs(op, shape, torch.float32, draw=draw, dense=draw % 2)
        exact = run_spec(op, inputs, dout, torch.float64, **options)
        same_dtype = run_spec(op, inputs, dout, torch.float32, **options)
        errors.add(run_cuda(op, inputs, dout, **options), same_dtype, exact)
    errors.check()
    passes = ("mma_fwd", "mma_bwd") if op == SPATIAL else ("mma_gram", "mma_product")
    assert {f"{op}_{name}" for name in passes} <= set(emulated_cuda())
    torch.set_float32_matmul_precision("highest")
    run_cuda(op, inputs, dout, **options)
    assert not any("_mma_" in name for name in emulated_cuda())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("D", (8, 64))
def test_channel_attention_of_many_tokens_is_as_accurate_as_spec(D, dtype):
    """Chunks of several tiles, the last one of 7 tokens."""
    op, options = CASES["channel-dropout"]
    inputs, dout = make_inputs(op, (1, 4103, 1, 1, D), dtype)
    exact = run_spec(op, inputs, dout, torch.float64, **options)
    same_dtype = run_spec(op, inputs, dout, dtype, **options)
    assert_as_accurate(run_cuda(op, inputs, dout, **options), same_dtype, exact)


@pytest.mark.parametrize("D", (8, 32))
def test_channel_gradients_keep_their_digits_in_float16(D):
    """Of <q_i, k_j>: cast to float16, they would be off by 3 to 6 times the definition's error."""
    inputs, dout = make_inputs(CHANNEL, (1, 1031, 1, 2, D), torch.float16)
    dout = (1e-3 * dout.float()).half()
    inputs[0][:, :, 1, 3] = 0  # its own gradient is infinite, and spoils that of no other channel
    exact = run_spec(CHANNEL, inputs, dout, torch.float64)
    same_dtype = run_spec(CHANNEL, inputs, dout, torch.float16)
    found = run_cuda(CHANNEL, inputs, dout)
    for results in (exact, same_dtype, found):
        results["q"][:, :, 1, 3] = 0
    for name in ("q", "k", "v"):
        allowed = relative_l2(same_dtype[name], exact[name])
        assert relative_l2(found[name], exact[name]) <= 1.5 * allowed, name


# P at its most and beyond a warp, D beyond a block of channels and of its matrix's elements.
LARGE = ((1, 5, 512, 1, 8), (1, 37, 70, 1, 130))


@pytest.mark.parametrize("case", ("spatial-normalize-dropout", "channel-dropout"))
@pytest.mark.parametrize("shape", LARGE, ids=shape_id)
def test_large_shapes_match_spec(shape, case):
    op, options = CASES[case]
    inputs, dout = make_inputs(op, shape, torch.float64)
    exact = run_spec(op, inputs, dout, torch.float64, **options)
    found = run_cuda(op, inputs, dout, **options)
    for name, truth in exact.items():
        assert (found[name] - truth).abs().max() <= 1e-11 * truth.abs().max(), name


@pytest.mark.parametrize("case", ("spatial-normalize-dropout", "channel-dropout"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_change_no_bit(dtype, case):
    """Channels next to each other, or heads, or nothing: the same numbers, each in its strides."""
    op, options = CASES[case]
    inputs, dout = make_inputs(op, SPECIALISED[0], dtype, dense=True)
    dense = run_cuda(op, inputs, dout, **options)
    permuted = [t.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1) for t in (*inputs[:3], dout)]
    found = run_cuda(op, [*permuted[:3], inputs[3]], permuted[3], **options)
    assert found["q"].stride() == permuted[0].stride()
    for name, value in dense.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("case", ("spatial-normalize", "channel"))
@pytest.mark.parametrize("shape", (SHAPES[1], SPECIALISED[1]), ids=shape_id)
def test_nothing_around_a_tensor_is_read(shape, case):
    """Slices of tensors of NaN: the result has none, and the same bits as from tensors of zeros."""
    op, options = CASES[case]
    inputs, dout = make_inputs(op, shape, torch.bfloat16)

    def inside(t, value):
        larger = torch.full([n + 2 for n in t.shape], value, dtype=t.dtype)
        result = larger[tuple(slice(1, -1) for _ in t.shape)]
        return result.copy_(t)

    results = []
    for value in (float("nan"), 0.0):
        *tensors, gradient = (inside(t, value) for t in (*inputs[:3], dout))
        results.append(run_cuda(op, [*tensors, inputs[3]], gradient, **options))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]) and value.isfinite().all(), name


def test_nan_comes_out():
    """One of q in spatial attention spoils its row, one of k_proj every row of its head."""
    for case, shape in (("spatial", SPECIALISED[0]), ("spatial", SHAPES[1])):
        op, options = CASES[case]
        for tensor, rows in ((0, slice(3, 4)), (1, slice(None))):
            inputs, dout = make_inputs(op, shape, torch.bfloat16, dense=True)
            inputs[tensor][0, 3, 1, 2] = float("nan")
            out = run_cuda(op, inputs, dout, **options)["out"]
            expected = torch.zeros(out.shape, dtype=torch.bool)
            expected[0, rows, 1] = True
            assert torch.equal(out.isnan(), expected)


def test_the_largest_head_of_channel_attention_fits_a_block():
    inputs, dout = make_inputs(CHANNEL, (1, 3, 1, 1, 256), torch.float64)
    exact = run_spec(CHANNEL, inputs, dout, torch.float64)
    for name, value in run_cuda(CHANNEL, inputs, dout).items():
        assert (value - exact[name]).abs().max() <= 1e-11 * exact[name].abs().max(), name
    call = call_on(CHANNEL, torch.empty(1, 3, 1, 257))
    assert cuda.why_not(call)[-1:] == ["head dim 257 > 256"]
