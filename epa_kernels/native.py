"""The compiled modules of the package, and why one is absent where it is. `_C` runs on CPUs."""

import importlib
import os
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

_source = Path(__file__).parents[1]


def load(name: str, switch: str, compiler: str) -> tuple[ModuleType | None, str | None]:
    """A module, or None and the reason.

    Args:
        switch: variable of setup.py that makes it an error if the module cannot be built.
        compiler: what the module is built with.
    """
    extension = f"the extension {__package__}.{name}"
    if find_spec(f".{name}", __package__) is not None:
        try:
            return importlib.import_module(f".{name}", __package__), None
        except ImportError as error:
            return None, f"{extension} cannot be loaded ({error})"
    if (_source / "setup.py").is_file():
        return None, (
            f"epa_kernels was imported from its sources in {_source}, where {extension} is not "
            f"built; start Python in another folder, or pip install --editable the sources"
        )
    return None, (
        f"{extension} was not built; reinstall from source with {compiler}, "
        f"{switch}=1 pip install tells what is missing"
    )


module, missing = load("_C", "EPA_KERNELS_CPU", "GCC or Clang")

# The instruction set is one for the process, chosen before the first kernel runs.
isa = None
if module is not None:
    isa = os.environ.get("EPA_KERNELS_ISA") or module.isas().split(",")[0]
    module.use_isa(isa)


def describe() -> str:
    """The instruction set that runs, of those that could, or why there are no kernels."""
    if module is None:
        return f"none: {missing}"
    threads = "torch's OpenMP threads" if module.has_openmp else "one thread, built without OpenMP"
    return f"{isa} of {module.isas().replace(',', ', ')} (EPA_KERNELS_ISA), {threads}"
