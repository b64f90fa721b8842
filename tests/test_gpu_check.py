"""benchmarks/gpu_check without a GPU: the dry run, and what it makes of crashes, hangs and time."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from cases import CHILD_ENVIRONMENT, KINDS, LAYOUTS, ROOT

from benchmarks import device, layers
from benchmarks.gpu_check import __main__ as driver
from benchmarks.gpu_check import lines, network, ops, processes, report, sanitizer, steps
from epa_kernels import dispatch, testing
from epa_kernels.backends import triton
from epa_kernels.testing import make_layer
from epa_kernels.torch_private import SLEEP

# Nothing else calls torch.cuda.
DEVICES = (Path(device.__file__), Path(testing.__file__))
SOURCES = (
    *(ROOT / "benchmarks" / "gpu_check").glob("*.py"),
    ROOT / "tests" / "test_gpu.py",
    *DEVICES,
)

# Does with each item what its name says, and plays dead where it is called as such.
WORKER = """
import os, sys, time
from benchmarks.gpu_check import lines
file, deadline, items = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
if items == ["dead"]:
    sys.exit("no such module")
progress, writer = lines.Progress(file), lines.Writer(file)
writer.plan(items)
for item in items:
    if progress.knows(item) or time.time() > deadline:
        continue
    writer.begin(item)
    kind = item.partition("-")[0]
    if kind == "crash":
        print("illegal memory access", flush=True)
        os.abort()
    if kind == "quit":
        os._exit(3)
    if kind == "hang":
        time.sleep(100)
    if kind == "slow":
        time.sleep(0.4)
    writer.end(item, "failed" if kind == "raise" else "ok", "ValueError" * (kind == "raise"))
