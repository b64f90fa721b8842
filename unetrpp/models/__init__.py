"""Networks, and the functions that find and build one by name.

To add a network, write one file in this folder and its test. The file holds a subclass of `Network`
with the decorator `register`; its class attributes are its name, presets, widths and recipe. Every
file of this folder is imported below, so the commands find it by its name.
"""

import importlib
import pkgutil
from typing import Any

# First, because names and helps list the networks in the order of their registration.
from unetrpp.models.unetrpp import UNETRPP  # isort: split

from unetrpp.models.network import MODELS, RECONSTRUCTION, Network
from unetrpp.models.segformer3d import SegFormer3D
from unetrpp.models.slim_unetr import SlimUNETR
from unetrpp.models.slim_unetrpp import SlimUNETRPP

__all__ = [
    "MODELS",
    "PRESETS",
    "RECONSTRUCTION",
    "UNETRPP",
    "Network",
    "SegFormer3D",
    "SlimUNETR",
    "SlimUNETRPP",
    "create_model",
    "find_preset",
    "model_label",
    "preset_label",
    "preset_names",
]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

PRESETS = {name: network.presets for name, network in MODELS.items()}


def create_model(name: str, preset: str | None = None, **arguments: Any) -> Network:
    """Build a network by name.

    Args:
        name: a key of `MODELS`: "unetrpp", "segformer3d", "slim_unetr", or "slim_unetrpp" (a
            reconstruction, see `SlimUNETRPP`).
        preset: named settings of that network, for instance "synapse", with or without the
            network in front ("segformer3d/brats"); None takes all settings from `arguments`.
        arguments: constructor arguments, which override the preset's.

    Raises:
        ValueError: unknown name or preset, or an argument is unknown or breaks its rule.

    Example:
        >>> model = create_model("unetrpp", "tiny", out_channels=3)
        >>> again = create_model(model.config["name"], **model.config["args"])
    """
    if name not in MODELS:
        raise ValueError(f"create_model: name must be one of {', '.join(MODELS)}; got {name!r}.")
    model = MODELS[name]
    return model.build(**arguments) if preset is None else model.from_preset(preset, **arguments)


def preset_names() -> dict[str, tuple[str, str]]:
    """Return the names of all presets, with their network and their name there.

    A name is "network/preset", for instance "segformer3d/brats", and "synapse" for one of UNETR++.
    """
    return {
        preset if network == UNETRPP.name else f"{network}/{preset}": (network, preset)
        for network, presets in PRESETS.items()
        for preset in presets
    }


def find_preset(name: str | None) -> str | None:
    """Return the name of `preset_names` that is meant, "unetrpp/synapse" is "synapse"; or None."""
    name = str(name).removeprefix(f"{UNETRPP.name}/")
    return name if name in preset_names() else None


def preset_label(name: str) -> str:
    """Return a name of `preset_names` as it is shown: with the word, if it is a reconstruction."""
    network, _ = preset_names()[name]
    return f"{name} (reconstruction)" if MODELS[network].is_reconstruction else name


def model_label(name: str) -> str:
    """Return a key of `MODELS` as a list of networks shows it."""
    return f"{name} (a reconstruction)" if MODELS[name].is_reconstruction else name
