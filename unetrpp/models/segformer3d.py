"""SegFormer3D: a hierarchical transformer for volumes with a decoder of linear layers alone.

    x -- embed_1, tf_block1 -- embed_2, tf_block2 -- embed_3, tf_block3 -- embed_4, tf_block4
              |                     |                     |                     |
           linear_c1             linear_c2             linear_c3             linear_c4
              +---------------------+----------+----------+---------------------+
                                  linear_fuse, linear_pred, upsampled to x

Source: Perera, Navard, Yilmaz, "SegFormer3D: an Efficient Transformer for 3D Medical Image
Segmentation", CVPR workshops 2024. Written from a description of its arithmetic; names of the
parameters, sizes and numbers are those of the published network. Tokens are (B, N, C) throughout:
in memory that is a volume (B, C, *grid) with channels last, so that going between the two copies
nothing.

Presets:
    brats     BraTS, four MR sequences in, three regions out, which overlap and have no background;
              4,525,251 parameters
    tiny      no published counterpart
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional

from epa_kernels import spatial_attention
from unetrpp.models.layers import Triple, constant, to_tokens, to_volume, upsample_linear
from unetrpp.models.network import STAGES, Network, Widths, register

__all__ = ["SegFormer3D"]

SCALES = ("num_heads", "head_dim")


@register
class SegFormer3D(Network):
    """SegFormer3D for 3-D segmentation: logits for volumes of any legal size.

    Args:
        in_channels: channels of the input volume, for instance one per MR sequence.
        out_channels: classes of a label map, the background included (`unetrpp train`); or regions
            that may overlap, without one, as published.
        img_size: size of the training patch, three integers or one. Weights do not depend on it:
            forward takes every size whose axes are multiples of the product of the strides, which
            need not be cubes as in the published code.
        strides: of the four patch embeddings, three integers or one each. Their kernels overlap:
            2 s - 1 voxels along an axis of stride s, at least 3. Keys and values of the first two
            stages are reduced to the tokens of the third, by the strides between.
        dims: channels of the four stages.
        depths: transformer blocks in each stage.
        num_heads: attention heads of each stage; divides its channels.
        mlp_ratio: hidden channels of the feed-forward layers, as a multiple of the stage's.
        decoder_dim: channels of the decoder.
        attention_scale: what the attention's logits are divided by the root of: "num_heads" (the
            code of 2024, which the published weights belong to) or "head_dim" (the code since the
            end of 2025, and the usual one). One state dict, two functions.

    Attributes:
        img_size, config: see `Network`.

    Raises:
        ValueError: an argument breaks its rule, or forward gets a volume of an illegal size.

    Notes:
        Initialised as published: linear layers by a normal distribution of deviation 0.02
        truncated at 2, convolutions by one of deviation sqrt(2 / fan-out), biases zero. The logits
        are computed at the resolution of the first stage and upsampled trilinearly, as published.
        The last stage may be a single voxel, but then training needs a batch of two or more.

    Example:
        >>> model = SegFormer3D.from_preset("tiny").eval()
        >>> model(torch.randn(1, 1, 32, 64, 32)).shape
        torch.Size([1, 2, 32, 64, 32])
    """

    name = "segformer3d"
    takes_any_size = True
    input_weight = ("segformer_encoder.embed_1.patch_embeddings.weight", 1)
    output_weight = ("segformer_decoder.linear_pred.weight", 0)
    presets = {
        "brats": {"in_channels": 4, "out_channels": 3, "img_size": (128, 128, 128)},
        "tiny": {
            "in_channels": 1,
            "out_channels": 2,
            "img_size": (32, 32, 32),
            "strides": (2, 2, 2, 2),
            "dims": (8, 16, 24, 32),
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 3, 4),
            "decoder_dim": 32,
        },
    }
    cpu_widths = gpu_widths = Widths(
        "brats", "segformer3d, preset brats: the published widths, light enough for a CPU"
    )
    published_patch = "[96,96,96] (segformer3d)"
    # 800 epochs of 206 steps, 20 of them warm-up; a step takes 4 patches of each of 2 volumes.
    recipe = {
        "loss": "dice",
        "optimizer": "adamw",
        "betas": [0.9, 0.999],
        "schedule": "restarts",
        "warm_up": 4_120,
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "augmentation": "segformer3d",
        "mirror": False,
        "ema": 0.0,
        "steps": 164_800,
        "batch_size": 8,
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        img_size: Sequence[int] | int,
        *,
        strides: Sequence[Sequence[int] | int] = (4, 2, 2, 2),
        dims: Sequence[int] = (32, 64, 160, 256),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratio: int = 4,
        decoder_dim: int = 256,
        attention_scale: str = "num_heads",
    ) -> None:
        super().__init__(
            in_channels,
            img_size,
            strides,
            out_channels=out_channels,
            dims=dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            decoder_dim=decoder_dim,
            attention_scale=attention_scale,
        )
        self.check_lengths(STAGES, dims=dims, depths=depths, num_heads=num_heads)
        self.check_heads(dims, num_heads)
        if attention_scale not in SCALES:
            raise ValueError(
                f"SegFormer3D: attention_scale must be one of {', '.join(SCALES)}; got "
                f"{attention_scale!r}."
            )
        self.segformer_encoder = Encoder(
            in_channels, self.strides, dims, depths, num_heads, mlp_ratio, attention_scale
        )
        self.segformer_decoder = Decoder(dims, decoder_dim, out_channels)
        self.draw_own_way()

    def draw_own_way(self) -> None:
        """See `Network`."""
        self.apply(_init)

    @classmethod
    def load_warning(cls, overrides: Mapping[str, Any]) -> str | None:
        """See `Network`: one state dict serves two attention scales."""
        if "attention_scale" in overrides:
            return None
        return (
            'does not tell which attention scale it was trained with; assumed is attention_scale="'
            'num_heads", of the code that the published weights came with in 2024. Pass that, or '
            '"head_dim" for weights of the code since end of 2025.'
        )

    @property
    def attention_inputs(self) -> dict[str, tuple[int, ...]]:
        """See `Network`: queries of the first stage, (1, N, H, D)."""
        return {"spatial_attention": self._heads_shape(0, 0)}

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of x.

        Args:
            x (B, in_channels, X, Y, Z): any float dtype, axes multiples of the strides' products.

        Returns: (B, out_channels, X, Y, Z).

        Raises:
            ValueError: x has another number of axes or of channels, or an illegal size.
        """
        x = self.check_input(x)
        return upsample_linear(self.segformer_decoder(*self.segformer_encoder(x)), x.shape[2:])


