"""prediction.json: what `predict` has written into a folder, true whenever the program stops.

Commands that write into one folder at a time, as the jobs of an array do, all add to one record.

It names the checkpoint with the SHA-256 of its weights, the class names and options, and by case
the input files, the label map and the seconds. Label maps of other weights or options are listed
apart, under "earlier"; a run adds to a folder of such maps only where it may replace them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from unetrpp.faults import in_words
from unetrpp.files import read_json, write_json
from unetrpp.folder_lock import waited_for

__all__ = ["FILE", "LOCK", "PredictionRecord", "fingerprint"]

FILE = "prediction.json"
LOCK = ".prediction.lock"
# What belongs to a case, by its name.
_BY_CASE = ("inputs", "outputs", "seconds")


def fingerprint(checkpoint: Path) -> str | None:
    """Return the SHA-256 of a checkpoint's weights; None where it holds no model.safetensors."""
    file = checkpoint / "model.safetensors"
    if not file.is_file():
        return None
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class PredictionRecord:
    """The record of a folder, with what was done there before.

    Args:
        folder: folder of the label maps; None keeps no record.
        checkpoint: checkpoint folder.
        preprocessing: what `unetrpp.preprocessing.Preprocessing.to_dict` returns.
        options: what the label maps depend on. The device is noted and not compared.
        overwrite: label maps of other weights or options may be replaced.

    Raises:
        ValueError: the folder's record is damaged, or of other weights or options, and overwrite
            was not given.
    """

    def __init__(
        self,
        folder: Path | None,
        checkpoint: Path,
        preprocessing: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        overwrite: bool,
    ) -> None:
        from unetrpp.preprocessing import Preprocessing

        self.file = folder / FILE if folder is not None else None
        self.content: dict[str, Any] = {
            "checkpoint": str(checkpoint.absolute()),
            "weights": fingerprint(checkpoint),
            "labels": Preprocessing.from_dict(dict(preprocessing)).named_labels,
            "preprocessing": dict(preprocessing),
            "options": dict(options),
            **{key: {} for key in _BY_CASE},
            "failures": {},
            "earlier": [],
        }
        # Cases of this command; what the file says of others is theirs.
        self.touched: set[str] = set()
        if self.file is not None and self.file.is_file():
            self._go_on_from(self.file, overwrite)

    def forget(self, case: str) -> None:
        """Take a case out, and say so on disk: its label map is about to be replaced."""
        self.touched.add(case)
        parts = [self.content, *self.content["earlier"]]
        if not any(case in part["outputs"] for part in parts):
            return
        for key in _BY_CASE:
            self.content[key].pop(case, None)
        self.content["earlier"] = _without(self.content["earlier"], self.touched)
        self._write()

    def add(self, case: str, inputs: Sequence[Path], output: Path, seconds: float) -> None:
        """Note a label map that was written."""
        self.content["inputs"][case] = [str(path) for path in inputs]
        self.content["outputs"][case] = str(output)
        self.content["seconds"][case] = round(seconds, 3)

    def save(self, failures: Mapping[str, str]) -> str | None:
        """Write the record; returns the reason where that fails, None where it is written."""
        self.content["failures"] = dict(failures)
        try:
            self._write()
        except OSError as error:
            return in_words(error)
        return None

    def _write(self) -> None:
        if self.file is None:
            return
        with waited_for(self.file.with_name(LOCK)):
            self._take_over_from_others(self.file)
            write_json(self.file, self.content)

    def _take_over_from_others(self, file: Path) -> None:
        """Take what other commands have written since about their cases."""
        try:
            now = _checked(read_json(file))
        except (OSError, ValueError):
            return
        if not _alike(now, self.content):
            return
        for key in _BY_CASE:
            theirs = {case: v for case, v in now[key].items() if case not in self.touched}
            own = {case: v for case, v in self.content[key].items() if case in self.touched}
            self.content[key] = {**theirs, **own}
        self.content["earlier"] = _without(now["earlier"], self.touched)

    def _go_on_from(self, file: Path, overwrite: bool) -> None:
        try:
            before = _read(file)
        except (OSError, ValueError) as error:
            if overwrite:
                return
            raise ValueError(
                f"{file} should be the record of unetrpp predict, and cannot be read ({error}); "
                "delete it, name another folder, or replace label maps with --overwrite"
            ) from error
        if _alike(before, self.content):
            self.content.update({key: before[key] for key in (*_BY_CASE, "earlier")})
        elif not before["outputs"]:
            self.content["earlier"] = before["earlier"]
        elif overwrite:
            kept = ("checkpoint", "weights", "labels", "preprocessing", "options", *_BY_CASE)
            earlier = {key: before.get(key) for key in kept}
            self.content["earlier"] = [*before["earlier"], earlier]
        else:
            raise ValueError(
                f"{file} says that label maps here come from {before.get('checkpoint')} with "
                f"{_said(before)}, and now it is {self.content['checkpoint']} with "
                f"{_said(self.content)}; name another folder, or replace them with --overwrite"
            )


def _read(file: Path) -> dict[str, Any]:
    """A record's content, without the label maps that are gone."""
    content = _checked(read_json(file))
    for part in (content, *content["earlier"]):
        there = {case for case, path in part["outputs"].items() if Path(path).is_file()}
        for key in _BY_CASE:
            part[key] = {case: value for case, value in part[key].items() if case in there}
    content["earlier"] = [part for part in content["earlier"] if part["outputs"]]
    return content


def _without(parts: Sequence[Mapping[str, Any]], cases: Collection[str]) -> list[dict[str, Any]]:
    """Parts of a record without some cases; one without label maps is left out."""
    left = []
    for part in parts:
        kept = {key: {c: v for c, v in part[key].items() if c not in cases} for key in _BY_CASE}
        left += [{**part, **kept}] if kept["outputs"] else []
    return left


def _checked(content: Any) -> dict[str, Any]:
    """A record's content, with every entry by case."""
    if not isinstance(content, dict):
        raise ValueError("it holds no entries by name")
    content.setdefault("earlier", [])
    for part in (content, *content["earlier"]):
        if not all(isinstance(part.get(key, {}), dict) for key in (*_BY_CASE, "options")):
            raise ValueError(f"{', '.join(_BY_CASE)} and options must be entries by name")
        for key in _BY_CASE:
            part.setdefault(key, {})
    return content


def _alike(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether label maps of two records come from the same weights, used in the same way."""
    # A record without the weights' sum is of an earlier version, or of no file of weights.
    if before.get("weights") is None:
        paths = [Path(part.get("checkpoint") or "").absolute() for part in (before, now)]
        return paths[0] == paths[1] and _compared(before, ()) == _compared(now, ())
    keys = ("weights", "preprocessing")
    return _compared(before, keys) == _compared(now, keys)


def _compared(content: Mapping[str, Any], keys: Sequence[str]) -> list[Any]:
    return [*(content.get(key) for key in (*keys, "labels")), _options(content)]


def _options(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.get("options", {}).items() if key != "device"}


def _said(content: Mapping[str, Any]) -> str:
    listed = [f"{key} {value}" for key, value in _options(content).items()]
    weights = content.get("weights")
    return ", ".join([*listed, *([f"weights {weights[:8]}"] if isinstance(weights, str) else [])])
