"""What the compiled backends share: how a module is loaded, and tensors as kernels take them."""

import importlib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import overload

import torch
from torch import Tensor

from ..contract import DTYPES, KINDS, LAYOUTS, Call

# As csrc/kernels.h numbers them: in the order of the contract.
DTYPE_NUMBERS, KIND_NUMBERS, LAYOUT_NUMBERS = (
    {value: number for number, value in enumerate(values)} for values in (DTYPES, KINDS, LAYOUTS)
)

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


def unknown_dtype(call: Call) -> list[str]:
    """The reason why kernels cannot run a call, if its dtype is one."""
    if call.dtype in DTYPES:
        return []
    return [f"dtype {call.dtype} is none of {', '.join(map(str, DTYPES))}"]


def float32_is_exact() -> bool:
    """Whether torch multiplies float32 matrices on a GPU in float32: new setting, or old one."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # once the new setting was used, torch refuses the old one
        return torch.backends.cuda.matmul.fp32_precision not in ("tf32", "bf16")


def view(t: Tensor | None) -> tuple[int, ...] | None:
    """Address, dtype, strides in elements."""
    return None if t is None else (t.data_ptr(), DTYPE_NUMBERS[t.dtype], *t.stride())


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


@overload
def dense(t: Tensor, dtype: torch.dtype) -> Tensor: ...


@overload
def dense(t: None, dtype: torch.dtype) -> None: ...


def dense(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """t in `dtype` and dense, t itself where it is."""
    # Asked first: to and contiguous take two microseconds where they have nothing to do.
    if t is None or (t.dtype == dtype and t.is_contiguous()):
        return t
    return t.to(dtype).contiguous()
