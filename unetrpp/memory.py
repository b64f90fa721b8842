"""How much memory there is to take, and the refusal of what would take too much of it.

free_memory    bytes that this process can still take, or None where the system does not say
may_take       whether so many bytes are at most half of that: the rule of every large array
check_memory   the same as an error that names what would take them, before they are taken
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["SHARE", "NotEnoughMemory", "check_memory", "free_memory", "may_take", "size_in_words"]

# Share of the free memory that one thing may take. The rest is for the network and for copies.
SHARE = 0.5


class NotEnoughMemory(MemoryError):
    """Something would take more than its share of memory; the message names it."""


def free_memory() -> int | None:
    """Return the bytes that this process can still take; None where the system does not say.

    The least of: what Linux calls available, what the control groups of the process leave
    (containers, SLURM), and what its own limit leaves (ulimit -v). Elsewhere the free pages.
    """
    known = [*_available(), *_left_by_groups(), *_left_by_limit()]
    return max(0, min(known)) if known else None


def may_take(needed: int) -> bool:
    """Whether `needed` bytes are at most `SHARE` of the free memory, or nothing is known of it."""
    free = free_memory()
    return free is None or needed <= SHARE * free


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Refuse what `may_take` does not admit.

    Args:
        needed: bytes.
        what: what would take them, as the beginning of a sentence: "FILE: resampled to 1 mm, it".
        remedy: what the user can do.

    Raises:
        NotEnoughMemory: with both, and the two sizes.
    """
    if not may_take(needed):
        raise NotEnoughMemory(
            f"{what} would take {size_in_words(needed)} of memory, and one volume or data set may "
            f"take {SHARE:.0%} of the {size_in_words(free_memory() or 0)} that are free; {remedy}"
        )


def size_in_words(count: float) -> str:
    """Return a number of bytes as people say it: 3.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _available() -> Iterator[int]:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                yield 1024 * int(line.split()[1])
                return
    except (OSError, ValueError):
        pass
    try:
        yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return  # Windows, macOS


def _left_by_groups() -> Iterator[int]:
    """What the memory limits of this process's control groups leave, of both versions of them."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, usage = names if controllers else ("memory.max", "memory.current")
        # A limit of a group holds for those inside it. In a container only the root can be seen.
        group = root / place.strip("/")
        for folder in [group, *group.parents][: len(place.strip("/").split("/")) + 1]:
            try:
                most = int((folder / limit).read_text(encoding="ascii"))
                taken = int((folder / usage).read_text(encoding="ascii"))
                pages = (folder / "memory.stat").read_text(encoding="ascii").split()
                # Cached files are given up where memory is asked for.
                cached = int(dict(zip(pages[::2], pages[1::2], strict=True))["inactive_file"])
            except (OSError, ValueError, KeyError):
                continue  # "max", or no such group here
            yield most - taken + cached


def _left_by_limit() -> Iterator[int]:
    try:
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        if most != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            yield most - pages * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError, ValueError):
        return
