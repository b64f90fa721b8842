"""Build, test and time everything on a GPU, in one run that needs no network.

    python -m benchmarks.gpu_check                        from the root of the repository
    python -m benchmarks.gpu_check --part correctness     in 4 minutes: what is right
    python -m benchmarks.gpu_check --part speed           in 4 more: what is fast
    python -m benchmarks.gpu_check --steps tests ops      some steps alone
    python -m benchmarks.gpu_check --dry-run --output D   every step in small, on a CPU

Each step runs in processes of its own and within its share of the time; what it finds is kept as it
comes, and what is left out is said. Steps that were cut short go on at the end with the time that
is left. gpu_check.json and gpu_check.md, or those of the part, are written after each step, and
the tables printed last. The exit status is 0 only if no step failed.
"""

import argparse
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import processes, report

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
PACKAGE += ("epa_kernels", "unetrpp", "csrc")
TESTS = ("gpu", "rng", "attention_ops", "paired_attention", "modules", "registration")
OPS_COLUMNS = ("case", "batch", "dtype", "direction", "provider")
NETWORK_COLUMNS = ("direction", "batch", "backend", "mode")
# Step -> share of the time, seconds an item may take; in the order of importance.
SHARES = {
    "build": (0.2, None),
    "admission": (0.12, 120),
    "tests": (0.25, 120),
    "peaks": (0.06, 60),
    "compile": (0.12, 120),
    "ops": (0.18, 60),
    "network": (0.12, 150),
    "sanitizer": (0.12, 150),
    "network compiled": (0.15, 200),
    "ops compiled": (0.12, 200),
}
# Each part is whole in itself, so that it can be repeated after a change.
PARTS = {
    "correctness": {"build": 0.45, "admission": 0.35, "tests": 0.4, "sanitizer": 0.2},
    "speed": {
        "build": 0.45,
        "peaks": 0.1,
        "compile": 0.2,
        "ops": 0.3,
        "network": 0.25,
        "network compiled": 0.25,
        "ops compiled": 0.2,
    },
}
PART_MINUTES, ALL_MINUTES = 4, 9
PARALLEL = ("admission", "tests", "compile")  # Triton compiles in one thread
MOST_WORKERS, WORKER_BYTES = 12, 2**31
RESERVE_SECONDS = 10  # for what is written at the end
DRY_TESTS = 30  # at most, of the first files


