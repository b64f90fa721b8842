"""Slim UNETR: a U-shaped network of light blocks, for machines without a GPU.

    x -- DWconv1, block1 -- DWconv2, block2 -- DWconv3, block3 -- DWconv4, block4 -- tokens
              |                  |                  |                                  |
    SegHead - block1 - TSconv3 - block2 - TSconv2 - block3 - TSconv1 ---------------- block4

Source: Pang, Liang, Huang, Chen, Li, Li, Huang, Wang, "Slim UNETR: Scale Hybrid Transformers to
Efficient 3D Medical Image Segmentation Under Limited Computational Resources", IEEE TMI 2024, and
the published code (github.com/deepang-ai/Slim-UNETR, MIT). Names of parameters, sizes and
arithmetic are the code's, its oddities too, for published weights need them:

    - attention is not scaled: softmax(q k), although head_dim ** -0.5 is computed there;
    - the decoder takes the tokens (B, N, C) for a volume (B, C, *grid) as they lie in memory,
      which mixes channels and positions;
    - the logits are normalised, by a GroupNorm over all classes and voxels of a sample;
    - what it calls depth-wise in stem and downsampling is dense.

Presets, whose `out_channels` count regions that overlap, without a background:
    brats     BraTS, four MR sequences in, three regions out; 1,783,425 parameters
    hepatic   Decathlon hepatic vessels and tumours, two regions out; 1,773,726 parameters
    tiny      no published counterpart
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from epa_kernels import spatial_attention
from unetrpp.models.layers import (
    Triple,
    UpsamplingConv3d,
    constant,
    replace_parameter,
    resample_grid,
    to_tokens,
)
from unetrpp.models.network import STAGES, Network, Widths, register

__all__ = ["SlimUNETR"]


@register
class SlimUNETR(Network):
    """Slim UNETR for 3-D segmentation: logits for volumes of one fixed size.

    Args:
        in_channels: channels of the input volume, for instance one per MR sequence.
        out_channels: classes of a label map, the background included (`unetrpp train`); or regions
            that may overlap, without one, as published.
        img_size: size of the input volume (the training patch), three integers or one; each axis a
            multiple of the product of its strides. Weights go to another by `resize_tokens`.
        strides: one step per stage, three integers or one each, default (4, 2, 2, 2). Attention of
            the first two stages runs on the voxels of the third's grid, that of the others on the
            fourth's: on every 4th, 2nd, 2nd and every voxel of an axis, as published.
        dims: channels of the four stages.
        depths: blocks in each stage, in the encoder and again in the decoder.
        num_heads: attention heads of each stage; divides its channels.
        dropout: of the tokens between encoder and decoder, default 0.3.

    Attributes:
        img_size, config: see `Network`.

    Raises:
        ValueError: an argument breaks its rule, or forward gets a volume of another size.

    Notes:
        Initialised by the defaults of torch, the position embedding with zeros. With the published
        128^3 or 96^3 volumes the published embedding_dim is the number of tokens of the last stage.
        The last stage may be a single voxel, but then training needs a batch of two or more.

    Example:
        >>> model = SlimUNETR.from_preset("tiny").eval()
        >>> model(torch.randn(1, 1, 32, 32, 32)).shape
        torch.Size([1, 2, 32, 32, 32])
    """

    name = "slim_unetr"
    input_weight = ("Encoder.DWconv1.depth_wise.weight", 1)
    output_weight = ("Decoder.SegHead.transposed.weight", 1)
    presets = {
        "brats": {"in_channels": 4, "out_channels": 3, "img_size": (128, 128, 128)},
        "hepatic": {"in_channels": 1, "out_channels": 2, "img_size": (96, 96, 96)},
        "tiny": {
            "in_channels": 1,
            "out_channels": 2,
            "img_size": (32, 32, 32),
            "strides": (2, 2, 2, 2),
            "dims": (8, 12, 16, 24),
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 2, 4),
        },
    }
    cpu_widths = gpu_widths = Widths(
        "brats", "slim_unetr, preset brats: the published widths, light enough for a CPU"
    )
    published_patch = "[128,128,128] (slim_unetr)"
    # 300 epochs of 1000 volumes, 5 of them warm-up; a step takes 2 patches of each of 16 volumes.
    recipe = {
        "loss": "dice_focal",
        "optimizer": "adamw",
        "betas": [0.9, 0.95],
        "schedule": "cosine",
        "warm_up": 313,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "augmentation": "slim_unetr",
        "mirror": True,
        "ema": 0.0,
        "steps": 18_750,
        "batch_size": 32,
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        img_size: Sequence[int] | int,
        *,
        strides: Sequence[Sequence[int] | int] = (4, 2, 2, 2),
        dims: Sequence[int] = (24, 48, 60, 96),
        depths: Sequence[int] = (1, 2, 3, 2),
        num_heads: Sequence[int] = (1, 2, 4, 4),
        dropout: float = 0.3,
    ) -> None:
        super().__init__(
            in_channels,
            img_size,
            strides,
            out_channels=out_channels,
            dims=dims,
            depths=depths,
            num_heads=num_heads,
            dropout=dropout,
        )
        self.check_lengths(STAGES, dims=dims, depths=depths, num_heads=num_heads)
        self.check_heads(dims, num_heads)
        stage = stage_builder(Block, self.strides, dims, depths, num_heads)
        self.Encoder = Encoder(in_channels, self.strides, dims, stage, self.grids[-1], dropout)
        self.Decoder = Decoder(out_channels, self.strides, dims, stage)

    @staticmethod
    def is_decayed(name: str, parameter: nn.Parameter) -> bool:
        """See `Network`: neither biases nor scales of norms decay, by the default of timm."""
        return parameter.ndim > 1

    @property
    def attention_inputs(self) -> dict[str, tuple[int, ...]]:
        """See `Network`: the first stage's queries, on the voxels of the third's grid."""
        return {"spatial_attention": self._heads_shape(0, 2)}

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of x.

        Args:
            x (B, in_channels, *img_size): any float dtype.

        Returns: (B, out_channels, *img_size).

        Raises:
            ValueError: x has another number of axes, of channels, or another size.
        """
        x = self.check_input(x)
        tokens, skips = self.Encoder(x)
        return self.Decoder(tokens, skips, self.grids[-1])


