"""Names of cases: which files belong to one.

group_channels   image files -> cases, each with its channels in order
pair_names       predicted and reference label maps -> pairs

nnU-Net names the channels of a case NAME_0000, NAME_0001, ... Names of patients and years look the
same (STS24_0001, scan_2019), so what a number means depends on the files beside it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unetrpp.volumes import ENDINGS, case_name, nifti_files

__all__ = [
    "group_channels",
    "label_beside",
    "pair_names",
    "spellings",
    "split_number",
]


def group_channels(
    files: Iterable[Path], channels: Sequence[str]
) -> tuple[dict[tuple[Path, str], tuple[Path, ...]], dict[Path, str]]:
    """Group image files into cases: here alone is decided whether _NNNN is a channel's number.

    A file NAME_NNNN is a case of its own where a label map beside it has this name, or where the
    file holds several channels itself. It keeps its name, except NAME_0000 of which only NAME has a
    label map. Otherwise the files NAME_0000 to NAME_(n-1) of n channels are the case NAME if all of
    them exist and no other number does. Where they do not, several channels make a gap, which is a
    problem; for one channel, NAME_NNNN is a plain name.

    Args:
        files: the images, in any order.
        channels: the names of the channels.

    Returns:
        The files of each case in the order of the channels, by folder and name; and the reason why
        files belong to no case, by the first of them.

    Raises:
        ValueError: two files are the same channel of one case.
    """
    cases: dict[tuple[Path, str], tuple[Path, ...]] = {}
    problems: dict[Path, str] = {}
    numbered: dict[tuple[Path, str], dict[int, Path]] = {}
    series: dict[Path, set[str]] = {}
    for file in files:
        name, number = split_number(case_name(file))
        holds_all = number is not None and len(channels) > 1 and _channels_in(file) > 1
        if number == 0 and holds_all and not label_beside(file) and label_beside(file, name):
            _add(cases, (file.parent, name), file)
            continue
        if number is None or holds_all or label_beside(file):
            _add(cases, (file.parent, case_name(file)), file)
            continue
        images = numbered.setdefault((file.parent, name), {})
        if number in images:
            _refuse_twins(images[number], file)
        images[number] = file
    for (folder, name), images in numbered.items():
        first = images[min(images)]
        has_label = label_beside(first, name) is not None
        plain = len(channels) == 1 and not has_label
        if plain and folder not in series:
            series[folder] = _series(folder)
        is_complete = set(images) == set(range(len(channels)))
        if is_complete and not (plain and name in series[folder]):
            _add(cases, (folder, name), *(images[number] for number in sorted(images)))
        elif plain or not all(map(_channels_in, images.values())):
            # Plain names; or a file that cannot be read, which the reading says better.
            for file in images.values():
                _add(cases, (folder, case_name(file)), file)
        else:
            problems[first] = _gap(name, images, channels)
    return cases, problems


def label_beside(file: Path, name: str | None = None) -> Path | None:
    """Return the label map of an image, from the folder labelsXX beside imagesXX, if it is there.

    Args:
        file: the image.
        name: that of the label map; the image's own if not given.
    """
    if not file.parent.name.startswith("images"):
        return None
    folder = file.parent.parent / file.parent.name.replace("images", "labels", 1)
    name = case_name(file) if name is None else name
    ending = file.name[len(case_name(file)) :]
    endings = dict.fromkeys((ending, *ENDINGS))
    candidates = (folder / f"{each}{end}" for each in spellings(name) for end in endings)
    return next((label for label in candidates if label.is_file()), None)


def pair_names(predictions: Collection[str], references: Collection[str]) -> Mapping[str, str]:
    """Return the reference of each prediction that has one, by name.

    Equal names are a pair, in either spelling of accents. Of the rest, NAME and NAME_0000 are: the
    label map of an image NAME_0000 is called by either name.
    """
    pairs = {name: name for name in predictions if name in references}
    taken = set(pairs.values())
    for name in predictions:
        if name in pairs:
            continue
        stem, number = split_number(name)
        other = stem if number == 0 else f"{name}_0000"
        for each in (*spellings(name), *spellings(other)):
            if each in references and each not in taken:
                pairs[name] = each
                taken.add(each)
                break
    return pairs


def spellings(name: str) -> tuple[str, ...]:
    """Return a name as it is, then with letters and accents joined (NFC) and apart (NFD).

    macOS writes file names in one form, editors and other systems in the other; they look alike.
    """
    forms = (unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
    return tuple(dict.fromkeys((name, *forms)))


def split_number(name: str) -> tuple[str, int | None]:
    """Return (NAME, number) of NAME_NNNN, and (name, None) of any other name."""
    match = re.fullmatch(r"(.+)_([0-9]{4})", name, re.DOTALL)
    return (match[1], int(match[2])) if match else (name, None)


def _series(folder: Path) -> set[str]:
    """Return the NAMEs of a folder that have other files NAME_NNNN than NAME_0000."""
    numbered = (split_number(case_name(file)) for file in nifti_files(folder))
    return {name for name, number in numbered if number}


def _channels_in(file: Path) -> int:
    """Return the channels of a file, by its header; 0 where that cannot be read."""
    import nibabel

    try:
        image: Any = nibabel.load(file)
        shape = image.shape
    except Exception:  # reading the volume says what is wrong with it
        return 0
    count = 1
    for length in shape[3:]:
        count *= length
    return count


def _add(
    cases: dict[tuple[Path, str], tuple[Path, ...]], key: tuple[Path, str], *files: Path
) -> None:
    if key in cases:
        _refuse_twins(cases[key][0], files[0])
    cases[key] = files


def _refuse_twins(one: Path, other: Path) -> None:
    raise ValueError(f"{one} and {other} are the same channel of one case; give one of them")


def _gap(name: str, images: Mapping[int, Path], channels: Sequence[str]) -> str:
    """Say which channels of a case are missing, and which files are none of them."""
    first, count = images[min(images)], len(channels)
    ending = first.name[len(case_name(first)) :]
    there = sum(number < count for number in images)
    text = (
        f"{first}: case {name} has {there} channel{'' if there == 1 else 's'} of {count} "
        f"({', '.join(channels)})"
    )
    missing = [f"{name}_{number:04d}{ending}" for number in range(count) if number not in images]
    beside = [file for file in missing if first.with_name(file).is_file()]
    if missing and beside == missing:
        return f"{text}; {', '.join(beside)} lies beside it: name that as well, or the folder"
    beyond = [images[number].name for number in sorted(images) if number >= count]
    if missing:
        text += f", there is no {', '.join(missing)}"
    if beyond:
        text += f", and {', '.join(beyond)} is none of them"
    return f"{text}; the files of a case end in _0000 to _{count - 1:04d}, or one file holds all"
