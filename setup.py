"""Build the kernels of csrc with ninja; pyproject.toml says all the rest.

epa_kernels._C runs on CPUs: every file of csrc/cpu is compiled once per instruction set, and the
machine that runs chooses one. epa_kernels._C_cuda runs on NVIDIA GPUs: nvcc compiles csrc/cuda, on
Linux. Neither depends on the machine that builds, or on anything of torch. A module that cannot be
compiled is left out, and a sentence says so; an error in the sources is an error.

    EPA_KERNELS_CPU       0 leaves _C out, 1 makes it an error that it cannot be compiled
    EPA_KERNELS_CUDA      the same for _C_cuda
    CXX                   the compiler, GCC or Clang, with options or not; else c++, g++ or clang++
    CXXFLAGS, LDFLAGS     come last, so they win; with CXXFLAGS, which nvcc does not get, the
                          modules keep their symbols
    CUDA_HOME             the toolkit of nvcc; else that on the PATH, else /usr/local/cuda
    TORCH_CUDA_ARCH_LIST  compute capabilities to compile for, as PyTorch has it; those that nvcc
                          knows are taken, and PTX for what comes after. Default "8.0 9.0 10.0 12.0"
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

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


class Module(NamedTuple):
    """A module: the variable that switches it, what is said where it is left out, and its parts.

    objects: () -> {name: (source, command)}; a RuntimeError says why there can be none.
    link: the command that links them, in front of them and behind.
    """

    switch: str
    kernels: str
    without: str
    objects: Callable[[], dict[str, tuple[Path, str]]]
    link: tuple[str, str]


def ask(command: str, **options: str) -> str:
    """What a compiler prints; a RuntimeError says why it cannot."""
    compiler, *_ = words = shlex.split(command)
    try:
        result = subprocess.run(words, capture_output=True, text=True, **options)
    except OSError as error:
        raise RuntimeError(f"the compiler {compiler} cannot run ({error.strerror})") from error
    if result.returncode:
        said = result.stderr.strip().partition("\n")[0] or f"exit status {result.returncode}"
        raise RuntimeError(f"the compiler {compiler} cannot compile them ({said})")
    return result.stdout


def cpu_objects() -> dict[str, tuple[Path, str]]:
    if sys.platform == "win32":
        raise RuntimeError("they need GCC or Clang")
    source = "#include <Python.h>\n#include <vector>\n"
    macros = ask(f"{CXX} {LANGUAGE} -x c++ -E -dM -", input=source)
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


def cuda_objects() -> dict[str, tuple[Path, str]]:
    if sys.platform != "linux":
        raise RuntimeError("they are compiled on Linux alone")
    known = re.findall(r"compute_(\d+)", ask(f"{NVCC} --list-gpu-arch"))
    words = re.split(r"[\s;,]+", CAPABILITIES.strip())
    parts = [re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", word) for word in words]
    if None in parts:
        unknown = words[parts.index(None)]
        raise RuntimeError(f"TORCH_CUDA_ARCH_LIST has {unknown!r}, which is no number such as 9.0")
    asked = {part[1] + part[2] for part in parts}
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
    "_C": Module(
        "EPA_KERNELS_CPU",
        "C++",
        "it is complete, but slower on a CPU",
        cpu_objects,
        (f"{CXX} {LINK} {STRIP}", LDFLAGS),
    ),
    "_C_cuda": Module(
        "EPA_KERNELS_CUDA",
        "CUDA",
        "on a GPU its other backends run",
        cuda_objects,
        (f"{NVCC} -shared -cudart=static {through_nvcc(STRIP)}", through_nvcc(LDFLAGS)),
    ),
}


def ninja_file(targets: dict[str, str], temp: Path) -> str:
    """How each module is built at its target, {name: target}, by way of objects in `temp`."""
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
        objects = {escape(temp / f"{key}.o"): parts for key, parts in PLANS[name].items()}
        text += f"build {escape(target)}: link {' '.join(objects)}\n"
        linker, last = (escape(part, "$") for part in MODULES[name].link)
        text += f"  linker = {linker}\n  last = {last}\n"
        for key, (source, command) in objects.items():
            # Only a binding gets pybind11, whose folder is another one in every isolated build.
            if source.name.startswith("bind"):
                command += f" -I{shlex.quote(pybind11.get_include())}"
            text += f"build {key}: compile {escape(source)}\n  compiler = {escape(command, '$')}\n"
    return text


class Build(build):  # build_ext has something to say without an extension, too
    sub_commands = [*(c for c in build.sub_commands if c[0] != "build_ext"), ("build_ext", None)]


class BuildExt(build_ext):
    def run(self) -> None:
        for name, reason in REASONS.items():
            module = MODULES[name]
            if os.getenv(module.switch) == "1":
                raise PlatformError(f"{module.switch} is 1, but {reason}")
            said = f"epa-kernels is built without its {module.kernels} kernels, because {reason}"
            print(f"{said}; {module.without}.", file=sys.stderr)
        super().run()

    def build_extensions(self) -> None:
        # The folder that an editable install gives is temporary: all would be compiled every time.
        temp = Path("build/editable" if self.editable_mode else self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        targets = {
            ext.name.split(".")[-1]: self.get_ext_fullpath(ext.name) for ext in self.extensions
        }
        (temp / "build.ninja").write_text(ninja_file(targets, temp))
        ninja = [sys.executable, "-m", "ninja"] if find_spec("ninja") else ["ninja"]
        if subprocess.call([*ninja, "-f", str(temp / "build.ninja")]):
            switches = " or ".join(f"{MODULES[name].switch}=0" for name in targets)
            raise CompileError(f"csrc does not compile, see above; {switches} leaves it out")


PLANS, REASONS = {}, {}
for name, module in MODULES.items():
    try:
        if os.getenv(module.switch) == "0":
            raise RuntimeError(f"{module.switch} is 0")
        PLANS[name] = module.objects()
    except RuntimeError as error:
        REASONS[name] = str(error)
EXTENSIONS = [Extension(f"epa_kernels.{name}", []) for name in PLANS]
setup(ext_modules=EXTENSIONS, cmdclass={"build": Build, "build_ext": BuildExt})
