"""Files that are written whole or not at all; text is UTF-8 whatever the locale.

with replacing(file) as partial: ...   write to `partial`, which then takes the file's place
write_text, write_json, read_json      on top of it
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["read_json", "replacing", "write_json", "write_text"]


@contextmanager
def replacing(file: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a path to write to; then flush it to disk and rename it to `file`, or remove it.

    Whenever the machine stops, `file` is the old file or the whole new one. Its permissions are
    those of any new file in that folder: they follow the umask, whatever writes to the path.

    Args:
        shared: several processes may write the file, default False: one process owns it.
    """
    # One owner has a fixed name: what a killed process left is overwritten and never piles up. The
    # name ends like the file's, because writers of images choose the format by it.
    owner = f".{os.getpid()}" if shared else ""
    partial = file.with_name(f".partial{owner}.{file.name}")
    partial.unlink(missing_ok=True)
    try:
        partial.touch(exist_ok=False)
        mode = stat.S_IMODE(partial.stat().st_mode)
        yield partial
        # safetensors, for one, puts a file of its own there, which only its owner can read.
        partial.chmod(mode)
        with open(partial, "r+b") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Replace a text file; line ends are written as they are in `text`."""
    with replacing(file) as partial:
        partial.write_bytes(text.encode("utf-8"))


def write_json(file: Path, content: Any) -> None:
    """Replace a JSON file."""
    write_text(file, json.dumps(content, indent=1) + "\n")


def read_json(file: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))
