"""Results as JSON lines, written as they come: a process that dies takes none with it.

{"plan": [key, ...]}                             what a process means to do, in order
{"begin": key, "time": seconds}                  since the epoch
{"end": key, "status": ..., "reason": ..., ...}  and what was found
{"error": text}                                  why a process did none of its plan
"""

import json
import time
from pathlib import Path

# `refused` is a result that is not accurate enough to be timed, `cut` one that time did not allow.
FAILURES = ("failed", "refused", "crashed", "hung")
STATUSES = ("ok", "skipped", "cut", *FAILURES)


class Refused(Exception):
    """The result is not accurate enough to be timed."""


class Skipped(Exception):
    """The machine lacks what the item needs."""


class Writer:
    """Appends the lines of one process to its file."""

    def __init__(self, path):
        self._file = open(path, "a", encoding="utf-8")
        self._file.write("\n")  # behind a line that another process died on

    def _write(self, line):
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def plan(self, keys):
        self._write({"plan": list(keys)})

    def begin(self, key):
        self._write({"begin": key, "time": time.time()})

    def end(self, key, status, reason=None, **found):
        assert status in STATUSES, status
        self._write({"end": key, "status": status, "reason": reason, **found})

    def error(self, text):
        self._write({"error": text})


class Progress:
    """What the lines of a file tell.

    plan: keys in order, None before a process has said it.
    results: key -> what was found, of items that came to an end.
    in_flight: key of the item that was begun and has not ended, or None.
    error: the last one, or None.
    """

    def __init__(self, path):
        self.plan, self.results, self.in_flight, self.error = None, {}, None, None
        path = Path(path)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for written in text.splitlines():
            try:
                line = json.loads(written)
            except json.JSONDecodeError:
                continue  # empty, or one that a process died on
            if "plan" in line:
                self.plan = list(dict.fromkeys([*(self.plan or ()), *line["plan"]]))
            elif "begin" in line:
                self.in_flight = line["begin"]
                self.results.pop(self.in_flight, None)
            elif "end" in line:
                self.results[line.pop("end")] = line
                self.in_flight = None
            else:
                self.error = line["error"]

    @property
    def left(self):
        """Keys of the plan that have no result, or were cut."""
        return [key for key in self.plan or () if not self.knows(key)]

    @property
    def done(self):
        """How many items came to an end, and were not cut."""
        return sum(map(self.knows, self.results))

    def knows(self, key):
        return key in self.results and self.results[key]["status"] != "cut"
