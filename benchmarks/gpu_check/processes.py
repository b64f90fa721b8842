"""A step in processes of its own: one that crashes or hangs costs the item it was at, no more.

Each process keeps a file of lines. When it ends before its plan is done, what it was at is written
down as crashed, and it is started again for the rest; likewise one whose item takes too long, which
is killed. A step ends with its plan, at its deadline, or when a process dies before an item.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import lines

POLL_SECONDS = 0.2
GRACE_SECONDS = 4  # for an item that was begun in front of the deadline
LOG_LINES = 30


class Step(NamedTuple):
    """What is run, in how many processes, and how long one item may take."""

    name: str
    command: Callable[[Path, float, int, int], list[str]]  # lines, deadline, worker, workers
    workers: int
    item_seconds: float


class Outcome(NamedTuple):
    """What became of a step: status "ok", "failed", or "cut" where items are left."""

    status: str
    reason: str | None
    results: dict[str, dict]  # key -> what was found
    done: int
    left: list[str]  # keys that time did not allow


class _Worker:
    """One process after another, until its share of the plan is done."""

    def __init__(self, step, index, folder, environment):
        name = f"{step.name.replace(' ', '-')}.{index}"
        self.lines, self.log = folder / f"{name}.jsonl", folder / f"{name}.log"
        self.step, self.index, self.folder, self.environment = step, index, folder, environment
        self.process = None

    def start(self, deadline):
        command = self.step.command(self.lines, deadline, self.index, self.step.workers)
        self.done = lines.Progress(self.lines).done
        self.started, self.deadline = time.time(), deadline
        with self.log.open("ab") as log:
            # A session of its own, so that what it starts is killed with it.
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                cwd=self.folder, env=self.environment, start_new_session=True,
            )  # fmt: skip

    def poll(self):
        """Whether it is still at work; ends, records and restarts what has to be."""
        if self.process is None:
            return False
        now, code = time.time(), self.process.poll()
        # Every item begins and ends with a line.
        active = self.lines.stat().st_mtime if self.lines.exists() else 0
        is_late = now > self.deadline + GRACE_SECONDS
        is_hung = now - max(self.started, active) > self.step.item_seconds
        if code is None and not is_late and not is_hung:
            return True
        self.kill()
        self.process = None
        status, reason = "crashed", _ending(code)
        if code is None:
            status, reason = "hung", f"no result within {self.step.item_seconds:.0f} s"
            if is_late:
                status, reason = "cut", "the step's time was over"
        return self._account(status, reason)

    def _account(self, status, reason):
        """Write down what a process left undone; whether another one goes on."""
        progress, writer = lines.Progress(self.lines), lines.Writer(self.lines)
        if progress.in_flight:
            said = f": {self._log_tail(3)}" if status == "crashed" else ""
            writer.end(progress.in_flight, status, reason + said)
            progress = lines.Progress(self.lines)
        if time.time() >= self.deadline or (progress.plan is not None and not progress.left):
            return False
        if progress.done > self.done:
            self.start(self.deadline)
            return True
        writer.error(f"{reason}, before an item was done: {self._log_tail(LOG_LINES)}")
        return False

    def kill(self):
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                pass  # a driver can hold it; it goes when it can

    def _log_tail(self, count):
        return "\n".join(
            self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-count:]
        )


def run(step, folder, environment, deadline):
    """Run a step, or what an earlier run of it in the same folder left.

    Args:
        folder: where its files of lines and logs lie, and the working directory.
        deadline: seconds since the epoch, behind which no item begins.
    """
    workers = [_Worker(step, index, folder, environment) for index in range(step.workers)]
    try:
        for worker in workers:
            worker.start(deadline)
        while any([worker.poll() for worker in workers]):
            time.sleep(POLL_SECONDS)
    finally:
        for worker in workers:
            worker.kill()


def outcome(step, folder):
    """What the files of a step tell, whatever became of its processes."""
    results, done, left, reasons = {}, 0, [], []
    for index in range(step.workers):
        progress = lines.Progress(_Worker(step, index, folder, None).lines)
        results |= progress.results
        done += progress.done
        left += progress.left
        reasons += [progress.error] if progress.error else []
        if progress.plan is None and not progress.error:
            left.append("its plan")
    failed = [key for key, result in results.items() if result["status"] in lines.FAILURES]
    if failed:
        reasons.insert(0, f"{len(failed)} of {len(results)} failed, first {failed[0]}")
    status = "failed" if reasons else "cut" if left else "ok"
    return Outcome(status, "\n".join(reasons) or None, results, done, left)


def _ending(code):
    if code is not None and code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with exit status {code}"
