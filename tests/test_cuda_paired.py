"""Paired attention's CUDA kernels on a CPU, under the emulator, against the reference."""

import itertools
import math

import pytest
import torch
from cases import KINDS, LAYOUTS, shape_id

import epa_kernels
from epa_kernels import reference
from epa_kernels.backends import cuda
from epa_kernels.contract import OPS
from epa_kernels.testing import (
    Errors,
    Surroundings,
    assert_as_accurate,
    op_arguments,
    relative_l2,
    strided,
)

PAIRED = OPS["paired_attention"]

pytestmark = pytest.mark.usefixtures("emulated_cuda")

SEED = torch.tensor(-5)
# B, N, C, H, P. Two chunks and more, C no divisor of N; whole rows of the official layout; D = 15;
# P at its most; the direct plan, its smallest too.
SHAPES = (
    (2, 131, 16, 2, 17),
    (1, 160, 32, 4, 9),
    (1, 90, 30, 2, 5),
    (1, 50, 24, 1, 512),
    (2, 35, 40, 2, 5),
    (2, 1, 6, 2, 3),
)
# Where the specialised kernels run: D from 8 to 64, P at its most and odd, C no divisor of N.
SPECIALISED = (
    (1, 160, 32, 4, 64),
    (1, 131, 32, 2, 33),
    (1, 128, 64, 2, 9),
    (1, 150, 64, 1, 64),
)
NO_DROPOUT = {"channel_dropout_p": 0.0, "spatial_dropout_p": 0.0}


def exhaustive(*values):
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def run_cuda(tensors, dy, **options):
    y, *kept = cuda.paired_attention(*tensors, SEED, **options)
    gradients = cuda.paired_attention_bwd(dy, *tensors, *kept, SEED, **options)
    return named(y, gradients, tensors)


def run_reference(tensors, dy, **options):
    inputs = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = reference.paired_attention(*inputs, seed=SEED, **options)
    present = [t for t in inputs if t is not None]
    found = iter(torch.autograd.grad(y, present, dy))
    return named(y.detach(), [None if t is None else next(found) for t in inputs], tensors)


def named(y, gradients, tensors):
    pairs = zip(PAIRED.Inputs._fields, gradients, tensors, strict=True)
    return {"y": y} | {name: gradient for name, gradient, t in pairs if t is not None}


def cast(tensors, dtype, parameter_dtype=None):
    dtypes = [dtype] + [parameter_dtype or dtype] * (len(tensors) - 1)
    return [None if t is None else t.to(d) for t, d in zip(tensors, dtypes, strict=True)]


def output_gradient(shape, dtype=torch.float64, seed=2):
    return torch.randn(shape[:3], generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found, exact, tolerance=1e-11):
    for name, truth in exact.items():
        # Where N = 1 the normalised q has no gradient: zero against rounding.
        scale = max(truth.abs().max().item(), 1e-3 * exact["y"].abs().max().item())
        assert (found[name] - truth).abs().max() <= tolerance * scale, name


