"""Folders of volumes: dataset.json, cases and their files, the split into training and validation.

find_cases          DATA/dataset.json (Decathlon or nnU-Net) -> Case objects, one per volume
split_cases         cases -> (training, validation), by fold and seed
read_dataset_info   channels, labels and file ending of a dataset.json for training
class_names         the classes of any JSON file with "labels", for scoring
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unetrpp.files import read_json

__all__ = [
    "Case",
    "DatasetInfo",
    "class_names",
    "find_cases",
    "read_dataset_info",
    "split_cases",
]

_DATASET_JSON_HINT = (
    'the smallest dataset.json is {"channel_names": {"0": "MRI"}, "labels": {"background": 0, '
    '"lesion": 1}, "file_ending": ".nii.gz"}, beside imagesTr/NAME_0000.nii.gz and '
    "labelsTr/NAME.nii.gz"
)


@dataclass(frozen=True)
class Case:
    """One volume: its name, one file per channel (or a single 4-D file), and its label map."""

    name: str
    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True)
class DatasetInfo:
    """What dataset.json says: channel names, label values by name, and the files' ending."""

    channels: list[str]
    labels: dict[str, int]
    file_ending: str


def read_dataset_info(data_dir: str | Path) -> DatasetInfo:
    """Read DATA/dataset.json in Decathlon or nnU-Net spelling.

    Raises:
        FileNotFoundError: no dataset.json. ValueError: it lacks channels or labels, or label values
        are not 0, 1, 2, ... without gaps.
    """
    path = Path(data_dir) / "dataset.json"
    return _dataset_info(path, _read(path))


