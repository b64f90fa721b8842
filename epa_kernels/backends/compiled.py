"""What the compiled backends share: how a module is loaded, and tensors as its kernels take them.

The numbers of dtypes, kinds and layouts are those of csrc/kernels.h.
"""

import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
KINDS = {"shared": 0, "split": 1, "sum": 2}
LAYOUTS = {"official": 0, "tokens": 1}
# Inputs of paired_attention: those that the kernels take as views, and those as dense weights.
VIEWS, WEIGHTS = (0, 3, 5), (1, 2, 4, 6, 7, 8, 9, 10, 11, 12)

_PACKAGE = __package__.partition(".")[0]
_SOURCE = Path(__file__).parents[2]


def load(name: str, switch: str, compiler: str) -> tuple[ModuleType | None, str | None]:
    """A compiled module of the package, or None and the reason.

    Args:
        switch: variable of setup.py that makes it an error if the module cannot be built.
        compiler: what the module is built with.
    """
    extension = f"the extension {_PACKAGE}.{name}"
    if find_spec(f"{_PACKAGE}.{name}") is not None:
        try:
            return importlib.import_module(f"{_PACKAGE}.{name}"), None
        except ImportError as error:
            return None, f"{extension} cannot be loaded ({error})"
    if (_SOURCE / "setup.py").is_file():
        return None, (
            f"{_PACKAGE} was imported from its sources in {_SOURCE}, where {extension} is not "
            f"built; start Python in another folder, or pip install --editable the sources"
        )
    return None, (
        f"{extension} was not built; reinstall from source with {compiler}, "
        f"{switch}=1 pip install tells what is missing"
    )


def unknown_dtype(x: Tensor) -> list[str]:
    """The reason why kernels cannot run on x, if its dtype is one."""
    known = ", ".join(map(str, DTYPES))
    return [] if x.dtype in DTYPES else [f"dtype {x.dtype} is none of {known}"]


def view(t: Tensor | None) -> tuple[int, ...] | None:
    """Address, dtype, strides in elements."""
    return None if t is None else (t.data_ptr(), DTYPES[t.dtype], *t.stride())


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def dense(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype).contiguous()
