"""The files of a run folder: what a run writes there, reads again, and may remove.

metrics.jsonl holds one JSON object per line: {"step", "loss", ...} for each step, {"step",
"val_dice", "val_dice_per_class", ...} for each validation.

A damaged file is refused by name: "FILE is ...; what to do". Nothing in one is ever executed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from glob import escape as glob_escape
from pathlib import Path
from typing import Any

from unetrpp.files import PARTIAL, naming, read_json, read_yaml, replacing, write_json, write_text
from unetrpp.folder_lock import LOCK
from unetrpp.prediction_record import LOCK as RECORD_LOCK

__all__ = [
    "Metrics",
    "check_folder",
    "read_config",
    "read_metrics",
    "read_plan",
    "read_state",
    "remove_partial_files",
    "save_state",
    "start_folder",
    "unread_lines",
]

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
PLAN = "plan.json"
STATE = "resume.pt"
CHECKPOINT = ("model.safetensors", "config.json")
# All that a run and its report write, by folder; label maps of held-out cases lie in validation/.
WRITTEN = {
    ".": (CONFIG, PLAN, METRICS, STATE, LOCK, "report.html", "nonfinite_step_*.pt"),
    "best": CHECKPOINT,
    "last": CHECKPOINT,
    # New checkpoints, until they are whole.
    ".best.partial": CHECKPOINT,
    ".last.partial": CHECKPOINT,
    "tensorboard": ("events.out.tfevents.*",),
    "validation": ("scores.csv", "scores.json", "prediction.json", RECORD_LOCK),
}
# What resume.pt holds; a missing entry means that another program wrote it.
STATE_ENTRIES = {"step", "total", "best", "elapsed", "model", "optimizer", "average"}
RESTORE = "restore it from a copy, or delete it and the run starts again at step 0"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run, in order; empty where there are none.

    A line that is no record is left out: a killed run or a full disk may leave half a line.
    """
    return [record for record in _lines(folder) if record is not None]


def unread_lines(folder: Path) -> int:
    """Return how many lines of the metrics are no records."""
    return sum(record is None for record in _lines(folder))


def _lines(folder: Path) -> Iterator[dict[str, Any] | None]:
    file = folder / METRICS
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        is_record = isinstance(record, dict) and isinstance(record.get("step"), int)
        yield record if is_record else None


def read_config(folder: Path) -> dict[str, Any]:
    """Return the options that a run was started with; empty where there are none.

    Raises:
        ValueError: config.yaml is not what a run wrote.
    """
    file = folder / CONFIG
    if not file.is_file():
        return {}
    try:
        content = read_yaml(file)
    except ValueError as error:
        raise ValueError(f"{error}; restore it from a copy") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(
            f"{file} must hold options of a run by name, got {_short(content)}; restore it from a "
            "copy"
        )
    return content


