"""UNETR++ and its siblings for 3-D medical image segmentation: networks, training, prediction.

Importing this package costs nothing: torch and the networks are loaded at the first use of a name.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unetrpp.checkpoint import load_checkpoint, save_checkpoint
    from unetrpp.models import UNETRPP, SegFormer3D, SlimUNETR, SlimUNETRPP, create_model
    from unetrpp.published import load_published

__all__ = [
    "UNETRPP",
    "SegFormer3D",
    "SlimUNETR",
    "SlimUNETRPP",
    "create_model",
    "load_checkpoint",
    "load_published",
    "save_checkpoint",
]

# Names that do not come from `models`.
_HOMES = {
    "load_checkpoint": "checkpoint",
    "load_published": "published",
    "save_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = importlib.import_module(f".{_HOMES.get(name, 'models')}", __name__)
    except ModuleNotFoundError as error:
        if _is_of_an_extra(error):
            raise ModuleNotFoundError(_remedy(error, name), name=error.name) from error
        raise
    return getattr(home, name)


def _is_of_an_extra(error: ModuleNotFoundError) -> bool:
    """Whether what is missing is another package, not a part of this one, torch or Python."""
    package = (error.name or "").partition(".")[0]
    ours = package in ("unetrpp", "epa_kernels", "torch")
    return bool(package) and not ours and package not in sys.stdlib_module_names


def _remedy(error: ModuleNotFoundError, name: str) -> str:
    package = (error.name or "").partition(".")[0]
    return f"{name} needs {package}, which is not installed: pip install 'epa-kernels[train]'"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