"""


def fake_step(*items, name="fake", item_seconds=20):
    def command(file, deadline, worker, workers):
        return [sys.executable, "-c", WORKER, str(file), str(deadline), *items]

    return processes.Step(name, command, 1, item_seconds)


def run(step, folder, seconds=60):
    processes.run(step, folder, CHILD_ENVIRONMENT, time.time() + seconds)
    return processes.outcome(step, folder)


def test_a_crash_a_hang_and_an_error_cost_their_item_alone(tmp_path):
    items = ("ok-1", "crash", "ok-2", "hang", "quit", "raise", "ok-3")
    outcome = run(fake_step(*items, item_seconds=2), tmp_path)
    found = {key: result["status"] for key, result in outcome.results.items()}
    expected = ("ok", "crashed", "ok", "hung", "crashed", "failed", "ok")
    assert found == dict(zip(items, expected, strict=True))
    assert outcome.status == "failed" and outcome.left == []
    assert outcome.results["crash"]["reason"] == "ended by SIGABRT: illegal memory access"
    assert outcome.results["quit"]["reason"].startswith("ended with exit status 3")
    assert outcome.results["hang"]["reason"] == "no result within 2 s"
    assert outcome.reason == "4 of 7 failed, first crash"


def test_a_process_that_dies_at_its_start_is_not_started_again(tmp_path):
    outcome = run(fake_step("dead"), tmp_path)
    assert outcome.status == "failed" and "no such module" in outcome.reason


def test_a_step_ends_at_its_deadline_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
    step = fake_step("ok-1", "slow-1", "slow-2", "hang", "ok-2")
    outcome = run(step, tmp_path, seconds=2)
    assert outcome.status == "cut"
    assert outcome.results["ok-1"]["status"] == "ok" and outcome.left[-1] == "ok-2"
    assert outcome.done == 4 - len(set(outcome.left) & {"slow-1", "slow-2", "hang"})
    outcome = run(fake_step("ok-1", "slow-1", "slow-2", "hang", "ok-2", item_seconds=2), tmp_path)
    found = [outcome.results[key]["status"] for key in ("slow-2", "hang", "ok-2")]
    assert found == ["ok", "hung", "ok"] and outcome.left == []
    text = (tmp_path / "fake.0.jsonl").read_text(encoding="utf-8")
    assert text.count('{"begin": "ok-1"') == 1


def test_a_line_that_a_process_died_on_is_passed_over(tmp_path):
    file = tmp_path / "lines"
    writer = lines.Writer(file)
    writer.plan(["a", "b"])
    writer.begin("a")
    with file.open("a", encoding="utf-8") as half:
        half.write('{"end": "a", "sta')
    progress = lines.Progress(file)
    assert progress.in_flight == "a" and progress.left == ["a", "b"]
    lines.Writer(file).end("a", "crashed", "reason")
    assert lines.Progress(file).results == {"a": {"status": "crashed", "reason": "reason"}}


@pytest.fixture
def fake_driver(monkeypatch):
    """The driver on steps of the fake worker: step -> items. Returns the dictionary."""
    plans = {"tests": ("ok-1",), "peaks": (), "ops": (), "network": ()}
    plans |= {
        "admission": (),
        "compile": (),
        "network compiled": (),
        "ops compiled": (),
        "sanitizer": (),
    }
    machine = device.Cpu().describe() | {"versions": device.versions()}

    def identify(self):
        self.machine = machine
        return True

    def step(self, name):
        return fake_step(*plans[name], name=name, item_seconds=2)

    monkeypatch.setattr(driver._Run, "identify", identify)
    monkeypatch.setattr(driver._Run, "step", step)
    monkeypatch.setattr(driver._Run, "environment", lambda self, step=None: CHILD_ENVIRONMENT)
    return plans


STEPS = ("tests", "peaks", "compile", "network compiled")


def run_driver(output, *options, steps=STEPS):
    status = driver.main(["--output", str(output), "--steps", *steps, *options])
    text = (output / "gpu_check.md").read_text(encoding="utf-8")
    return status, json.loads((output / "gpu_check.json").read_text(encoding="utf-8")), text


def test_other_steps_run_when_one_fails_and_the_exit_status_tells(fake_driver, tmp_path, capsys):
    status, results, text = run_driver(tmp_path)
    assert status == 0 and [step["status"] for step in results["steps"]] == ["ok"] * 4
    fake_driver |= {"tests": ("crash",), "peaks": ("dead",), "compile": ("ok-1, 2, 3, 4, 5",)}
    status, results, text = run_driver(tmp_path)
    assert status == 1
    found = {step["name"]: step["status"] for step in results["steps"]}
    assert found == dict(zip(STEPS, ("failed", "failed", "ok", "ok"), strict=True))
    assert results["tests"]["failures"][0]["key"] == "crash"
    assert "ended by SIGABRT: illegal memory access" in text and "no such module" in text
    printed = capsys.readouterr().out
    sections = report.sections(results)
    assert printed.endswith("\n\n".join(reversed(sections)) + "\n")
    assert text == "\n\n".join(sections) + "\n"


@pytest.mark.parametrize("part", driver.PARTS)
def test_a_part_has_steps_time_and_files_of_its_own(part, fake_driver, tmp_path, monkeypatch):
    """What was found is written after each step."""
    take, written = driver._Run.take, []

    def look(self, name, seconds):
        if (file := tmp_path / f"gpu_check_{part}.json").is_file():
            written.append(json.loads(file.read_text(encoding="utf-8"))["steps"][0]["status"])
        if name != "build":
            take(self, name, seconds)

    fake_driver |= {name: ("ok-1, 2, 3, 4",) for name in ("admission",)}
    monkeypatch.setattr(driver._Run, "take", look)
    driver.main(["--output", str(tmp_path), "--part", part])
    results = json.loads((tmp_path / f"gpu_check_{part}.json").read_text(encoding="utf-8"))
    assert [step["name"] for step in results["steps"]] == list(driver.PARTS[part])
    assert results["minutes"] == driver.PART_MINUTES and len(written) >= len(driver.PARTS[part]) - 1
    assert (tmp_path / f"gpu_check_{part}.md").is_file()
    assert set(driver.PARTS["correctness"]) | set(driver.PARTS["speed"]) == set(driver.SHARES)


def test_what_the_time_does_not_allow_is_said(fake_driver, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "RESERVE_SECONDS", 0)
    fake_driver["tests"] = tuple(f"slow-{i}" for i in range(30))
    status, results, text = run_driver(tmp_path, "--minutes", "0.06")
    assert status == 0 and results["seconds"] < 10
    tests, *_, last = results["steps"]
    assert tests["status"] == "cut" and tests["done"] >= 1 and "slow-29" in tests["left"]
    assert last["status"] in ("cut", "ok")
    assert f"- tests: {len(tests['left'])}, the first of them `{tests['left'][0]}`" in text


def test_time_that_is_left_goes_to_what_was_cut(fake_driver, tmp_path):
    fake_driver["tests"] = tuple(f"slow-{i}" for i in range(8))
    fake_driver["peaks"] = ("ok-1",)
    _, results, _ = run_driver(tmp_path, "--minutes", "0.3", steps=("tests", "peaks"))
    assert [step["status"] for step in results["steps"]] == ["ok", "ok"]
    assert results["peaks"][0]["name"] == "ok-1"


def test_an_interruption_keeps_what_was_found(fake_driver, tmp_path, monkeypatch):
    take = driver._Run.take

    def interrupt(self, name, seconds):
        if name == "compile":
            raise KeyboardInterrupt
        take(self, name, seconds)

    monkeypatch.setattr(driver._Run, "take", interrupt)
    status, results, _ = run_driver(tmp_path)
    assert status == 130 and results["is_interrupted"]
    assert [step["status"] for step in results["steps"]] == ["ok", "ok", "cut", "cut"]


@pytest.mark.parametrize(
    "options, message",
    (
        (("--dry-run",), "--dry-run must not write to .*results, where figures of GPUs lie"),
        (("--dry-run", "--output", str(driver.ROOT / "benchmarks" / "results")), "name another"),
        (("--minutes", "0"), "--minutes must be positive, got 0"),
        (("--workers", "0"), "--workers must be at least 1, got 0"),
        (("--steps", "ops", "all"), "invalid choice: 'all'"),
        (("--part", "speed", "--steps", "tests"), "--steps tests: the part speed has build, peaks"),
        (("--output", "/proc/no"), "--output must be a folder to write to"),
    ),
)
def test_bad_options_are_refused_with_the_rule(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        driver.main(list(options))
    assert error.value.code == 2
    (found,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert re.search(message, found), found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_sentence_says_what_to_do(tmp_path, capsys):
    assert driver.main(["--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "needs a GPU that torch can use" in said and "--dry-run --output DIR" in said


def test_a_gpu_is_given_the_kernels_of_its_capability(tmp_path, monkeypatch):
    run = driver._Run(
        SimpleNamespace(part=None, dry_run=False, minutes=9, steps=["build"]), tmp_path
    )
    run.machine = {"capability": "sm_120"}
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert run.kernels() == {"TORCH_CUDA_ARCH_LIST": "12.0"}
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert run.kernels() == {"TORCH_CUDA_ARCH_LIST": "8.0"}


def test_sources_serve_where_pip_cannot_install(tmp_path, monkeypatch):
    run = driver._Run(
        SimpleNamespace(part=None, dry_run=True, minutes=9, steps=["build"]), tmp_path
    )
    monkeypatch.setattr(driver._Run, "python", lambda *_, **__: (False, "no module named pip"))
    run.build()
    assert (run.package_folder / "epa_kernels" / "ops.py").is_file()
    assert "no module named pip" in run.package["reason"]
    run.seconds["build"] = 1
    assert run.state("build")[0] == "failed"


def test_an_inaccurate_backend_is_refused_and_not_timed(tmp_path, monkeypatch):
    functions = dispatch.BACKENDS["two_pass"].functions
    exact = functions["paired_attention"]
    monkeypatch.setitem(functions, "paired_attention", lambda *a, **k: 1.05 * exact(*a, **k))
    stand_in = device.Cpu()
    every = ops.items(stand_in, True, {}, compiled=False)
    share = [item for item in every if item[0].endswith(("two_pass", "sdpa"))]
    writer = lines.Writer(tmp_path / "lines")
    writer.plan(key for key, _ in share)
    steps.run(stand_in, share, writer, lambda key: False, time.time() + 60)
    results = lines.Progress(tmp_path / "lines").results
    for key, result in results.items():
        is_refused = key.endswith("two_pass")
        assert result["status"] == ("refused" if is_refused else "ok"), (key, result)
        assert ("warm" in result) != is_refused
        if is_refused:
            assert "y: largest error" in result["reason"]
    outcome = processes.Outcome("failed", None, results, len(results), [])
    rows = report.rows([outcome], driver.OPS_COLUMNS)
    table = "\n".join(report._ops({"ops": rows}))
    assert "| refused |" in table


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_sdpa_peer_computes_the_layer(kind, layout):
    layer = make_layer((2, 60, 12, 3, 5), kind, layout, bias=False)
    x = torch.randn(2, 60, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer.backend = "reference"
    expected = layer(x)
    torch.testing.assert_close(layers.sdpa_forward(layer, x), expected)


def test_the_most_important_rows_come_first():
    names = [row.name for row in ops.rows(dry_run=False)]
    assert len(set(names)) == len(names) == 6 * 3 * 3
    assert names[0] == "synapse/stage1, B=2, bfloat16"
    assert (
        names[6] == "synapse/stage1, B=2, float16" and names[18] == "synapse/stage1, B=1, bfloat16"
    )
    assert names[-1] == "tumor/stage1, B=8, float32"


def test_without_monai_cross_entropy_is_the_loss_and_said(monkeypatch):
    monkeypatch.setattr(network, "find_spec", lambda name: None)
    loss, name = network.loss_function()
    assert "MONAI is not installed" in name
    label = torch.tensor([0.0, 1, 1, 0]).view(1, 1, 1, 2, 2)
    fine, coarse = torch.zeros(1, 2, 1, 2, 2), torch.zeros(1, 2, 1, 1, 1, requires_grad=True)
    value = loss([fine, coarse], label)
    torch.testing.assert_close(value, torch.tensor(2.0).log())
    value.backward()
    assert coarse.grad.abs().sum() > 0


FAKE_SANITIZER = """#!/bin/sh
[ "$1 $2 $3 $4" = "--tool $CHECK --error-exitcode 1" ] || exit 5
echo "========= ERROR SUMMARY: $ERRORS errors"
[ $ERRORS = 0 ] || exit 1
while [ "$1" != "-m" ]; do shift; done
echo "$2 $3 $4, spatial_attention, float32"
"""


@pytest.mark.parametrize("errors", (0, 3))
def test_a_report_of_the_sanitizer_is_a_failure(errors, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE_SANITIZER, encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("ERRORS", str(errors))
    monkeypatch.setenv("CHECK", "racecheck")
    able = dispatch.BACKENDS["cuda"]._replace(why_not=lambda call: [])
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", able)
    if errors:
        with pytest.raises(RuntimeError, match="ERROR SUMMARY: 3 errors"):
            sanitizer.check("racecheck", "cpu", dry_run=False)
    else:
        found = sanitizer.check("racecheck", "cpu", dry_run=False)
        assert found == {
            "ran": ["benchmarks.gpu_check.sanitizer cpu cuda, spatial_attention, float32"]
        }


def test_without_the_sanitizer_or_the_kernels_its_checks_are_skipped(tmp_path, monkeypatch):
    writer = lines.Writer(tmp_path / "lines")
    stand_in = device.Cpu()
    share = list(sanitizer.items(stand_in, dry_run=False))
    steps.run(stand_in, share[:1], writer, lambda key: False, time.time() + 60)
    able = dispatch.BACKENDS["cuda"]._replace(why_not=lambda call: [])
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", able)
    monkeypatch.setattr(sanitizer, "find_tool", lambda: None)
    steps.run(stand_in, share[1:], writer, lambda key: False, time.time() + 60)
    results = lines.Progress(tmp_path / "lines").results
    assert [result["status"] for result in results.values()] == ["skipped"] * 3
    assert "x is on cpu" in results["memcheck"]["reason"]
    assert "neither on the PATH nor in CUDA_HOME" in results["racecheck"]["reason"]


FAILING_TESTS = """
import os
import pytest

