"""Checkpoints: a folder with `model.safetensors` and `config.json`.

config.json holds {"model": model.config, ...} and whatever the caller adds. The same text lies in
the header of model.safetensors, so the weights file alone is complete and one rename replaces a
checkpoint: if writing stops between the two files, the text that came with the weights counts.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unetrpp.files import read_json, replacing
from unetrpp.models import MODELS, Network, create_model
from unetrpp.weights import aliases_of, load_state, unwrapped

__all__ = ["is_checkpoint", "load_checkpoint", "save_checkpoint"]

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def save_checkpoint(
    folder: str | os.PathLike, model: nn.Module, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write model and configuration to a folder; an older checkpoint there stays until replaced.

    Args:
        folder: made if missing; other files in it are left alone.
        model: a network of `create_model`; wrappers of torch.compile and DistributedDataParallel
            are looked through. Tensors that are shared (E and F of kind "shared") are stored once.
        extra: plain JSON (keys are strings) that goes into config.json beside "model", for
            instance {"preprocessing": {...}, "labels": {...}}.

    Returns: the folder.

    Raises:
        TypeError: model is no network of this package, nor of a class derived from one.
        ValueError: extra is not plain JSON, or uses the keys "model" or "config_id".

    Notes: each file is written under another name, flushed to disk and renamed, and a new folder
        gets its name last: a reader sees the old checkpoint, the new one or none.
    """
    network = unwrapped(model)
    if not isinstance(network, Network):
        raise TypeError(
            f"save_checkpoint: model must be a network of create_model or of a class derived from "
            f"one, got {type(network).__name__}; keep other modules with torch.save of their "
            f"state_dict()."
        )
    extra = dict(extra or {})
    reserved = {"model", "config_id"} & set(extra)
    if reserved:
        raise ValueError(f"save_checkpoint: extra must not use the reserved keys {reserved}.")
    config = {"model": network.config, **extra}
    try:
        text = json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_checkpoint: extra must be plain JSON, but {error}.") from error
    # Tells an interrupted write, where the two files differ in it, from an edited config.json.
    config_id = hashlib.sha256(text.encode()).hexdigest()
    aliases = aliases_of(network)
    tensors = {
        key: value.contiguous() for key, value in network.state_dict().items() if key not in aliases
    }
    folder = Path(folder)
    is_new = not folder.exists()
    place = folder.with_name(f".{folder.name}.partial") if is_new else folder
    if is_new and place.is_symlink():
        place.unlink()  # nobody's files are written through it
    place.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(place / WEIGHTS) as file:
            metadata = {"format": "pt", "config": text, "config_id": config_id}
            save_file(tensors, file, metadata)
        with replacing(place / CONFIG) as file:
            readable = json.dumps({**config, "config_id": config_id}, indent=2)
            file.write_text(readable + "\n", encoding="utf-8")
        if is_new:
            place.rename(folder)
    except BaseException:
        if is_new:
            shutil.rmtree(place, ignore_errors=True)
        raise
    return folder


def load_checkpoint(
    folder: str | os.PathLike,
    img_size: Any = None,
    map_location: torch.device | str = "cpu",
    model: Network | None = None,
    **overrides: Any,
) -> tuple[Network, dict[str, Any]]:
    """Build the model of a checkpoint folder and load its weights.

    Args:
        folder: what `save_checkpoint` wrote.
        img_size: another input size than the one trained at; the weights are carried over by
            `resize_tokens`.
        map_location: device of the model.
        model: the network to load into, for one of a class of your own; built if not given.
        overrides: constructor arguments that leave the weights' shapes alone, for instance
            deep_supervision, epa_backend, attention_dropout, conv_dropout.

    Returns: the model, in evaluation mode and with float32 parameters, and the content of
        config.json, whose "model" describes the model as returned.

    Warns:
        UserWarning: the network was of a class outside this package and was built as the network
            that it derives from, because `model` was not given.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is truncated or not what it should be, or does not fit the model; an
            override is no argument of the model or breaks its rule; or img_size does.
    """
    folder = Path(folder)
    config, tensors = _read_folder(folder, str(map_location))
    if model is None:
        model = _build(folder / CONFIG, config["model"], overrides)
    elif overrides:
        raise ValueError(
            f"load_checkpoint: {', '.join(overrides)} cannot change a model that is already built."
        )
    described = config["model"]
    size = described.get("img_size", described["args"].get("img_size"))
    if "class" in described and size is not None:
        model.resize_tokens(size)
    try:
        load_state(model, tensors, "load_checkpoint", folder / WEIGHTS)
    except ValueError as error:
        raise ValueError(f"{error}{_of_a_class(config['model'], model)}") from None
    if img_size is not None:
        model.resize_tokens(img_size)
    if _of_a_class(config["model"], model):
        warnings.warn(
            f"load_checkpoint: {folder} is loaded as {type(model).__name__}."
            f"{_of_a_class(config['model'], model)}",
            stacklevel=2,
        )
    config["model"] = model.config
    return model.to(map_location).eval(), config


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds what `save_checkpoint` wrote, rather than another program."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return _is_described(config) and (folder / WEIGHTS).is_file()


