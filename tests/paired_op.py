"""Paired attention as an op of tensors, and memory whose surroundings are watched."""

import torch
from cases import make_layer

GUARD = 64  # elements of NaN on each side of a buffer


class Guards:
    """Allocate every tensor filled with NaN and between NaN, and see that those stay."""

    def __init__(self, monkeypatch):
        self.buffers = []
        self._empty = torch.empty
        monkeypatch.setattr(torch, "empty", self.empty)
        monkeypatch.setattr(torch, "empty_like", lambda t, **_: self.like(t))
        monkeypatch.setattr(
            torch.Tensor, "new_empty", lambda t, *a, **k: self.new_empty(t, *a, **k)
        )

    def empty(self, *shape, dtype=torch.float32, device=None):
        shape = shape[0] if shape and isinstance(shape[0], (tuple, list, torch.Size)) else shape
        return self._take(shape, torch.Size(shape).numel(), dtype)

    def new_empty(self, t, *shape, dtype=None, device=None):
        return self.empty(*shape, dtype=dtype or t.dtype)

    def like(self, t):
        return self._take(t.shape, t.numel(), t.dtype).as_strided(t.shape, t.stride())

    def copy(self, t):
        return None if t is None else self.like(t).copy_(t)

    def _take(self, shape, count, dtype):
        if not count or not dtype.is_floating_point:  # the interpreter's own
            return self._empty(shape, dtype=dtype)
        buffer = self._empty(count + 2 * GUARD, dtype=dtype).fill_(float("nan"))
        self.buffers.append(buffer)
        return buffer[GUARD : GUARD + count].view(shape)

    def check(self):
        assert self.buffers
        for buffer in self.buffers:
            assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()


def ops_arguments(shape, kind, layout, dtype=torch.float32, *, bias=True, seed=0):
    """Inputs of the op, without a seed of dropout, and its options."""
    B, N, C, H, _ = shape
    layer = make_layer(shape, kind, layout, bias=bias, seed=seed).to(dtype)
    weights = dict(layer.named_parameters())

    def pair(name):
        return weights.get(f"{name}.weight"), weights.get(f"{name}.bias")

    projection = (layer.EF.t(), None) if kind == "sum" else pair("E")
    x = torch.randn(B, N, C, dtype=dtype, generator=torch.Generator().manual_seed(seed + 1))
    tensors = (x, *pair("qkvv"), *projection, *pair("F"), layer.temperature, layer.temperature2,
               *pair("out_proj"), *pair("out_proj2"))  # fmt: skip
    options = {"num_heads": H, "kind": kind, "layout": layout,
               "channel_dropout_p": 0.1, "spatial_dropout_p": 0.2}  # fmt: skip
    return [None if t is None else t.detach() for t in tensors], options
