"""Slim UNETR++, a reconstruction: Slim UNETR with MedNeXt blocks, SCA on its skips, and EPA.

    x -- stage 1 -- stage 2 -- stage 3 -- stage 4 -- tokens -- EPA
            |          |          |                             |
            |         SCA        SCA                            |
            +----------+----------+---------- decoder ----------+

Jin, Yang, Tong, Zhang, Wang, "Slim UNETR++", Medical & Biological Engineering & Computing 2025
(doi 10.1007/s11517-025-03390-2) published the parts (github.com/JJW20230321/Slim-UNETR-plus-plus,
MIT) but neither encoder, decoder nor block, so how they are joined is unknown. The parts here,
`MedNeXtBlock`, `SCA` and `layers.TransformerBlock` with `epa_kind="sum"`, compute what the
published ones do, with their names. The network around them is a RECONSTRUCTION, not the authors'
code: no published weights fit it, and nothing measured with it says anything about theirs.
MedNeXt: Roy et al., MICCAI 2023 (github.com/MIC-DKFZ/MedNeXt, Apache-2.0).

Presets:
    brats     the reconstruction at the size of slim_unetr's; 3,407,899 parameters
    tiny      no published counterpart
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from epa_kernels import channel_attention, spatial_attention
from epa_kernels.layout import from_heads
from unetrpp.models.layers import (
    TransformerBlock,
    Triple,
    replace_parameter,
    resample_projection,
    to_tokens,
    to_volume,
)
from unetrpp.models.network import STAGES, Network, Widths, register
from unetrpp.models.slim_unetr import (
    Decoder,
    Encoder,
    GlobalSparseTransformer,
    LineConv,
    LocalReverseDiffusion,
    PositionalEncoding,
    SlimUNETR,
    stage_builder,
)

__all__ = ["SCA", "MedNeXtBlock", "SlimUNETRPP"]


@register
class SlimUNETRPP(Network):
    """Slim UNETR++ as RECONSTRUCTED here (see the module): logits for volumes of one fixed size.

    Args:
        in_channels, out_channels, img_size, strides, dims, depths, num_heads, dropout: as in
            `SlimUNETR`.
        kernel_size: of the depthwise convolution of each MedNeXt block, odd.
        sca_stages: stages, counted from 1, whose skip connection goes through SCA; of 1, 2, 3.
        has_epa: whether the tokens of the last stage go through a block of EPA.
        proj_size: P of each SCA, the tokens that spatial attention attends to.
        epa_proj_size: P of the EPA.
        attention_dropout: of both attention maps in SCA and EPA, and of the channels in front of
            the EPA block's last convolution.

    Attributes:
        img_size, config: see `Network`.

    Raises:
        ValueError: an argument breaks its rule, or forward gets a volume of another size.

    Notes:
        No accuracy is claimed for this network, and none that was published is its own.
        The last stage may be a single voxel, but then training and evaluation need a batch of two
        or more, and MedNeXt's norm, over the voxels of a channel, leaves nothing of that one.

    Example:
        >>> model = SlimUNETRPP.from_preset("tiny").eval()
        >>> model(torch.randn(1, 1, 32, 32, 32)).shape
        torch.Size([1, 2, 32, 32, 32])
    """

    name = "slim_unetrpp"
    is_reconstruction = True
    input_weight = ("Encoder.DWconv1.depth_wise.weight", 1)
    output_weight = ("Decoder.SegHead.transposed.weight", 1)
    unread_parameters = ("sa.temperature",)
    presets = {
        "brats": SlimUNETR.presets["brats"],
        "tiny": {
            **SlimUNETR.presets["tiny"],
            "kernel_size": 3,
            "proj_size": 16,
            "epa_proj_size": 8,
        },
    }
    cpu_widths = gpu_widths = Widths(
        "brats", "slim_unetrpp, preset brats: Slim UNETR's widths, light enough for a CPU"
    )
    published_patch = "[128,128,128] (slim_unetrpp)"
    # Slim UNETR's, with 3 volumes a step.
    recipe = {**SlimUNETR.recipe, "warm_up": 1_667, "steps": 100_000, "batch_size": 6}
    is_decayed = staticmethod(SlimUNETR.is_decayed)

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
        kernel_size: int = 7,
        sca_stages: Sequence[int] = (2, 3),
        has_epa: bool = True,
        proj_size: int = 64,
        epa_proj_size: int = 32,
        attention_dropout: float = 0.1,
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
            kernel_size=kernel_size,
            sca_stages=sca_stages,
            has_epa=has_epa,
            proj_size=proj_size,
            epa_proj_size=epa_proj_size,
            attention_dropout=attention_dropout,
        )
        self.check_lengths(STAGES, dims=dims, depths=depths, num_heads=num_heads)
        self.check_heads(dims, num_heads)
        if kernel_size % 2 == 0:
            raise ValueError(
                f"SlimUNETRPP: kernel_size must be odd and at least 1; got {kernel_size}."
            )
        if not set(sca_stages) <= {1, 2, 3}:
            raise ValueError(
                f"SlimUNETRPP: sca_stages must be among 1, 2, 3, the stages with a skip "
                f"connection; got {sca_stages}."
            )

        def block(channels: int, heads: int, step: Triple) -> Block:
            return Block(channels, heads, step, kernel_size)

        stage = stage_builder(block, self.strides, dims, depths, num_heads)
        self.Encoder = Encoder(in_channels, self.strides, dims, stage, self.grids[-1], dropout)
        self.SCA = nn.ModuleDict(
            {
                str(number): SCA(
                    self.grids[number - 1],
                    dims[number - 1],
                    proj_size,
                    num_heads[number - 1],
                    dropout=attention_dropout,
                )
                for number in sorted(sca_stages)
            }
        )
        self.EPA = None
        if has_epa:
            self.EPA = TransformerBlock(
                self.grids[-1],
                dims[-1],
                epa_proj_size,
                num_heads[-1],
                epa_kind="sum",
                attention_dropout=attention_dropout,
                conv_dropout=attention_dropout,
                has_pos_embed=False,
            )
        self.Decoder = Decoder(out_channels, self.strides, dims, stage)

    @property
    def attention_inputs(self) -> dict[str, tuple[int, ...]]:
        """See `Network`: the blocks' queries as in `SlimUNETR`, then those of SCA, then EPA's."""
        inputs: dict[str, tuple[int, ...]] = {"spatial_attention": self._heads_shape(0, 2)}
        if self.SCA:
            level = int(next(iter(self.SCA))) - 1
            inputs["channel_attention"] = self._heads_shape(level, level)
        if self.EPA is not None:
            inputs["paired_attention"] = 1, math.prod(self.grids[-1]), self._arguments["dims"][-1]
        return inputs

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
        for number, attention in self.SCA.items():
            skip = skips[int(number) - 1]
            skips[int(number) - 1] = skip + attention(skip)
        if self.EPA is not None:
            tokens = to_tokens(self.EPA(to_volume(tokens, self.grids[-1])))
        return self.Decoder(tokens, skips, self.grids[-1])


class Block(nn.Module):
    """The block of Slim UNETR with a MedNeXt block in place of its LocalRC; see `slim_unetr`."""

    def __init__(self, channels: int, num_heads: int, step: Triple, kernel_size: int) -> None:
        super().__init__()
        self.patch1 = PositionalEncoding(channels)
        self.MedNeXt = MedNeXtBlock(channels, kernel_size=kernel_size)
        self.LineConv1 = LineConv(channels)
        self.patch2 = PositionalEncoding(channels)
        self.GlobalST = GlobalSparseTransformer(channels, num_heads, step)
        self.LocalRD = LocalReverseDiffusion(channels, step)
        self.LineConv2 = LineConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *grid) -> the same shape."""
        x = x + self.patch1(x)
        x = self.MedNeXt(x)
        x = x + self.LineConv1(x)
        x = x + self.patch2(x)
        x = x + self.LocalRD(self.GlobalST(x))
        return x + self.LineConv2(x)


