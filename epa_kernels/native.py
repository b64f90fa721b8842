"""The compiled module of CPU kernels, `_C`, and why it is absent where it is."""

import os

try:
    from . import _C as module

    missing = None
except ImportError as error:
    module = None
    missing = (
        f"the extension epa_kernels._C cannot be loaded ({error}); reinstall with GCC or Clang at "
        f"hand, EPA_KERNELS_CPU=1 tells what is missing"
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
