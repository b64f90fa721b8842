"""What a report reads of a run: each file checked, and what is damaged named and left out.

Sources   curves, plan, configuration, scores and the record of the prediction
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from unetrpp.files import read_json
from unetrpp.run_folder import CONFIG, METRICS, read_metrics, unread_lines

__all__ = ["Sources", "number", "read_scores"]

_SCORES = ("dice", "hd95_voxels", "hd95_mm")


def number(value: Any) -> float:
    """Return a value as a number; NaN for anything else that stands in a number's place."""
    try:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        return float(value) if is_number else math.nan
    except OverflowError:
        return math.nan


def read_scores(file: Path) -> dict[str, Any]:
    """Return the content of a scores.json.

    Raises:
        ValueError: it is cut short or no scores.json; the message names the file and the entry.
    """
    try:
        content = read_json(file)
        _check_scores(content)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file} cannot be read as the scores of unetrpp evaluate ({error}); write it again "
            "with unetrpp evaluate"
        ) from error
    return content


def _check_scores(content: Any) -> None:
    def expect(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(what)

    expect(isinstance(content, dict), "it holds no entries by name")
    rows = content.get("rows")
    listed = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    expect(listed, '"rows" must be a list of entries by name')
    columns = {"case", "class", "label", *_SCORES, "prediction_voxels", "reference_voxels"}
    for place, row in enumerate(rows):
        missing = sorted(columns - set(row))
        expect(not missing, f"row {place} lacks {', '.join(missing)}")
        expect(isinstance(row["case"], str), f'"case" of row {place} must be text')
        expect(isinstance(row["class"], str), f'"class" of row {place} must be text')
    for key in ("files", "failures", "definitions"):
        expect(isinstance(content.get(key, {}), dict), f'"{key}" must hold entries by name')
    for case, files in content.get("files", {}).items():
        both = isinstance(files, dict) and {"prediction", "reference"} <= set(files)
        texts = both and all(isinstance(path, str) for path in files.values())
        expect(texts, f'"files" of {case!r} must name prediction and reference')
    if not rows:
        return
    summary = content.get("summary")
    parts = [_mapping(summary).get(key) for key in ("classes", "mean")]
    expect(all(isinstance(part, dict) for part in parts), '"summary" lacks classes or mean')
    for entry in (*summary["classes"].values(), summary["mean"]):
        scored = isinstance(entry, dict) and all(isinstance(entry.get(s), dict) for s in _SCORES)
        expect(scored, '"summary" lacks a score')


class Sources:
    """What a report shows of a run.

    Args:
        run: run folder.
        scores: what `read_scores` returned, or {}.

    Attributes:
        steps, validations: records of metrics.jsonl.
        plan, split, prediction: what plan.json and prediction.json hold.
        config: the text of config.yaml, None where there is none.
        damaged: a sentence for each file or part that could not be read.
    """

    def __init__(self, run: Path, scores: Mapping[str, Any]) -> None:
        self.damaged: list[str] = []
        records = self._records(run)
        self.steps = [r for r in records if math.isfinite(number(r.get("loss")))]
        self.validations = [r for r in records if math.isfinite(number(r.get("val_dice")))]
        stored = self._read(run / "plan.json")
        self.plan, self.split = (_mapping(stored.get(key)) for key in ("plan", "split"))
        self.model = _mapping(self.plan.get("model")).get("name")
        self.prediction = self._record_of(scores)
        self.config = self._text(run / CONFIG)

    def names(self, part: str) -> list[str]:
        """Return the cases of "training" or "validation"."""
        names = self.split.get(part)
        return [str(name) for name in names] if isinstance(names, list) else []

    def _records(self, run: Path) -> list[dict[str, Any]]:
        try:
            records, unread = read_metrics(run), unread_lines(run)
        except OSError as error:
            self.damaged.append(f"{run / METRICS} cannot be read: {error}")
            return []
        if unread:
            self.damaged.append(f"{run / METRICS}: {unread} line(s) are no records of a step")
        for record in records:
            record["val_dice_per_class"] = _mapping(record.get("val_dice_per_class"))
        return records

    def _record_of(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """prediction.json from beside the predicted label maps, if it is there."""
        files = next(iter(scores.get("files", {}).values()), None)
        if files is None:
            return {}
        content = self._read(Path(files["prediction"]).parent / "prediction.json")
        if not content:
            return {}
        by_name = {key: _mapping(content.get(key)) for key in ("inputs", "seconds", "options")}
        return {**by_name, "checkpoint": str(content.get("checkpoint") or "")}

    def _read(self, file: Path) -> dict[str, Any]:
        if not file.is_file():
            return {}
        try:
            content = read_json(file)
        except (OSError, ValueError, RecursionError) as error:
            self.damaged.append(f"{file} cannot be read: {error}")
            return {}
        if not isinstance(content, dict):
            self.damaged.append(f"{file} holds no entries by name")
        return _mapping(content)

    def _text(self, file: Path) -> str | None:
        try:
            return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
        except OSError as error:
            self.damaged.append(f"{file} cannot be read: {error}")
            return None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