class _Run:
    """One run: its folder, environment, time and results."""

    def __init__(self, args, folder):
        self.args, self.folder = args, folder
        self.shares = PARTS.get(args.part) or {name: share for name, (share, _) in SHARES.items()}
        self.kind = "cpu" if args.dry_run else "cuda"
        self.start, self.end = time.time(), time.time() + 60 * args.minutes - RESERVE_SECONDS
        self.seconds = dict.fromkeys(args.steps, 0.0)
        self.package = {"source": "the sources as they are", "reason": None, "modules": []}
        self.package_folder = ROOT
        self.machine, self.backends = {}, None
        self.workers = 1

    def environment(self, step=None):
        """Of child processes: the package that was built, no settings of kernels.

        The package comes before the sources, which have no compiled modules.
        """
        ours = (self.package_folder, ROOT)
        theirs = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        theirs = [p for p in theirs if Path(p).resolve() != ROOT]
        dropped = ("TRITON_INTERPRET", "EPA_KERNELS_BACKEND", "EPA_KERNELS_DRY_RUN")
        dropped += ("PYTEST_ADDOPTS",)
        environment = {key: value for key, value in os.environ.items() if key not in dropped}
        environment |= {
            "PYTHONPATH": os.pathsep.join([*map(str, ours), *theirs]),
            "PYTHONUNBUFFERED": "1",
            "EPA_KERNELS_TEST_DEVICE": self.kind,
        }
        # Of this run alone: what an earlier one compiled would make its first calls look fast.
        environment.setdefault("TRITON_CACHE_DIR", str(self.folder / "triton"))
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.folder / "inductor"))
        environment["EPA_KERNELS_CACHE"] = str(self.folder / "answers")
        if self.args.dry_run:
            environment |= {"TRITON_INTERPRET": "1", "EPA_KERNELS_DRY_RUN": "1"}
        if self.args.dry_run or step in PARALLEL:
            environment["OMP_NUM_THREADS"] = "1"
        return environment

    def python(self, *arguments, seconds, **variables):
        """Run Python to its end; (whether it succeeded, what it said)."""
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=self.folder, start_new_session=True,
            env=self.environment() | variables, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=max(1, seconds))
            return process.returncode == 0, said
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            return False, f"{said}\nkilled: not done within {seconds:.0f} s"
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise

    def identify(self):
        """Describe the device; whether there is one."""
        is_there, said = self.python("-m", "benchmarks.device", self.kind, seconds=180)
        lines = said.strip().splitlines() or ["torch says nothing"]
        if not is_there:
            last = lines[-1]
            print(
                f"gpu_check: it needs a GPU that torch can use, but {last}; run it where there is "
                f"one, or walk through its steps on a CPU with --dry-run --output DIR.",
                file=sys.stderr,
            )
            return False
        self.machine = json.loads(next(line for line in lines if line.startswith("{")))
        # Processes that compile share the device; not where it takes one at a time.
        if self.machine["compute_mode"] in ("Default", None) and not self.args.dry_run:
            memory = self.machine["memory_bytes"] // WORKER_BYTES
            self.workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 1) - 2, memory))
        self.workers = self.args.workers or self.workers
        return True

    def kernels(self):
        """Variables of the build: CUDA kernels for this GPU alone, unless others are asked for."""
        if self.args.dry_run:
            return {"EPA_KERNELS_CPU": "0", "EPA_KERNELS_CUDA": "0"}
        number = self.machine["capability"].removeprefix("sm_")
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
        return {"TORCH_CUDA_ARCH_LIST": asked or f"{number[:-1]}.{number[-1]}"}

    def build(self):
        """Install a copy of the sources into a folder; the copy itself serves where that fails."""
        source, target = self.folder / "source", self.folder / "package"
        for name in PACKAGE:
            if (ROOT / name).is_dir():
                skip = shutil.ignore_patterns("__pycache__", "*.so")
                shutil.copytree(ROOT / name, source / name, ignore=skip)
            else:
                source.mkdir(exist_ok=True)
                shutil.copy(ROOT / name, source / name)
        has_built, said = self.python(
            "-m", "pip", "--isolated", "install", "-v", "--no-deps", "--no-build-isolation",
            "--no-index", "--disable-pip-version-check", "--no-compile", "--target", target, source,
            seconds=self.limit("build"), **self.kernels(),
        )  # fmt: skip
        (self.folder / "build.log").write_text(said, encoding="utf-8")
        self.package_folder = target if has_built else source
        modules = sorted(str(p.relative_to(target)) for p in target.rglob("*.so"))
        reasons = [line.strip() for line in said.splitlines() if "is built without" in line]
        if not has_built:
            reasons = ["pip install failed: " + "\n".join(said.strip().splitlines()[-30:])]
        self.package = {
            "source": "installed" if has_built else "the sources, which pip could not install",
            "reason": "\n".join(reasons) or None,
            "modules": modules if has_built else [],
        }

    def limit(self, name):
        """Seconds that a step may take now."""
        total = 60 * self.args.minutes
        return max(0, min(self.shares[name] * total, self.end - time.time()))

    def step(self, name):
        def command(lines, deadline, worker, workers):
            place = ("--lines", lines, "--deadline", deadline)
            place += ("--worker", worker, "--workers", workers)
            if name == "tests":
                subjects, most = TESTS, ()
                if self.args.dry_run:
                    subjects, most = TESTS[:3], ("--most", DRY_TESTS)
                files = [ROOT / "tests" / f"test_{subject}.py" for subject in subjects]
                arguments = (
                    "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-q",
                    "-p", "no:cacheprovider", "-p", "benchmarks.gpu_check.pytest_plugin",
                    "--continue-on-collection-errors", f"--device={self.kind}",
                    *place, *most, *files,
                )  # fmt: skip
            else:
                arguments = (
                    "benchmarks.gpu_check.steps",
                    name,
                    *place,
                    "--package",
                    self.package_folder,
                )
                arguments += ("--peaks", self.folder / "peaks.0.jsonl")
                arguments += ("--dry-run",) if self.args.dry_run else ()
            return [sys.executable, "-m", *map(str, arguments)]

        workers = self.workers if name in PARALLEL else 1
        return processes.Step(name, command, workers, SHARES[name][1])

    def take(self, name, seconds):
        """Run a step, or go on with it, for so many seconds at most."""
        start = time.time()
        print(f"{name}: {seconds:.0f} s at most", flush=True)
        try:
            if name == "build":
                self.build()
                _, self.backends = self.python("-m", "epa_kernels", seconds=60)
                print(self.backends, flush=True)
            else:
                step = self.step(name)
                processes.run(step, self.folder, self.environment(name), start + seconds)
        finally:
            self.seconds[name] += time.time() - start
        status, reason, done, left = self.state(name)
        said = report.short(reason or "", 300)
        print(f"{name}: {status}, {done} done, {len(left)} left; {said}", flush=True)

    def state(self, name):
        """(status, reason, items done, keys left) of a step."""
        if name == "build":
            if not self.seconds["build"]:
                return "cut", None, 0, ["build"]
            is_built = self.package["source"] == "installed"
            return "ok" if is_built else "failed", self.package["reason"], int(is_built), []
        outcome = processes.outcome(self.step(name), self.folder)
        return outcome.status, outcome.reason, outcome.done, outcome.left

    def take_all(self, write):
        """Run all steps; `write` is called after each."""
        for name in self.args.steps:
            if self.limit(name) > 1:
                self.take(name, self.limit(name))
                write()
        for name in self.args.steps:
            if name != "build" and self.state(name)[3] and self.end - time.time() > 1:
                self.take(name, self.end - time.time())

    def results(self, command):
        """Everything, as the JSON file holds it."""
        outcomes = {
            name: processes.outcome(self.step(name), self.folder)
            for name in SHARES
            if name != "build"
        }
        steps = []
        for name in self.args.steps:
            status, reason, done, left = self.state(name)
            steps.append(
                {"name": name, "status": status, "reason": reason, "done": done, "left": left}
                | {"seconds": self.seconds[name]}
            )
        device = dict(self.machine)
        return {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": command,
            "dry_run": self.args.dry_run,
            "minutes": self.args.minutes,
            "seconds": time.time() - self.start,
            "commit": _commit(),
            "versions": device.pop("versions"),
            "device": device,
            "package": self.package,
            "backends": self.backends and self.backends.splitlines(),
            "steps": steps,
            "tests": report.tests(outcomes["tests"]),
            "admission": report.rows(
                [outcomes["admission"]], ("layer", "dtype", "dropout", "backend")
            ),
            "peaks": report.rows([outcomes["peaks"]], ("name",)),
            "sanitizer": report.rows([outcomes["sanitizer"]], ("check",)),
            "compile": report.rows([outcomes["compile"]], (*OPS_COLUMNS[:3], "dropout", "backend")),
            "ops": report.rows([outcomes["ops"], outcomes["ops compiled"]], OPS_COLUMNS),
            "network": report.rows(
                [outcomes["network"], outcomes["network compiled"]], NETWORK_COLUMNS
            ),
        }


