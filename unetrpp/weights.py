"""State dicts: loading them strictly, tensors that a model shares, the presets that they fit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unetrpp.models import MODELS, Network, preset_label, preset_names

__all__ = ["advice", "aliases_of", "fitting_presets", "from_preset", "load_state", "unwrapped"]

# By the ends of their names, entries with an axis of the tokens, hence of img_size, and that axis;
# and those with an axis of the projected tokens, P.
_TOKEN_AXES = {"pos_embed": 1, "position_embeddings": 1, "E.weight": 1, "F.weight": 1, "EF": 0}
_PROJECTED_AXES = {"E.weight": 0, "F.weight": 0, "E.bias": 0, "F.bias": 0, "EF": 1}


def load_state(model: nn.Module, tensors: dict[str, Tensor], caller: str, source: Path) -> None:
    """Load strictly; a tensor that the model shares may be stored once or, if equal, twice."""
    tensors = dict(tensors)
    for key, first in aliases_of(model).items():
        if key not in tensors and first in tensors:
            tensors[key] = tensors[first]
        elif first not in tensors and key in tensors:
            tensors[first] = tensors[key]
        elif key in tensors and not torch.equal(tensors[key], tensors[first]):
            raise ValueError(
                f"{caller}: {source} holds different tensors {first} and {key}, which the model "
                f'shares; it was trained with separate ones. Build the model with epa_kind="split".'
            )
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in tensors.items()}
    problems = {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "of another shape": [
            f"{key} {given[key]} instead of {own[key]}"
            for key in own
            if key in given and own[key] != given[key]
        ],
    }
    if any(problems.values()):
        listed = "".join(
            f"\n  {len(keys)} {what}: {_abridged(keys)}" for what, keys in problems.items() if keys
        )
        raise ValueError(f"{caller}: {source} does not fit the model:{listed}\n{advice(tensors)}")
    model.load_state_dict(tensors)


def _abridged(items: list[str], limit: int = 5) -> str:
    more = f", ... and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def advice(tensors: Mapping[str, Tensor], otherwise: str = "The file fits no preset.") -> str:
    """Return the sentence that says which preset the tensors fit, or `otherwise` if none."""

    def fits(*free: Mapping[str, int]) -> str:
        fitting = map(preset_label, fitting_presets(tensors, *free))
        return " or ".join(fitting)

    if presets := fits():
        return f"The file fits preset {presets}."
    if presets := fits(_TOKEN_AXES):
        key = next(key for key in tensors if key.endswith(("pos_embed", "position_embeddings")))
        return (
            f"The file fits preset {presets} at another img_size, one with "
            f"{tensors[key].shape[1]} tokens in {key}: build the model with the img_size it was "
            f"trained at, then use resize_tokens."
        )
    if presets := fits(_TOKEN_AXES, _PROJECTED_AXES):
        return (
            f"The file fits preset {presets} with other numbers P of projected tokens (E.weight is "
            f"(P, N) in the file, EF (N, P)): build the model with those it was trained with "
            f"(proj_sizes, proj_size, ...), and with that img_size."
        )
    return otherwise


def fitting_presets(
    tensors: Mapping[str, Tensor], *free: Mapping[str, int], **overrides: Any
) -> list[str]:
    """Return the presets whose state dict has the names and shapes of `tensors`.

    free: by the ends of names, axes whose length may differ.
    """

    def shape(key: str, value: Tensor) -> list[int]:
        ignored = {a for axes in free for end, a in axes.items() if key.endswith(end)}
        return [size for axis, size in enumerate(value.shape) if axis not in ignored]

    def shapes(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
        return {key: shape(key, value) for key, value in state.items()}

    wanted = shapes(tensors)
    fitting = []
    for preset, (network, _) in preset_names().items():
        if MODELS[network].input_weight[0] not in tensors:
            continue
        try:
            with torch.device("meta"):
                model = from_preset(preset, tensors, **overrides)
        except ValueError:
            # What is passed need not be legal for every preset, nor known to every network.
            continue
        if shapes(model.state_dict()) == wanted:
            fitting.append(preset)
    return fitting


def from_preset(preset: str, tensors: Mapping[str, Tensor], **overrides: Any) -> Network:
    """Build a preset with the numbers of input channels and of classes that the tensors have."""
    network, name = preset_names()[preset]
    model = MODELS[network]
    return model.from_preset(name, **{**model.channels_of(tensors), **overrides})


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Return, for every parameter name that repeats another one's tensor, that other name."""
    first: dict[int, str] = {}
    aliases = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), key) != key:
            aliases[key] = first[id(parameter)]
    return aliases


def unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
