"""What a dataset.json says, in Decathlon or nnU-Net spelling and in those that people write.

read_dataset_json   channels, labels, file ending and listed files of a dataset.json
class_names         the classes of any JSON file with "labels", for scoring
split_ignore        nnU-Net's reserved label "ignore", apart from the classes

Where the meaning is plain, a spelling is read; where it is not, it is refused with the file, the
entry, what was expected and what to write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unetrpp.files import read_json
from unetrpp.volumes import ENDINGS

__all__ = [
    "DATASET_JSON_HINT",
    "IGNORE",
    "DatasetInfo",
    "Entry",
    "class_names",
    "read_dataset_json",
    "split_ignore",
]

# The name that nnU-Net reserves for voxels that nobody has labelled.
IGNORE = "ignore"
BACKGROUND = "background"
# nnU-Net allows as many; a label map of more classes is a mistake.
MOST_CLASSES = 65_536
DATASET_JSON_HINT = (
    'the smallest dataset.json is {"channel_names": {"0": "MRI"}, "labels": {"background": 0, '
    '"lesion": 1}, "file_ending": ".nii.gz"}, beside imagesTr/NAME_0000.nii.gz and '
    "labelsTr/NAME.nii.gz"
)
_ENTRY_HINT = (
    'an entry is {"image": "imagesTr/NAME.nii.gz", "label": "labelsTr/NAME.nii.gz"}, with paths '
    "from the folder of dataset.json"
)
# How people call the two.
_IMAGE_KEYS = ("image", "images")
_LABEL_KEYS = ("label", "labels", "mask", "masks", "seg", "segmentation")


@dataclass(frozen=True)
class Entry:
    """A case that dataset.json lists: the files as they are written there."""

    place: str
    images: tuple[str, ...]
    label: str | None = None


@dataclass(frozen=True)
class DatasetInfo:
    """What dataset.json says.

    Args:
        channels: their names, in the order of the files.
        labels: value by class name, from 0 (the background) without gaps.
        file_ending: that of all volumes in small letters, or None where it is not said.
        ignore: label value of the voxels that are left out of everything, nnU-Net's "ignore".
        training, test: the listed cases, if any are.
    """

    channels: list[str]
    labels: dict[str, int]
    file_ending: str | None = None
    ignore: int | None = None
    training: list[Entry] = field(default_factory=list)
    test: list[Entry] = field(default_factory=list)


def read_dataset_json(path: Path) -> DatasetInfo:
    """Read a dataset.json.

    Raises:
        FileNotFoundError: there is no such file. ValueError: an entry whose meaning is not plain;
        the message names the file.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; it must be a JSON file: {DATASET_JSON_HINT}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {DATASET_JSON_HINT}")
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds {_short(content)}, and must be one object; {DATASET_JSON_HINT}"
        )
    try:
        labels, ignore = _classes(content.get("labels"))
        return DatasetInfo(
            _channels(content),
            labels,
            _file_ending(content.get("file_ending")),
            ignore,
            _entries(content, "training"),
            _entries(content, "test"),
        )
    except _Unclear as error:
        raise ValueError(f"{path}: {error}") from None


def class_names(file: Path) -> dict[str, int | list[int]]:
    """Return the classes that a JSON file names under "labels", without the background.

    Args:
        file: a dataset.json, whose labels may be regions: {"tumour": [1, 2]}; or a prediction.json.

    Returns:
        Label value, or values of a region, by name; "ignore" is among them where it is named.

    Raises:
        ValueError: no such file, no JSON, or it has no labels.
    """
    try:
        content = read_json(file)
        if not isinstance(content, dict):
            raise _Unclear(f"it holds {_short(content)}")
        labels = _label_values(content.get("labels"))
        split_ignore(labels)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} must be a JSON file with 'labels', as in a dataset.json; reading it gave "
            f"{type(error).__name__ if isinstance(error, OSError) else 'this'}: {error}"
        ) from error
    return {name: value for name, value in labels.items() if value not in (0, [0])}


