"""Builds csrc/cuda for a CPU, on the emulator of tests/cuda_emulator."""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

TESTS = Path(__file__).parent
EMULATOR, SOURCES = TESTS / "cuda_emulator", TESTS.parent / "csrc"
# The kernels read rows of 16-bit numbers as words.
FLAGS = (
    "-std=c++17 -O2 -fPIC -fno-strict-aliasing -fvisibility=hidden -Wall -Wextra "
    "-Wno-unknown-pragmas"
).split()


def compile_object(source, to, *flags, sources=SOURCES):
    include = [f"-I{EMULATOR}", f"-I{sources}", f"-I{sources / 'cuda'}"]
    command = ["g++", *FLAGS, *include, *flags, "-x", "c++", "-c", str(source), "-o", str(to)]
    subprocess.run(command, check=True)
    return to


def build_module(folder: Path):
    """The module `_C_cuda`, whose kernels take addresses on the CPU."""
    import pybind11

    binding = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-O0"]
    binding += ["-DEPA_ARCHITECTURES=", "-DEPA_PTX=0", "-DEPA_CUDA_VERSION=0"]
    objects = [
        compile_object(EMULATOR / "emulator.cpp", folder / "emulator.o"),
        compile_object(SOURCES / "bind_cuda.cpp", folder / "bind_cuda.o", *binding),
    ]
    for source in sorted((SOURCES / "cuda").glob("*.cu")):
        objects.append(compile_object(source, folder / f"{source.stem}.o"))
    module = folder / "_C_cuda.so"
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(module)], check=True)
    # pybind11 gives the same module for the same name.
    spec = importlib.util.spec_from_file_location("cuda_on_cpu._C_cuda", module)
    result = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(result)
    return result


def why_not() -> str:
    """Why nothing can be compiled here, or ""."""
    return "" if shutil.which("g++") else "g++ is not installed, which compiles the CUDA kernels"


# Name -> flags of the kernels, flags of the emulator. Kernels are compiled as they stand:
# optimised, that would take three times as long. So would "address,undefined" in one.
SANITIZERS = {
    "values": (("-O0",), ()),
    "thread": (("-O0", "-fsanitize=thread", "-g1"), ("-DEMULATOR_TSAN",)),
    "address": (("-O0", "-fsanitize=address", "-g1"),) * 2,
    "undefined": (("-O0", "-fsanitize=undefined", "-fno-sanitize-recover"),) * 2,
}


class Checker:
    """Builds check_kernels.cpp with a sanitizer; `sources` may be a copy with a bug in it."""

    def __init__(self, folder: Path, sanitizer: str):
        self.folder, (self.flags, flags) = folder, SANITIZERS[sanitizer]
        self.objects = [
            compile_object(EMULATOR / "emulator.cpp", folder / "emulator.o", *flags),
            compile_object(EMULATOR / "check_kernels.cpp", folder / "check.o", *self.flags),
            *map(self.compile, sorted((SOURCES / "cuda").glob("*.cu"))),
        ]

    def compile(self, source: Path, name: str = "") -> Path:
        to = self.folder / f"{name or source.stem}.o"
        return compile_object(source, to, *self.flags, sources=source.parents[1])

    def run(self, *ops: str, changed: Path | None = None) -> subprocess.CompletedProcess:
        """The program's end for some ops or all, with `changed` in place of the .cu of its name."""
        objects = self.objects
        if changed is not None:
            # In front: of a function that several sources have, the linker takes the first.
            others = [other for other in objects if other.stem != changed.stem]
            objects = [self.compile(changed, "changed"), *others]
        program = self.folder / "check"
        link = ["g++", *self.flags, *map(str, objects), "-o", str(program)]
        subprocess.run(link, check=True)
        options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
        environment = {**os.environ, **options}
        return subprocess.run([program, *ops], capture_output=True, text=True, env=environment)