def _is_described(config: Any) -> bool:
    described = config.get("model") if isinstance(config, dict) else None
    return (
        isinstance(described, dict)
        and isinstance(described.get("name"), str)
        and isinstance(described.get("args"), dict)
    )


def _build(file: Path, described: Mapping[str, Any], overrides: Mapping[str, Any]) -> Network:
    try:
        return create_model(described["name"], **{**described["args"], **overrides})
    except (TypeError, ValueError) as error:
        known = described["name"] in MODELS
        raise ValueError(
            f"load_checkpoint: {file} describes a network that cannot be built: {error}"
            + (
                " If no argument of yours causes this, a later version wrote the file: update "
                "unetrpp, or correct the file."
                if known
                else f" A network of your own ({described.get('class', 'see config.json')}) is "
                f"known once the module that registers it is imported; one of a later version "
                f"needs an update of unetrpp."
            )
        ) from error


def _of_a_class(described: Mapping[str, Any], model: Network) -> str:
    """Return what to say if a class of the user's was saved and one of this package is loaded."""
    if "class" not in described or "class" in model.config:
        return ""
    return (
        f" It was saved from a class of its own, {described['class']}: pass an instance, "
        f"load_checkpoint(folder, model=...), or give the class the decorator "
        f"unetrpp.models.register and a name of its own."
    )


def _read_folder(folder: Path, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if folder.is_file():
        raise ValueError(
            f"load_checkpoint: {folder} is a file; a checkpoint is a folder with {WEIGHTS} and "
            f"{CONFIG}. unetrpp convert or load_published reads files of other training code."
        )
    for file in (folder, folder / CONFIG, folder / WEIGHTS):
        if not file.exists():
            inner = folder / "best"
            hint = f" Did you mean {inner}?" if (inner / WEIGHTS).is_file() else ""
            raise FileNotFoundError(
                f"load_checkpoint: {file} is missing; a checkpoint is a folder with {WEIGHTS} and "
                f"{CONFIG}.{hint}"
            )
    for file in (folder / CONFIG, folder / WEIGHTS):
        if not file.is_file():
            raise ValueError(f"load_checkpoint: {file} is no file; copy the checkpoint again")
    try:
        config = read_json(folder / CONFIG)
    except ValueError as error:
        raise ValueError(
            f"load_checkpoint: {folder / CONFIG} is truncated or no JSON ({error}); copy the "
            "checkpoint again"
        ) from error
    if os.fsencode(folder).decode("utf-8", "ignore") != str(folder):
        raise ValueError(
            f"load_checkpoint: the name of {folder} is no UTF-8, and safetensors opens no such "
            "path; rename the folder"
        )
    try:
        with safe_open(folder / WEIGHTS, framework="pt", device=device) as stream:
            metadata = stream.metadata() or {}
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"load_checkpoint: {folder / WEIGHTS} is truncated or no safetensors file ({error}); "
            "copy the checkpoint again."
        ) from error
    if not _is_described(config):
        raise ValueError(
            f'load_checkpoint: {folder / CONFIG} must hold {{"model": {{"name", "args"}}}}, as '
            f"save_checkpoint writes it."
        )
    config_id = config.pop("config_id", None)
    if "config" in metadata and config_id not in (None, metadata.get("config_id")):
        config = json.loads(metadata["config"])
    return config, tensors
