"""UNETR++ for 3-D medical image segmentation: networks, checkpoints, training, prediction.

Importing this package costs nothing: torch and the networks are loaded at the first use of a name.
"""

import importlib
from typing import Any

__all__ = [
    "UNETRPP",
    "create_model",
    "load_checkpoint",
    "load_published",
    "save_checkpoint",
]

_HOMES = {"UNETRPP": "models", "create_model": "models"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES.get(name, 'checkpoint')}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
