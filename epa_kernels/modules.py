"""Efficient paired attention as a layer, and its drop-in for models that use the published one."""

from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch, functional
from .contract import KINDS, LAYOUTS, PairedInputs, PairedOptions


class EfficientPairedAttention(nn.Module):
    """The EPA layer of UNETR++: spatial and channel attention with shared queries and keys.

    Computes `epa_kernels.paired_attention` with its own parameters. Positional arguments and
    state-dict keys are those of the published layer, so its weights load unchanged.

    Args:
        input_size: N, number of tokens; fixed, because E and F are (P, N).
        hidden_size: C, channels; even unless kind is "sum".
        proj_size: P, projected tokens.
        num_heads: H, divides C; default 4.
        qkv_bias: bias of the q, k, v, v projection, default False.
        channel_attn_drop, spatial_attn_drop: dropout of the two attention maps, default 0.1.
        kind: "shared" (Synapse: one projection E = F for keys and values), "split" (ACDC, Lung:
            E for keys, F for values) or "sum" (BraTS: one matrix EF without bias, the branches
            are added and there are no output projections).
        layout: order of the spatial branch's result. "official" is the published one, which
            checkpoints need; "tokens" keeps each token's channels together, as the paper describes.
        backend: "reference", "two_pass", "cpu", "cuda", "triton"; None takes the one of
            `epa_kernels.use_backend`, or the fastest that can run.

    Shapes: x (B, N, C) -> (B, N, C), dtype of x (the autocast dtype under autocast).

    Example:
        >>> layer = EfficientPairedAttention(4 * 4 * 4, 32, 16)
        >>> layer(torch.randn(2, 64, 32)).shape
        torch.Size([2, 64, 32])

    Source: Shaker et al., "UNETR++", TMI 2024.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        proj_size: int,
        num_heads: int = 4,
        qkv_bias: bool = False,
        channel_attn_drop: float = 0.1,
        spatial_attn_drop: float = 0.1,
        *,
        kind: str = "shared",
        layout: str = "official",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        functional.check_choice("EfficientPairedAttention", "kind", kind, KINDS)
        functional.check_choice("EfficientPairedAttention", "layout", layout, LAYOUTS)
        if backend is not None:
            dispatch.check_backend("EfficientPairedAttention", backend)
        for name, value in (
            ("input_size", input_size),
            ("hidden_size", hidden_size),
            ("proj_size", proj_size),
            ("num_heads", num_heads),
        ):
            if value < 1:
                raise ValueError(
                    f"EfficientPairedAttention: {name} must be at least 1, got {value}."
                )
        if hidden_size % num_heads:
            raise ValueError(
                f"EfficientPairedAttention: hidden_size must be a multiple of num_heads, got "
                f"{hidden_size} and {num_heads}."
            )
        if kind != "sum" and hidden_size % 2:
            raise ValueError(
                f"EfficientPairedAttention: hidden_size must be even, got {hidden_size}; each "
                f"branch is projected to half of it. kind='sum' takes odd sizes."
            )
        factory: Any = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.kind = kind
        self.layout = layout
        self.backend = backend
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1, **factory))
        self.temperature2 = nn.Parameter(torch.ones(num_heads, 1, 1, **factory))
        # Registration order is the published state dict's.
        if kind == "sum":
            bound = proj_size**-0.5
            self.EF = nn.Parameter(
                torch.empty(input_size, proj_size, **factory).uniform_(-bound, bound)
            )
        self.qkvv = nn.Linear(hidden_size, 4 * hidden_size, bias=qkv_bias, **factory)
        if kind != "sum":
            self.E = nn.Linear(input_size, proj_size, **factory)
            self.F = self.E if kind == "shared" else nn.Linear(input_size, proj_size, **factory)
        self.attn_drop = nn.Dropout(channel_attn_drop)
        self.attn_drop_2 = nn.Dropout(spatial_attn_drop)
        if kind != "sum":
            self.out_proj = nn.Linear(hidden_size, hidden_size // 2, **factory)
            self.out_proj2 = nn.Linear(hidden_size, hidden_size // 2, **factory)

    def arguments(self, x: Tensor) -> tuple[PairedInputs, PairedOptions]:
        """Inputs and options of `epa_kernels.paired_attention` that compute the layer on x."""
        qkvv, temperature, temperature2 = self.qkvv, self.temperature, self.temperature2
        if self.kind == "sum":
            inputs = PairedInputs(
                x, qkvv.weight, qkvv.bias, self.EF.t(), None, None, None, temperature, temperature2,
                None, None, None, None,
            )  # fmt: skip
        else:
            E, out_proj, out_proj2 = self.E, self.out_proj, self.out_proj2
            F_weight, F_bias = None, None
            if self.kind == "split":
                F_weight, F_bias = self.F.weight, self.F.bias
            inputs = PairedInputs(
                x, qkvv.weight, qkvv.bias, E.weight, E.bias, F_weight, F_bias,
                temperature, temperature2,
                out_proj.weight, out_proj.bias, out_proj2.weight, out_proj2.bias,
            )  # fmt: skip
        channel, spatial = self.attn_drop, self.attn_drop_2
        options = PairedOptions(
            self.num_heads,
            self.kind,
            self.layout,
            channel.p if channel.training else 0.0,
            spatial.p if spatial.training else 0.0,
        )
        return inputs, options

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, C); x may have any strides."""
        inputs, options = self.arguments(x)
        return functional.paired_attention(*inputs, **options._asdict(), backend=self.backend)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kind={self.kind!r}, layout={self.layout!r}"


