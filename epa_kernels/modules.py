"""Efficient paired attention as a layer."""

from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch, functional, parts
from .contract import KINDS, LAYOUTS, OPS, Call, PairedInputs, PairedOptions, by_name
from .subclasses import as_compiled, foreign


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

    Notes:
        The fused op reads the weights of plain `nn.Linear` parts. If a part is another module, or
        has a hook or a parametrisation, the layer calls its modules instead, with the same result;
        a warning says so once. TorchScript cannot compile the layer (RuntimeError).

    Example:
        >>> layer = EfficientPairedAttention(4 * 4 * 4, 32, 16)
        >>> layer(torch.randn(2, 64, 32)).shape
        torch.Size([2, 64, 32])

    Source: Shaker et al., "UNETR++", TMI 2024.
    """

    _told = False  # whether the layer has said that it is not fused

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
        self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1, **factory))
        self.temperature2 = nn.Parameter(torch.empty(num_heads, 1, 1, **factory))
        # Registration order is the published state dict's.
        if kind == "sum":
            self.EF = nn.Parameter(torch.empty(input_size, proj_size, **factory))
        self._reset_own_parameters()
        self.qkvv = nn.Linear(hidden_size, 4 * hidden_size, bias=qkv_bias, **factory)
        if kind != "sum":
            self.E = nn.Linear(input_size, proj_size, **factory)
            self.F = self.E if kind == "shared" else nn.Linear(input_size, proj_size, **factory)
        self.attn_drop = nn.Dropout(channel_attn_drop)
        self.attn_drop_2 = nn.Dropout(spatial_attn_drop)
        if kind != "sum":
            self.out_proj = nn.Linear(hidden_size, hidden_size // 2, **factory)
            self.out_proj2 = nn.Linear(hidden_size, hidden_size // 2, **factory)

    def _reset_own_parameters(self) -> None:
        with torch.no_grad():
            self.temperature.fill_(1)
            self.temperature2.fill_(1)
            if self.kind == "sum":
                bound = self.EF.shape[1] ** -0.5
                self.EF.uniform_(-bound, bound)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as at construction; after `to_empty`, for example.

        Parts that are no plain nn.Linear, as one that FSDP shards, are left to themselves.
        """
        self._reset_own_parameters()
        for part in self.children():
            if type(part) is nn.Linear:
                part.reset_parameters()

    def arguments(self, x: Tensor) -> tuple[PairedInputs, PairedOptions]:
        """Inputs and options of `epa_kernels.paired_attention` that compute the layer on x.

        Weights of plain parts are all that they tell, see `parts`.
        """
        # Not by self.qkvv: that takes a microsecond each, as it is looked up elsewhere first.
        modules: dict[str, Any] = self._modules
        qkvv, kind, temperature, temperature2 = (
            modules["qkvv"], self.kind, self.temperature, self.temperature2
        )  # fmt: skip
        if kind == "sum":
            inputs = PairedInputs(
                x, qkvv.weight, qkvv.bias, self.EF.t(), None, None, None, temperature, temperature2,
                None, None, None, None,
            )  # fmt: skip
        else:
            E, F = modules["E"], modules["F"]
            out_proj, out_proj2 = modules["out_proj"], modules["out_proj2"]
            # What the modules are counts: either name may have been given another one since.
            kind = "shared" if E is F else "split"
            F_weight, F_bias = (None, None) if E is F else (F.weight, F.bias)
            inputs = PairedInputs(
                x, qkvv.weight, qkvv.bias, E.weight, E.bias, F_weight, F_bias,
                temperature, temperature2,
                out_proj.weight, out_proj.bias, out_proj2.weight, out_proj2.bias,
            )  # fmt: skip
        return inputs, PairedOptions(self.num_heads, kind, self.layout, *parts.rates(self))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> (B, N, C); x may have any strides."""
        if torch.compiler.is_compiling():
            x = as_compiled(x)
        if parts.are_plain(self):
            inputs, options = self.arguments(x)
            rate = max(options.channel_dropout_p, options.spatial_dropout_p)
            if foreign(*tuple(inputs)[1:]) is None and rate < 1:
                return functional.paired_attention(
                    *inputs, **by_name(options), backend=self.backend
                )
        parts.warn(self)
        return parts.call(self, x)

    def explained(self, x: Tensor) -> tuple[list[str], list[Call]]:
        """For `epa_kernels.explain`: why the layer calls its modules, and its calls of ops on x."""
        if reasons := parts.reasons(self):
            return reasons, parts.calls(self, x)
        return [], [OPS["paired_attention"].call(*self.arguments(x))]

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot compile the layer; use torch.compile, "
            f"or to export it torch.export, torch.onnx.export or torch.jit.trace."
        )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kind={self.kind!r}, layout={self.layout!r}"


EPA = EfficientPairedAttention