def read_plan(folder: Path) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Return what plan.json holds: the plan, as `Plan.from_dict` takes it, and the split.

    Raises:
        FileNotFoundError: no plan.json. ValueError: it is not what a run wrote.
    """
    file = folder / PLAN
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing, and without it the run cannot go on; restore it from a copy"
        )
    try:
        content = read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}; restore it from a copy") from error
    plan = content.get("plan") if isinstance(content, dict) else None
    split = content.get("split") if isinstance(content, dict) else None
    parts = ("training", "validation")
    if (
        not isinstance(plan, dict)
        or not isinstance(split, dict)
        or not all(isinstance(split.get(part), list) for part in parts)
        or not all(isinstance(name, str) for part in parts for name in split[part])
        or not all(split[part] for part in parts)
    ):
        raise ValueError(
            f'{file} must hold {{"plan": ..., "split": {{"training", "validation"}}}}, as a run '
            f"writes it, got {_short(content)}; restore it from a copy"
        )
    return plan, split


class Metrics:
    """metrics.jsonl, and TensorBoard where it works.

    Args:
        folder: the run's.
        start: steps taken so far; records of later ones are dropped.
        due: the validation after step `start` is to come; one of it is dropped.
        say: prints a line.
    """

    def __init__(
        self, folder: Path, start: int, *, due: bool = False, say: Callable[[str], None] = print
    ):
        kept = [
            record
            for record in read_metrics(folder)
            if record["step"] <= start
            and not (due and record["step"] == start and "val_dice" in record)
        ]
        write_text(folder / METRICS, "".join(json.dumps(record) + "\n" for record in kept))
        self.path, self.say = folder / METRICS, say
        self.file = open(self.path, "a", encoding="utf-8")
        self.board: Any = None
        # It is optional, so no fault of its installation or of its files may end a training.
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)
        except Exception as error:
            if importlib.util.find_spec("tensorboard") is not None:
                self._leave_out_board(error)

    def write(self, record: dict[str, Any]) -> None:
        """Add a record.

        Raises:
            OSError: it could not be written; the message names the file and the cause.
        """
        with naming(self.path):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        if self.board is None:
            return
        try:
            for key, value in record.items():
                if isinstance(value, float) and key != "seconds":
                    self.board.add_scalar(key, value, record["step"])
        except Exception as error:
            self._leave_out_board(error)

    def close(self) -> None:
        """Close the files."""
        try:
            with naming(self.path):
                self.file.close()
        finally:
            if self.board is not None:
                try:
                    self.board.close()
                except Exception as error:
                    self._leave_out_board(error)

    def _leave_out_board(self, error: Exception) -> None:
        self.board = None
        self.say(
            f"TensorBoard is left out ({type(error).__name__}: {_line(error)}); the curves are in "
            f"{self.path}"
        )


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is an earlier run and may be replaced.

    Raises:
        FileExistsError: see above; or the folder holds more than a run writes.
    """
    own, others = _content(folder)
    is_run = any(path.name != LOCK and not path.name.startswith(PARTIAL) for path in own)
    if not others and not is_run:
        return
    listed = ", ".join(path.relative_to(folder).as_posix() for path in others[:3])
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    if not is_run:
        raise FileExistsError(
            f"{folder} is not an earlier run: it holds {listed}{more}, and a run starts in a new "
            "or empty folder; move that away, or name another folder"
        )
    if not overwrite:
        raise FileExistsError(
            f"{folder} is not empty; continue that run with --resume {folder}, replace it "
            "with --overwrite, or name another folder"
        )
    if others:
        raise FileExistsError(
            f"{folder} is not an earlier run alone: it holds {listed}{more}, which no run writes, "
            "so --overwrite leaves it as it is; move that away, or name another folder"
        )
    try:
        read_plan(folder)
    except (ValueError, OSError):
        raise FileExistsError(
            f"{folder} is not an earlier run, since it has no {PLAN} of one, so --overwrite leaves "
            "it as it is; empty it yourself, or name another folder"
        ) from None


def start_folder(
    folder: Path, config: Mapping[str, Any], plan: Mapping[str, Any], split: Mapping[str, Any]
) -> None:
    """Make a run folder, in place of an earlier run's, that holds configuration and plan.

    Args:
        folder: one that is held, and that `check_folder` has let pass.
        config: options of the run by name; a path is stored as text.
        plan, split: plain lists and dicts.
    """
    import yaml

    _remove_run(folder)
    write_json(folder / PLAN, {"plan": plan, "split": split})
    values = {k: str(v) if isinstance(v, Path) else v for k, v in config.items()}
    # Last, because a folder with config.yaml can be resumed.
    write_text(folder / CONFIG, yaml.safe_dump(values, sort_keys=False))


