"""Checkpoints of others: published weights, and those of other people's training code."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unetrpp.checkpoint import is_checkpoint, load_checkpoint
from unetrpp.models import find_preset, nearest_names, preset_label, preset_names
from unetrpp.weight_files import find_file, read_tensors
from unetrpp.weights import (
    advice,
    fitting_presets,
    from_preset,
    load_state,
    of_network,
    unwrapped,
)

__all__ = ["load_published"]


def load_published(
    path: str | os.PathLike,
    model_or_preset: nn.Module | str | None = None,
    map_location: torch.device | str = "cpu",
    **overrides: Any,
) -> nn.Module:
    """Load a checkpoint of published or other training code, without running that code.

    The file is one of torch.save (`.model`, `.pt`, `.ckpt`, `.bin`) or of safetensors. The weights
    may lie under entries ("state_dict", "network_weights", "model", "ema", ...) and have prefixes
    ("module.", "_orig_mod.", "model.", ...), in any nesting: what stands in front of the network's
    names is removed, and what belongs to something else is left out. Averaged weights are taken
    where there are no others. Only tensors, Python's plain types, numpy's numbers and arrays of
    them are unpickled, stand-ins take the place of a trainer's settings, and everything else is
    refused. A file may leave out the second name of a shared tensor and the heads of deep
    supervision. Weights of half precision become float32.

    Args:
        path: the file, or a folder with one: of nnU-Net (model_final_checkpoint.model before
            model_best.model), accelerate, Lightning or DeepSpeed, also nested; or a folder of
            `save_checkpoint`.
        model_or_preset: the model to load into, or a preset's name ("synapse", or of another
            network "segformer3d/brats"), or None: the preset whose tensors have the names and
            shapes of the file's. Numbers of input channels and of classes are taken from the file.
        map_location: device of the model; a model that is passed stays where it is.
        overrides: constructor arguments beside the preset's, for instance the img_size that the
            checkpoint was trained at. `model.resize_tokens` then carries it to another.

    Returns: the model; a newly built one in evaluation mode.

    Warns:
        UserWarning: a SegFormer3D was built and attention_scale not given. Its published code knows
            two scales, which the weights do not tell apart: 1 / sqrt(num_heads) in 2024, when its
            weights came out, which is assumed, and 1 / sqrt(head_dim) since the end of 2025. Or the
            file is of Slim UNETR++ as RECONSTRUCTED here, which no published weights fit. Or the
            file has no weights of the heads of deep supervision.

    Raises:
        FileNotFoundError: no such file, or no file of weights in the folder.
        ValueError: the file is truncated, holds something that is refused, or does not fit: the
            message lists the keys and names the preset that would fit. A file whose E and F differ
            does not fit a model that shares them, whereas the published code would keep only F.

    Example:
        >>> model = load_published("model_final_checkpoint.model")  # doctest: +SKIP
        >>> save_checkpoint("synapse", model)  # doctest: +SKIP
    """
    if model_or_preset is None and is_checkpoint(Path(path)):
        return load_checkpoint(path, map_location=map_location, **overrides)[0]
    path = find_file(Path(path), "load_published")
    tensors = read_tensors(path, "load_published")
    if isinstance(model_or_preset, nn.Module):
        if overrides:
            raise ValueError(
                f"load_published: {', '.join(overrides)} cannot change a model that is already "
                f"built; pass a preset's name instead."
            )
        _load(unwrapped(model_or_preset), tensors, path)
        return model_or_preset
    if model_or_preset is None:
        preset = _recognised(path, tensors, overrides)
    else:
        named = find_preset(model_or_preset)
        if named is None:
            listed = ", ".join(map(preset_label, preset_names()))
            raise ValueError(
                f"load_published: preset must be one of {listed}; got {model_or_preset!r}."
                f"{nearest_names(model_or_preset, preset_names())}"
            )
        preset = named
    model = from_preset(preset, of_network(tensors)[0], **overrides)
    _load(model, tensors, path)
    warning = model.load_warning(overrides)
    if warning is not None:
        warnings.warn(f"load_published: {path} {warning}", stacklevel=2)
    return model.to(map_location).eval()


def _recognised(path: Path, tensors: dict[str, Tensor], overrides: dict[str, Any]) -> str:
    own, prefix = of_network(tensors)
    preset = next(iter(fitting_presets(own, **overrides)), None)
    if preset is not None:
        return preset
    found = advice(own, otherwise="") or (
        f"None of its {len(own)} names is one of a network of this package; the first is "
        f"{next(iter(own))} {tuple(next(iter(own.values())).shape)}."
        if own
        else "It holds no weights."
    )
    raise ValueError(
        f"load_published: {path} fits no preset. {found}{_seen(prefix)} Pass the model or the "
        f"preset that it was trained with."
    )


def _load(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    own, prefix = of_network(tensors, model.state_dict().keys())
    try:
        load_state(model, own, "load_published", path)
    except ValueError as error:
        raise ValueError(f"{error}{_seen(prefix)}") from None


def _seen(prefix: str) -> str:
    return f" The prefix {prefix!r} of its names was removed." if prefix else ""
