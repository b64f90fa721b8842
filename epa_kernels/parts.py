"""The layer by calls of its modules, and what makes them necessary.

The fused op reads weights. It can stand for plain modules alone: `nn.Linear`, `nn.Dropout` and
`nn.Identity` themselves, without a hook and with a forward of torch's. A part of another class (an
adapter, a quantised or sharded layer), a hook (pruning, weight norm, a probe) or a parametrisation
counts only if its module is called. Then the layer runs

    linear parts   their modules are called, with the inputs that the published layer gives them
    attention      `spatial_attention` and `channel_attention`, still fused; where a dropout module
                   has to be called, in plain PyTorch, because it needs the map
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import functional, reference
from .contract import OPS, Call
from .layout import from_heads
from .rng import draw_seed
from .subclasses import foreign
from .torch_private import MODULE_HOOKS, global_hooks

if TYPE_CHECKING:
    from .modules import EfficientPairedAttention

LINEAR = {
    "shared": ("qkvv", "E", "F", "out_proj", "out_proj2"),
    "split": ("qkvv", "E", "F", "out_proj", "out_proj2"),
    "sum": ("qkvv",),
}
DROPOUT = ("attn_drop", "attn_drop_2")
_ALL = {kind: (*names, *DROPOUT) for kind, names in LINEAR.items()}
_PLAIN = (nn.Linear, nn.Dropout, nn.Identity)
_FORWARD = nn.Linear.forward  # some programs replace it for every Linear, to add adapters


def are_plain(layer: EfficientPairedAttention) -> bool:
    """Whether weights and rates are all there is to every part; asked at each call."""
    modules = layer._modules
    for name in _ALL[layer.kind]:
        part: Any = modules[name]
        # Attributes by name, not by getattr in a loop, which takes three times as long.
        if (
            type(part) not in _PLAIN
            or part._forward_pre_hooks
            or part._forward_hooks
            or part._backward_pre_hooks
            or part._backward_hooks
            or "forward" in part.__dict__
        ):
            return False
    return nn.Linear.forward is _FORWARD and (not global_hooks() or not _foreign_hooks())


def _foreign_hooks() -> list[str]:
    """Modules of Python that put a hook on every module; torch's own only watch which one runs."""
    homes = {getattr(hook, "__module__", None) or "" for hook in global_hooks()}
    return sorted(home for home in homes if not home.startswith("torch."))


def _why_not_plain(part: nn.Module, classes: tuple[type, ...]) -> list[str]:
    if type(part) not in classes:
        return [f"is a {type(part).__name__}"]
    hooks = [name for name in MODULE_HOOKS if getattr(part, name)]
    reasons = [f"has {name.strip('_').replace('_', ' ')}" for name in hooks]
    if "forward" in part.__dict__:
        reasons.append("has a forward of its own")
    if name := foreign(*part._parameters.values()):
        reasons.append(f"has parameters of class {name}")
    return reasons


def _is_called(dropout: nn.Module) -> bool:
    return bool(_why_not_plain(dropout, (nn.Dropout, nn.Identity))) or _rate(dropout) >= 1


def _rate(dropout: Any) -> float:
    """The probability that a plain dropout module drops with, 0 in eval mode."""
    return dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0


def rates(layer: EfficientPairedAttention) -> tuple[float, float]:
    """Dropout of the channel map and of the spatial map, of plain modules."""
    modules = layer._modules
    return _rate(modules["attn_drop"]), _rate(modules["attn_drop_2"])


