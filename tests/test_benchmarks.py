"""`pytest benchmarks --benchmark-only` on a stand-in for a GPU, and what it leaves."""

import csv
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from cases import CHILD_ENVIRONMENT, ROOT

from benchmarks import device as devices

# A CPU that counts its time on events, has the dtypes of a GPU, and finds peaks without one.
STAND_IN = """
import sys, time, types
from benchmarks import device, layers

class Event:
    def __init__(self, enable_timing):
        assert enable_timing
    def record(self):
        self.at = time.perf_counter()
    def synchronize(self):
        pass
    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)

class StandIn(device.Cpu):
    is_gpu, clock, dtypes, flushed = True, device.Moment, device.DTYPES, 0
    def describe(self):
        return super().describe() | {"name": "stand-in", "driver": "1.2"}
    def flush(self):
        StandIn.flushed += 1

def pytest_unconfigure():
    print("flushed", StandIn.flushed > 100)

peaks = dict.fromkeys(("memory", "exponentials", "float32", "bfloat16", "float16"), 1e9)
sys.modules["benchmarks.gpu_peaks"] = types.SimpleNamespace(
    items=lambda *_, **__: [(name, lambda p=peak: {"value": p}) for name, peak in peaks.items()]
)
device.torch.cuda.Event = Event
device.Gpu = StandIn
device.calls_within = lambda *_: 3
layers.CASES = (layers.DRY_CASE,)
"""


def run(folder, *arguments, **environment):
    # In a worker of pytest-xdist pytest-benchmark would time nothing.
    outside = {k: v for k, v in CHILD_ENVIRONMENT.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "--benchmark-only", *arguments],
        cwd=folder, capture_output=True, text=True, env=outside | environment,
    )  # fmt: skip


@pytest.mark.skipif(find_spec("pytest_benchmark") is None, reason="needs pytest-benchmark")
def test_the_benchmarks_follow_the_device(tmp_path):
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    found = run(
        tmp_path, "-p", "stand_in", "--device", "cuda", "--results", "results",
        "-k", "paired and not triton",
        PYTHONPATH=f"{tmp_path}:{CHILD_ENVIRONMENT['PYTHONPATH']}",
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
    assert "flushed True" in found.stdout and "dropout 0.0, stand-in" in found.stdout
    with open(tmp_path / "results" / "ops_cuda.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    every = {(row["dtype"], row["direction"], row["backend"]) for row in rows}
    for dtype in ("float32", "bfloat16", "float16"):
        for direction in ("forward", "forward+backward"):
            for backend in ("reference", "reference compiled", "sdpa", "two_pass"):
                assert (dtype, direction, backend) in every
        assert (tmp_path / "results" / f"ops_cuda_{dtype}.png").stat().st_size > 10_000
    assert {(row["device"], row["driver"]) for row in rows} == {("stand-in", "1.2")}
    assert all(float(row["median_ms"]) > 0 and float(row["floor_ms"]) > 0 for row in rows)


@pytest.mark.skipif(find_spec("pytest_benchmark") is None, reason="needs pytest-benchmark")
def test_a_missing_gpu_is_said(tmp_path):
    found = run(tmp_path, "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert found.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device cuda: torch" in found.stderr and "leave the option out" in found.stderr


def test_moments_are_told_apart_in_seconds(monkeypatch):
    waited = []
    event = SimpleNamespace(
        record=lambda: None,
        synchronize=lambda: waited.append(True),
        elapsed_time=lambda end: 2.0,
    )
    monkeypatch.setattr(devices.torch.cuda, "Event", lambda enable_timing: event)
    start = devices.Moment()
    assert devices.Moment() - start == 2e-3 and waited == [True]
