"""Builds csrc/cuda for a CPU, on the emulator of tests/cuda_emulator."""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

TESTS = Path(__file__).parent
EMULATOR, SOURCES = TESTS / "cuda_emulator", TESTS.parent / "csrc"
SUFFIXES = (".h", ".cuh", ".cpp", ".cu")
# The kernels read rows of 16-bit numbers as words.
FLAGS = (
    "-std=c++17 -fPIC -fno-strict-aliasing -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas"
).split()
# Name -> flags of the kernels, flags of the emulator. Kernels are compiled as they stand:
# optimised, that would take three times as long. So would "address,undefined" in one.
SANITIZERS = {
    "values": (("-O0",), ("-O2",)),
    "thread": (("-O0", "-fsanitize=thread", "-g1"), ("-O2", "-DEMULATOR_TSAN")),
    "address": (("-O0", "-fsanitize=address", "-g1"),) * 2,
    "undefined": (("-O0", "-fsanitize=undefined", "-fno-sanitize-recover"),) * 2,
}


def why_not() -> str:
    """Why nothing can be compiled here, or ""."""
    return "" if shutil.which("g++") else "g++ is not installed, which compiles the CUDA kernels"


class Builder:
    """Compiles and links, each file once for all test processes of a run.

    A file's name stands for what it is made of, and a lock keeps the others waiting.
    """

    def __init__(self, tmp_path_factory):
        folder = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            folder = folder.parent
        self.folder = folder / "cuda_on_cpu"
        self.folder.mkdir(exist_ok=True)

    def object(self, source: Path, *flags: str, sources: Path = SOURCES) -> Path:
        """The object of a source; `sources` may be a copy of csrc with bugs in it."""
        include = [f"-I{EMULATOR}", f"-I{sources}", f"-I{sources / 'cuda'}"]
        command = ["g++", *FLAGS, *flags, *include, "-x", "c++", "-c", str(source)]
        key = [*flags, source.name, _digest(EMULATOR), _digest(sources)]
        return self._make(source.stem, ".o", command, key)

    def link(self, name: str, objects: list[Path], *flags: str) -> Path:
        command = ["g++", *flags, *map(str, objects)]
        return self._make(name, ".so" if "-shared" in flags else "", command, command)

    def _make(self, stem: str, suffix: str, command: list[str], key: list[str]) -> Path:
        digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:12]
        to = self.folder / f"{stem}-{digest}{suffix}"
        with _locked(to.with_suffix(".lock")):
            if not to.exists():
                part = to.with_suffix(".part")
                subprocess.run([*command, "-o", str(part)], check=True)
                part.rename(to)
        return to

    def module(self):
        """The module `_C_cuda`, whose kernels take addresses on the CPU."""
        import pybind11

        binding = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-O0"]
        binding += ["-DEPA_ARCHITECTURES=", "-DEPA_PTX=0", "-DEPA_CUDA_VERSION=0"]
        objects = [
            self.object(EMULATOR / "emulator.cpp", "-O2"),
            self.object(SOURCES / "bind_cuda.cpp", *binding),
        ]
        objects += [self.object(source, "-O2") for source in _kernels()]
        # pybind11 gives the same module for the same name.
        module = self.link("_C_cuda", objects, "-shared")
        spec = importlib.util.spec_from_file_location("cuda_on_cpu._C_cuda", module)
        result = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(result)
        result.missing = None  # what `backends.cuda` asks the module in its place
        return result

    def check(self, sanitizer: str, op: str, sources: Path = SOURCES):
        """A function that runs cuda_emulator/check_<op>.cpp with arguments, with a sanitizer."""
        flags, emulator_flags = SANITIZERS[sanitizer]
        objects = [
            self.object(EMULATOR / "emulator.cpp", *emulator_flags),
            self.object(EMULATOR / f"check_{op}.cpp", *flags),
            self.object(sources / "cuda" / f"{op}_attention.cu", *flags, sources=sources),
        ]
        program = self.link(f"check_{op}", objects, *flags)
        options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
        return functools.partial(run, program, env={**os.environ, **options})


def run(program: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([program, *arguments], capture_output=True, text=True, **options)


def _kernels() -> list[Path]:
    return sorted((SOURCES / "cuda").glob("*.cu"))


@functools.cache
def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    content = b"\n".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def _locked(path: Path):
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
