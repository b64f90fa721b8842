"""Files that are written whole or not at all; text is UTF-8 whatever the locale.

with replacing(file) as partial: ...   write to `partial`, which then takes the file's place
naming(file)                           a failed write names its file and the system's cause
write_text, write_json                 on top of it
make_folder                            a folder that can be written, or the cause why not
read_json                              JSON in any of its encodings; an error names the file
read_yaml                              YAML of plain values; an error names file and line
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = [
    "PARTIAL",
    "make_folder",
    "naming",
    "read_json",
    "read_yaml",
    "replacing",
    "write_json",
    "write_text",
]

# How the names of unfinished files begin.
PARTIAL = ".partial."
# What a write beyond the end of a failed file asks for, bytes: more than a last block has left.
PROBE = 1 << 20
# Digits of a number in a JSON file.
LONGEST_NUMBER = 400


@contextmanager
def replacing(file: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a path to write to; then flush it to disk and rename it to `file`, or remove it.

    Whenever the machine stops, `file` is the old file or the whole new one. Its permissions are
    those of any new file (the umask), whatever the writer gave it.

    Args:
        shared: several processes may write the file, default False: one process owns it.

    Raises:
        OSError: a write failed; the message names `file` and the cause. The old file is as it was.
    """
    # One owner has a fixed name: what a killed process left is replaced and never piles up. The
    # name ends like the file's, because writers of images choose the format by it.
    owner = f"{_host()}.{os.getpid()}." if shared else ""
    partial = file.with_name(f"{PARTIAL}{owner}{file.name}")
    if shared:
        _remove_of_dead_processes(file)
    try:
        with naming(file, partial):
            partial.unlink(missing_ok=True)
            # Made here and now: a link that somebody has put there is never followed.
            partial.touch(exist_ok=False)
            mode = partial.stat().st_mode & 0o777
            yield partial
            with open(partial, "r+b") as stream:
                os.fsync(stream.fileno())
            # safetensors, for one, puts a file there that only its owner can read.
            os.chmod(partial, mode)
            os.replace(partial, file)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def naming(file: Path, partial: Path | None = None) -> Iterator[None]:
    """Turn the failure of a write into an OSError that names `file` and the cause.

    Args:
        file: what is written.
        partial: where it is written, and what is removed after a failure; `file` itself if not
            given.

    Notes: torch and safetensors hide the system's error behind their own. A further write to
        `partial` shows whether the disk was the cause; else their error is raised as it came.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and str(error.filename) != str(partial or file):
            raise  # of another file, which it names
        raise _not_written(file, error) from error
    except Exception as error:
        cause = _cause(partial) if partial is not None else None
        if cause is None:
            raise
        raise _not_written(file, cause) from error


def _not_written(file: Path, cause: OSError) -> OSError:
    remedy = {
        errno.ENOSPC: "free some space there",
        errno.EDQUOT: "free some space there, or ask for a larger quota",
        errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
        errno.EROFS: "name a folder that can be written",
        errno.EACCES: "name a folder that can be written",
    }.get(cause.errno or 0, "see that its folder can be written")
    failed = type(cause)(
        f"{file} could not be written: {cause.strerror or cause}; what was there before is as it "
        f"was; {remedy}"
    )
    failed.errno = cause.errno
    return failed


def _cause(file: Path) -> OSError | None:
    """Return the system's error of one more write to a file, if there is one."""
    try:
        with open(file, "ab") as stream:
            stream.write(bytes(PROBE))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return error
    return None


def _host() -> str:
    return re.sub(r"[^\w-]", "_", socket.gethostname())


def _remove_of_dead_processes(file: Path) -> None:
    """Remove what processes of this machine left of a shared file when they were killed."""
    start = f"{PARTIAL}{_host()}."
    for left in file.parent.glob(f"{glob.escape(start)}*.{glob.escape(file.name)}"):
        pid = left.name.removeprefix(start).removesuffix(f".{file.name}")
        if pid.isdigit() and not _is_alive(int(pid)):
            left.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # where kill with 0 would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def make_folder(folder: Path) -> None:
    """Make a folder, and refuse one that takes no files before there is work to lose.

    Raises:
        OSError: with the folder and the system's cause.
    """
    probe = folder / f"{PARTIAL}{_host()}.{os.getpid()}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        error.filename = str(folder)
        raise


def write_text(file: Path, text: str) -> None:
    """Replace a text file; line ends are written as they are in `text`.

    A byte of a file name that is no UTF-8 is written as an escape, \\udcXX.
    """
    with replacing(file) as partial:
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_json(file: Path, content: Any) -> None:
    """Replace a JSON file."""
    write_text(file, json.dumps(content, indent=1) + "\n")


def read_json(file: Path) -> Any:
    """Return the content of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a BOM.

    Raises:
        OSError: no such file, or it cannot be read. ValueError: it is no JSON in such an encoding,
        or an object has one key with two values. Both name the file.
    """
    content = Path(file).read_bytes()
    if not content.strip():
        raise ValueError(f"{file} is empty; it must hold JSON, a text that begins with {{ or [")
    if not content.strip(b"\0"):
        raise ValueError(f"{file} holds zero bytes only, as after a failed write; restore it")
    try:
        text = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        guess = " (Latin-1, as some editors write?)" if error.encoding == "utf-8" else ""
        raise ValueError(
            f"{file} is not in {error.encoding.upper()}, as its first bytes say: byte "
            f"{error.start + 1} of it is 0x{content[error.start]:02x}{guess}; save it as UTF-8"
        ) from error
    try:
        return json.loads(text, object_pairs_hook=_without_twins, parse_int=_of_digits)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}; "
            "JSON allows no comments, no single quotes and no comma after the last entry"
        ) from error
    except RecursionError:
        raise ValueError(f"{file} is not usable: its JSON is nested too deeply") from None
    except ValueError as error:  # of the two below
        raise ValueError(f"{file} is not usable: {error}") from error


def _of_digits(text: str) -> int:
    """Make an integer, of which Python refuses those of thousands of digits in its own words."""
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"it holds a number of {len(text)} digits; correct it")
    return int(text)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the dict of a JSON object, of which Python would keep only the last of equal keys."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"the key {key!r} occurs twice with different values; keep one")
        found[key] = value
    return found


def read_yaml(file: Path) -> Any:
    """Return the content of a YAML file in UTF-8, with or without a BOM; no code in it runs.

    Raises:
        OSError: no such file, or it cannot be read. ValueError: it is no such YAML; names the file.
    """
    import yaml

    try:
        return yaml.safe_load(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: the text is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from error
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {_yaml_problem(error)}") from error
    except RecursionError:
        raise ValueError(f"{file} is no YAML: it is nested too deeply") from None


def _yaml_problem(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "\\t" in problem or " tab" in problem:
        problem = "a tab where YAML takes spaces only"
    return (f"line {mark.line + 1}: " if mark is not None else "") + problem