def reasons(layer: EfficientPairedAttention) -> list[str]:
    """Why the layer calls its modules, a clause each; empty if it is fused."""
    found = []
    for name in _ALL[layer.kind]:
        classes = (nn.Dropout, nn.Identity) if name in DROPOUT else (nn.Linear,)
        why = _why_not_plain(getattr(layer, name), classes)
        if name in DROPOUT and not why and _rate(getattr(layer, name)) >= 1:
            why = ["drops everything"]
        if why:
            found.append(f"{name} {' and '.join(why)}")
    if nn.Linear.forward is not _FORWARD:
        found.append("nn.Linear.forward was replaced")
    if homes := _foreign_hooks():
        found.append(f"every module has a hook of {', '.join(homes)}")
    if cls := foreign(*layer._parameters.values()):
        found.append(f"the layer has parameters of class {cls}")
    return found


def warn(layer: EfficientPairedAttention) -> None:
    """Say once a layer that it is not fused, and why."""
    if layer._told or torch.compiler.is_compiling():
        return
    layer._told = True
    warnings.warn(
        f"{type(layer).__name__}: {'; '.join(reasons(layer))}. So the layer calls its modules, "
        f"with the same result but not as one fused op; epa_kernels.explain(layer, x) tells more.",
        stacklevel=2,
    )


def calls(layer: EfficientPairedAttention, x: Tensor) -> list[Call]:
    """The calls of ops that the layer makes on x when it calls its modules, for `explain`."""
    (B, N, C), H = x.shape, layer.num_heads
    P = layer.EF.shape[1] if layer.kind == "sum" else getattr(layer.E, "out_features", 0)
    found = []
    for op, name in zip(("channel_attention", "spatial_attention"), DROPOUT, strict=True):
        dropout, is_spatial = getattr(layer, name), op == "spatial_attention"
        if not _is_called(dropout):
            found.append(
                Call(
                    op,
                    x.device,
                    x.dtype,
                    B,
                    N,
                    C,
                    H,
                    C // H,
                    P if is_spatial else 0,
                    normalize=is_spatial,
                    dropout=_rate(dropout) > 0,
                )  # fmt: skip
            )
    return found


def call(layer: EfficientPairedAttention, x: Tensor) -> Tensor:
    """The layer on x (B, N, C), by calls of its modules."""
    functional.check_tokens(OPS["paired_attention"], x)
    (B, N, C), H, backend = x.shape, layer.num_heads, layer.backend
    qkvv = layer.qkvv(x).reshape(B, N, 4, H, C // H)
    q, k, vc, vs = qkvv.unbind(2)  # each (B, N, H, D)

    def project(t: Tensor, projection: nn.Module | None) -> Tensor:
        if projection is None:
            return torch.einsum("np,bnhd->bphd", layer.EF.to(t.dtype), t)
        return projection(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # over the last axis, tokens

    E, F = (None, None) if layer.kind == "sum" else (layer.E, layer.F)
    k_proj, v_proj = project(k, E), project(vs, F)

    # One seed for both maps, as the fused op has.
    called = [_is_called(getattr(layer, name)) for name in DROPOUT]
    p = [0.0 if c else rate for c, rate in zip(called, rates(layer), strict=True)]
    seed = draw_seed(x.device) if max(p) > 0 else None
    if called[0]:
        attention = layer.attn_drop(reference.channel_map(q, k, layer.temperature).to(q.dtype))
        out_c = reference.mix_channels(attention, vc)
    else:
        out_c = functional.channel_attention(
            q, k, vc, layer.temperature, dropout_p=p[0], seed=seed, backend=backend
        )
    if called[1]:
        attention = reference.spatial_map(q, k_proj, layer.temperature2, normalize=True)
        out_s = reference.mix_tokens(layer.attn_drop_2(attention.to(q.dtype)), v_proj)
    else:
        out_s = functional.spatial_attention(
            q, k_proj, v_proj, layer.temperature2,
            normalize=True, dropout_p=p[1], seed=seed, backend=backend,
        )  # fmt: skip
    out_c, out_s = out_c.reshape(B, N, C), from_heads(out_s, layer.layout)
    if layer.kind == "sum":
        return out_c + out_s
    return torch.cat((layer.out_proj(out_s), layer.out_proj2(out_c)), dim=-1)
