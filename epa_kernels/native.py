"""The compiled module of CPU kernels, `_C`, and why it is absent where it is."""

import os
from importlib.util import find_spec
from pathlib import Path

module = None
missing = None
_source = Path(__file__).parents[1]
if find_spec("._C", __package__) is not None:
    try:
        from . import _C as module
    except ImportError as error:
        missing = f"the extension epa_kernels._C cannot be loaded ({error})"
elif (_source / "setup.py").is_file():
    missing = (
        f"epa_kernels was imported from its sources in {_source}, where the extension is not "
        f"built; start Python in another folder, or pip install --editable the sources"
    )
else:
    missing = (
        "the extension epa_kernels._C was not built; reinstall from source with GCC or Clang, "
        "EPA_KERNELS_CPU=1 pip install tells what is missing"
    )

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
