"""What went wrong, in a user's words.

in_words            one sentence for an error: what file, what cause, what to do
ran_out_of_memory   whether that was it, whichever library says so
is_expected         whether an error has a cause outside the program
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

__all__ = ["NEEDS_LESS", "in_words", "is_expected", "ran_out_of_memory"]

# How NumPy, torch, oneDNN, CUDA, Apple's Metal, C++ and the operating system say it.
_MEMORY_WORDS = (
    "out of memory",
    "out_of_memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "unable to allocate",
    "could not create a primitive",
    "could not create a memory",
    "could not allocate",
    "failed to allocate",
    "bad_alloc",
    "bad allocation",
    "alloc_failed",
    "insufficient shared memory",
    "out of shared memory",
    # What Linux does to a loader process when memory runs out.
    "is killed by signal: killed",
)
# What would need less, by command.
NEEDS_LESS = {
    "train": "a smaller --patch_size or --preset, --batch_size 1, a small --cache or --workers 0",
    "predict": "a --batch_size of 1, --device cpu instead of a GPU, or a cropped volume",
    "evaluate": "fewer programs beside this one, or cropped label maps",
    "report": "unetrpp evaluate first, and then unetrpp report RUN --evaluation SCORES",
    "convert": "fewer programs beside this one",
    "info": "a smaller preset",
    "demo": "fewer programs beside this one",
}
_REMEDIES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or take another disk",
    errno.EROFS: "name a folder on a disk that can be written to",
    errno.EACCES: "change the permissions, or name another place",
    errno.EPERM: "change the permissions, or name another place",
    errno.ENOENT: "check the path",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "name a folder where there is a file",
    errno.EEXIST: "name another place",
    errno.ENAMETOOLONG: "take a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "check the disk and its connection",
}


def in_words(error: BaseException, command: str = "predict") -> str:
    """Return what to tell a user of an error, in a sentence."""
    if ran_out_of_memory(error):
        return f"memory ran out ({_first_line(error)}); what needs less: {NEEDS_LESS[command]}"
    # One with a sentence of its own has no cause in the system's words.
    if isinstance(error, OSError) and error.strerror is not None:
        where = f"{error.filename}: " if error.filename is not None else ""
        remedy = _REMEDIES.get(error.errno or 0)
        cause = f"{where}{error.strerror} (errno {error.errno})"
        return f"{cause}; {remedy}" if remedy else cause
    text = str(error) or type(error).__name__
    return text if is_expected(error) else f"{type(error).__name__}: {text}"


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, here or in what led to the error."""
    return any(_is_of_memory(cause) for cause in _causes(error))


def is_expected(error: BaseException) -> bool:
    """Whether the error speaks of files, values or the machine, and no fault of the program is."""
    known = (ValueError, OSError, RuntimeError, ImportError, MemoryError)
    return isinstance(error, known) or hasattr(error, "exit_code")


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        # A subclass of the package says in its own words what is too large.
        return not type(error).__module__.startswith("unetrpp")
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _MEMORY_WORDS)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _first_line(error: BaseException) -> str:
    cause = next(cause for cause in _causes(error) if _is_of_memory(cause))
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
