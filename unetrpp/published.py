"""Checkpoints of published training code: pickles, read without running what is in them."""

import os
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unetrpp.models import find_preset, preset_label, preset_names
from unetrpp.weights import advice, fitting_presets, from_preset, load_state, unwrapped

__all__ = ["load_published"]


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
        load_state(unwrapped(model_or_preset), tensors, "load_published", path)
        return model_or_preset
    if model_or_preset is None:
        preset = next(iter(fitting_presets(tensors, **overrides)), None)
        if preset is None:
            found = advice(tensors, otherwise="")
            raise ValueError(
                f"load_published: {path} fits no preset. {found + ' ' if found else ''}Pass the "
                f"model or the preset that it was trained with."
            )
    else:
        preset = find_preset(model_or_preset)
        if preset is None:
            listed = ", ".join(map(preset_label, preset_names()))
            raise ValueError(
                f"load_published: preset must be one of {listed}; got {model_or_preset!r}."
            )
    model = from_preset(preset, tensors, **overrides)
    load_state(model, tensors, "load_published", path)
    warning = model.load_warning(overrides)
    if warning is not None:
        warnings.warn(f"load_published: {path} {warning}", stacklevel=2)
    return model.to(map_location).eval()


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
