"""UNETR++: a U-shaped network for volumes whose levels are blocks of paired attention.

    x --- encoder1 (full resolution) -------------------------------- decoder2 -- out1
    |                                                                     |
    stem, stages.0 -- stages.1 -- stages.2 -- stages.3                    |
              |          |            |          |                        |
              +-------------------------------------- decoder3 -- out2 ---+
                         +------------------ decoder4 -- out3
                                      +- decoder5, from stages.3

Source: Shaker et al., "UNETR++: Delving into Efficient and Accurate 3D Medical Image Segmentation",
TMI 2024. Names, sizes and arithmetic are those of the published code, its sizes no longer fixed.

Presets, whose `out_channels` count the background:
    synapse   Synapse multi-organ CT, 14 classes; 42,952,850 parameters
    btcv      the same network: BTCV was trained with the Synapse model on other splits
    acdc      ACDC cardiac MR, E and F separate, two convolution blocks; 66,796,404 parameters
    lung      Decathlon lung CT, as acdc; 121,174,798 parameters
    tumor     BraTS, four MR sequences in, branches added; 42,647,604 parameters
    tiny      no published counterpart
"""

import math
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from unetrpp.models.layers import ResidualBlock, TransformerBlock, Triple, UpBlock, named_conv
from unetrpp.models.network import STAGES, Network, Widths, register

__all__ = ["UNETRPP"]

_DEEPER = ((2, 2, 2), (2, 2, 2), (2, 2, 2))
_SYNAPSE = {
    "in_channels": 1,
    "out_channels": 14,
    "img_size": (64, 128, 128),
    "strides": ((2, 4, 4), *_DEEPER),
    "attention_dropout": 0.15,
}
# For a CPU: 4 M parameters at 48x64x48.
_CPU_SETTINGS = {
    "feature_size": 8,
    "dims": [16, 32, 64, 128],
    "num_heads": 4,
    "proj_sizes": [32, 32, 32, 16],
    "decoder_proj_sizes": [32, 32, 32],
}


