"""Files of weights as people have them: which file of a folder, and the tensors in it.

  find_file      a file, or a folder of nnU-Net, accelerate, Lightning or DeepSpeed -> the file
  read_tensors   torch.save or safetensors -> every tensor by its dotted name, entries included

Nothing that is read can run code: safetensors hold none, and of a pickle only tensors, plain types,
numpy's numbers and stand-ins for harmless settings are built.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["find_file", "read_tensors"]

# The file that counts, first of those that a folder has.
NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model_final_checkpoint.model",
    "model_best.model",
    "model_latest.model",
    "checkpoint_final.pth",
    "checkpoint_best.pth",
    "checkpoint_latest.pth",
    "last.ckpt",
    "mp_rank_00_model_states.pt",
)
ENDINGS = (".model", ".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".tar")
# What lies beside the weights in such folders.
OTHERS = re.compile("optim|sched|random_state|scaler|sampler|training_args|rng_state|custom_check")
DEEPEST = 4  # levels of folders that are searched

# torch.save compresses nothing. A file that somebody packed again may shrink by as much as this.
LARGEST_GROWTH = 4
SPARE = 16 * 2**20

# Settings that trainers keep beside the weights; a stand-in takes their place and does nothing.
SETTINGS = (
    "argparse.Namespace",
    *(f"pathlib.{kind}{name}" for kind in ("", "Pure") for name in ("PosixPath", "WindowsPath")),
    "pathlib.Path",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "datetime.datetime",
    "datetime.timedelta",
    "torch.torch_version.TorchVersion",
    "typing.Any",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "types.SimpleNamespace",
    *(f"{module}.{kind}" for module in ("builtins", "__builtin__") for kind in ("dict", "list")),
    *(f"{module}.{kind}" for module in ("builtins", "__builtin__") for kind in ("int", "float")),
)
MAPPINGS = (
    "collections.defaultdict",
    "easydict.EasyDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)


def find_file(path: Path, caller: str) -> Path:
    """Return the file of weights that a path means.

    Of a folder it is the first of `NAMES`, else its only file with an ending of weights, else the
    one that the folders in it have.

    Raises:
        FileNotFoundError: there is none. ValueError: there are several, or the folder has shards.
    """
    if not path.exists():
        raise FileNotFoundError(f"{caller}: {path} is missing.")
    if not path.is_dir():
        return path
    found: list[Path] = []
    for folder, inner, names in os.walk(path):
        place = Path(folder)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if len(place.relative_to(path).parts) >= DEEPEST:
            inner.clear()
        if any(name.endswith(".distcp") for name in names):
            raise ValueError(
                f"{caller}: {place} holds the shards of torch.distributed.checkpoint; join them: "
                f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {place} FILE.pt"
            )
        found += _files_of(place, names)
        if found and place == path:
            break
    if not found:
        raise FileNotFoundError(
            f"{caller}: {path} holds no file of weights; known are {', '.join(NAMES)}, and one "
            f"file that ends with {', '.join(ENDINGS)}."
        )
    if len(found) > 1:
        listed = ", ".join(str(file.relative_to(path)) for file in found[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(
            f"{caller}: {path} holds several files of weights; name one: {listed}{more}."
        )
    return found[0]


def _files_of(folder: Path, names: list[str]) -> list[Path]:
    for name in NAMES:
        if name in names:
            return [folder / name]
    endings = (name for name in names if name.endswith(ENDINGS) and not OTHERS.search(name))
    return [folder / name for name in sorted(endings)]


def read_tensors(file: Path, caller: str) -> dict[str, Tensor]:
    """Return the tensors of a file, on the CPU, by their dotted names.

    A name has the entries that lead to the tensor in front: "state_dict.model.out1.weight".

    Raises:
        ValueError: the file is truncated or no file of weights, or holds what is refused, or no
            tensor that has a name.
    """
    if file.name.endswith(".index.json"):
        return _read_shards(file, caller)
    with open(file, "rb") as stream:
        head = stream.read(64)
    if head[8:9] == b"{" and not zipfile.is_zipfile(file):
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, caller, "safetensors file", error) from error
    content = _read_pickle(file, head, caller)
    tensors = dict(_named(content, (), set()))
    if not tensors:
        is_optimizer = isinstance(content, dict) and {"state", "param_groups"} <= set(content)
        raise ValueError(
            f"{caller}: {file} "
            + (
                "holds the state of an optimizer alone; name the file with the weights."
                if is_optimizer
                else "holds no state dict, whose keys are names and whose values are tensors; "
                'expected one, alone or under an entry such as "state_dict". Save the model\'s '
                "state_dict()."
            )
        )
    for name, value in tensors.items():
        if value.is_meta or value.layout != torch.strided:
            kind = "without numbers, on the meta device" if value.is_meta else f"{value.layout}"
            raise ValueError(
                f"{caller}: {file} holds {name} {kind}; save dense tensors of the trained model."
            )
    return tensors


def _named(content: Any, path: tuple[str, ...], above: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor) and path:
        yield ".".join(path), content
    if isinstance(content, Mapping) and id(content) not in above:
        for key, value in content.items():
            if isinstance(key, str):
                yield from _named(value, (*path, key), above | {id(content)})


def _read_shards(file: Path, caller: str) -> dict[str, Tensor]:
    try:
        shards = sorted(set(json.loads(file.read_bytes())["weight_map"].values()))
        if any(Path(shard).name != shard for shard in shards):
            raise ValueError("a shard lies in another folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(file, caller, "index of shards", error) from error
    missing = [shard for shard in shards if not (file.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{caller}: {file.parent / missing[0]}, a shard, is missing.")
    return {
        key: value
        for shard in shards
        for key, value in read_tensors(file.parent / shard, caller).items()
    }


def _read_pickle(file: Path, head: bytes, caller: str) -> Any:
    """Return what torch.save wrote."""
    _refuse_what_is_none(file, head, caller)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_allowed()):
            warnings.simplefilter("ignore")  # on the protocol of a pickle
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise _unreadable(file, caller, "torch checkpoint", error) from error
        if refused[1].startswith("torch.nn.modules.") or _has_modules(file):
            raise ValueError(
                f"{caller}: {file} holds {refused[1]}, so it is a whole module, torch.save(model), "
                f"which only its own code can unpickle; unpickling it could run any code, so the "
                f"file is refused. Where that code is, save torch.save(model.state_dict(), FILE)."
            ) from error
        raise ValueError(
            f"{caller}: {file} holds {refused[1]}, which is neither a tensor nor a number; "
            f"unpickling it could run code, so the file is refused. If you trust its source, save "
            f"it again with its state_dict alone."
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise _unreadable(file, caller, "torch checkpoint", error) from error


def _refuse_what_is_none(file: Path, head: bytes, caller: str) -> None:
    """Raise a ValueError for a file that is known to be something else, or a bomb."""
    reason = None
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        reason = "is a web page, no checkpoint; the download gave a page instead: fetch it again"
    elif head.startswith(b"version https://git-lfs"):
        reason = "is a pointer of Git LFS, no checkpoint; fetch the file: git lfs pull"
    elif zipfile.is_zipfile(file):
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise _unreadable(file, caller, "torch checkpoint", error) from error
        names = [member.filename.partition("/")[2] for member in members]
        size, inflated = file.stat().st_size, sum(member.file_size for member in members)
        if inflated > LARGEST_GROWTH * size + SPARE:
            reason = (
                f"has {size:,} bytes and would inflate to {inflated:,}; torch.save compresses "
                f"nothing, so it is refused. If you trust its source, unpack it and zip it again "
                f"without compression"
            )
        elif "constants.pkl" in names and any(name.startswith("code/") for name in names):
            reason = "is a TorchScript archive, which holds code; save the model's state_dict()"
        elif "data.pkl" not in names:
            reason = "is a zip archive of other files; unpack it and name the file of weights"
    if reason is not None:
        raise ValueError(f"{caller}: {file} {reason}.")


def _has_modules(file: Path) -> bool:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # the older format of torch.save, or damaged
        return False
    return any(name.startswith("torch.nn.modules.") for name in names)


def _unreadable(file: Path, caller: str, what: str, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(f"{caller}: {file} is truncated or no {what} ({reason}).")


class _Setting:
    """Takes the place of an object of `SETTINGS`: keeps nothing and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Setting:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _mapping(*_: Any) -> OrderedDict:
    return OrderedDict()


def _allowed() -> list:
    """Return what a pickle may name beside torch's own: numbers of numpy, and stand-ins."""
    return [
        *_numpy_values(),
        *((_Setting, name) for name in SETTINGS),
        # Their items are set one by one, which is allowed of this type alone.
        *(
            (_mapping if name == "collections.defaultdict" else OrderedDict, name)
            for name in MAPPINGS
        ),
    ]


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