EPA = EfficientPairedAttention


def _kind_of(layer: nn.Module) -> str | None:
    """The kind of a published EPA layer, by its attributes; None if it is no such layer."""
    if not all(hasattr(layer, name) for name in ("qkvv", "temperature", "temperature2")):
        return None
    if hasattr(layer, "EF"):
        return "sum"
    if hasattr(layer, "E") and hasattr(layer, "F"):
        return "shared" if layer.E is layer.F else "split"
    return None


def _adopt(name: str, layer: Any, kind: str) -> EfficientPairedAttention:
    """Our layer around the parameters and dropout modules of a published one."""
    if kind == "sum":
        token_projection, parts = tuple(layer.EF.shape), ["EF"]
    else:
        token_projection = tuple(reversed(layer.E.weight.shape))
        parts = ["E", "F", "out_proj", "out_proj2"]
    parts += ["temperature", "temperature2", "qkvv", "attn_drop", "attn_drop_2"]
    missing = [part for part in parts if not hasattr(layer, part)]
    unknown = (
        dict(layer.named_parameters(recurse=False)).keys() | dict(layer.named_children()).keys()
    )
    unknown -= set(parts)
    if missing or unknown:
        raise ValueError(
            f"patch_model: {name} looks like an EPA layer of kind {kind!r} but "
            + " and ".join(
                f"{verb} {', '.join(sorted(names))}"
                for verb, names in (("lacks", missing), ("has besides", unknown))
                if names
            )
            + "; only the published layers are known."
        )
    ours = EfficientPairedAttention(
        token_projection[0],
        layer.qkvv.in_features,
        token_projection[1],
        layer.temperature.numel(),
        layer.qkvv.bias is not None,
        layer.attn_drop.p,
        layer.attn_drop_2.p,
        kind=kind,
        device="meta",
    )
    expected, found = ({k: v.shape for k, v in m.state_dict().items()} for m in (ours, layer))
    wrong = [key for key in expected if found.get(key) != expected[key]]
    if wrong:
        raise ValueError(
            f"patch_model: {name} has parameters of an unknown shape: "
            + ", ".join(
                f"{key} {tuple(found[key]) if key in found else 'absent'} instead of "
                f"{tuple(expected[key])}"
                for key in wrong
            )
            + "; only the published layers are known."
        )
    for part in parts:
        setattr(ours, part, getattr(layer, part))
    ours.training = layer.training
    return ours


def patch_model(model: nn.Module) -> int:
    """Replace every published EPA layer inside `model` by ours, in place.

    A layer counts if it has `qkvv`, `temperature`, `temperature2` and either `E` and `F` or `EF`.
    Its kind follows from them. Parameters and dropout modules are shared, not copied, so outputs,
    optimizers, state-dict keys and checkpoints stay valid.

    Args:
        model: any module that contains such layers.

    Returns:
        How many layers were replaced.

    Raises:
        ValueError: no such layer, or one whose attributes or shapes are unknown; then nothing has
            been replaced.

    Example:
        >>> import epa_kernels
        >>> epa_kernels.patch_model(model)
        21
    """
    adopted: dict[int, EfficientPairedAttention] = {}
    places = []
    for prefix, parent in model.named_modules():
        # Not named_children: it skips the second name of a layer that one parent holds twice.
        for name, child in parent._modules.items():
            kind = None if isinstance(child, EfficientPairedAttention) else _kind_of(child)
            if kind is None:
                continue
            if id(child) not in adopted:
                adopted[id(child)] = _adopt(f"{prefix}.{name}".lstrip("."), child, kind)
            places.append((parent, name, adopted[id(child)]))
    if not adopted:
        raise ValueError(
            f"patch_model: {type(model).__name__} contains no published EPA layer (a submodule "
            f"with qkvv, temperature, temperature2 and E and F, or EF); for a model that is itself "
            f"the layer, build epa_kernels.EPA and load its state dict."
        )
    for parent, name, ours in places:
        setattr(parent, name, ours)
    return len(adopted)