def stage_builder(
    block: Callable[[int, int, Triple], nn.Module],
    strides: Sequence[Triple],
    dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
) -> Callable[[int], nn.Sequential]:
    """Return the function that builds the blocks of a stage, given its number from 0.

    block(channels, num_heads, step) builds one. Its attention runs on every step-th voxel: those
    of the third stage's grid in the first two, of the fourth's in the others.
    """
    steps = [
        tuple(math.prod(axis) for axis in zip((1, 1, 1), *strides[level + 1 : last], strict=True))
        for level, last in enumerate((3, 3, 4, 4))
    ]

    def stage(level: int) -> nn.Sequential:
        blocks = (block(dims[level], num_heads[level], steps[level]) for _ in range(depths[level]))
        return nn.Sequential(*blocks)

    return stage


class Encoder(nn.Module):
    """Four stages of a strided convolution and blocks, then the tokens of the last."""

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[Triple],
        dims: Sequence[int],
        stage: Callable[[int], nn.Module],
        grid: Triple,
        dropout: float,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.position_embeddings = nn.Parameter(torch.empty(1, math.prod(grid), dims[-1]))
        self.reset_parameters()
        for level, (before, after) in enumerate(pairwise((in_channels, *dims))):
            self.add_module(f"DWconv{level + 1}", Downsample(before, after, strides[level]))
        for level in range(STAGES):
            self.add_module(f"block{level + 1}", stage(level))
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Set the position embeddings to zero, as in a new model."""
        nn.init.zeros_(self.position_embeddings)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x (B, in_channels, *size) -> tokens (B, N, dims[3]), volumes of the other stages."""
        stages = []
        for level in range(1, STAGES + 1):
            x = getattr(self, f"block{level}")(getattr(self, f"DWconv{level}")(x))
            stages.append(x)
        tokens = to_tokens(x) + self.position_embeddings
        return self.dropout(tokens), stages[:-1]

    @torch.no_grad()
    def resize_tokens(self, grid: Triple) -> None:
        """Resample the position embedding to another token grid, in place."""
        embeddings = resample_grid(self.position_embeddings, 1, self.grid, grid)
        replace_parameter(self.position_embeddings, embeddings)
        self.grid = grid


