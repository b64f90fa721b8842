"""Layers and inputs that the tests of the attention ops share, and the tolerance rule."""

import math
import os

import pytest
import torch

import epa_kernels

# Where layers and inputs lie; `pytest --device cuda` sets it (conftest.py).
DEVICE = os.environ.get("EPA_KERNELS_TEST_DEVICE", "cpu")

# Backends beside the spec that run here; a new one is tested by being named here. The CUDA kernels
# under the emulator have tests of their own, test_cuda*.py.
FUSED_BACKENDS = ("two_pass", "cpp" if DEVICE == "cpu" else "cuda", "triton")
BACKENDS = ("reference", *FUSED_BACKENDS)
INTERPRETED = ("triton",) if DEVICE == "cpu" else ()
# For tests of a hundred calls or large shapes.
COMPILED_BACKENDS = tuple(name for name in BACKENDS if name not in INTERPRETED)
KINDS = ("shared", "split", "sum")
LAYOUTS = ("official", "tokens")

# B, N, C, H, P. Odd and prime on purpose: N that C does not divide, rows of P and D that fill no
# vector, D = 1, P = 1, N = 1, N beyond one tile, and both plans (N < 2C is "direct").
SHAPES = (
    (2, 1, 6, 2, 3),
    (1, 63, 40, 2, 5),
    (2, 210, 32, 4, 33),
    (1, 513, 24, 24, 1),
    (2, 300, 130, 1, 7),
    (1, 1031, 10, 5, 17),
)

# Triton's interpreter takes milliseconds a program: few heads and tiles. C a power of two that
# divides N; other C; N = 1; D = 2, and P of several blocks.
INTERPRETED_SHAPES = ((1, 160, 32, 2, 33), (1, 63, 40, 2, 5), (2, 1, 6, 2, 3), (1, 130, 10, 5, 70))

# Draws that errors are gathered over; the error in half precision is the rounding of the result.
DRAWS = {torch.float32: 24, torch.bfloat16: 2, torch.float16: 2}


def shape_id(shape):
    return "B{}N{}C{}H{}P{}".format(*shape)


def backend_shapes(shapes=SHAPES, interpreted=INTERPRETED_SHAPES):
    """Every pair of a fused backend and a shape, for parametrize("backend, shape", ...)."""
    return [
        pytest.param(backend, shape, id=f"{backend}-{shape_id(shape)}")
        for backend in FUSED_BACKENDS
        for shape in (interpreted if backend in INTERPRETED else shapes)
    ]


def draws(dtype, backend):
    few = backend in INTERPRETED and DRAWS[dtype] > 2
    return range(DRAWS[dtype] // 3 if few else DRAWS[dtype])


def strided(*shape, dtype, generator):
    """Normal numbers as a slice of a larger tensor, so that no stride is trivial."""
    larger = torch.randn(*(n + 1 for n in shape), generator=generator, dtype=torch.float64)
    # Moved before it is cut, since a cut tensor would arrive dense.
    return larger.to(DEVICE)[tuple(slice(1, None) for _ in shape)].to(dtype)


def make_layer(shape, kind="shared", layout="official", *, bias=True, dropout=0.0, seed=0):
    """A layer in float64 whose values are float32 numbers and whose attention is not uniform."""
    _, N, C, H, P = shape
    torch.manual_seed(seed)
    layer = epa_kernels.EPA(N, C, P, H, bias, dropout, dropout, kind=kind, layout=layout).double()
    with torch.no_grad():
        layer.temperature.copy_(4 * (1 + torch.rand(H, 1, 1) / 2))
        layer.temperature2.copy_(2 * math.sqrt(N * H / C) * (1 + torch.rand(H, 1, 1) / 2))
        for parameter in layer.parameters():
            parameter.copy_(parameter.float())
    return layer.to(DEVICE)


def run_layer(layer, x, gy, *, backend, dtype, parameter_dtype=None, seed=0):
    """Output and every gradient of a run in `dtype`: {"y", "x", parameter names}."""
    layer.to(DEVICE, parameter_dtype or dtype).zero_grad()
    x = x.detach().to(DEVICE, dtype).requires_grad_()
    torch.manual_seed(seed)
    with epa_kernels.use_backend(backend):
        y = layer(x)
        y.backward(gy.to(DEVICE, dtype))
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients}


def relative_l2(value, expected):
    value, expected = value.double(), expected.double()
    return ((value - expected).norm() / expected.norm().clamp_min(1e-300)).item()


class Errors:
    """Errors of a kernel and of the spec in the same dtype, both against the spec in float64.

    Gathered over draws, because the error of a handful of numbers in a single one, and the largest
    of errors with heavy tails, is luck: within 2 of the definition's over many draws, 3.5 in one.
    """

    FEWEST = 16  # numbers whose error is a statistic

    def __init__(self):
        self.draws = {}  # tensor's name -> list of (kernel's, same dtype's, exact), flat

    def add(self, kernel, same_dtype, exact):
        for name, truth in exact.items():
            draw = tuple(t.detach().flatten() for t in (kernel[name], same_dtype[name], truth))
            self.draws.setdefault(name, []).append(draw)

    def check(self):
        """error(kernel) <= 2 error(spec) + 4 ulp of the largest value, max and RMS, each tensor.

        Fewer than FEWEST numbers are held by the cosine alone. It keeps a missing term of a
        gradient from hiding in a large tolerance.
        """
        for name, draws in self.draws.items():
            kernel, same_dtype, truth = (torch.cat(column) for column in zip(*draws, strict=True))
            ulp = torch.finfo(kernel.dtype).eps * truth.abs().max().double()
            error, allowed = ((t.double() - truth).abs() for t in (kernel, same_dtype))
            if truth.numel() >= self.FEWEST:
                worst = allowed.max()
                assert error.max() <= 2 * worst + 4 * ulp, (name, error.max(), worst)
                rms, allowed_rms = (t.square().mean().sqrt() for t in (error, allowed))
                assert rms <= 2 * allowed_rms + 4 * ulp, (name, rms, allowed_rms)
            cosine = torch.cosine_similarity(kernel.double(), truth, dim=0, eps=1e-300)
            assert cosine >= 0.9999 or not truth.any(), (name, cosine)


def assert_as_accurate(kernel, same_dtype, exact):
    """`Errors` of a single draw."""
    errors = Errors()
    errors.add(kernel, same_dtype, exact)
    errors.check()


def kept_for_backward(layer, x):
    """Bytes of the storages that autograd saves in one forward pass, parameters excluded."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x.requires_grad_())
    return sum(kept.values())