DEVICE = "cpu"

@pytest.mark.parametrize("backend", ("reference", "two_pass", "triton"))
@pytest.mark.parametrize("number", (0, 1))
def test_first(backend, number):
    assert number == 0, "numbers differ"

@pytest.mark.parametrize("backend", ("two_pass",))
def test_crash(backend):
    print("about to crash", flush=True)
    os.abort()

@pytest.mark.parametrize("backend", ("two_pass",))
def test_skip(backend):
    pytest.skip("not here")

def test_of_no_backend():
    assert False
"""


def test_tests_are_ordered_recorded_and_survive_a_crash(tmp_path):
    """The first case of each test and backend comes first; TRITON_INTERPRET decides on triton."""
    (tmp_path / "test_it.py").write_text(FAILING_TESTS, encoding="utf-8")
    (tmp_path / "test_broken.py").write_text("import no_such_module", encoding="utf-8")
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--device', default='cpu')\n",
        encoding="utf-8",
    )

    def command(file, deadline, worker, workers):
        options = ("--lines", file, "--deadline", deadline)
        plugin = ("-p", "no:cacheprovider", "-p", "benchmarks.gpu_check.pytest_plugin")
        plugin += ("--continue-on-collection-errors",)
        files = tmp_path / "test_it.py", tmp_path / "test_broken.py"
        python = (sys.executable, "-m", "pytest", "-q", *plugin, *options, *files)
        return [str(argument) for argument in python]

    environment = {**CHILD_ENVIRONMENT, "TRITON_INTERPRET": "0"}
    step = processes.Step("tests", command, 1, 60)
    processes.run(step, tmp_path, environment, time.time() + 60)
    outcome = processes.outcome(step, tmp_path)
    found = {key.rpartition("::")[2]: r["status"] for key, r in outcome.results.items()}
    assert found == {
        "test_first[0-two_pass]": "ok",
        "test_crash[two_pass]": "crashed",
        "test_skip[two_pass]": "skipped",
        "test_first[0-reference]": "ok",
        "test_first[1-two_pass]": "failed",
        "test_first[1-reference]": "failed",
        "test_broken.py": "failed",
    }
    places = {name: i for i, name in enumerate(found)}
    assert places["test_first[0-two_pass]"] < places["test_first[0-reference]"]
    assert places["test_first[0-reference]"] < places["test_first[1-two_pass]"]
    told = report.tests(outcome)
    assert told["counts"] == {"ok": 2, "crashed": 1, "skipped": 1, "failed": 3}
    assert "no_such_module" in str(told["failed"])
    assert any("not here" in reason for reason in told["skipped"])
    (failure,) = [f for f in told["failures"] if "1-two_pass" in f["key"]]
    assert "numbers differ" in failure["reason"] and "assert number == 0" in failure["trace"]


def attributes_of_torch_cuda(source):
    """The names X of torch.cuda.X in a file."""
    nodes = ast.walk(ast.parse(source.read_text(encoding="utf-8")))
    attributes = (node for node in nodes if isinstance(node, ast.Attribute))
    return {node.attr for node in attributes if ast.unparse(node.value) == "torch.cuda"}


def test_what_is_used_of_torch_cuda_exists_and_lies_in_two_files():
    used = {source: attributes_of_torch_cuda(source) for source in SOURCES}
    timing, testing_ = (used[source] for source in DEVICES)
    assert timing >= {"Event", "max_memory_allocated"}
    assert testing_ >= {"CUDAGraph", "graph", "Stream", "set_sync_debug_mode"}
    for source, names in used.items():
        assert not names or source in DEVICES, source
        for attribute in names:
            assert hasattr(torch.cuda, attribute), attribute


@pytest.fixture
def mocked_gpu(monkeypatch, tmp_path):
    """A Gpu on mocks of torch.cuda that check how they are called, with its tensors on the CPU."""
    for name in {SLEEP.partition(".")[2]}.union(*map(attributes_of_torch_cuda, DEVICES)):
        monkeypatch.setattr(torch.cuda, name, mock.create_autospec(getattr(torch.cuda, name)))
    torch.cuda.is_available.return_value = True
    torch.cuda.get_device_properties.return_value = SimpleNamespace(
        name="GPU", major=9, minor=0, total_memory=2**36, multi_processor_count=132,
        L2_cache_size=2**20,
    )  # fmt: skip
    torch.cuda.max_memory_allocated.return_value = 7
    torch.cuda.Event.return_value.elapsed_time.return_value = 2.0
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '580.159.04, Default, 1980, [N/A]'\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(device, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(device, "SETTLE_SIZE", 8)
    gpu = device.Gpu()
    gpu.kind = "cpu"
    return gpu


def test_calls_of_torch_cuda_have_the_right_form(mocked_gpu):
    gpu, calls = mocked_gpu, []

    def function():
        calls.append(1)
        return (torch.ones(1),)

    assert gpu.describe() == {
        "name": "GPU", "capability": "sm_90", "memory_bytes": 2**36, "multiprocessors": 132,
        "l2_bytes": 2**20, "driver": "580.159.04", "compute_mode": "Default", "most_mhz": 1980.0,
        "power_limit_watts": None,
    }  # fmt: skip
    assert gpu.seconds(function, 3, gpu.flush) == [2e-3] * 3 and len(calls) == 3
    assert len(gpu.host_seconds(function, 2)) == 2
    calls.clear()
    replay, result = gpu.capture(function)
    replay()
    assert len(calls) == testing.WARM_UP + 1 and torch.equal(result[0], torch.ones(1))
    assert gpu.peak_bytes(function) == 7
    gpu.settle()
    gpu.release()
    gpu.synchronize()
    gpu.allocated_bytes()
    with gpu.no_synchronization():
        torch.cuda.set_sync_debug_mode.assert_called_with("error")
    torch.cuda.set_sync_debug_mode.assert_called_with("default")
    assert torch.equal(gpu.on_busy_stream(function)[0], torch.ones(1))
    assert gpu.is_alive()


def test_the_stand_in_answers_every_call_of_a_gpu():
    def public(kind):
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(device.Gpu) == public(device.Cpu)


STATISTICS = {"median_us", "p20_us", "p80_us", "calls"}
OPS_FIELDS = {
    "multiply_adds", "exponentials", "bytes", "floor_us", "bound", "inaccuracy", "warm", "cold",
    "graph", "graph_cold", "host_us", "calls", "gbps", "share_of_floor", "peak_bytes",
    "kept_bytes", "reasons",
}  # fmt: skip
NETWORK_FIELDS = STATISTICS | {"loss", "host_us", "first_call_seconds", "peak_bytes", "reasons"}


# The rest takes 40 s more: each step is a process that imports torch, and networks compile.
DAILY_STEPS = ("build", "admission", "tests", "peaks", "ops")


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    (
        pytest.param(DAILY_STEPS, id="daily"),
        pytest.param(tuple(driver.SHARES), id="all", marks=pytest.mark.exhaustive),
    ),
)
def test_dry_run_walks_every_step(names, tmp_path):
    if reason := triton.missing():
        pytest.skip(reason)
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    command = (sys.executable, "-m", "benchmarks.gpu_check", "--dry-run", "--output", tmp_path)
    done = subprocess.run(
        [*command, "--steps", *names], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before
    results = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))
    assert [step["name"] for step in results["steps"]] == list(names)
    for step in results["steps"]:
        assert step["status"] == "ok" and step["done"] > 0 and step["seconds"] > 0, step
    assert results["dry_run"] and results["device"]["name"] and results["versions"]["torch"]
    assert results["package"]["source"] == "installed" and results["package"]["reason"]
    assert any("paired_attention on cpu" in line for line in results["backends"])
    assert results["tests"]["counts"]["ok"] >= 20 and not results["tests"]["failed"]
    assert [row["status"] for row in results["admission"]] == ["ok"] * 6  # dtypes, dropout or not
    if "sanitizer" in names:
        checks = {row["check"]: row["ran"] for row in results["sanitizer"]}
        assert checks.keys() == {"memcheck", "racecheck", "synccheck"}
        assert all(len(ran) == 12 for ran in checks.values())  # three ops, four settings
    assert {row["name"] for row in results["peaks"]} >= {"memory", "L2", "bfloat16", "float32"}

    providers = {row["provider"] for row in results["ops"]}
    assert providers >= {"triton", "two_pass", "reference", "sdpa"}
    assert ("reference compiled" in providers) == ("ops compiled" in names)
    for row in results["ops"]:
        assert row.keys() >= {*driver.OPS_COLUMNS, *OPS_FIELDS}, row
        assert row["warm"].keys() == row["cold"].keys() == STATISTICS
        assert row["floor_us"] > 0 and 0 < row["share_of_floor"] and row["gbps"] > 0
        for field in OPS_FIELDS - {"inaccuracy", "bound", "graph_cold"}:
            assert row[field] is not None or field in row["reasons"], (row, field)
    modes = {"eager", "graph", "compiled", "compiled graph"} if "network" in names else set()
    assert {row["mode"] for row in results["network"]} == modes
    for row in results["network"]:
        assert row.keys() >= {*driver.NETWORK_COLUMNS, *NETWORK_FIELDS}, row

    sections = (tmp_path / "gpu_check.md").read_text(encoding="utf-8").rstrip().split("\n\n#")
    sections = [sections[0], *(f"#{section}" for section in sections[1:])]
    titles = [section.partition("\n")[0] for section in sections]
    assert titles[1:] == [
        "## Steps", "## Failures", "## Admission", "## Ops", "## Whole network", "## Peaks",
        "## Left out for want of time",
    ]  # fmt: skip
    assert done.stdout.rstrip().endswith("\n\n".join(reversed(sections)))
