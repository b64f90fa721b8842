"""Where backends write gradients: allocation, dtypes and strides."""

from collections.abc import Iterable

import torch
from torch import Tensor


def empty_gradient(t: Tensor | None, like: Tensor) -> Tensor:
    """Uninitialised gradient of an input: with its strides where dense, of size 0 where absent."""
    return like.new_empty((0,)) if t is None else torch.empty_like(t)


def per_head(temperature: Tensor) -> tuple[Tensor, int]:
    """A temperature of H elements or one as a row, and its stride over heads."""
    row = temperature.flatten()
    return row, row.stride(0) if row.numel() > 1 else 0


def temperature_gradient(dtemperature: Tensor, temperature: Tensor) -> Tensor:
    """From one value a head (H), in shape and dtype of a temperature of H elements or one."""
    total = dtemperature.sum() if temperature.numel() == 1 else dtemperature
    return empty_gradient(temperature, temperature).copy_(total.view_as(temperature))


class ParameterGradients:
    """Gradients of parameters from kernels that write densely, in `dtype` or each one's own."""

    def __init__(
        self, tensors: Iterable[Tensor | None], like: Tensor, dtype: torch.dtype | None = None
    ) -> None:
        tensors = list(tensors)
        self.results = [empty_gradient(t, like) for t in tensors]
        self.dense = [
            None
            if t is None
            else result
            if result.dtype == (dtype or t.dtype) and result.is_contiguous()
            else torch.empty(t.shape, dtype=dtype or t.dtype, device=like.device)
            for t, result in zip(tensors, self.results, strict=True)
        ]

    def finish(self) -> list[Tensor]:
        """The gradients in dtype, shape and strides of their tensors; size 0 for absent ones."""
        for result, dense in zip(self.results, self.dense, strict=True):
            if dense is not None and dense is not result:
                result.copy_(dense)
        return self.results
