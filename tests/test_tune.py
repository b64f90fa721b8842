"""The table of launch shapes: how it is chosen, written, and looked up."""

import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from cases import CHILD_ENVIRONMENT

pytest.importorskip("triton", "3.6", reason="needs the package triton, 3.6 or later")

from epa_kernels.backends.triton import launch  # noqa: E402


@pytest.fixture(scope="module")
def tune():
    from benchmarks import tune

    return tune


def test_candidates_begin_with_the_nearest_and_differ(tune):
    shape = launch.rule("paired_output_bwd", 64, 16, 64, "half")
    found = list(tune.candidates(shape))
    assert found[0] == shape and len(found) == len(set(found)) > 50
    assert all(c.rows >= 16 and c.columns >= 16 and 1 <= c.warps <= 16 for c in found)


def test_the_table_wins_over_the_rule(monkeypatch):
    x, kernel = torch.empty(0, dtype=torch.bfloat16), "paired_output_fwd"
    rule = launch.rule(kernel, 32, 8, 64, "half")._replace(chunks=2)  # `enlarge_blocks`
    assert launch.pick(kernel, x, 32, 8, 64) == rule
    monkeypatch.setattr(launch, "architecture", lambda _: "gfx942")
    monkeypatch.setattr(launch, "TABLE", {})
    assert launch.pick(kernel, x, 32, 8, 64).warps == rule.warps // 2  # a warp has 64 threads
    other = launch.Launch(16, 16, 1, chunks=2)
    monkeypatch.setattr(launch, "TABLE", {("gfx942", kernel, 8, 64, "half"): other})
    assert launch.pick(kernel, x, 32, 8, 64) == other
    assert launch.pick(kernel, x.float(), 32, 8, 64) != other


def test_a_written_table_is_read_back(tune, tmp_path):
    path = tmp_path / "launch.py"
    path.write_text(Path(launch.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    table = {
        ("sm_90", "paired_output_fwd", 8, 64, "half"): launch.Launch(64, 32, 8),
        ("gfx942", "paired_summary_fwd", 8, 64, "tf32x3"): launch.Launch(32, 64, 4, 2, 64),
    }
    for written in (table, {}, table):
        tune.write(written, path)
        found = {"__name__": launch.__name__, "__package__": launch.__package__}
        exec(path.read_text(encoding="utf-8"), found)
        assert found["TABLE"] == written


@pytest.mark.exhaustive
def test_the_fastest_is_searched_behind_the_accuracy_gate(tune, monkeypatch, capsys):
    """The search of a GPU, walked in the interpreter."""
    layer = tune.Layer(40, 8, 1, 3, "shared")
    times = (1000 * 0.9**i for i in count())
    monkeypatch.setattr(tune.statistics, "median", lambda _: next(times))
    broken = launch.Launch(24)  # no power of two: does not run
    monkeypatch.setattr(tune, "candidates", lambda shape: [shape, shape._replace(warps=2), broken])
    kernels = ["paired_summary_fwd", "paired_mix_fwd", "paired_gather_bwd"]
    table = tune.fastest(layer, torch.float32, "cpu", repetitions=1, most=3, only=kernels)
    assert {key[1] for key in table} == set(kernels)
    assert all(shape.warps == 2 for shape in table.values())
    said = capsys.readouterr()
    assert "1000000000.0 ->" in said.out and "(24, 0, 4, 1, 0)" in said.err


def test_without_a_gpu_the_nearest_that_fits_is_taken(tmp_path):
    """Half the registers a thread: the rule's launch shape spills, and another one is taken."""
    code = """
from benchmarks import tune
from epa_kernels.backends.triton import launch
layer = tune.Layer(4096, 32, 4, 64, "shared")
tune.resources = lambda binary: {"spilled": 8 * (binary.metadata.num_warps < 8), "shared": 0}
tune.kernels = lambda *_: {("sm_90", "paired_merge_bwd", 8, 64, "half"): launch.Launch(256)}
print(tune.fitting("sm_90", [layer], "bfloat16"))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=CHILD_ENVIRONMENT | {"TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert (
        "('sm_90', 'paired_merge_bwd', 8, 64, 'half'): Launch(rows=256, columns=0, warps=8"
        in result.stdout
    )
    assert "8 bytes spilled" in result.stderr
