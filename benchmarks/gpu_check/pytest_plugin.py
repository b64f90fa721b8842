"""The tests of the attention ops on a device: a line for each, in a telling order, for one worker.

    pytest -p benchmarks.gpu_check.pytest_plugin --device cuda --lines FILE --deadline TIME TESTS

Taken are tests of a backend that can run there, and those of tests/test_gpu.py. First come the
first case of every test and backend, then the second of each, so that a run that is cut short has
seen a bit of everything. Tests that FILE has a result of are passed over. A device that is lost,
by an illegal access, ends the process, since every test behind it would fail.
"""

import time

import pytest
import torch

from benchmarks import device
from epa_kernels import dispatch
from epa_kernels.contract import call_on

from . import lines

MESSAGE, TRACE = 1500, 4000  # characters kept of a failure


def pytest_addoption(parser):
    group = parser.getgroup("gpu-check")
    group.addoption("--lines", required=True)
    group.addoption("--deadline", type=float, required=True, help="seconds since the epoch")
    group.addoption("--worker", type=int, default=0)
    group.addoption("--workers", type=int, default=1)
    group.addoption("--most", type=int, help="tests at most, for a dry run")


def pytest_configure(config):
    config.pluginmanager.register(Recorder(config), "gpu-check-recorder")


class Recorder:
    def __init__(self, config):
        self.option = config.getoption
        self.knows = lines.Progress(self.option("--lines")).knows
        self.writer = lines.Writer(self.option("--lines"))
        self.device = None

    def pytest_collectreport(self, report):
        """A file that cannot be imported is a failure of its own."""
        if report.failed:
            text = report.longreprtext
            self.writer.end(report.nodeid, "failed", text[-MESSAGE:], trace=text[-TRACE:])

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        """Choose, sort, share out and plan."""
        self.device = device.get(self.option("--device"))
        chosen = [item for item in items if self._rank(item) is not None]
        counts = {}
        order = {}
        for item in chosen:
            group = item.function, _parameter(item, "backend")
            counts[group] = counts.get(group, 0) + 1
            order[item] = counts[group], self._rank(item)
        chosen = sorted(chosen, key=order.get)[: self.option("--most")]
        chosen = chosen[self.option("--worker") :: self.option("--workers")]
        self.writer.plan(item.nodeid for item in chosen)
        left = [item for item in chosen if not self.knows(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(left)])
        items[:] = left

    def _rank(self, item):
        """The backend's place in the order, None where it cannot run or the test has none."""
        name, kind = _parameter(item, "backend"), getattr(item.module, "DEVICE", None)
        if kind is None or name is None:
            return None
        x = torch.empty(0, device=kind)
        if dispatch.BACKENDS[name].why_not(call_on("paired_attention", x)):
            return None
        return list(dispatch.BACKENDS).index(name)

    def pytest_runtest_logstart(self, nodeid):
        self.writer.begin(nodeid)
        self._worst = None

    def pytest_runtest_logreport(self, report):
        """Keep the worst of setup, call and teardown, and write it behind the last."""
        ranks = {"passed": 0, "skipped": 1, "failed": 2}
        if self._worst is None or ranks[report.outcome] > ranks[self._worst.outcome]:
            self._worst = report
        self._seconds = report.duration + (0 if report.when == "setup" else self._seconds)

    def pytest_runtest_logfinish(self, nodeid):
        status = {"passed": "ok", "skipped": "skipped", "failed": "failed"}[self._worst.outcome]
        found = {"seconds": self._seconds}
        reason = None
        if status == "skipped":
            reason = self._worst.longrepr[2] if self._worst.longrepr else None
        if status == "failed":
            crash = getattr(self._worst.longrepr, "reprcrash", None)
            reason = (crash.message if crash else self._worst.longreprtext)[:MESSAGE]
            found["trace"] = self._worst.longreprtext[-TRACE:]
        self.writer.end(nodeid, status, reason, **found)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        result = yield
        if time.time() > self.option("--deadline"):
            item.session.shouldstop = "the step's time is over"
        elif self._worst.outcome == "failed" and not self.device.is_alive():
            item.session.shouldstop = "the device is lost to its process"
        return result


def _parameter(item, name):
    return getattr(getattr(item, "callspec", None), "params", {}).get(name)