class Decoder(nn.Module):
    """Blocks on the tokens, then three times: upsample, add the encoder's volume, blocks."""

    block1: nn.Module
    block2: nn.Module
    block3: nn.Module
    block4: nn.Module
    TSconv1: nn.Module
    TSconv2: nn.Module
    TSconv3: nn.Module

    def __init__(
        self,
        out_channels: int,
        strides: Sequence[Triple],
        dims: Sequence[int],
        stage: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.SegHead = Upsample(dims[0], out_channels, strides[0])
        for number in (3, 2, 1):
            level = STAGES - number
            self.add_module(
                f"TSconv{number}", Upsample(dims[level], dims[level - 1], strides[level])
            )
        for level in range(STAGES):
            self.add_module(f"block{level + 1}", stage(level))

    def forward(self, tokens: Tensor, skips: list[Tensor], grid: Triple) -> Tensor:
        """tokens (B, N, C) on grid, skips of the first three stages -> logits."""
        # As published, a reshape of what lies in memory; tokens.transpose(1, 2) would be meant.
        x = self.block4(tokens.reshape(tokens.shape[0], -1, *grid))
        x = self.block3(self.TSconv1(x) + skips[2])
        x = self.block2(self.TSconv2(x) + skips[1])
        x = self.block1(self.TSconv3(x) + skips[0])
        return self.SegHead(x)


class Downsample(nn.Module):
    """Convolution with kernel = stride, then GroupNorm with one group."""

    def __init__(self, in_channels: int, out_channels: int, stride: Triple) -> None:
        super().__init__()
        self.depth_wise = nn.Conv3d(in_channels, out_channels, stride, stride)
        self.norm = nn.GroupNorm(1, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, *grid * stride) -> (B, out_channels, *grid)."""
        return self.norm(self.depth_wise(x))


class Upsample(nn.Module):
    """Transposed convolution with kernel = stride, then GroupNorm with one group."""

    def __init__(self, in_channels: int, out_channels: int, stride: Triple) -> None:
        super().__init__()
        self.transposed = UpsamplingConv3d(in_channels, out_channels, stride)
        self.norm = nn.GroupNorm(1, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, *grid) -> (B, out_channels, *grid * stride)."""
        return self.norm(self.transposed(x))


class Block(nn.Module):
    """One block of Slim UNETR; nothing normalises the sum between its parts.

        x = x + patch1(x)                  depthwise 3x3x3
        x = x + LocalRC(x)                 local representation congregation
        x = x + LineConv1(x)
        x = x + patch2(x)
        x = x + LocalRD(GlobalST(x))       attention of every step-th voxel, spread to all again
        x = x + LineConv2(x)

    Args:
        channels: C. num_heads: divides C.
        step: r, the distance of the voxels that attend, per axis.

    Shapes: (B, C, *grid) -> the same; step divides grid.
    """

    def __init__(self, channels: int, num_heads: int, step: Triple) -> None:
        super().__init__()
        self.patch1 = PositionalEncoding(channels)
        self.LocalRC = LocalRepresentationsCongregation(channels)
        self.LineConv1 = LineConv(channels)
        self.patch2 = PositionalEncoding(channels)
        self.GlobalST = GlobalSparseTransformer(channels, num_heads, step)
        self.LocalRD = LocalReverseDiffusion(channels, step)
        self.LineConv2 = LineConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *grid) -> the same shape."""
        x = x + self.patch1(x)
        x = x + self.LocalRC(x)
        x = x + self.LineConv1(x)
        x = x + self.patch2(x)
        x = x + self.LocalRD(self.GlobalST(x))
        return x + self.LineConv2(x)


class PositionalEncoding(nn.Module):
    """Depthwise 3x3x3 convolution without bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.positional_encoding = nn.Conv3d(
            channels, channels, 3, padding=1, groups=channels, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *grid) -> the same shape."""
        return self.positional_encoding(x)


class LocalRepresentationsCongregation(nn.Module):
    """pointwise(bn2(depthwise(pointwise(bn1(x))))), without activation and bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm3d(channels)
        self.pointwise_conv_0 = nn.Conv3d(channels, channels, 1, bias=False)
        self.depthwise_conv = nn.Conv3d(
            channels, channels, 3, padding=1, groups=channels, bias=False
        )
        self.bn2 = nn.BatchNorm3d(channels)
        self.pointwise_conv_1 = nn.Conv3d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *grid) -> the same shape."""
        x = self.depthwise_conv(self.pointwise_conv_0(self.bn1(x)))
        return self.pointwise_conv_1(self.bn2(x))


class LineConv(nn.Module):
    """Two 1x1x1 convolutions with gelu between, 4 C channels wide, without bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.line_conv_0 = nn.Conv3d(channels, 4 * channels, 1, bias=False)
        self.line_conv_1 = nn.Conv3d(4 * channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *grid) -> the same shape."""
        return self.line_conv_1(functional.gelu(self.line_conv_0(x)))


class GlobalSparseTransformer(nn.Module):
    """Self-attention of every step-th voxel of an axis: softmax_p(q_n . k_p) v_p, not scaled.

    Shapes: (B, C, *grid) -> (B, C, *grid / step).
    """

    def __init__(self, channels: int, num_heads: int, step: Triple) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.step = step
        self.qkv = nn.Conv3d(channels, 3 * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *grid) -> (B, C, *grid / step)."""
        a, b, c = self.step
        x = x[:, :, ::a, ::b, ::c]
        # Head after head, each with its queries, keys and values.
        qkv = to_tokens(self.qkv(x)).unflatten(2, (self.num_heads, 3, -1))  # (B, N, H, 3, D)
        q, k, v = qkv.unbind(3)  # (B, N, H, D)
        out = spatial_attention(q, k, v, constant(1.0, q))  # (B, N, H, D)
        return out.flatten(2).transpose(1, 2).reshape(x.shape)


class LocalReverseDiffusion(nn.Module):
    """Spread every value over a box of `step` voxels: pointwise(norm(depthwise transposed conv)).

    Shapes: (B, C, *grid) -> (B, C, *grid * step).
    """

    def __init__(self, channels: int, step: Triple) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.conv_trans = nn.ConvTranspose3d(channels, channels, step, step, groups=channels)
        self.pointwise_conv = nn.Conv3d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *grid) -> (B, C, *grid * step)."""
        return self.pointwise_conv(self.norm(self.conv_trans(x)))
