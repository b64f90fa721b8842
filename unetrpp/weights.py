"""State dicts: a network's among the tensors of a file, loading it strictly, presets that fit."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unetrpp.models import MODELS, Network, preset_label, preset_names

__all__ = [
    "advice",
    "aliases_of",
    "completed",
    "fitting_presets",
    "from_preset",
    "load_state",
    "of_network",
    "unwrapped",
]

# By the ends of their names, entries with an axis of the tokens, hence of img_size, and that axis;
# and those with an axis of the projected tokens, P.
_TOKEN_AXES = {"pos_embed": 1, "position_embeddings": 1, "E.weight": 1, "F.weight": 1, "EF": 0}
_PROJECTED_AXES = {"E.weight": 0, "F.weight": 0, "E.bias": 0, "F.bias": 0, "EF": 1}

# What is put around a network leaves these in the names of its tensors, at any depth.
_WRAPPERS = {
    "module",
    "_orig_mod",
    "_forward_module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
# Tensors of averaged weights and of profilers (thop), which belong to no network.
_EXTRAS = ("n_averaged", "total_ops", "total_params")
# Entries of weights that are averaged over steps: taken where the file has no others.
_AVERAGED = re.compile(r"(^|[._])(ema|averaged?|swa|teacher|shadow)([._]|$)")


def of_network(
    tensors: Mapping[str, Tensor], keys: Collection[str] | None = None
) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a network among those of a file, by the network's names, and a prefix.

    The prefix is what stands in front of the names in the file, entries and wrappers alike:
    "state_dict.module.model.". What does not start with it belongs to something else. Of several
    networks in a file the one counts whose weights are not averaged, then the shortest prefix.

    Args:
        keys: names of the network's tensors; those that tell the networks of this package apart
            if not given.
    """
    if keys is None:
        keys = {network.input_weight[0] for network in MODELS.values()}
    wrappers = _WRAPPERS - {part for key in keys for part in key.split(".")}
    found: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        # From the longest end: a network's name may be the end of another of its names.
        for start in range(len(parts)):
            if parts[start] not in wrappers and _name(parts[start:], wrappers) in keys:
                found["".join(f"{part}." for part in parts[:start])] += 1
                break
    likely = [prefix for prefix, count in found.items() if 2 * count >= max(found.values())]
    # Without any of the names: what all tensors have in front, so that a message can say so.
    prefix = min(
        likely, key=lambda p: (bool(_AVERAGED.search(p)), len(p)), default=_common_prefix(tensors)
    )
    own = {
        _name(name.removeprefix(prefix).split("."), wrappers): value
        for name, value in tensors.items()
        if name.startswith(prefix)
        and name.rpartition(".")[2] not in _EXTRAS
        and not any(other != prefix and name.startswith(other) for other in found if other)
    }
    return own, prefix


def _name(parts: Iterable[str], wrappers: Collection[str]) -> str:
    return ".".join(part for part in parts if part not in wrappers)


def _common_prefix(names: Iterable[str]) -> str:
    folders = [name.split(".")[:-1] for name in names]
    shared = os.path.commonprefix(folders) if folders else []
    return "".join(f"{part}." for part in shared)


def load_state(model: nn.Module, tensors: dict[str, Tensor], caller: str, source: Path) -> None:
    """Load strictly, except for what `completed` adds.

    Warns:
        UserWarning: the coarse heads of deep supervision are not among the tensors.
    """
    for key, first in aliases_of(model).items():
        if key in tensors and first in tensors and not torch.equal(tensors[key], tensors[first]):
            raise ValueError(
                f"{caller}: {source} holds different tensors {first} and {key}, which the model "
                f'shares; it was trained with separate ones. Build the model with epa_kind="split".'
            )
    given = completed(model, tensors)
    own = model.state_dict()
    problems = _problems(own, given)
    if problems:
        listed = "".join(f"\n  {len(keys)} {what}: {_abridged(keys)}" for what, keys in problems)
        raise ValueError(f"{caller}: {source} does not fit the model:{listed}\n{advice(tensors)}")
    model.load_state_dict(given)
    missing = sorted({key.split(".")[0] for key in _of_coarse_heads(model) if key not in tensors})
    if missing:
        warnings.warn(
            f"{caller}: {source} has no weights of {', '.join(missing)}, the heads of deep "
            f"supervision; they keep those of a new model.",
            stacklevel=3,
        )


