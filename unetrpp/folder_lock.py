"""One run at a time in a folder: a lock of the system on FOLDER/.lock, which ends with its process.

with held(folder, say): ...   makes the folder where it is missing, and is refused if it is in use
with waited_for(file): ...    the same of a moment, for which the next one waits

A killed process leaves the file, but not the lock. On network file systems (NFS, Lustre, SMB) the
lock holds between machines as far as they are mounted with locks; where there are none, `held` says
so and goes on.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["LOCK", "held", "waited_for"]

LOCK = ".lock"
# Locks of this process. Its loader workers, made by fork, must not hold them on when it is killed.
_held: set[BinaryIO] = set()


@contextmanager
def held(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder; what was made for it and stayed empty goes away at the end.

    Raises:
        FileExistsError: another process, or another thread of this one, holds it.
        OSError: the folder cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise FileExistsError(
            f"{folder} is a file, or a link that leads nowhere; name a folder"
        ) from None
    try:
        lock = _taken(folder / LOCK, say)
        try:
            yield
        finally:
            _release(folder / LOCK, lock)
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def waited_for(file: Path) -> Iterator[None]:
    """Hold a file of locks for a moment; where the system has none, go on without."""
    lock = _taken(file, lambda _: None, wait=True)
    try:
        yield
    finally:
        _release(file, lock)


def _taken(file: Path, say: Callable[[str], None], *, wait: bool = False) -> BinaryIO:
    """Return the locked file."""
    while True:
        if file.is_symlink():
            raise FileExistsError(f"{file} is a link, which no run makes; remove it")
        file.touch()
        try:
            lock = open(file, "r+b")
        except FileNotFoundError:  # its holder has just left
            continue
        try:
            _lock(lock, file.parent, say, wait)
            # A holder that left meanwhile has removed it; then it locks nobody out.
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(file)):
                break
        except FileNotFoundError:
            pass
        except BaseException:
            lock.close()
            raise
        lock.close()
    _held.add(lock)
    holder = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}"
    with suppress(OSError):  # of a full disk; the lock holds all the same
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), holder.encode())
    return lock


def _lock(lock: BinaryIO, folder: Path, say: Callable[[str], None], wait: bool) -> None:
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        holder = lock.read(200).decode(errors="replace") or "another process"
        raise FileExistsError(
            f"{folder} is in use by {holder}; wait until that run ends, or name another folder"
        ) from None
    except (ImportError, OSError) as error:
        say(
            f"{folder}: this system has no locks for files there ({error}); do not start a second "
            "run in this folder while this one goes on"
        )


def _release(file: Path, lock: BinaryIO) -> None:
    if lock not in _held:
        return
    _held.discard(lock)
    with suppress(OSError):
        file.unlink()
    lock.close()


def _forget() -> None:
    for lock in _held:
        lock.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
