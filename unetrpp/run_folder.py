"""The files of a run folder: written whole or not at all, never over somebody's work."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

__all__ = ["Metrics", "check_folder", "save_state", "write_text"]


class Metrics:
    """metrics.jsonl, and TensorBoard where installed; what came after step `start` is dropped."""

    def __init__(self, folder: Path, start: int):
        path = folder / "metrics.jsonl"
        kept = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                step = json.loads(line)["step"]
            except json.JSONDecodeError:
                continue  # a killed run may leave half a line
            if step <= start:
                kept.append(line + "\n")
        write_text(path, "".join(kept))
        self.file = open(path, "a")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)
        except ImportError:
            self.board = None

    def write(self, record: dict) -> None:
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


def write_text(path: Path, text: str) -> None:
    """Replace a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_state(path: Path, state: dict) -> None:
    """torch.save that leaves the old file or the whole new one, whenever the machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