def _problems(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> list[tuple[str, list[str]]]:
    """Return what differs, by its kind: names, shapes, integers in the place of floats."""
    both = [key for key in own if key in given]
    problems = {
        "missing": [key for key in own if key not in given],
        "unexpected": [key for key in given if key not in own],
        "of another shape": [
            f"{key} {tuple(given[key].shape)} instead of {tuple(own[key].shape)}"
            for key in both
            if own[key].shape != given[key].shape
        ],
        "of another type": [
            f"{key} {given[key].dtype} instead of {own[key].dtype}"
            for key in both
            if own[key].is_floating_point() and not given[key].is_floating_point()
        ],
    }
    return [(what, keys) for what, keys in problems.items() if keys]


def completed(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with what a file may leave out.

    A tensor that the model shares may be stored under one of its names. The counters of
    normalisations and whole coarse heads, which no prediction needs, are then the model's.
    """
    tensors = dict(tensors)
    for key, first in aliases_of(model).items():
        if key not in tensors and first in tensors:
            tensors[key] = tensors[first]
        elif first not in tensors and key in tensors:
            tensors[first] = tensors[key]
    heads = _of_coarse_heads(model)
    present = {key.split(".")[0] for key in heads if key in tensors}
    for key, value in model.state_dict().items():
        is_counter = key.endswith(".num_batches_tracked")
        if key not in tensors and (
            is_counter or (key in heads and key.split(".")[0] not in present)
        ):
            tensors[key] = value
    return tensors


def _of_coarse_heads(model: nn.Module) -> list[str]:
    heads = tuple(f"{head}." for head in getattr(model, "coarse_heads", ()))
    return [key for key in model.state_dict() if heads and key.startswith(heads)]


def _abridged(items: list[str], limit: int = 5) -> str:
    more = f", ... and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def advice(tensors: Mapping[str, Tensor], otherwise: str = "The file fits no preset. ") -> str:
    """Return which preset the tensors fit; if none, `otherwise` and the nearest preset."""

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
    return (otherwise + _nearest_preset(tensors)).strip()


def _nearest_preset(tensors: Mapping[str, Tensor]) -> str:
    """Return the sentence on the preset that most of the tensors fit, and on the first others."""
    best, sentence = 0, ""
    for preset in preset_names():
        model = _on_meta(preset, tensors)
        if model is None:
            continue
        own = model.state_dict()
        given = completed(model, tensors)
        same = sum(key in own and own[key].shape == value.shape for key, value in tensors.items())
        if same > best:
            best, differences = same, _problems(own, given)
            listed = "; ".join(
                f"{len(keys)} {what}: {_abridged(keys, 3)}" for what, keys in differences
            )
            sentence = (
                f"The nearest preset is {preset_label(preset)}, whose names and shapes {same} of "
                f"{len(tensors)} tensors have; {listed}."
            )
    return sentence


def _on_meta(preset: str, tensors: Mapping[str, Tensor], **overrides: Any) -> Network | None:
    """Return a preset without memory; None where the arguments are not legal for it."""
    try:
        with torch.device("meta"):
            return from_preset(preset, tensors, **overrides)
    except ValueError:
        # What is passed need not be legal for every preset, nor known to every network.
        return None


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

    fitting = []
    for preset, (network, _) in preset_names().items():
        if MODELS[network].input_weight[0] not in tensors:
            continue
        model = _on_meta(preset, tensors, **overrides)
        if model is None:
            continue
        if shapes(model.state_dict()) == shapes(completed(model, tensors)):
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