class MedNeXtBlock(nn.Module):
    """MedNeXt's residual block with global response normalisation.

        h = gelu(conv2(norm(conv1(x))))             depthwise k^3, one group per channel, C -> 4 C
        g = |h|_2 over the voxels,  n = g / (mean over channels of g + 1e-6)
        y = x + conv3(grn_gamma h n + grn_beta + h)

    Args:
        channels: C. expansion: 4 above. kernel_size: k, odd.

    Shapes: (B, C, *grid) -> the same.

    Source: Roy et al., "MedNeXt", MICCAI 2023, as Slim UNETR++ uses it.
    """

    def __init__(self, channels: int, *, expansion: int = 4, kernel_size: int = 7) -> None:
        super().__init__()
        hidden = expansion * channels
        self.grn_beta = nn.Parameter(torch.empty(1, hidden, 1, 1, 1))
        self.grn_gamma = nn.Parameter(torch.empty(1, hidden, 1, 1, 1))
        self.reset_parameters()
        self.conv1 = nn.Conv3d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels
        )
        self.norm = nn.GroupNorm(channels, channels)
        self.conv2 = nn.Conv3d(channels, hidden, 1)
        self.conv3 = nn.Conv3d(hidden, channels, 1)

    def reset_parameters(self) -> None:
        """Set the block's own parameters to zero; its parts have their own reset."""
        nn.init.zeros_(self.grn_beta)
        nn.init.zeros_(self.grn_gamma)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *grid) -> the same shape."""
        h = functional.gelu(self.conv2(self.norm(self.conv1(x))))
        g = torch.linalg.vector_norm(h, dim=(2, 3, 4), keepdim=True)
        n = g / (g.mean(1, keepdim=True) + 1e-6)
        return x + self.conv3(self.grn_gamma * (h * n) + self.grn_beta + h)


class SCA(nn.Module):
    """Spatial plus channel attention of a volume, each with projections of its own.

        y = sa(x) + sc(x), no residual

    That is `EfficientPairedAttention` of kind "sum" whose branches do not share queries and keys.

    Args:
        grid: token grid of the volumes; N is its product.
        channels: C. proj_size: P. num_heads: divides C. dropout: of both attention maps.

    Shapes: (B, C, *grid) -> the same.

    Source: SCA.py of Slim UNETR++, where the class is called DANetHead.
    """

    def __init__(
        self, grid: Triple, channels: int, proj_size: int, num_heads: int, *, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.sa = SpatialAttention(grid, channels, proj_size, num_heads, dropout)
        self.sc = ChannelAttention(channels, num_heads, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *grid) -> the same shape."""
        tokens = to_tokens(x)
        return (self.sa(tokens) + self.sc(tokens)).transpose(1, 2).reshape(x.shape)