def split_ignore(
    labels: Mapping[str, int | list[int]],
) -> tuple[dict[str, int | list[int]], int | None]:
    """Return (the classes, the value of the voxels to leave out or None).

    Raises:
        ValueError: "ignore" is a region, or not the highest value, as nnU-Net demands.
    """
    classes = {name: value for name, value in labels.items() if name != IGNORE}
    ignore = labels.get(IGNORE)
    if ignore is None:
        return classes, None
    values = [part for value in classes.values() for part in _parts(value)]
    if isinstance(ignore, list) or ignore <= max(values, default=0):
        raise _Unclear(
            f'the label "ignore" is reserved for voxels to leave out, and must have one value, '
            f"higher than every class; got {ignore} beside {classes}; rename it if it is a class"
        )
    return classes, ignore


class _Unclear(ValueError):
    """An entry whose meaning is not plain; the caller adds the file."""


def _channels(content: Mapping[str, Any]) -> list[str]:
    key = "channel_names" if content.get("channel_names") else "modality"
    given = content.get(key)
    if not given:
        raise _Unclear(f"it names no channels or no labels; {DATASET_JSON_HINT}")
    expected = f'{key} must give each channel a name, as {{"0": "CT"}} or {{"0": "T1", "1": "T2"}}'
    if isinstance(given, str):
        given = [given]
    if isinstance(given, list):
        numbered: list[tuple[int | None, Any]] = list(enumerate(given))
    elif not isinstance(given, dict):
        raise _Unclear(f"{expected}; got {_short(given)}")
    elif all(_whole(number) is None for number in given):
        # Names mapped to numbers, as labels are.
        numbered = [(_whole(number), name) for name, number in given.items()]
    else:
        numbered = [(_whole(number), name) for number, name in given.items()]
    by_number = dict(numbered)
    if len(by_number) < len(numbered) or set(by_number) != set(range(len(numbered))):
        raise _Unclear(f"{expected}, numbered 0, 1, ... without gaps; got {_short(given)}")
    names = [by_number[number] for number in range(len(given))]
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise _Unclear(
                f"{expected}; channel {number} is {_short(name)}; the name CT decides how "
                "intensities are scaled, any other name is a free one"
            )
    return names


def _classes(given: Any) -> tuple[dict[str, int], int | None]:
    if not given:
        raise _Unclear(f"it names no channels or no labels; {DATASET_JSON_HINT}")
    classes, ignore = split_ignore(_label_values(given))
    labels: dict[str, int] = {}
    for name, value in classes.items():
        if isinstance(value, list):
            raise _Unclear(
                f"every label must map to one integer (regions made of several labels are not "
                f"supported), got {name!r}: {value}; train on the labels that the regions consist "
                "of, and give the regions to unetrpp evaluate --names"
            )
        labels[name] = value
    if 0 not in labels.values():
        labels = {BACKGROUND: 0, **labels}
    labels = dict(sorted(labels.items(), key=lambda item: item[1]))
    if list(labels.values()) != list(range(len(labels))) or len(labels) < 2:
        raise _Unclear(
            f"label values must be 0 (background), 1, 2, ... without gaps, and at least one class, "
            f"got {_short(labels)}; renumber the labels in dataset.json and in the label maps"
        )
    if len(labels) > MOST_CLASSES:
        raise _Unclear(f"there are {len(labels)} labels, and at most {MOST_CLASSES} can be told")
    return labels, ignore


def _label_values(labels: Any) -> dict[str, int | list[int]]:
    """Return label value, or values of a region, by name.

    nnU-Net writes {"liver": 1} and regions {"tumour": [1, 2]}, the Decathlon {"1": "liver"}; a list
    counts from its first, the background.
    """
    expected = (
        '"labels" must be {"background": 0, "lesion": 1} or {"0": "background", "1": "lesion"}'
    )
    if isinstance(labels, list):
        if not labels or not isinstance(labels[0], str) or not _is(BACKGROUND, labels[0]):
            raise _Unclear(f'{expected}; a list must begin with "background", got {_short(labels)}')
        labels = {str(value): name for value, name in enumerate(labels)}
    if not isinstance(labels, dict) or not labels:
        raise _Unclear(f"{expected}; got {_short(labels)}")
    only_numbers = all(_whole(key) is not None for key in labels)
    values: dict[str, int | list[int]] = {}
    for key, value in labels.items():
        name = key
        if isinstance(value, str) and (only_numbers or _whole(value) is None):
            name, value = value, key
        parts = [_whole(part) for part in value] if isinstance(value, list) else [_whole(value)]
        if not parts or None in parts or not name.strip():
            raise _Unclear(f"{expected}; got {key!r}: {_short(labels[key])}")
        if name in values:
            raise _Unclear(f"{expected}; two labels are called {name!r}, rename one of them")
        numbers = [part for part in parts if part is not None]
        if _is(BACKGROUND, name) and numbers != [0]:
            raise _Unclear(
                f"the background must have the value 0, got {name!r}: {_short(value)}; give it 0 "
                "in dataset.json and in the label maps, or rename the class"
            )
        if _is(IGNORE, name) and name != IGNORE:
            raise _Unclear(
                f'{name!r} may be a class or voxels to leave out; write "ignore" for those, or '
                "rename the class"
            )
        values[name] = numbers if isinstance(value, list) else numbers[0]
    return values