class Encoder(nn.Module):
    """Four stages, each an overlapping patch embedding, transformer blocks, and a LayerNorm."""

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[Triple],
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: int,
        attention_scale: str,
    ) -> None:
        super().__init__()
        # Keys of a stage are reduced to the grid of the third, for the published strides 4 2 1 1.
        reductions = [
            tuple(math.prod(axis) for axis in zip((1, 1, 1), *strides[level:3], strict=True))
            for level in range(1, STAGES + 1)
        ]
        for level, (before, after) in enumerate(pairwise((in_channels, *dims))):
            self.add_module(f"embed_{level + 1}", PatchEmbedding(before, after, strides[level]))
        for level in range(STAGES):
            blocks = nn.ModuleList(
                TransformerBlock(
                    dims[level], num_heads[level], reductions[level], mlp_ratio, attention_scale
                )
                for _ in range(depths[level])
            )
            self.add_module(f"tf_block{level + 1}", blocks)
            self.add_module(f"norm{level + 1}", nn.LayerNorm(dims[level]))

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Triple]]:
        """x (B, in_channels, *size) -> tokens (B, N_i, dims[i]) and grid of each stage."""
        stages, grids = [], []
        for level in range(1, STAGES + 1):
            x, grid = getattr(self, f"embed_{level}")(x)
            for block in getattr(self, f"tf_block{level}"):
                x = block(x, grid)
            stages.append(getattr(self, f"norm{level}")(x))
            grids.append(grid)
            x = to_volume(stages[-1], grid)
        return stages, grids


