"""What is known of the backends of a device: verdicts and times, kept on disk between processes.

One JSON file per version of everything that could change an answer. It lies in the cache folder of
the platform, or in EPA_KERNELS_CACHE. A file that is damaged is begun anew, and a folder that
cannot be written is no error: the answers are then those of this process.
"""

import functools
import hashlib
import json
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .version import __version__

PREFIX = "answers-"
SECTIONS = ("verdicts", "times", "running")
LOCK_SECONDS = 5.0  # then the file is written without
# So many processes that ended in a check of a backend refuse it. One may have been stopped there.
MOST_ENDED = 2


def folder() -> Path:
    """Where the files lie: EPA_KERNELS_CACHE, or the cache folder that the platform has for it."""
    if own := os.environ.get("EPA_KERNELS_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        base = Path("~/Library/Caches")
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.path.expanduser(base)) / "epa_kernels"


def forget() -> int:
    """Remove every file of answers, and return how many there were.

    Raises:
        OSError: one cannot be removed.
    """
    files = [*folder().glob(f"{PREFIX}*.json"), *folder().glob(f"{PREFIX}*.lock")]
    for file in files:
        file.unlink(missing_ok=True)
    return sum(file.suffix == ".json" for file in files)


@functools.cache
def kernel_sources() -> str:
    """A hash of all that computes: the Python sources of the package and its compiled modules."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for file in sorted([*root.rglob("*.py"), *root.glob("_C*")]):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def identity(device: torch.device) -> dict[str, str]:
    """All that an answer on a device depends on, beside the question."""
    from .backends import cuda

    found = {"epa_kernels": __version__, "sources": kernel_sources(), "torch": torch.__version__}
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": str(cuda.driver_version()),
            "cuda": str(torch.version.cuda or torch.version.hip),
        }
    else:
        found |= {
            "device": f"{device.type} {platform.machine()}",
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    return found


class Answers:
    """The answers of one device.

    Args:
        key: what they depend on, see `identity`.
    """

    def __init__(self, key: dict[str, str]) -> None:
        self.key = key
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.file = folder() / f"{PREFIX}{name}.json"
        self.content = self._read()

    def verdict(self, backend: str, question: str) -> list[str] | None:
        """Why a backend is refused, empty if it is admitted, None if nothing is known."""
        entry = f"{backend} {question}"
        found = self.content["verdicts"].get(entry)
        if found is None and sum(map(_has_ended, self._running(entry))) >= MOST_ENDED:
            return [f"{MOST_ENDED} processes ended while they checked it"]
        return found

    def times(self, question: str, shape: str) -> dict[str, float] | None:
        """Microseconds by backend, None if the shape was not timed."""
        return self.content["times"].get(f"{question} {shape}")

    def reload(self) -> None:
        """Take what other processes have found since."""
        if self.file.is_file():
            self.content = self._read()

    def keep_verdict(self, backend: str, question: str, reasons: list[str]) -> None:
        """Keep why a backend is refused, or that it is admitted."""
        self._change("verdicts", f"{backend} {question}", lambda _: reasons)

    def keep_times(self, question: str, shape: str, times: dict[str, float]) -> None:
        """Keep microseconds by backend."""
        self._change("times", f"{question} {shape}", lambda _: times)

    @contextmanager
    def running(self, backend: str, question: str) -> Iterator[None]:
        """Note that a check runs: if it ends the process, the next ones know."""
        entry, me = f"{backend} {question}", f"{socket.gethostname()} {os.getpid()}"
        self._change("running", entry, lambda there: [*(there or []), me])
        try:
            yield
        finally:
            self._change("running", entry, lambda there: [p for p in there or [] if p != me])

    def _running(self, entry: str) -> list[str]:
        return self.content["running"].get(entry, [])

    def _change(self, section: str, entry: str, value: Callable[[Any], Any]) -> None:
        """Change one entry of the file, or where it cannot be written of this process."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.file.with_suffix(".lock")):
                content = self._read()
                content[section][entry] = value(content[section].get(entry))
                self._replace(content)
                self.content = content
        except OSError:
            self.content[section][entry] = value(self.content[section].get(entry))

    def _read(self) -> dict[str, dict[str, Any]]:
        empty: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        try:
            content = json.loads(self.file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return empty
        return content["answers"] if _is_whole(content, self.key) else empty

    def _replace(self, content: dict[str, dict[str, Any]]) -> None:
        text = json.dumps({"key": self.key, "answers": content}, indent=1, sort_keys=True)
        handle, partial = tempfile.mkstemp(".partial", PREFIX, self.file.parent)
        try:
            with open(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            os.replace(partial, self.file)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise


def _is_whole(content: Any, key: dict[str, str]) -> bool:
    """Whether a file holds what `Answers` writes, and of this key."""
    answers = content.get("answers") if isinstance(content, dict) else None
    if not isinstance(answers, dict) or content.get("key") != key or set(answers) != set(SECTIONS):
        return False
    return (
        all(isinstance(answers[section], dict) for section in SECTIONS)
        and all(
            isinstance(found, list) and all(isinstance(text, str) for text in found)
            for section in ("verdicts", "running")
            for found in answers[section].values()
        )
        and all(
            isinstance(found, dict) and all(isinstance(t, int | float) for t in found.values())
            for found in answers["times"].values()
        )
    )


def _has_ended(process: str) -> bool:
    """Whether a process of this machine, "host number", runs no more."""
    host, _, number = process.rpartition(" ")
    if os.name == "nt" or host != socket.gethostname() or not number.isdigit():
        return False  # nothing is known of it
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock between processes; where none is to be had, go on without."""
    with open(file, "ab") as stream:
        try:
            import fcntl
        except ImportError:  # Windows: a lost answer is found again
            yield
            return
        deadline = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < deadline:
            with suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.01)
        yield