def _commit():
    """Of the repository, with a plus where it has changes; None outside of one."""
    git = ("git", "-C", ROOT, "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12")
    try:
        said = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip()


def _interrupted(*_):
    raise KeyboardInterrupt


def _parse(arguments):
    results = ROOT / "benchmarks" / "results"
    parser = argparse.ArgumentParser(
        prog="gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=tuple(PARTS), help="one part alone, default all")
    parser.add_argument("--steps", nargs="+", choices=tuple(SHARES), help="default: of the part")
    parser.add_argument(
        "--minutes", type=float, help=f"default {ALL_MINUTES}, for a part {PART_MINUTES}"
    )
    parser.add_argument("--output", type=Path, help="folder, default benchmarks/results")
    parser.add_argument("--workers", type=int, help="processes that compile, default by machine")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a CPU, needs --output")
    args = parser.parse_args(arguments)
    shares = PARTS.get(args.part, SHARES)
    if args.minutes is None:
        args.minutes = PART_MINUTES if args.part else ALL_MINUTES
    if missing := sorted(set(args.steps or ()) - set(shares)):
        parser.error(f"--steps {' '.join(missing)}: the part {args.part} has {', '.join(shares)}")
    if args.minutes <= 0:
        parser.error(f"--minutes must be positive, got {args.minutes:g}; 9 is enough for all steps")
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if args.dry_run and (args.output is None or args.output.resolve() == results):
        parser.error(
            f"--dry-run must not write to {results}, where figures of GPUs lie, got --output "
            f"{args.output}; name another folder"
        )
    args.output = (args.output or results).resolve()
    args.steps = [name for name in shares if name in (args.steps or shares)]
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()
    except OSError as error:
        parser.error(f"--output must be a folder to write to: {error}")
    return args


def _write(run, command, *, is_interrupted):
    """Write what was found so far; (results, sections of the page)."""
    results = run.results(command) | {"is_interrupted": is_interrupted}
    sections = report.sections(results)
    name = f"gpu_check_{run.args.part}" if run.args.part else "gpu_check"
    texts = {"json": json.dumps(results, indent=1), "md": "\n\n".join(sections)}
    for ending, text in texts.items():
        (run.args.output / f"{name}.{ending}").write_text(f"{text}\n", encoding="utf-8")
    return results, sections


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parse(arguments)
    signal.signal(signal.SIGTERM, _interrupted)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        run = _Run(args, Path(folder))
        if not run.identify():
            return 2
        command = shlex.join(["python", "-m", "benchmarks.gpu_check", *arguments])
        is_interrupted = False
        try:
            run.take_all(lambda: _write(run, command, is_interrupted=False))
        except KeyboardInterrupt:
            is_interrupted = True
        results, sections = _write(run, command, is_interrupted=is_interrupted)
    # Backwards, so that the end of the screen shows what matters most.
    print("\n" + "\n\n".join(reversed(sections)))
    if is_interrupted:
        return 130
    return int(any(step["status"] == "failed" for step in results["steps"]))


if __name__ == "__main__":
    sys.exit(main())
