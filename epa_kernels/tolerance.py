"""The tolerance rule of kernels, with two anchors: the reference in float64 and in their dtype."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Errors:
    """Errors of a kernel and of `reference` in the same dtype, both against `reference` in float64.

    Gathered over draws, because the error of a handful of numbers in a single one, and the largest
    of errors with heavy tails, is luck: within 2 of the reference's over many draws, 3.5 in one.
    """

    FEWEST = 16  # numbers whose error is a statistic

    def __init__(self) -> None:
        # tensor's name -> list of (kernel's, same dtype's, exact), flat
        self.draws: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def add(
        self, kernel: Mapping[str, Tensor], same_dtype: Mapping[str, Tensor],
        exact: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Add one draw: results and gradients by name."""
        for name, truth in exact.items():
            first, second, third = (
                t.detach().flatten() for t in (kernel[name], same_dtype[name], truth)
            )
            self.draws.setdefault(name, []).append((first, second, third))

    def differences(self, factor: float = 2) -> list[str]:
        """Say of each tensor how it breaks the rule; empty if none does.

        error(kernel) <= factor error(reference) + 4 ulp of the largest value: max and RMS, by
        tensor.

        Fewer than FEWEST numbers are held by the cosine alone. It keeps a missing term of a
        gradient from hiding in a large tolerance.
        """
        found = []
        for name, kernel, truth, error, allowed in self._errors():
            ulp = torch.finfo(kernel.dtype).eps * truth.abs().max().double()
            if truth.numel() >= self.FEWEST:
                for measure, of in (("largest error", torch.max), ("RMS error", _rms)):
                    reached, bound = float(of(error)), float(factor * of(allowed) + 4 * ulp)
                    if not reached <= bound:  # true of NaN as well
                        found.append(f"{name}: {measure} {reached:.2g}, allowed {bound:.2g}")
            cosine = torch.cosine_similarity(kernel.double(), truth, dim=0, eps=1e-300)
            if not (cosine >= 0.9999 or not truth.any()):
                found.append(f"{name}: cosine {float(cosine):.6f}, at least 0.9999 is needed")
        return found

    def ratio(self) -> float:
        """The RMS error as a multiple of the reference's own, of the tensor where it is largest."""
        ratios = [0.0]
        for _, _, truth, error, allowed in self._errors():
            if truth.numel() >= self.FEWEST and allowed.any():
                ratios.append(float(_rms(error) / _rms(allowed)))
        return max(ratios, key=lambda ratio: math.inf if math.isnan(ratio) else ratio)

    def _errors(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
        """Name, kernel, exact, and errors of the kernel and of the reference, of all draws."""
        for name, draws in self.draws.items():
            kernel, same_dtype, truth = (torch.cat(column) for column in zip(*draws, strict=True))
            error, allowed = ((t.double() - truth).abs() for t in (kernel, same_dtype))
            yield name, kernel, truth, error, allowed

    def check(self) -> None:
        """Raise AssertionError with all `differences`."""
        if found := self.differences():
            raise AssertionError("; ".join(found))


def _rms(t: Tensor) -> Tensor:
    return t.square().mean().sqrt()
