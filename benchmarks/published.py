"""The siblings as their published code computes them: scores in memory, decoders in its order.

    with published_order(): ...     inside, SegFormer3D and Slim UNETR run like that

Written from the description of the arithmetic, for timing and for a test that both orders agree.
"""

import contextlib
from unittest import mock

import torch
from torch.nn import functional

from unetrpp.models import segformer3d, slim_unetr
from unetrpp.models.layers import UpsamplingConv3d, to_volume


def materialised_attention(q, k, v, scale):
    """`epa_kernels.spatial_attention` with scores (B, H, N, P) in memory."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, tokens, D)
    return ((q @ k.transpose(2, 3)) * scale).softmax(3).matmul(v).transpose(1, 2)


def interpolate(x, size):
    """`layers.upsample_linear` by the operator of torch."""
    return functional.interpolate(x, size=size, mode="trilinear")


def fuse_at_full_resolution(decoder, stages, grids):
    """`segformer3d.Decoder.forward`: every stage upsampled to the first, then fused."""
    parts = []
    for level in range(len(stages), 0, -1):
        part = to_volume(getattr(decoder, f"linear_c{level}")(stages[level - 1]), grids[level - 1])
        parts.append(interpolate(part, grids[0]))
    return decoder.linear_pred(decoder.linear_fuse(torch.cat(parts, 1)))


@contextlib.contextmanager
def published_order():
    """Inside, the networks compute in the published order."""
    with (
        mock.patch.object(segformer3d, "spatial_attention", materialised_attention),
        mock.patch.object(slim_unetr, "spatial_attention", materialised_attention),
        mock.patch.object(segformer3d.Decoder, "forward", fuse_at_full_resolution),
        mock.patch.object(segformer3d, "upsample_linear", interpolate),
        mock.patch.object(UpsamplingConv3d, "forward", torch.nn.ConvTranspose3d.forward),
    ):
        yield