@register
class UNETRPP(Network):
    """UNETR++ for 3-D segmentation: logits for volumes of one fixed size.

    Args:
        in_channels: channels of the input volume, for instance one per MR sequence.
        out_channels: classes, background included.
        img_size: size of the input volume (the training patch), three integers or one. Each axis
            must be a multiple of the product of its strides; other sizes raise and name the
            nearest legal one. Weights of one size go to another by `resize_tokens`.
        strides: one step per stage, three integers or one each. The first is the stem (kernel and
            stride of the first convolution and of the last upsampling), the others lie between the
            stages. Axes with few voxels take 1: ((1, 4, 4), (1, 2, 2), (2, 2, 2), (2, 2, 2)).
        feature_size: channels at full resolution, default 16.
        dims: channels of the four stages; the decoder mirrors the first three.
        depths: transformer blocks in each encoder stage.
        decoder_depths: the same in the decoder, deepest first (decoder5, decoder4, decoder3).
        num_heads: attention heads; divides every entry of dims.
        proj_sizes: P of each encoder stage, the tokens that spatial attention attends to.
        decoder_proj_sizes: the same in the decoder, deepest first.
        epa_kind: "shared", "split" or "sum", see `epa_kernels.EfficientPairedAttention`.
        epa_layout: "official" (published checkpoints need it) or "tokens" (the paper's text).
        epa_backend: kernel backend, None for the fastest available. Not part of `config`, because
            it belongs to a machine, not to a model.
        res_blocks: residual convolution blocks behind each attention, 1 or 2.
        attention_dropout: dropout of both attention maps, default 0.1 (synapse: 0.15).
        conv_dropout: channel dropout in each transformer block, default 0.1.
        deep_supervision: see below. Can be switched on the model at any time.

    Attributes:
        deep_supervision: False (default): forward returns the logits, (B, out_channels, *img_size).
            True: a list of three, full resolution first, in training and in evaluation as in the
            published code; their strides are `output_strides`. With False the two coarse heads
            get no gradient and ask for none, see `Network`.
        img_size: the input size as three integers.
        config: everything needed to build the model again, as plain JSON.

    Raises:
        ValueError: an argument breaks its rule, or forward gets a volume of another size.

    Notes:
        Initialised as published: linear layers of the encoder by a normal distribution of
        deviation 0.02 truncated at 2 (biases zero), everything else by the defaults of torch,
        gamma 1e-6. GroupNorm of the stem has gcd(in_channels, dims[0]) groups and that of each
        deeper step gcd of its channels: the published in_channels and dims[i] wherever these fit.
        The last stage may be a single voxel, but then training needs a batch of two or more.

    Example:
        >>> model = UNETRPP.from_preset("tiny").eval()
        >>> model(torch.randn(1, 1, 32, 32, 32)).shape
        torch.Size([1, 2, 32, 32, 32])
    """

    name = "unetrpp"
    coarse_heads = ("out2", "out3")
    input_weight = ("encoder1.conv1.conv.weight", 1)
    output_weight = ("out1.conv.conv.weight", 0)
    presets = {
        "synapse": _SYNAPSE,
        "btcv": _SYNAPSE,
        "acdc": {
            "in_channels": 1,
            "out_channels": 4,
            "img_size": (16, 160, 160),
            "strides": ((1, 4, 4), *_DEEPER),
            "epa_kind": "split",
            "res_blocks": 2,
        },
        "lung": {
            "in_channels": 1,
            "out_channels": 2,
            "img_size": (32, 192, 192),
            "strides": ((1, 4, 4), *_DEEPER),
            "epa_kind": "split",
            "res_blocks": 2,
        },
        "tumor": {
            "in_channels": 4,
            "out_channels": 4,
            "img_size": (128, 128, 128),
            "strides": ((4, 4, 4), *_DEEPER),
            "epa_kind": "sum",
        },
        "tiny": {
            "in_channels": 1,
            "out_channels": 2,
            "img_size": (32, 32, 32),
            "strides": ((2, 2, 2), *_DEEPER),
            "feature_size": 8,
            "dims": (8, 16, 32, 64),
            "depths": (1, 1, 1, 1),
            "decoder_depths": (1, 1, 1),
            "num_heads": 2,
            "proj_sizes": (16, 16, 16, 8),
            "decoder_proj_sizes": (16, 16, 16),
        },
    }
    cpu_widths = Widths(
        "tiny",
        f"preset tiny, widened ({_CPU_SETTINGS}): trains in minutes on a CPU",
        _CPU_SETTINGS,
    )
    gpu_widths = Widths("synapse", "preset synapse: the published widths (43 M parameters)")
    published_patch = "[64,128,128] (unetrpp on Synapse)"
    recipe = {
        "loss": "dice_ce",
        "optimizer": "sgd",
        "betas": [0.9, 0.999],  # of AdamW, where the user asks for it
        "schedule": "poly",
        "warm_up": 0,
        "learning_rate": 1e-2,
        "weight_decay": 3e-5,
        "augmentation": "full",
        "mirror": True,
        "ema": 0.0,
        "steps": 250_000,
    }

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        img_size: Sequence[int] | int,
        *,
        strides: Sequence[Sequence[int] | int] = ((2, 4, 4), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
        feature_size: int = 16,
        dims: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (3, 3, 3, 3),
        decoder_depths: Sequence[int] = (3, 3, 3),
        num_heads: int = 4,
        proj_sizes: Sequence[int] = (64, 64, 64, 32),
        decoder_proj_sizes: Sequence[int] = (64, 64, 64),
        epa_kind: str = "shared",
        epa_layout: str = "official",
        epa_backend: str | None = None,
        res_blocks: int = 1,
        attention_dropout: float = 0.1,
        conv_dropout: float = 0.1,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            img_size,
            strides,
            out_channels=out_channels,
            feature_size=feature_size,
            dims=dims,
            depths=depths,
            decoder_depths=decoder_depths,
            num_heads=num_heads,
            proj_sizes=proj_sizes,
            decoder_proj_sizes=decoder_proj_sizes,
            epa_kind=epa_kind,
            epa_layout=epa_layout,
            res_blocks=res_blocks,
            attention_dropout=attention_dropout,
            conv_dropout=conv_dropout,
        )
        self.check_lengths(STAGES, dims=dims, depths=depths, proj_sizes=proj_sizes)
        self.check_lengths(
            STAGES - 1, decoder_depths=decoder_depths, decoder_proj_sizes=decoder_proj_sizes
        )
        if res_blocks not in (1, 2):
            raise ValueError(f"UNETRPP: res_blocks must be 1 or 2, got {res_blocks}.")

        def stage(level: int, depth: int, proj_size: int) -> nn.Sequential:
            return nn.Sequential(
                *(
                    TransformerBlock(
                        self.grids[level],
                        dims[level],
                        proj_size,
                        num_heads,
                        epa_kind=epa_kind,
                        epa_layout=epa_layout,
                        epa_backend=epa_backend,
                        res_blocks=res_blocks,
                        attention_dropout=attention_dropout,
                        conv_dropout=conv_dropout,
                    )
                    for _ in range(depth)
                )
            )

        def decoder(level: int) -> UpBlock:
            position = STAGES - 2 - level
            block = stage(level, decoder_depths[position], decoder_proj_sizes[position])
            return UpBlock(dims[level + 1], dims[level], self.strides[level + 1], block)

        channels = (in_channels, *dims)
        self.unetr_pp_encoder = Encoder(
            [
                _downsample(channels[level], channels[level + 1], self.strides[level])
                for level in range(STAGES)
            ],
            [stage(level, depths[level], proj_sizes[level]) for level in range(STAGES)],
        )
        self.encoder1 = ResidualBlock(in_channels, feature_size, norm="instance")
        self.decoder5 = decoder(2)
        self.decoder4 = decoder(1)
        self.decoder3 = decoder(0)
        self.decoder2 = UpBlock(
            dims[0],
            feature_size,
            self.strides[0],
            ResidualBlock(feature_size, feature_size, norm="instance"),
        )
        self.out1 = _head(feature_size, out_channels)
        self.out2 = _head(dims[0], out_channels)
        self.out3 = _head(dims[1], out_channels)
        self.draw_own_way()
        self.deep_supervision = deep_supervision

    def draw_own_way(self) -> None:
        """See `Network`."""
        self.unetr_pp_encoder.apply(_init_encoder)

    @property
    def output_strides(self) -> tuple[Triple, Triple, Triple]:
        """Stride of each of the three outputs of deep supervision against the input."""
        stem, first = self.strides[:2]
        product = tuple(s * f for s, f in zip(stem, first, strict=True))
        return (1, 1, 1), stem, cast(Triple, product)

    @property
    def attention_inputs(self) -> dict[str, tuple[int, ...]]:
        """See `Network`: tokens of the first stage, (1, N, C)."""
        return {"paired_attention": (1, math.prod(self.grids[0]), self._arguments["dims"][0])}

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return the logits of x.

        Args:
            x (B, in_channels, *img_size): any float dtype.

        Returns: (B, out_channels, *img_size), or with `deep_supervision` a list of three of
            resolutions img_size / output_strides.

        Raises:
            ValueError: x has another number of axes, of channels, or another size.
        """
        x = self.check_input(x)
        stages = self.unetr_pp_encoder(x)
        deep = self.decoder5(stages[3], stages[2])
        middle = self.decoder4(deep, stages[1])
        shallow = self.decoder3(middle, stages[0])
        # Late, so that no full-resolution volume is held while the levels below are computed.
        logits = self.out1(self.decoder2(shallow, self.encoder1(x)))
        if not self.deep_supervision:
            return logits
        return [logits, self.out2(shallow), self.out3(middle)]


class Encoder(nn.Module):
    """Four stages, each a strided convolution with GroupNorm and then transformer blocks."""

    def __init__(self, downsample_layers: list[nn.Module], stages: list[nn.Module]) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList(downsample_layers)
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x (B, in_channels, *img_size) -> four volumes (B, dims[i], *grid_i), finest first."""
        outputs = []
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(downsample(x))
            outputs.append(x)
        return outputs


def _downsample(in_channels: int, out_channels: int, stride: Triple) -> nn.Sequential:
    return nn.Sequential(
        named_conv(nn.Conv3d(in_channels, out_channels, stride, stride, bias=False)),
        nn.GroupNorm(math.gcd(in_channels, out_channels), out_channels),
    )


def _head(in_channels: int, out_channels: int) -> nn.Sequential:
    return named_conv(named_conv(nn.Conv3d(in_channels, out_channels, 1)))


def _init_encoder(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