def save_state(file: Path, state: Mapping[str, Any]) -> None:
    """Replace resume.pt, what a run goes on from."""
    import torch

    with replacing(file) as partial:
        torch.save(state, partial)


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return what resume.pt holds; None where there is none.

    Raises:
        ValueError: it is not what a run wrote. Tensors and plain values are read, never code.
    """
    import torch

    file = folder / STATE
    if file.is_symlink() and not file.exists():
        raise ValueError(f"{file} is a link that leads nowhere; {RESTORE}")
    if not file.exists():
        return None
    try:
        # torch does not compare the sums that it has written.
        with zipfile.ZipFile(file) as archive:
            flipped = archive.testzip()
        if flipped is None:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of many kinds, and all advise to load code
        raise ValueError(f"{file} is truncated, or not what a run wrote; {RESTORE}") from error
    if flipped is not None:
        raise ValueError(f"{file} is damaged: its checksum does not hold at {flipped}; {RESTORE}")
    if not isinstance(state, dict) or not state.keys() >= STATE_ENTRIES:
        missing = sorted(STATE_ENTRIES - set(state if isinstance(state, dict) else ()))
        raise ValueError(
            f"{file} lacks {', '.join(missing)}, so another version or program wrote it; {RESTORE}"
        )
    # As version 0.1.0 wrote it.
    state.setdefault("due", False)
    state.setdefault("validations", 10)
    total = math.inf if state["total"] is None else state["total"]
    rules = {
        "total": total == math.inf or (type(total) is int and total >= 1),
        "step": type(state["step"]) is int and state["step"] >= 0,
        "best": _is_finite(state["best"]),
        "elapsed": _is_finite(state["elapsed"]),
        "due": isinstance(state["due"], bool),
        "validations": type(state["validations"]) is int and state["validations"] >= 1,
    }
    wrong = [name for name, holds in rules.items() if not holds]
    if not wrong and state["step"] > total:
        wrong = ["step", "total"]
    if wrong:
        found = ", ".join(f"{name} {_short(state[name])}" for name in wrong)
        raise ValueError(f"{file} holds {found}, which no run writes; {RESTORE}")
    return state


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def remove_partial_files(folder: Path) -> None:
    """Remove the unfinished files of a run that was killed; the folder is held."""
    for path in _content(folder)[0]:
        if path.name.startswith(PARTIAL) or path.parent.name in (".best.partial", ".last.partial"):
            path.unlink()
    for name in (".best.partial", ".last.partial"):
        with suppress(OSError):
            (folder / name).rmdir()


def _content(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of a folder that a run writes, and what else is there."""
    own: list[Path] = []
    others: list[Path] = []
    for path in _walk(folder):
        parent = path.parent.relative_to(folder).as_posix()
        patterns = WRITTEN[parent] + (_label_maps(folder) if parent == "validation" else ())
        is_own = path.name.startswith(PARTIAL) or any(fnmatch(path.name, p) for p in patterns)
        # A run writes no links: what they lead to is somebody else's.
        plain = path.is_file() and not path.is_symlink()
        (own if plain and is_own else others).append(path)
    return own, others


def _walk(folder: Path) -> Iterator[Path]:
    """Yield what lies in a run's folders, and whole every folder that no run makes."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and path.name in WRITTEN:
            yield from sorted(path.iterdir())
        else:
            yield path


def _label_maps(folder: Path) -> tuple[str, ...]:
    try:
        names = read_plan(folder)[1]["validation"]
    except (ValueError, OSError):
        return ()
    return tuple(f"{glob_escape(name)}{ending}" for name in names for ending in (".nii.gz", ".nii"))


def _remove_run(folder: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    check_folder(folder, overwrite=True)
    own, _ = _content(folder)
    # config.yaml first, so that a half-removed run cannot be resumed; plan.json last, so that it
    # can still be overwritten.
    own.sort(key=lambda path: (path.name == PLAN, path.name != CONFIG))
    for path in own:
        if path.name != LOCK:
            path.unlink()
    for name in WRITTEN:
        if name != "." and (folder / name).is_dir():
            (folder / name).rmdir()


def _short(content: Any) -> str:
    text = repr(content)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
