"""Build the kernels of csrc with ninja; pyproject.toml says all the rest.

epa_kernels._C runs on CPUs: every file of csrc/cpu is compiled once per instruction set, and the
machine that runs chooses one. epa_kernels._C_cuda runs on NVIDIA GPUs: nvcc compiles csrc/cuda, on
Linux. Neither depends on the machine that builds, or on anything of torch. A module that cannot be
compiled is left out, and a sentence says so; an error in the sources is an error. Metadata and
source distributions ask no compiler. csrc/compile_commands.py has the commands.

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
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

# An isolated build does not search the folder of this file.
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "csrc"))


class BuildExt(build_ext):
    """Asks the compilers, leaves out the modules that they cannot compile, and runs ninja."""

    def run(self) -> None:
        from compile_commands import MODULES

        self.objects, withdrawn = {}, []
        for extension in self.extensions:
            module = MODULES[extension.name]
            try:
                if os.getenv(module.switch) == "0":
                    raise RuntimeError(f"{module.switch} is 0")
                self.objects[extension.name] = module.objects()
            except RuntimeError as error:
                if os.getenv(module.switch) == "1":
                    raise PlatformError(f"{module.switch} is 1, but {error}") from error
                said = f"epa-kernels is built without its {module.kernels} kernels, because {error}"
                print(f"{said}; {module.without}.", file=sys.stderr)
                withdrawn.append(extension)
        for extension in withdrawn:
            self.extensions.remove(extension)
            # Of an earlier build: a wheel takes all that lies there.
            Path(self.build_lib, self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        self.distribution.ext_modules = self.extensions
        super().run()

    def build_extensions(self) -> None:
        from compile_commands import MODULES, ninja_file

        # The folder that an editable install gives is temporary: all would be compiled every time.
        temp = Path("build/editable" if self.editable_mode else self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        targets = {name: self.get_ext_fullpath(name) for name in self.objects}
        text = ninja_file(self.objects, targets, temp)
        (temp / "build.ninja").write_text(text, encoding="utf-8")
        ninja = [sys.executable, "-m", "ninja"] if find_spec("ninja") else ["ninja"]
        if subprocess.call([*ninja, "-f", str(temp / "build.ninja")]):
            switches = " or ".join(f"{MODULES[name].switch}=0" for name in targets)
            raise CompileError(f"csrc does not compile, see above; {switches} leaves it out")


class BdistWheel(bdist_wheel):
    """The name of a wheel tells of a platform only if a module was built."""

    @property
    def root_is_pure(self) -> bool:
        """Asked for again behind the build; the base class decides in front of it."""
        return not self.distribution.has_ext_modules()

    @root_is_pure.setter
    def root_is_pure(self, value: bool) -> None:
        pass


setup(
    ext_modules=[Extension("epa_kernels._C", []), Extension("epa_kernels._C_cuda", [])],
    cmdclass={"bdist_wheel": BdistWheel, "build_ext": BuildExt},
)