class PatchEmbedding(nn.Module):
    """Strided convolution whose patches overlap, then LayerNorm over the channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: Triple) -> None:
        super().__init__()
        kernel = cast(Triple, tuple(max(3, 2 * s - 1) for s in stride))
        padding = cast(Triple, tuple(k // 2 for k in kernel))
        self.patch_embeddings = nn.Conv3d(in_channels, out_channels, kernel, stride, padding)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Triple]:
        """x (B, in_channels, *size) -> tokens (B, N, out_channels) and their grid."""
        x = self.patch_embeddings(x)
        grid: Any = tuple(x.shape[2:])
        return self.norm(to_tokens(x)), grid


class TransformerBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(
        self, channels: int, num_heads: int, reduction: Triple, mlp_ratio: int, attention_scale: str
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = SelfAttention(channels, num_heads, reduction, attention_scale)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = MixFFN(channels, mlp_ratio)

    def forward(self, x: Tensor, grid: Triple) -> Tensor:
        """x (B, N, C), N the product of grid -> (B, N, C)."""
        x = x + self.attention(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x), grid)


class SelfAttention(nn.Module):
    """Self-attention whose keys and values come from a coarser grid.

        z = sr_norm(sr(x)), sr a convolution with kernel and stride `reduction`; x where that is 1
        y = proj(softmax_p(scale q_n . k_p) v_p),   q = query(x),  k, v = key_value(z)
        scale = 1 / sqrt(H), or 1 / sqrt(C / H), see `SegFormer3D`

    Shapes: x (B, N, C) -> (B, N, C); P = N / prod(reduction) keys.
    """

    def __init__(
        self, channels: int, num_heads: int, reduction: Triple, attention_scale: str
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)
        self.has_reduction = math.prod(reduction) > 1
        if self.has_reduction:
            self.sr = nn.Conv3d(channels, channels, reduction, reduction)
            self.sr_norm = nn.LayerNorm(channels)
        divisor = num_heads if attention_scale == "num_heads" else channels // num_heads
        self.scale = divisor**-0.5

    def forward(self, x: Tensor, grid: Triple) -> Tensor:
        """x (B, N, C), N the product of grid -> (B, N, C)."""
        q = self.query(x).unflatten(2, (self.num_heads, -1))  # (B, N, H, D)
        if self.has_reduction:
            x = self.sr_norm(to_tokens(self.sr(to_volume(x, grid))))  # (B, P, C)
        k, v = self.key_value(x).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        return self.proj(spatial_attention(q, k, v, constant(self.scale, q)).flatten(2))


class MixFFN(nn.Module):
    """fc2(gelu(bn(dwconv(fc1(x))))), dwconv a depthwise 3x3x3 convolution on the grid of tokens."""

    def __init__(self, channels: int, mlp_ratio: int) -> None:
        super().__init__()
        hidden = mlp_ratio * channels
        self.fc1 = nn.Linear(channels, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor, grid: Triple) -> Tensor:
        """x (B, N, C), N the product of grid -> (B, N, C)."""
        hidden = self.dwconv(to_volume(self.fc1(x), grid))
        return self.fc2(functional.gelu(to_tokens(hidden)))


class DepthwiseConv(nn.Module):
    """bn(dwconv(x)), dwconv a 3x3x3 convolution of every channel by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv3d(channels, channels, 3, padding=1, groups=channels)
        self.bn = nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *grid) -> the same shape."""
        return self.bn(self.dwconv(x))


class Decoder(nn.Module):
    """Project every stage to one width, upsample to the first, fuse, classify.

        published: logits = linear_pred(relu(norm(W concat_i(up(y_i))))),  y_i = bn_i(proj_i(x_i))
        here:      W concat_i(up(y_i)) = sum_i up(W_i y_i)

    W is a 1x1x1 convolution: it acts on channels, the upsampling on positions, so they commute
    and W_i acts on the few tokens of its stage. At 128^3 this is 2.45 instead of 8.59 G
    multiply-adds, for the same numbers up to rounding.
    """

    def __init__(self, dims: Sequence[int], decoder_dim: int, out_channels: int) -> None:
        super().__init__()
        for level in range(STAGES, 0, -1):
            self.add_module(f"linear_c{level}", Projection(dims[level - 1], decoder_dim))
        self.linear_fuse = nn.Sequential(
            nn.Conv3d(STAGES * decoder_dim, decoder_dim, 1, bias=False),
            nn.BatchNorm3d(decoder_dim),
            nn.ReLU(inplace=True),
        )
        self.linear_pred = nn.Conv3d(decoder_dim, out_channels, 1)

    def forward(self, stages: list[Tensor], grids: list[Triple]) -> Tensor:
        """stages[i] (B, N_i, dims[i]) on grids[i] -> logits (B, out_channels, *grids[0])."""
        fuse: Any
        fuse, *norm_relu = self.linear_fuse
        # Published order of the channels: the coarsest stage first.
        weights = fuse.weight.flatten(1).chunk(STAGES, 1)[::-1]  # (decoder_dim, decoder_dim) each
        fused = None
        for level, (x, grid, weight) in enumerate(zip(stages, grids, weights, strict=True)):
            projected = getattr(self, f"linear_c{level + 1}")(x).transpose(1, 2)
            # Stored channel by channel, which upsampling reads; expanded for a product per sample.
            part = (weight.expand(x.shape[0], -1, -1) @ projected).unflatten(2, grid)
            if fused is None:
                fused = part
            else:
                fused += upsample_linear(part, grids[0])
        for layer in norm_relu:
            fused = layer(fused)
        return self.linear_pred(fused)


class Projection(nn.Module):
    """Linear layer, then LayerNorm, which the published code calls bn."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, out_channels)
        self.bn = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, in_channels) -> (B, N, out_channels)."""
        return self.bn(self.proj(x))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv3d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
