"""The grid of backends, kinds, layouts and shapes that the tests of the attention ops share."""

import os
from pathlib import Path

import pytest
import torch

import epa_kernels
from epa_kernels import contract
from epa_kernels.backends import triton
from epa_kernels.testing import DEVICE

ROOT = Path(__file__).parents[1]
# For a child process that imports `benchmarks`: the package under test comes before its sources.
CHILD_ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(epa_kernels.__file__).parents[1]), str(ROOT)])
}

# Backends beside the reference that run here; a new one is tested by being named here. The CUDA
# kernels under the emulator have tests of their own, test_cuda*.py.
FUSED_BACKENDS = (
    "two_pass",
    "cpu" if DEVICE == "cpu" else "cuda",
    *(() if triton.missing() else ("triton",)),
)
BACKENDS = ("reference", *FUSED_BACKENDS)
INTERPRETED = ("triton",) if DEVICE == "cpu" else ()
# For tests of a hundred calls or large shapes.
COMPILED_BACKENDS = tuple(name for name in BACKENDS if name not in INTERPRETED)
KINDS, LAYOUTS = contract.KINDS, contract.LAYOUTS

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


def _is_one_of(cases, parameters):
    return any(all(parameters[name] in values for name, values in case.items()) for case in cases)


def daily(*cases):
    """A mark: only these cases are daily, the others exhaustive.

    cases: {parameter's name: its values in the case}
    """
    return pytest.mark.daily.with_args(lambda **parameters: _is_one_of(cases, parameters))


def daily_if_interpreted(*cases):
    """`daily` for an interpreted backend; every case of the others is daily."""

    def is_daily(backend, **parameters):
        return backend not in INTERPRETED or _is_one_of(cases, parameters)

    return pytest.mark.daily.with_args(is_daily)


def draws(dtype, backend):
    few = backend in INTERPRETED and DRAWS[dtype] > 2
    return range(DRAWS[dtype] // 3 if few else DRAWS[dtype])
