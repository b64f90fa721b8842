"""The commands that compile and link the modules of csrc, for setup.py, which lists the variables.

Importing this file reads those variables. Only `Module.objects` asks a compiler.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

MACOS = sys.platform == "darwin"
CXX, CXXFLAGS, LDFLAGS = (
    shlex.join(shlex.split(os.getenv(name, ""))) for name in ("CXX", "CXXFLAGS", "LDFLAGS")
)
CXX = CXX or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
OPENMP = "" if MACOS else "-fopenmp"
LANGUAGE = f"-std=c++17 {OPENMP} -I{shlex.quote(sysconfig.get_path('include'))} -Icsrc"
FLAGS = "-O3 -g0 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra"
LINK = "-bundle -undefined dynamic_lookup" if MACOS else "-shared -fopenmp"
STRIP = "" if MACOS or CXXFLAGS else "-s"
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
# The linker gets the objects in this order. Of an inline function that several of them define it
# keeps the first, which every processor must be able to run.
X86_64 = {"baseline": "", "avx2": AVX2, "avx512": AVX512}

# nvcc takes the compiler itself, without what may stand in front of it.
WRAPPERS = ("ccache", "sccache", "distcc", "env")
COMPILER, *OPTIONS = (word for word in shlex.split(CXX) if Path(word).name not in WRAPPERS)
TOOLKIT = os.getenv("CUDA_HOME")
NVCC = f"{TOOLKIT}/bin/nvcc" if TOOLKIT else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
# An architecture a thread: the largest source would decide how long a build takes.
NVCC = shlex.join([NVCC, "-std=c++17", "--threads=0", "-ccbin", COMPILER])
CAPABILITIES = os.getenv("TORCH_CUDA_ARCH_LIST") or "8.0 9.0 10.0 12.0"
FEWEST = 80  # the kernels have instructions of sm_80

Objects = dict[str, tuple[Path, str]]  # name -> source and the command that compiles it


class Module(NamedTuple):
    """A module: the variable that switches it, what is said where it is left out, and its parts.

    objects: asks the compiler for them; a RuntimeError says why there can be none.
    link: the command that links them, in front of them and behind.
    """

    switch: str
    kernels: str
    without: str
    objects: Callable[[], Objects]
    link: tuple[str, str]


def ask(command: str, source: str | None = None) -> str:
    """What a compiler prints of a source; a RuntimeError says why it cannot."""
    compiler, *_ = words = shlex.split(command)
    try:
        result = subprocess.run(words, capture_output=True, text=True, input=source)
    except OSError as error:
        raise RuntimeError(f"the compiler {compiler} cannot run ({error.strerror})") from error
    if result.returncode:
        said = result.stderr.strip().partition("\n")[0] or f"exit status {result.returncode}"
        raise RuntimeError(f"the compiler {compiler} cannot compile them ({said})")
    return result.stdout


def cpu_objects() -> Objects:
    if sys.platform == "win32":
        raise RuntimeError("they need GCC or Clang")
    needed = "#include <Python.h>\n#include <vector>\n"
    macros = ask(f"{CXX} {LANGUAGE} -x c++ -E -dM -", needed)
    if "#define __GNUC__ " not in macros:
        raise RuntimeError(f"the compiler {CXX} cannot compile them (neither GCC nor Clang)")
    isas = X86_64 if "#define __x86_64__ 1" in macros else {"baseline": ""}
    choice, compiler = Path("csrc/cpu/isa.cpp"), f"{CXX} {LANGUAGE} {FLAGS}"
    objects = {"isa": (choice, f"{compiler} {CXXFLAGS}")}
    objects["bind_cpu"] = Path("csrc/bind_cpu.cpp"), f"{compiler} {CXXFLAGS}"
    for isa, flags in isas.items():
        for source in sorted(set(choice.parent.glob("*.cpp")) - {choice}):
            command = f"{compiler} -DEPA_ISA={isa} {flags} {CXXFLAGS}"
            objects[f"{source.stem}.{isa}"] = source, command
    return objects


def through_nvcc(flags: str) -> str:
    """Flags of the compiler that nvcc calls."""
    words = (word.replace(",", "\\,") for word in shlex.split(flags))
    return shlex.join(argument for word in words for argument in ("-Xcompiler", word))


def cuda_objects() -> Objects:
    if sys.platform != "linux":
        raise RuntimeError("they are compiled on Linux alone")
    known = re.findall(r"compute_(\d+)", ask(f"{NVCC} --list-gpu-arch"))
    asked = set()
    for word in re.split(r"[\s;,]+", CAPABILITIES.strip()):
        number = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", word)
        if number is None:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST has {word!r}, which is no number such as 9.0")
        asked.add(number[1] + number[2])
    chosen = sorted(number for number in map(int, asked.intersection(known)) if number >= FEWEST)
    if not chosen:
        raise RuntimeError(f"the compiler {shlex.split(NVCC)[0]} knows none of {CAPABILITIES}")
    macros = ask(f"{NVCC} -x cu -E -Xcompiler -dM /dev/null")
    version = re.search(r"#define CUDART_VERSION (\d+)", macros)
    if version is None:
        raise RuntimeError(
            f"the compiler {shlex.split(NVCC)[0]} has no headers of the CUDA runtime"
        )
    # One PTX serves several: nvcc makes the same up to 9.0, and again from 10.0 on.
    groups = [list(group) for _, group in groupby(chosen, lambda number: number >= 100)]
    pairs = [(group[0], f"sm_{number}") for group in groups for number in group]
    ptx = groups[-1][0]
    binaries = " ".join(
        f"-gencode=arch=compute_{first},code={code}"
        for first, code in (*pairs, (ptx, f"compute_{ptx}"))
    )
    parallel = f"--threads={len(chosen)}"
    compiler = f"{NVCC} {binaries} {parallel} {through_nvcc(f'{shlex.join(OPTIONS)} {FLAGS}')}"
    folder, numbers = Path("csrc/cuda"), ",".join(map(str, chosen))
    objects = {f"{source.stem}.cuda": (source, compiler) for source in sorted(folder.glob("*.cu"))}
    facts = f"-DEPA_ARCHITECTURES={numbers} -DEPA_PTX={ptx} -DEPA_CUDA_VERSION={version[1]}"
    command = f"{CXX} {LANGUAGE} {FLAGS} {facts} {CXXFLAGS}"
    objects["bind_cuda"] = Path("csrc/bind_cuda.cpp"), command
    return objects


MODULES = {
    "epa_kernels._C": Module(
        "EPA_KERNELS_CPU",
        "C++",
        "it is complete, but slower on a CPU",
        cpu_objects,
        (f"{CXX} {LINK} {STRIP}", LDFLAGS),
    ),
    "epa_kernels._C_cuda": Module(
        "EPA_KERNELS_CUDA",
        "CUDA",
        "on a GPU its other backends run",
        cuda_objects,
        (f"{NVCC} -shared -cudart=static {through_nvcc(STRIP)}", through_nvcc(LDFLAGS)),
    ),
}


def ninja_file(objects: dict[str, Objects], targets: dict[str, str], temp: Path) -> str:
    """How ninja builds each module, {name: its objects}, at its target, {name: path}.

    temp: folder of the compiled objects.
    """
    import pybind11

    def escape(text: object, special: str = "$: ") -> str:
        return re.sub(f"[{special}]", r"$\g<0>", str(text))

    # `rm`: a module in use is replaced, not overwritten.
    text = f"""builddir = {escape(temp)}
rule compile
  command = $compiler -MMD -MF $out.d -c $in -o $out
  description = $out
  depfile = $out.d
  deps = gcc
rule link
  command = rm -f $out && $linker $in -o $out $last
"""
    for name, target in targets.items():
        files = {escape(temp / f"{key}.o"): parts for key, parts in objects[name].items()}
        text += f"build {escape(target)}: link {' '.join(files)}\n"
        linker, last = (escape(part, "$") for part in MODULES[name].link)
        text += f"  linker = {linker}\n  last = {last}\n"
        for file, (source, command) in files.items():
            # Only a binding gets pybind11, whose folder is another one in every isolated build.
            if source.name.startswith("bind"):
                command += f" -I{shlex.quote(pybind11.get_include())}"
            text += f"build {file}: compile {escape(source)}\n  compiler = {escape(command, '$')}\n"
    return text
