"""The tolerance rule itself: it must pass what is right and fail what is not."""

import pytest
import torch

from epa_kernels.testing import Errors


def gathered(change, size=200, draws=24):
    """Errors of results that `change` is done to, beside float32 rounding like the reference's."""
    generator = torch.Generator().manual_seed(0)
    errors = Errors()
    for _ in range(draws):
        terms = torch.randn(4, size, generator=generator, dtype=torch.float64)
        exact = terms.sum(0)
        noise = 1e-6 * torch.randn(2, size, generator=generator, dtype=torch.float64)
        kernel = (change(exact, terms) + noise[0]).float()
        errors.add({"dx": kernel}, {"dx": (exact + noise[1]).float()}, {"dx": exact})
    return errors


def one_wrong(exact, terms):
    return exact.index_fill(0, torch.tensor([7]), exact[7].item() + 1e-4)


@pytest.mark.parametrize("size, draws", ((200, 24), (1, 24), (200, 1), (4, 1)))
def test_rounding_passes(size, draws):
    gathered(lambda exact, terms: exact, size, draws).check()


@pytest.mark.parametrize(
    "change",
    (
        lambda exact, terms: exact * (1 + 1e-4),
        lambda exact, terms: exact - terms[3],
        lambda exact, terms: exact - 0.01 * terms[3],
        lambda exact, terms: -exact,
        lambda exact, terms: torch.full_like(exact, torch.nan),
        one_wrong,
    ),
    ids=("scaled", "no-term", "less-of-a-term", "sign", "nan", "one-element"),
)
@pytest.mark.parametrize("draws", (1, 24))
def test_wrong_result_fails(change, draws):
    with pytest.raises(AssertionError, match="dx"):
        gathered(change, draws=draws).check()


def test_a_handful_of_numbers_is_held_by_its_direction():
    gathered(lambda exact, terms: exact * (1 + 1e-4), 4, 1).check()
    with pytest.raises(AssertionError, match="dx"):
        gathered(lambda exact, terms: exact - terms[3], 4, 1).check()


def test_a_gradient_that_is_zero_must_be_zero():
    zero = torch.zeros(20, dtype=torch.float64)
    for value, passes in ((0.0, True), (1e-30, False)):
        errors = Errors()
        errors.add({"dx": zero.float() + value}, {"dx": zero.float()}, {"dx": zero})
        if passes:
            errors.check()
        else:
            with pytest.raises(AssertionError, match="dx"):
                errors.check()