def test_the_module_takes_tensors_in_the_order_of_the_op(cuda_module):
    for name, names in cuda_module.inputs.items():
        assert names == (OPS[name].view_names, OPS[name].address_names)
    assert "paired_attention" in cuda_module.inputs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_matches_reference_in_float64(shape, kind, layout):
    tensors, options = op_arguments(shape, kind, layout, torch.float64)
    dy = output_gradient(shape)
    assert_close(run_cuda(tensors, dy, **options), run_reference(tensors, dy, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", (SHAPES[0], SHAPES[4]), ids=shape_id)
def test_matches_reference_without_biases_and_dropout(shape, kind):
    tensors, options = op_arguments(shape, kind, "official", torch.float64, bias=False)
    options |= NO_DROPOUT
    # Steps of no kind: x a slice, dy transposed, projections as columns.
    generator = torch.Generator().manual_seed(1)
    tensors[0] = strided(*shape[:3], dtype=torch.float64, generator=generator)
    for i in (3, 5):
        tensors[i] = None if tensors[i] is None else tensors[i].t().contiguous().t()
    dy = output_gradient(shape).mT.contiguous().mT
    found = run_cuda(tensors, dy, **options)
    assert_close(found, run_reference(tensors, dy, **options))
    assert found["proj_k_weight"].stride() == tensors[3].stride()


@pytest.mark.parametrize(
    "shape, dtype, parameter_dtype",
    [(shape, torch.float32, None) for shape in (SHAPES[1], SHAPES[4])]
    + [(SHAPES[0], dtype, torch.float32) for dtype in (torch.bfloat16, torch.float16)]
    + [(SHAPES[4], torch.bfloat16, None), (SHAPES[2], torch.bfloat16, torch.float32)]
    + [
        (SPECIALISED[0], torch.float16, torch.float32),
        (SPECIALISED[1], torch.float16, None),
        (SPECIALISED[2], torch.bfloat16, torch.float32),
        (SPECIALISED[3], torch.bfloat16, None),
        # The other dtype of 16 bits, whose kernels differ in a scale alone.
        exhaustive(SPECIALISED[0], torch.bfloat16, torch.float32),
        exhaustive(SPECIALISED[1], torch.bfloat16, None),
        exhaustive(SPECIALISED[2], torch.float16, torch.float32),
        exhaustive(SPECIALISED[3], torch.float16, None),
    ],
    ids=lambda value: shape_id(value) if isinstance(value, tuple) else str(value),
)
def test_low_precision_is_as_accurate_as_the_reference(shape, dtype, parameter_dtype):
    errors = {}
    layers = list(itertools.product(KINDS, LAYOUTS))
    # The largest error in float32 has heavy tails, see `Errors`.
    for draw, (kind, layout) in enumerate(layers * (3 if dtype == torch.float32 else 1)):
        tensors, options = op_arguments(shape, kind, layout, torch.float64, seed=draw)
        dy = output_gradient(shape, seed=draw)
        low = cast(tensors, dtype, parameter_dtype)
        exact = run_reference(cast(low, torch.float64), dy.to(dtype).double(), **options)
        same_dtype = run_reference(low, dy.to(dtype), **options)
        found = run_cuda(low, dy.to(dtype), **options)
        for name, gradient in found.items():
            assert gradient.dtype == same_dtype[name].dtype, name
        errors.setdefault(kind, Errors()).add(found, same_dtype, exact)
    for found in errors.values():
        found.check()


@pytest.mark.parametrize(
    "shape, kind, layout",
    (
        (SPECIALISED[0], "shared", "official"),
        (SPECIALISED[0], "split", "tokens"),
        (SPECIALISED[1], "split", "official"),
        # The kernels of the next, without its channel branch.
        exhaustive((1, 128, 64, 4, 9), "shared", "official"),
        ((1, 128, 64, 4, 9), "sum", "official"),
        ((1, 35, 32, 4, 64), "split", "official"),
        ((1, 90, 30, 2, 70), "shared", "official"),
        # Three blocks of 32 channels instead of two.
        exhaustive((1, 150, 96, 6, 33), "shared", "official"),
    ),
    ids=lambda value: shape_id(value) if isinstance(value, tuple) else value,
)
def test_three_products_in_tf32_are_as_accurate_as_float32(
    shape, kind, layout, tf32, emulated_cuda
):
    errors = Errors()
    emulated_cuda()
    for draw in range(3):
        tensors, options = op_arguments(shape, kind, layout, torch.float64, seed=draw)
        dy = output_gradient(shape, torch.float32, seed=draw)
        low = cast(tensors, torch.float32)
        exact = run_reference(cast(low, torch.float64), dy.double(), **options)
        found = run_cuda(low, dy, **options)
        errors.add(found, run_reference(low, dy, **options), exact)
    errors.check()
    kernels = {name.removeprefix("paired_attention_") for name in emulated_cuda()}
    passes = {"output_bwd_mma", "summary_bwd_mma"}
    passes |= {"output_fwd_mma"} if layout == "official" else set()
    passes = passes if shape[2] % 32 == 0 and shape[4] <= 64 else set()
    passes |= {"summary_fwd_mma"} if shape[1] >= 2 * shape[2] else set()
    assert passes == {name for name in kernels if name.endswith("_mma")} - {"product_fwd_mma"}
    torch.set_float32_matmul_precision("highest")
    emulated_cuda()
    run_cuda(low, dy, **options)
    assert not any(name.endswith("_mma") for name in emulated_cuda())


def results(shape, kind, dtype, scale=1.0, draw=0):
    """Of the kernels, of the reference in the same dtype and in float64; parameters in float32."""
    tensors, options = op_arguments(shape, kind, "official", torch.float64, seed=draw)
    low = cast(tensors, dtype, torch.float32)
    dy = (scale * output_gradient(shape, seed=2 + draw)).to(dtype)
    exact = run_reference(cast(low, torch.float64), dy.double(), **options)
    return run_cuda(low, dy, **options), run_reference(low, dy, **options), exact


@pytest.mark.parametrize(
    "shape, kind, dtype",
    (
        ((2, 35, 160, 5, 9), "split", torch.float16),
        # The loop over tiles, which smaller layers run twice, not 64 times.
        exhaustive((1, 4103, 32, 4, 9), "shared", torch.bfloat16),
    ),
    ids=("matrices_in_slices", "several_tiles"),
)
def test_last_pass_of_large_layers_is_as_accurate_as_the_reference(shape, kind, dtype):
    # Draw 0 of several_tiles: dtemperature2 cancels, the reference's own cosine is 0.99988.
    assert_as_accurate(*results(shape, kind, dtype, draw=1))


# One projection or two: each is scaled by the same code.
@pytest.mark.parametrize("kind", ("shared", pytest.param("split", marks=pytest.mark.exhaustive)))
def test_small_gradients_keep_their_digits_in_float16(kind):
    """Of logits, of the gram and of E x: cast to float16, they would be off by 3 to 10 times."""
    found, same_dtype, exact = results((1, 1024, 32, 2, 33), kind, torch.float16, scale=1e-5)
    for name, truth in exact.items():
        if truth.numel() >= Errors.FEWEST:
            allowed = relative_l2(same_dtype[name], truth)
            assert relative_l2(found[name], truth) <= 1.5 * allowed, name


# Half a minute for a size that one line of the launcher decides.
@pytest.mark.exhaustive
def test_blocks_have_whole_rows_of_many_tokens():
    """C = 192 does not divide the 256 tokens that a block has of layers with other C."""
    tensors, options = op_arguments((1, 4224, 192, 6, 8), "shared", "official", torch.bfloat16)
    truth = reference.paired_attention(*cast(tensors, torch.float32), seed=SEED, **options)
    found, *_ = cuda.paired_attention(*tensors, SEED, **options)
    assert relative_l2(found, truth) <= 1e-2  # of the reference in bfloat16 5e-3


@pytest.mark.parametrize("shape", (SHAPES[0], SHAPES[4]), ids=("two_pass", "direct"))
@pytest.mark.parametrize("eps", (1e-1, 1e-4))
def test_nearly_constant_tokens(shape, eps):
    check_nearly_constant_tokens(shape, eps)


# The summary in float32 has the same formula.
@pytest.mark.exhaustive
def test_nearly_constant_tokens_in_tf32(tf32):
    check_nearly_constant_tokens(SPECIALISED[0], 1e-4)


def check_nearly_constant_tokens(shape, eps):
    """x = v + eps noise: the float32 error, RMS over draws, is at most twice the reference's."""
    squares = {}
    for draw in range(6):
        tensors, options = op_arguments(shape, "shared", "official", torch.float64, seed=draw)
        generator = torch.Generator().manual_seed(draw)
        x = torch.randn(1, 1, shape[2], generator=generator)
        tensors[0] = (x + eps * torch.randn(shape[:3], generator=generator)).double()
        dy = output_gradient(shape, torch.float32, seed=draw)
        options |= NO_DROPOUT
        exact = run_reference(tensors, dy.double(), **options)
        low = cast(tensors, torch.float32)
        for column, run in enumerate((run_reference, run_cuda)):
            result = run(low, dy, **options)
            for name, truth in exact.items():
                squares.setdefault(name, [0, 0])[column] += relative_l2(result[name], truth) ** 2
    for name, (allowed, found) in squares.items():
        assert found <= 4 * allowed, (name, math.sqrt(found), math.sqrt(allowed))


@pytest.mark.parametrize(
    "shape, kind, layout, dtype",
    (
        (SHAPES[0], "split", "official", torch.float32),
        (SHAPES[1], "shared", "official", torch.float64),
        (SHAPES[4], "sum", "tokens", torch.float32),
        (SPECIALISED[0], "shared", "official", torch.bfloat16),
        (SPECIALISED[1], "split", "official", torch.float16),
        (SPECIALISED[2], "sum", "official", torch.bfloat16),
        (SPECIALISED[3], "shared", "tokens", torch.bfloat16),
        ((1, 131, 32, 4, 33), "split", "official", torch.float32),
    ),
    ids=lambda value: shape_id(value) if isinstance(value, tuple) else str(value),
)
def test_nothing_is_touched_outside_and_everything_written(shape, kind, layout, dtype, tf32):
    """Reads outside would bring NaN into a result, and what is not written would be NaN."""
    tensors, options = op_arguments(shape, kind, layout, dtype)
    dy = output_gradient(shape, dtype)
    expected = run_cuda(tensors, dy, **options)
    with Surroundings() as memory:
        tensors, dy = [t if t is None else memory.copy(t) for t in tensors], memory.copy(dy)
        found = run_cuda(tensors, dy, **options)
    assert memory.buffers and not memory.broken()
    for name, truth in expected.items():
        assert torch.equal(found[name], truth) and truth.isfinite().all(), name


# Forward and backward of layers that are and are not whole rows, with and without a bias of qkvv.
@pytest.mark.parametrize(
    "shape, kind, layout, bias, dtype, expected",
    (
        ((1, 64, 32, 4, 8), "shared", "official", False, torch.bfloat16, (3, 5)),
        ((1, 64, 32, 4, 8), "split", "tokens", False, torch.float32, (3, 5)),
        ((1, 70, 32, 4, 8), "sum", "official", False, torch.float32, (3, 5)),
        ((1, 70, 32, 4, 8), "shared", "official", False, torch.float32, (4, 5)),
        ((1, 16, 32, 4, 8), "shared", "official", False, torch.bfloat16, (3, 5)),
        ((1, 16, 32, 4, 8), "shared", "tokens", False, torch.float32, (2, 5)),
        ((1, 64, 32, 4, 8), "shared", "official", True, torch.bfloat16, (4, 6)),
    ),
)
def test_launches(emulated_cuda, shape, kind, layout, bias, dtype, expected):
    tensors, options = op_arguments(shape, kind, layout, dtype, bias=bias)
    emulated_cuda()
    y, *kept = cuda.paired_attention(*tensors, SEED, **options)
    forward = len(emulated_cuda())
    cuda.paired_attention_bwd(y, *tensors, *kept, SEED, **options)
    assert (forward, len(emulated_cuda())) == expected


# MiB; stages 1 to 4 of Synapse, 2 and 3 of acdc, and many tokens of many channels.
@pytest.mark.parametrize(
    "shape, forward, backward",
    (
        ((2, 32768, 32, 4, 64), 1.7, 15.3),
        ((2, 4096, 64, 4, 64), 4.4, 6.4),
        ((2, 512, 128, 4, 64), 2.4, 5.6),
        ((2, 64, 256, 4, 32), 3.3, 7.5),
        ((1, 4000, 64, 4, 64), 2.7, 3.1),
        ((1, 400, 128, 4, 64), 1.2, 2.5),
        ((2, 4096, 256, 4, 64), 21.0, 32.1),
    ),
    ids=lambda value: shape_id(value) if isinstance(value, tuple) else "",
)
def test_workspace_stays_small(shape, forward, backward):
    tensors, options = op_arguments(shape, "shared", "official", torch.float32)
    tensors = cast(tensors, torch.bfloat16, torch.float32)
    inputs, seed, options = PAIRED.forward((*tensors, SEED), options)
    _, kept = PAIRED.allocate(inputs, options)
    op, _, _alive = cuda._paired(inputs, kept, seed, options)
    assert op.fwd_workspace() <= (forward + 0.05) * 2**20
    assert op.bwd_workspace() <= (backward + 0.05) * 2**20


def test_zero_channel_is_finite_and_equal():
    """|q| = 0 is clamped to 1e-12: output and gradients are those of the reference."""
    for shape in (SHAPES[0], SHAPES[4]):
        tensors, options = op_arguments(shape, "shared", "official", torch.float64, bias=False)
        tensors[1][1] = 0  # a query channel
        tensors[1][shape[2] + 2] = 0  # a key channel
        dy = output_gradient(shape)
        exact = run_reference(tensors, dy, **options)
        found = run_cuda(tensors, dy, **options)
        for name, truth in exact.items():
            assert relative_l2(found[name], truth) <= 1e-11, name
        # Upstream gradient over 1e-12: the direction of a zero channel is all that decides it.
        assert exact["qkvv_weight"][1].abs().max() > 1e6


def test_sizes_beyond_the_limits_are_refused():
    """What only other tensors than the first tell, too."""

    def why_not(shape):
        tensors, options = op_arguments(shape, "shared", "official")
        return cuda.why_not(PAIRED.call(PAIRED.Inputs(*tensors), PAIRED.Options(**options)))

    assert why_not((1, 3, 8, 2, 513))[-1:] == ["number of projected tokens 513 > 512"]
    assert why_not((1, 3, 1026, 2, 1))[-2:] == ["channels 1026 > 1024", "head dim 513 > 512"]
    q, k = torch.ones(1, 3, 1, 2), torch.ones(1, 513, 1, 2)
    with pytest.raises(RuntimeError, match="spatial_attention: .*; number of projected .* 513 > "):
        epa_kernels.spatial_attention(q, k, k, torch.ones(1), backend="cuda")
