"""Which signals stop a command, and how those commands end that have nothing to save.

stopping            SIGINT, SIGTERM, and SIGHUP of a closed terminal unless nohup ignores it
ended_by_signals    all of them end what runs inside as Ctrl-C does
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["HANGUP", "STOPPING", "Stopped", "ended_by_signals", "stopping"]

# A closed terminal sends it, and mostly more than once; Windows has none.
HANGUP: int | None = getattr(signal, "SIGHUP", None)
STOPPING = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if HANGUP else []))


class Stopped(KeyboardInterrupt):
    """A signal other than Ctrl-C, which ends a command alike: files that are half written go."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def stopping() -> list[int]:
    """Return the numbers of the signals that stop a command."""
    return [n for n in STOPPING if n != HANGUP or signal.getsignal(n) != signal.SIG_IGN]


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let all of them end what runs inside; `unetrpp train` has its own way in a run.

    Raises:
        Stopped: SIGTERM or SIGHUP came. KeyboardInterrupt: Ctrl-C, as Python does it.
    """

    def stop(number: int, frame: object) -> None:
        if number == HANGUP:
            signal.signal(number, signal.SIG_IGN)  # the next one would interrupt the tidying
        raise Stopped(number)

    # Only the main thread may set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [number for number in stopping() if number != signal.SIGINT]
    previous = {number: signal.signal(number, stop) for number in caught}
    try:
        yield
    finally:
        for number, handler in previous.items():
            # None stands for a handler that Python has not set.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
