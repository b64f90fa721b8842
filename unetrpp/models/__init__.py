"""Networks, and the function that builds one by name."""

from typing import Any

from torch import nn

from .presets import PRESETS
from .unetrpp import UNETRPP

__all__ = ["MODELS", "PRESETS", "UNETRPP", "create_model"]

MODELS: dict[str, type[nn.Module]] = {"unetrpp": UNETRPP}


def create_model(name: str, preset: str | None = None, **arguments: Any) -> nn.Module:
    """Build a network by name.

    Args:
        name: a key of `MODELS`: "unetrpp".
        preset: named settings of that network, for instance "synapse"; None takes all settings
            from `arguments`.
        arguments: constructor arguments, which override the preset's.

    Raises:
        ValueError: unknown name or preset, or an argument breaks its rule.

    Example:
        >>> model = create_model("unetrpp", "tiny", out_channels=3)
        >>> again = create_model(model.config["name"], **model.config["args"])
    """
    if name not in MODELS:
        raise ValueError(f"create_model: name must be one of {', '.join(MODELS)}; got {name!r}.")
    model = MODELS[name]
    return model(**arguments) if preset is None else model.from_preset(preset, **arguments)
