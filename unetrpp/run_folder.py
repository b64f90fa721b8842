"""The files of a run folder: its curves, and what may become of a folder that is in use.

metrics.jsonl holds one JSON object per line: {"step", "loss", ...} for each step, {"step",
"val_dice", "val_dice_per_class", ...} for each validation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from unetrpp.files import replacing, write_json, write_text

__all__ = ["Metrics", "check_folder", "read_config", "read_metrics", "save_state", "start_folder"]

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run, in order; empty where there are none."""
    file = folder / METRICS
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # a killed run may leave half a line
    return records


def read_config(folder: Path) -> dict[str, Any]:
    """Return the options that a run was started with; empty where there are none."""
    import yaml

    file = folder / CONFIG
    return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}


class Metrics:
    """metrics.jsonl, and TensorBoard where installed; what came after step `start` is dropped."""

    def __init__(self, folder: Path, start: int):
        kept = [record for record in read_metrics(folder) if record["step"] <= start]
        write_text(folder / METRICS, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = open(folder / METRICS, "a", encoding="utf-8")
        self.board: Any = None
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board is not None:
            for key, value in record.items():
                if isinstance(value, float) and key != "seconds":
                    self.board.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is an earlier run and may be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} is not empty; continue that run with --resume {folder}, replace it "
            "with --overwrite, or name another folder"
        )
    if not (folder / "plan.json").is_file():
        raise FileExistsError(f"{folder} is not an earlier run, so --overwrite leaves it alone")


def start_folder(
    folder: Path, config: Mapping[str, Any], plan: Mapping[str, Any], split: Mapping[str, Any]
) -> None:
    """Make an empty run folder, in place of an earlier run's, that holds configuration and plan.

    Args:
        folder: one that `check_folder` has let pass.
        config: options of the run by name; a path is stored as text.
        plan, split: plain lists and dicts.
    """
    import yaml

    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(folder / "plan.json", {"plan": plan, "split": split})
    values = {k: str(v) if isinstance(v, Path) else v for k, v in config.items()}
    # Last, because a folder with config.yaml can be resumed.
    write_text(folder / CONFIG, yaml.safe_dump(values, sort_keys=False))


def save_state(file: Path, state: Mapping[str, Any]) -> None:
    """Replace resume.pt, what a run goes on from."""
    import torch

    with replacing(file) as partial:
        torch.save(state, partial)