class SpatialAttention(nn.Module):
    """EPA's spatial branch alone, its result in the published order; `reference.heads_view`."""

    def __init__(
        self, grid: Triple, channels: int, proj_size: int, num_heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.grid = grid
        self.num_heads = num_heads
        # In the published state dict, and never read there either.
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1), requires_grad=False)
        self.temperature2 = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.EF = nn.Parameter(torch.empty(math.prod(grid), proj_size))
        self.reset_parameters()
        self.qkvv = nn.Linear(channels, 4 * channels, bias=False)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Draw the branch's own parameters anew; its parts have their own reset."""
        nn.init.ones_(self.temperature)
        nn.init.ones_(self.temperature2)
        bound = self.EF.shape[1] ** -0.5
        nn.init.uniform_(self.EF, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        # Of the four projections that EPA needs, the third is not read.
        q, k, _, v = self.qkvv(x).unflatten(2, (4, self.num_heads, -1)).unbind(2)  # (B, N, H, D)
        k_proj, v_proj = (torch.einsum("bnhd,np->bphd", t, self.EF) for t in (k, v))
        out = spatial_attention(
            q,
            k_proj,
            v_proj,
            self.temperature2,
            normalize=True,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return from_heads(out, "official")

    @torch.no_grad()
    def resize_tokens(self, grid: Triple) -> None:
        """Resample EF and rescale temperature2, in place; see `TransformerBlock.resize_tokens`."""
        old, self.grid = self.grid, grid
        growth = math.sqrt(math.prod(grid) / math.prod(old))
        replace_parameter(self.temperature2, self.temperature2 * growth)
        replace_parameter(self.EF, resample_projection(self.EF, 0, old, grid))


class ChannelAttention(nn.Module):
    """EPA's channel branch alone."""

    def __init__(self, channels: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.reset_parameters()
        self.qkvv = nn.Linear(channels, 4 * channels, bias=False)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Set the temperature to one; the projection has its own reset."""
        nn.init.ones_(self.temperature)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        # Of the four projections that EPA needs, the last is not read.
        q, k, v, _ = self.qkvv(x).unflatten(2, (4, self.num_heads, -1)).unbind(2)  # (B, N, H, D)
        dropout_p = self.dropout.p if self.training else 0.0
        return channel_attention(q, k, v, self.temperature, dropout_p=dropout_p).flatten(2)