def class_names(file: Path) -> dict[str, int | list[int]]:
    """Return the classes that a JSON file names under "labels", without the background.

    Args:
        file: a dataset.json, whose labels may be regions: {"tumour": [1, 2]}; or a prediction.json.

    Raises:
        ValueError: no such file, no JSON, or it has no labels.
    """
    try:
        labels = _label_values(read_json(file)["labels"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"run_evaluate: {file} must be a JSON file with 'labels', as in a dataset.json; "
            f"reading it gave {type(error).__name__}: {error}"
        ) from error
    return {name: value for name, value in labels.items() if value not in (0, [0])}


def find_cases(data_dir: str | Path, split: str = "train") -> list[Case]:
    """List the cases of DATA, sorted by name.

    Files named in dataset.json ("training": [{"image", "label"}], "test": [...]) are taken as they
    are listed (nnU-Net v1: NAME.nii.gz for NAME_0000.nii.gz, ...); else imagesTr/NAME_0000.nii.gz,
    _0001, ... with labelsTr/NAME.nii.gz (nnU-Net), or imagesTr/NAME.nii.gz (Decathlon) are found by
    name. Test cases lie in imagesTs, without labels.

    Raises:
        FileNotFoundError: a file is missing, or no case was found. ValueError: unknown split, two
        cases of one name, or the number of channel files differs from dataset.json.
    """
    if split not in ("train", "test"):
        raise ValueError(f"find_cases: split must be 'train' or 'test', got {split!r}")
    data_dir = Path(data_dir)
    content = _read(data_dir / "dataset.json")
    info = _dataset_info(data_dir / "dataset.json", content)
    listed = content.get("training" if split == "train" else "test")
    if listed:
        cases = [_listed_case(item, data_dir, info.file_ending) for item in listed]
    else:
        cases = _cases_by_name(data_dir, split, info.file_ending)
    missing = [str(p) for case in cases for p in (*case.images, case.label) if p and not p.exists()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} file(s) missing, the first: {missing[0]}")
    named: dict[str, Case] = {}
    for case in cases:
        other = named.setdefault(case.name, case)
        if other is not case:
            raise ValueError(
                f"two {split} cases are named {case.name}: {other.images[0]} and {case.images[0]}; "
                "names must differ, rename one of them"
            )
    if not cases:
        raise FileNotFoundError(f"no {split} case found in {data_dir}; {_DATASET_JSON_HINT}")
    for case in cases:
        if len(case.images) not in (1, len(info.channels)):
            raise ValueError(
                f"case {case.name} has {len(case.images)} image files, but dataset.json names "
                f"{len(info.channels)} channels {info.channels}"
            )
    return sorted(cases, key=lambda case: case.name)


def split_cases(
    cases: Sequence[Case], fold: int = 0, folds: int = 5, seed: int = 12345
) -> tuple[list[Case], list[Case]]:
    """Split into (training, validation), the same for the same names, fold and seed.

    Raises:
        ValueError: fold outside 0..folds-1, or fewer than two cases.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise ValueError(f"fold must lie in 0..{folds - 1} and folds be at least 2, got {fold}")
    if len(cases) < 2:
        raise ValueError(f"a held-out split needs at least two labelled cases, got {len(cases)}")
    order = np.random.default_rng(seed).permutation(len(cases))
    # Fewer cases than folds would leave some folds empty.
    held_out = set(order[fold % min(folds, len(cases)) :: min(folds, len(cases))].tolist())
    training = [case for i, case in enumerate(cases) if i not in held_out]
    return training, [case for i, case in enumerate(cases) if i in held_out]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {_DATASET_JSON_HINT}")
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _dataset_info(path: Path, content: Mapping[str, Any]) -> DatasetInfo:
    channels = content.get("channel_names") or content.get("modality")
    if not channels or not content.get("labels"):
        raise ValueError(f"{path} names no channels or no labels; {_DATASET_JSON_HINT}")
    channels = [channels[key] for key in sorted(channels, key=int)]
    try:
        labels = {name: int(value) for name, value in _label_values(content["labels"]).items()}
    except (TypeError, ValueError):
        raise ValueError(
            f"{path}: every label must map to one integer (regions made of several labels are not "
            f"supported), got {content['labels']}"
        ) from None
    labels = dict(sorted(labels.items(), key=lambda item: item[1]))
    if list(labels.values()) != list(range(len(labels))) or len(labels) < 2:
        raise ValueError(
            f"{path}: label values must be 0 (background), 1, 2, ... without gaps, got {labels}"
        )
    return DatasetInfo(channels, labels, content.get("file_ending", ".nii.gz"))


def _label_values(labels: Mapping[str, Any]) -> dict[str, Any]:
    """Return label value, or values of a region, by name.

    nnU-Net writes {"liver": 1} and regions {"tumour": [1, 2]}, the Decathlon {"1": "liver"}.
    """
    only_numbers = all(key.isdigit() for key in labels)
    values: dict[str, int | list[int]] = {}
    for key, value in labels.items():
        if isinstance(value, str) and (only_numbers or not value.isdigit()):
            key, value = value, key
        values[key] = [int(part) for part in value] if isinstance(value, list) else int(value)
    return values


def _listed_case(item: Any, data_dir: Path, file_ending: str) -> Case:
    """Return the case of an entry of dataset.json."""
    item = {"image": item} if isinstance(item, str) else item
    images = item["image"] if isinstance(item["image"], list) else [item["image"]]
    name = Path(images[0]).name.removesuffix(file_ending)
    label = data_dir / item["label"] if "label" in item else None
    paths = [data_dir / image for image in images]
    if len(paths) == 1 and not paths[0].exists():
        # nnU-Net v1 lists NAME.nii.gz for the files NAME_0000.nii.gz, NAME_0001.nii.gz, ...
        pattern = f"{glob.escape(name)}_[0-9][0-9][0-9][0-9]{file_ending}"
        paths = sorted(paths[0].parent.glob(pattern)) or paths
    return Case(name, tuple(paths), label)


def _cases_by_name(data_dir: Path, split: str, file_ending: str) -> list[Case]:
    """Return the cases of a folder whose dataset.json lists no files."""
    folder = data_dir / ("imagesTr" if split == "train" else "imagesTs")
    by_name: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"*{file_ending}")):
        if path.name.startswith("."):
            continue
        stem = path.name.removesuffix(file_ending)
        by_name.setdefault(re.sub(r"_\d{4}$", "", stem), []).append(path)
    cases = []
    for name, images in by_name.items():
        label = data_dir / "labelsTr" / f"{name}{file_ending}"
        cases.append(Case(name, tuple(images), label if split == "train" else None))
    return cases
