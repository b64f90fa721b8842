"""Build `epa_kernels._C`, the CPU kernels of csrc, with ninja; pyproject.toml says all the rest.

Every file of csrc/cpu is compiled once per instruction set, and the machine that runs chooses one:
the result depends on no processor, and on nothing of torch. Where nothing can be compiled, the
package is built without the module and a sentence says so; an error in the sources is an error.

    EPA_KERNELS_CPU    0 leaves the module out, 1 makes it an error that nothing can be compiled
    CXX                the compiler, GCC or Clang, with options or not; else c++, g++ or clang++
    CXXFLAGS, LDFLAGS  come last, so they win; with CXXFLAGS the module keeps its symbols
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

SWITCH, MACOS = os.getenv("EPA_KERNELS_CPU"), sys.platform == "darwin"
CXX, CXXFLAGS, LDFLAGS = (
    shlex.join(shlex.split(os.getenv(name, ""))) for name in ("CXX", "CXXFLAGS", "LDFLAGS")
)
CXX = CXX or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
OPENMP = "" if MACOS else "-fopenmp"
LANGUAGE = f"-std=c++17 {OPENMP} -I{shlex.quote(sysconfig.get_path('include'))} -Icsrc"
FLAGS = "-O3 -g0 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra"
LINK = "-bundle -undefined dynamic_lookup" if MACOS else "-shared -fopenmp"
LINK += "" if MACOS or CXXFLAGS else " -s"
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
# The linker gets the objects in this order. Of an inline function that several of them define it
# keeps the first, which every processor must be able to run.
X86_64 = {"baseline": "", "avx2": AVX2, "avx512": AVX512}


def find_isas() -> dict[str, str]:
    """The flags of each instruction set to compile for; a RuntimeError says why there is none."""
    if SWITCH == "0" or sys.platform == "win32":
        raise RuntimeError("EPA_KERNELS_CPU is 0" if SWITCH == "0" else "they need GCC or Clang")
    source = "#include <Python.h>\n#include <vector>\n"
    command = shlex.split(f"{CXX} {LANGUAGE} -x c++ -E -dM -")
    try:
        probe = subprocess.run(command, input=source, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"the compiler {CXX} cannot run ({error.strerror})") from error
    if probe.returncode or "#define __GNUC__ " not in probe.stdout:
        said = probe.stderr.strip().partition("\n")[0] or "neither GCC nor Clang"
        raise RuntimeError(f"the compiler {CXX} cannot compile them ({said})")
    return X86_64 if "#define __x86_64__ 1" in probe.stdout else {"baseline": ""}


def ninja_file(target: str, temp: Path) -> str:
    """How `target` is built from the sources, by way of objects in `temp`."""
    import pybind11

    def escape(text: object, special: str = "$: ") -> str:
        return re.sub(f"[{special}]", r"$\g<0>", str(text))

    # Only the binding gets pybind11, whose folder is another one in every isolated build.
    choice = Path("csrc/cpu/isa.cpp")
    objects = {"isa": (choice, "")}
    objects["bind_cpu"] = Path("csrc/bind_cpu.cpp"), f"-I{shlex.quote(pybind11.get_include())}"
    for isa, flags in find_isas().items():
        for source in sorted(set(choice.parent.glob("*.cpp")) - {choice}):
            objects[f"{source.stem}.{isa}"] = source, f"-DEPA_ISA={isa} {flags}"
    names = {key: escape(temp / f"{key}.o") for key in objects}
    # `rm`: a module in use is replaced, not overwritten.
    text = f"""builddir = {escape(temp)}
rule compile
  command = {escape(CXX, "$")} -MMD -MF $out.d $flags -c $in -o $out
  description = $out
  depfile = $out.d
  deps = gcc
rule link
  command = rm -f $out && {escape(f"{CXX} {LINK}", "$")} $in -o $out {escape(LDFLAGS, "$")}
build {escape(target)}: link {" ".join(names.values())}
"""
    for key, (source, flags) in objects.items():
        flags = escape(f"{LANGUAGE} {FLAGS} {flags} {CXXFLAGS}", "$")
        text += f"build {names[key]}: compile {escape(source)}\n  flags = {flags}\n"
    return text


class Build(build):  # build_ext has something to say without an extension, too
    sub_commands = [*(c for c in build.sub_commands if c[0] != "build_ext"), ("build_ext", None)]


class BuildExt(build_ext):
    def run(self) -> None:
        if self.extensions:
            return super().run()
        if SWITCH == "1":
            raise PlatformError(f"EPA_KERNELS_CPU is 1, but {REASON}")
        said = f"epa-kernels is built without its C++ kernels, because {REASON}"
        print(f"{said}; it is complete, but slower on a CPU.", file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        # The folder that an editable install gives is temporary: all would be compiled every time.
        temp = Path("build/editable" if self.editable_mode else self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        (temp / "build.ninja").write_text(ninja_file(self.get_ext_fullpath(ext.name), temp))
        ninja = [sys.executable, "-m", "ninja"] if find_spec("ninja") else ["ninja"]
        if subprocess.call([*ninja, "-f", str(temp / "build.ninja")]):
            raise CompileError("csrc does not compile, see above; EPA_KERNELS_CPU=0 leaves it out")


try:
    find_isas()
    MODULES, REASON = [Extension("epa_kernels._C", ["csrc/bind_cpu.cpp"])], ""
except RuntimeError as error:
    MODULES, REASON = [], str(error)
setup(ext_modules=MODULES, cmdclass={"build": Build, "build_ext": BuildExt})