def _file_ending(given: Any) -> str | None:
    if given is None:
        return None
    ending = given.lower() if isinstance(given, str) else ""
    ending = ending if ending.startswith(".") else f".{ending}"
    if ending not in ENDINGS:
        raise _Unclear(
            f"file_ending must be {' or '.join(ENDINGS)}, got {_short(given)}; other formats are "
            "not read, convert the volumes to NIfTI"
        )
    return ending


def _entries(content: Mapping[str, Any], key: str) -> list[Entry]:
    """Return what is listed under "training" or "test"; empty where nothing is."""
    listed, where = content.get(key), f'"{key}"'
    if key == "training" and not listed:
        # nnU-Net v2 lists files that lie elsewhere so.
        listed, where = content.get("dataset"), '"dataset"'
    if not listed and (listed is None or isinstance(listed, (list, dict))):
        return []
    if isinstance(listed, dict):
        places = {f"{where}[{name!r}]": item for name, item in listed.items()}
    elif isinstance(listed, list):
        places = {f"{where}[{number}]": item for number, item in enumerate(listed)}
    else:
        raise _Unclear(f"{where} must be a list of entries, got {_short(listed)}; {_ENTRY_HINT}")
    entries = [_entry(place, item) for place, item in places.items()]
    # An entry that is given twice is one case.
    return list({(entry.images, entry.label): entry for entry in entries}.values())


def _entry(place: str, item: Any) -> Entry:
    if isinstance(item, str):
        item = {"image": item}
    images = _one_of(place, item, _IMAGE_KEYS) if isinstance(item, dict) else None
    images = [images] if isinstance(images, str) else images
    if (
        not isinstance(images, list)
        or not images
        or not all(isinstance(image, str) and image.strip() for image in images)
    ):
        raise _Unclear(f"{place} names no image, got {_short(item)}; {_ENTRY_HINT}")
    label = _one_of(place, item, _LABEL_KEYS)
    if label is None and (others := [key for key in item if _is_volume(item[key], key)]):
        raise _Unclear(f"{place} has no label, but {others[0]!r}: {item[others[0]]}; {_ENTRY_HINT}")
    if label is not None and not (isinstance(label, str) and label.strip()):
        raise _Unclear(f"the label of {place} is {_short(label)}, not a path; {_ENTRY_HINT}")
    return Entry(place, tuple(images), label)


def _is_volume(value: Any, key: str) -> bool:
    """Whether an entry's value is a path of a volume that no key of an image announces."""
    is_image = key.strip().lower() in _IMAGE_KEYS
    return not is_image and isinstance(value, str) and value.strip().lower().endswith(ENDINGS)


def _one_of(place: str, item: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Return the value of the only one of the keys that is there, or None."""
    given = [key for key in item if key.strip().lower() in keys and item[key] is not None]
    if len(given) > 1:
        raise _Unclear(f"{place} has {' and '.join(given)}, which are one thing; {_ENTRY_HINT}")
    return item[given[0]] if given else None


def _whole(value: Any) -> int | None:
    """Return the integer that a JSON value spells (1, 1.0, "1", "1.0"), or None."""
    if isinstance(value, str):
        return int(float(value)) if re.fullmatch(r"\s*-?[0-9]{1,15}(\.0*)?\s*", value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if abs(value) < 2**53 and value == int(value) else None


def _is(reserved: str, name: str) -> bool:
    """Whether a name is a reserved one, however it is spelled."""
    return name.strip().lower() == reserved


def _parts(value: int | Sequence[int]) -> Sequence[int]:
    return value if isinstance(value, Sequence) else [value]


def _short(value: Any) -> str:
    """Return a JSON value for a message, cut where it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
