"""Folders of volumes: cases and their files, the split into training and validation.

find_cases          DATA/dataset.json (Decathlon or nnU-Net) -> Case objects, one per volume
split_cases         cases -> (training, validation), by fold and seed
read_dataset_info   what DATA/dataset.json says of channels and labels
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unetrpp.case_names import group_channels, label_beside, spellings, split_number
from unetrpp.dataset_json import DATASET_JSON_HINT, DatasetInfo, Entry, read_dataset_json
from unetrpp.volumes import ENDINGS, case_name, is_nifti, nifti_files, why_no_file

__all__ = [
    "Case",
    "DatasetInfo",
    "find_cases",
    "read_dataset_info",
    "split_cases",
]


@dataclass(frozen=True)
class Case:
    """One volume: its name, one file per channel (or a single 4-D file), and its label map."""

    name: str
    images: tuple[Path, ...]
    label: Path | None = None


def read_dataset_info(data_dir: str | Path) -> DatasetInfo:
    """Read DATA/dataset.json; see `unetrpp.dataset_json.read_dataset_json`."""
    return read_dataset_json(Path(data_dir) / "dataset.json")


def find_cases(data_dir: str | Path, split: str = "train") -> list[Case]:
    """List the cases of DATA, sorted by name.

    Files named in dataset.json ("training": [{"image", "label"}], "test": [...]) are taken as they
    are listed (nnU-Net v1: NAME.nii.gz for NAME_0000.nii.gz, ...); else imagesTr/NAME_0000.nii.gz,
    _0001, ... with labelsTr/NAME.nii.gz (nnU-Net), or imagesTr/NAME.nii.gz (Decathlon) are found by
    name, see `unetrpp.case_names.group_channels`. Test cases lie in imagesTs, without labels.

    Raises:
        FileNotFoundError: a file is missing, or no case was found. ValueError: unknown split, two
        cases of one name, or the number of channel files differs from dataset.json.
    """
    if split not in ("train", "test"):
        raise ValueError(f"find_cases: split must be 'train' or 'test', got {split!r}")
    data_dir = Path(data_dir)
    info = read_dataset_info(data_dir)
    listed = info.training if split == "train" else info.test
    if listed:
        cases = list(dict.fromkeys(_listed_case(e, data_dir, info, split) for e in listed))
    else:
        cases = _cases_by_name(data_dir, split, info)
    _check_files(data_dir, cases)
    named: dict[str, Case] = {}
    for case in cases:
        other = named.setdefault(case.name, case)
        if other is not case:
            raise ValueError(
                f"{data_dir / 'dataset.json'}: two {split} cases are named {case.name}: "
                f"{other.images[0]} and {case.images[0]}; names must differ, rename one of them"
            )
        if len(case.images) not in (1, len(info.channels)):
            raise ValueError(
                f"{data_dir / 'dataset.json'}: case {case.name} has {len(case.images)} image "
                f"files, but {len(info.channels)} channels are named, {info.channels}; list one "
                "file for each channel, or one file that holds them all"
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


def _listed_case(entry: Entry, data_dir: Path, info: DatasetInfo, split: str) -> Case:
    """Return the case of an entry of dataset.json."""
    paths = [_listed_path(data_dir, image) for image in entry.images]
    label = _listed_path(data_dir, entry.label) if entry.label is not None else None
    name = case_name(paths[0])
    stem, number = split_number(name)
    if len(paths) == 1 and not _is_file(paths[0]):
        # nnU-Net v1 lists NAME.nii.gz for the files NAME_0000.nii.gz, NAME_0001.nii.gz, ...
        found = list(_numbered_files(paths[0], name, info).values())
        paths = list(found[0]) if len(found) == 1 else paths
    elif number is not None and (label is None or case_name(label) != name):
        if len(paths) == 1 and len(info.channels) > 1:
            # One channel stands for all, or each is listed as an entry of its own.
            grouped = _numbered_files(paths[0], stem, info).get(stem, ())
            paths = list(grouped) if paths[0] in grouped else paths
        if [split_number(case_name(p)) for p in paths] == [(stem, i) for i in range(len(paths))]:
            name = stem
    if split == "test":
        return Case(name, tuple(paths))
    label = label or label_beside(paths[0], name)
    if label is None:
        raise ValueError(
            f"{data_dir / 'dataset.json'}: {entry.place} names no label, and beside its image "
            f"{paths[0]} none of its name is found; give the entry a label, as in "
            '{"image": "imagesTr/NAME.nii.gz", "label": "labelsTr/NAME.nii.gz"}, or leave the '
            "list out to have files found by name"
        )
    return Case(name, tuple(paths), label)


def _listed_path(data_dir: Path, text: str) -> Path:
    # Windows writes backslashes.
    slashed = text.replace("\\", "/")
    paths = [data_dir / each for each in (text, *spellings(slashed))]
    return next(filter(_is_file, paths), data_dir / slashed)


def _numbered_files(file: Path, name: str, info: DatasetInfo) -> dict[str, tuple[Path, ...]]:
    """Return the cases that the files NAME_0000, NAME_0001, ... beside a file make, by name."""
    ending = file.name[len(case_name(file)) :]
    files = (file.with_name(f"{name}_{i:04d}{ending}") for i in range(len(info.channels) + 1))
    grouped = _without_problems(filter(_is_file, files), info)
    return {name: images for (_, name), images in grouped.items()}


def _cases_by_name(data_dir: Path, split: str, info: DatasetInfo) -> list[Case]:
    """Return the cases of a folder whose dataset.json lists no files."""
    folder = data_dir / ("imagesTr" if split == "train" else "imagesTs")
    endings = ENDINGS if info.file_ending is None else (info.file_ending,)
    files = nifti_files(folder) if folder.is_dir() else []
    files = [file for file in files if file.name.lower().endswith(endings)]
    grouped = _without_problems(files, info)
    if not grouped:
        raise FileNotFoundError(
            f"no {split} case found: dataset.json lists none, and {folder} holds no file that "
            f"ends in {' or '.join(endings)}; {DATASET_JSON_HINT}"
        )
    cases = []
    for (_, name), images in grouped.items():
        ending = images[0].name[len(case_name(images[0])) :]
        label = label_beside(images[0], name) or data_dir / "labelsTr" / f"{name}{ending}"
        cases.append(Case(name, images, label if split == "train" else None))
    return cases


def _without_problems(files: Iterable[Path], info: DatasetInfo) -> dict:
    grouped, problems = group_channels(files, info.channels)
    for reason in problems.values():
        more = f" (and {len(problems) - 1} more such cases)" if len(problems) > 1 else ""
        raise ValueError(reason + more)
    return grouped


def _check_files(data_dir: Path, cases: Sequence[Case]) -> None:
    """Refuse what is listed and is no NIfTI file, or is not there."""
    files = [path for case in cases for path in (*case.images, case.label) if path is not None]
    for path in files:
        if not is_nifti(path):
            raise ValueError(
                f"{data_dir / 'dataset.json'} lists {path}, and only files that end in "
                f"{' or '.join(ENDINGS)} are read; convert the volumes to NIfTI"
            )
    missing = [path for path in files if not _is_file(path)]
    if missing:
        first = missing[0]
        raise FileNotFoundError(
            f"{len(missing)} file(s) missing, the first: {first} {why_no_file(first)}; every image "
            f"needs a label map, and {data_dir / 'dataset.json'} must list files by their paths "
            "from its own folder"
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False
