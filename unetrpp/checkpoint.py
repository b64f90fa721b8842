"""Checkpoints: a folder with `model.safetensors` and `config.json`, and published pickles read.

config.json holds {"model": model.config, ...} and whatever the caller adds. The same text lies in
the header of model.safetensors, so the weights file alone is complete and one rename replaces a
checkpoint: if writing stops between the two files, the text that came with the weights counts.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unetrpp.models import (
    MODELS,
    Network,
    create_model,
    find_preset,
    preset_label,
    preset_names,
)

__all__ = ["load_checkpoint", "load_published", "save_checkpoint"]

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

# By the ends of their names, entries with an axis of the tokens, hence of img_size, and that axis;
# and those with an axis of the projected tokens, P.
_TOKEN_AXES = {"pos_embed": 1, "position_embeddings": 1, "E.weight": 1, "F.weight": 1, "EF": 0}
_PROJECTED_AXES = {"E.weight": 0, "F.weight": 0, "E.bias": 0, "F.bias": 0, "EF": 1}


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
        ValueError: extra is not plain JSON, or uses the keys "model" or "config_id".

    Notes: each file is written under another name, flushed to disk and renamed, and a new folder
        gets its name last: a reader sees the old checkpoint, the new one or none.
    """
    model = _unwrapped(model)
    extra = dict(extra or {})
    reserved = {"model", "config_id"} & set(extra)
    if reserved:
        raise ValueError(f"save_checkpoint: extra must not use the reserved keys {reserved}.")
    config = {"model": model.config, **extra}
    try:
        text = json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_checkpoint: extra must be plain JSON, but {error}.") from error
    # Tells an interrupted write, where the two files differ in it, from an edited config.json.
    config_id = hashlib.sha256(text.encode()).hexdigest()
    aliases = _aliases(model)
    tensors = {
        key: value.contiguous() for key, value in model.state_dict().items() if key not in aliases
    }
    folder = Path(folder)
    is_new = not folder.exists()
    place = folder.with_name(f".{folder.name}.partial") if is_new else folder
    place.mkdir(parents=True, exist_ok=True)
    try:
        with _replacing(place / WEIGHTS) as file:
            metadata = {"format": "pt", "config": text, "config_id": config_id}
            save_file(tensors, file, metadata)
        with _replacing(place / CONFIG) as file:
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
    **overrides: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model of a checkpoint folder and load its weights.

    Args:
        folder: what `save_checkpoint` wrote.
        img_size: another input size than the one trained at; the weights are carried over by
            `resize_tokens`.
        map_location: device of the model.
        overrides: constructor arguments that leave the weights' shapes alone, for instance
            deep_supervision, epa_backend, attention_dropout, conv_dropout.

    Returns: the model, in evaluation mode and with float32 parameters, and the content of
        config.json, whose "model" describes the model as returned.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is truncated or not what it should be, or does not fit the model; an
            override is no argument of the model or breaks its rule; or img_size does.
    """
    folder = Path(folder)
    config, tensors = _read_folder(folder, str(map_location))
    described = config["model"]
    model = create_model(described["name"], **{**described["args"], **overrides})
    _load_state(model, tensors, "load_checkpoint", folder / WEIGHTS)
    if img_size is not None:
        model.resize_tokens(img_size)
    config["model"] = model.config
    return model.to(map_location).eval(), config


def load_published(
    path: str | os.PathLike,
    model_or_preset: nn.Module | str | None = None,
    map_location: torch.device | str = "cpu",
    **overrides: Any,
) -> nn.Module:
    """Load a checkpoint of published training code (`.model`, `.pt`), without running its code.

    The file is a pickle: {"epoch", "state_dict", "optimizer_state_dict", "plot_stuff", ...}, or a
    state dict alone. Only tensors, Python's plain types, numpy's numbers and arrays of them are
    unpickled; everything else is refused. The prefix `module.` of multi-GPU runs is removed.

    Args:
        path: the file.
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
            file is of Slim UNETR++ as RECONSTRUCTED here, which no published weights fit.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, holds something that is refused, or does not fit: the
            message lists the keys and names the preset that would fit. A file whose E and F differ
            does not fit a model that shares them, whereas the published code would keep only F.

    Example:
        >>> model = load_published("model_final_checkpoint.model")  # doctest: +SKIP
        >>> save_checkpoint("synapse", model)  # doctest: +SKIP
    """
    path = Path(path)
    tensors = _read_pickle(path)
    if isinstance(model_or_preset, nn.Module):
        if overrides:
            raise ValueError(
                f"load_published: {', '.join(overrides)} cannot change a model that is already "
                f"built; pass a preset's name instead."
            )
        _load_state(_unwrapped(model_or_preset), tensors, "load_published", path)
        return model_or_preset
    if model_or_preset is None:
        preset = next(iter(_fitting_presets(tensors, **overrides)), None)
        if preset is None:
            advice = _advice(tensors, otherwise="")
            raise ValueError(
                f"load_published: {path} fits no preset. {advice + ' ' if advice else ''}Pass the "
                f"model or the preset that it was trained with."
            )
    else:
        preset = find_preset(model_or_preset)
        if preset is None:
            listed = ", ".join(map(preset_label, preset_names()))
            raise ValueError(
                f"load_published: preset must be one of {listed}; got {model_or_preset!r}."
            )
    model = _from_preset(preset, tensors, **overrides)
    _load_state(model, tensors, "load_published", path)
    warning = model.load_warning(overrides)
    if warning is not None:
        warnings.warn(f"load_published: {path} {warning}", stacklevel=2)
    return model.to(map_location).eval()


def _read_folder(folder: Path, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if folder.is_file():
        raise ValueError(
            f"load_checkpoint: {folder} is a file; a checkpoint is a folder with {WEIGHTS} and "
            f"{CONFIG}. load_published reads files of the published code."
        )
    for file in (folder, folder / CONFIG, folder / WEIGHTS):
        if not file.exists():
            inner = folder / "best"
            hint = f" Did you mean {inner}?" if (inner / WEIGHTS).is_file() else ""
            raise FileNotFoundError(
                f"load_checkpoint: {file} is missing; a checkpoint is a folder with {WEIGHTS} and "
                f"{CONFIG}.{hint}"
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"load_checkpoint: {folder / CONFIG} is truncated or no JSON ({error})."
        ) from error
    try:
        with safe_open(folder / WEIGHTS, framework="pt", device=device) as stream:
            metadata = stream.metadata() or {}
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"load_checkpoint: {folder / WEIGHTS} is truncated or no safetensors file ({error})."
        ) from error
    if not isinstance(config, dict) or not {"name", "args"} <= set(config.get("model", ())):
        raise ValueError(
            f'load_checkpoint: {folder / CONFIG} must hold {{"model": {{"name", "args"}}}}, as '
            f"save_checkpoint writes it."
        )
    config_id = config.pop("config_id", None)
    if config_id is not None and config_id != metadata.get("config_id", config_id):
        config = json.loads(metadata["config"])
    return config, tensors


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file of torch.save, `module.` removed."""
    if not path.is_file():
        raise FileNotFoundError(f"load_published: {path} is missing.")
    try:
        with torch.serialization.safe_globals(_numpy_values()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise _unreadable(path, error) from error
        raise ValueError(
            f"load_published: {path} holds {refused[1]}, which is neither a tensor nor a number; "
            f"unpickling it could run code, so the file is refused. If you trust its source, save "
            f"it again with its state_dict alone."
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise _unreadable(path, error) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    state = state if isinstance(state, dict) else {}
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(
            f"load_published: {path} holds no state dict; expected one, alone or under "
            f'"state_dict".'
        )
    unnamed = [key for key in state if not isinstance(key, str)]
    if unnamed:
        raise ValueError(
            f"load_published: {path} holds no state dict, whose keys are names: it has the key "
            f"{unnamed[0]!r}; save the model's state_dict() again."
        )
    return {key.removeprefix("module."): value for key, value in state.items()}


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(f"load_published: {path} is truncated or no torch checkpoint ({reason}).")


def _numpy_values() -> list:
    """Return what a pickled numpy number or numeric array refers to, under its pickled name.

    The module was renamed in numpy 2. An array is built by a class of our own, which takes its
    content only if that is plain numbers.
    """
    import numpy

    class NumericArray(numpy.ndarray):
        def __setstate__(self, state):
            dtype = state[2]
            if not isinstance(dtype, numpy.dtype) or dtype.kind not in "biuf":
                raise pickle.UnpicklingError(f"numpy array of {dtype}, which is no plain number")
            super().__setstate__(state)

    def reconstruct(kind, shape, dtype):
        # What numpy itself writes there; the state that follows brings shape and type.
        if (kind, shape, dtype) != (NumericArray, (0,), b"b"):
            raise pickle.UnpicklingError(f"numpy array built from {kind}, {shape}, {dtype}")
        return NumericArray((0,), numpy.int8)

    def no_bytes():  # the content of an empty array
        return b""

    scalar = numpy.float64(0).__reduce__()[0]
    dtypes = [numpy.dtype(code) for code in "?bhilqBHILQefd"]
    return [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        (reconstruct, "numpy.core.multiarray._reconstruct"),
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        (NumericArray, "numpy.ndarray"),
        NumericArray,
        (no_bytes, "builtins.bytes"),
        (no_bytes, "__builtin__.bytes"),
        numpy.dtype,
        *{type(dtype) for dtype in dtypes},
    ]


def _load_state(model: nn.Module, tensors: dict[str, Tensor], caller: str, source: Path) -> None:
    """Load strictly; a tensor that the model shares may be stored once or, if equal, twice."""
    tensors = dict(tensors)
    for key, first in _aliases(model).items():
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
        raise ValueError(f"{caller}: {source} does not fit the model:{listed}\n{_advice(tensors)}")
    model.load_state_dict(tensors)


def _abridged(items: list[str], limit: int = 5) -> str:
    more = f", ... and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _advice(tensors: Mapping[str, Tensor], otherwise: str = "The file fits no preset.") -> str:
    """Return the sentence that says which preset the tensors fit, or `otherwise` if none."""

    def fits(*free: Mapping[str, int]) -> str:
        fitting = map(preset_label, _fitting_presets(tensors, *free))
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


def _fitting_presets(
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
                model = _from_preset(preset, tensors, **overrides)
        except ValueError:
            # What is passed need not be legal for every preset, nor known to every network.
            continue
        if shapes(model.state_dict()) == wanted:
            fitting.append(preset)
    return fitting


def _from_preset(preset: str, tensors: Mapping[str, Tensor], **overrides: Any) -> Network:
    """Build a preset with the numbers of input channels and of classes that the tensors have."""
    network, name = preset_names()[preset]
    model = MODELS[network]
    return model.from_preset(name, **{**model.channels_of(tensors), **overrides})


def _aliases(model: nn.Module) -> dict[str, str]:
    """Return, for every parameter name that repeats another one's tensor, that other name."""
    first: dict[int, str] = {}
    aliases = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), key) != key:
            aliases[key] = first[id(parameter)]
    return aliases


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """Yield a path to write to; then flush it to disk and rename it to `file`, or remove it."""
    # A fixed name, so that what a killed process left is overwritten and never piles up.
    partial = file.with_name(f".{file.name}.partial")
    try:
        yield partial
        with open(partial, "r+b") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
