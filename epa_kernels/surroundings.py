"""Memory whose surroundings are watched: every buffer lies between NaN, and is NaN at first.

A kernel that reads beyond a buffer spoils its result, one that writes beyond it is seen, and one
that leaves something unwritten leaves NaN.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GUARD = 64  # elements on each side of a buffer


class Surroundings(TorchFunctionMode):
    """Gives every buffer that is allocated inside such surroundings.

    Example:
        >>> with Surroundings() as memory:
        ...     result = kernel(memory.copy(x))
        >>> assert not memory.broken()
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.empty, Tensor.new_empty):
            like = function(*args, **kwargs)
            return self.take(like.shape, like.dtype, like.device)
        if function is torch.empty_like:
            like = function(*args, **kwargs)
            return self.take((like.numel(),), like.dtype, like.device).as_strided(
                like.shape, like.stride()
            )
        return function(*args, **kwargs)

    def take(self, shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A dense tensor of NaN between NaN; of whole numbers, between their largest."""
        count = torch.Size(shape).numel()
        value = torch.iinfo(dtype).max if not dtype.is_floating_point else float("nan")
        buffer = torch.full((count + 2 * GUARD,), value, dtype=dtype, device=device)
        self.buffers.append(buffer)
        return buffer[GUARD : GUARD + count].view(shape)

    def copy(self, t: Tensor, memory: str = "dense") -> Tensor:
        """t in such surroundings.

        Args:
            memory: "dense", axes in their order in memory; "transposed", the axis behind the first
                comes last; or "sliced", of a larger tensor along every axis.
        """
        if memory == "transposed" and t.dim() > 1:
            axes = (0, *range(2, t.dim()), 1) if t.dim() > 2 else (1, 0)
            swapped = t.permute(axes)
            back = [axes.index(axis) for axis in range(t.dim())]
            return self.take(swapped.shape, t.dtype, t.device).copy_(swapped).permute(back)
        if memory == "sliced":
            larger = self.take([n + 2 for n in t.shape], t.dtype, t.device)
            return larger[tuple(slice(1, 1 + n) for n in t.shape)].copy_(t)
        row = self.take((t.numel(),), t.dtype, t.device)
        return row.as_strided(t.shape, t.clone().stride()).copy_(t)

    def broken(self) -> bool:
        """Whether something was written around a buffer."""
        return not all(
            _is_untouched(edge) for b in self.buffers for edge in (b[:GUARD], b[-GUARD:])
        )


def _is_untouched(edge: Tensor) -> bool:
    if edge.is_floating_point():
        return bool(edge.isnan().all())
    return bool((edge == torch.iinfo(edge.dtype).max).all())
