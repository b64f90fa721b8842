"""Networks, and the functions that find and build one by name.

To add a network, write one file in this folder and its test. The file holds a subclass of `Network`
with the decorator `register`; its class attributes are its name, presets, widths and recipe. Every
file of this folder is imported below, so the commands find it by its name.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

# First, because names and helps list the networks in the order of their registration.
from unetrpp.models.unetrpp import UNETRPP  # isort: split

from unetrpp.models.network import MODELS, RECONSTRUCTION, Network, register
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
    "find_model",
    "find_preset",
    "model_label",
    "nearest_names",
    "preset_label",
    "preset_names",
    "register",
]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

PRESETS = {name: network.presets for name, network in MODELS.items()}


def create_model(name: str, preset: str | None = None, **arguments: Any) -> Network:
    """Build a network by name.

    Args:
        name: a key of `MODELS`: "unetrpp", "segformer3d", "slim_unetr", or "slim_unetrpp" (a
            reconstruction, see `SlimUNETRPP`); or the full name of a preset, "segformer3d/brats",
            where "synapse" is short for "unetrpp/synapse".
        preset: named settings of that network, for instance "synapse", with or without the
            network in front ("segformer3d/brats"); None takes all settings from `arguments`, or
            the preset that `name` says.
        arguments: constructor arguments, which override the preset's.

    Raises:
        ValueError: unknown name or preset, or an argument is unknown or breaks its rule.

    Example:
        >>> model = create_model("unetrpp", "tiny", out_channels=3)
        >>> again = create_model(model.config["name"], **model.config["args"])
    """
    network, preset = find_model(name, preset, "create_model: name")
    model = MODELS[network]
    return model.build(**arguments) if preset is None else model.from_preset(preset, **arguments)


def preset_names() -> dict[str, tuple[str, str]]:
    """Return the names of all presets, with their network and their name there.

    A name is "network/preset", for instance "segformer3d/brats", and "synapse" for one of UNETR++.
    """
    return {
        preset if network == UNETRPP.name else f"{network}/{preset}": (network, preset)
        for network, model in MODELS.items()
        for preset in model.presets
    }


def find_model(
    name: str | None, preset: str | None = None, asked: str = "model"
) -> tuple[str, str | None]:
    """Return the network and the preset that names mean; every function and command asks here.

    Args:
        name: a network ("segformer3d") or a preset by its full name ("segformer3d/brats",
            "synapse", "unetrpp/synapse"); None leaves the network to `preset`, else UNETR++.
        preset: a preset of that network, by its own or its full name; or None.
        asked: what the caller calls `name`, for messages.

    Raises:
        ValueError: a name is unknown, or the two contradict.
    """
    network, own = UNETRPP.name, None
    if name is not None:
        full = find_preset(name)
        if name not in MODELS and full is None:
            known = [*MODELS, *preset_names()]
            raise ValueError(
                f"{asked} must be one of {', '.join(MODELS)}, or a preset, "
                f"{', '.join(preset_names())}; got {name!r}.{nearest_names(name, known)}"
            )
        network, own = preset_names()[full] if full is not None else (name, None)
    if preset is None:
        return network, own
    found = preset_names().get(find_preset(preset) or "")
    if name is not None and preset in MODELS[network].presets:
        found = network, preset
    if found is None or (name is not None and found[0] != network):
        known = list(preset_names() if name is None else MODELS[network].presets)
        caller = f"{MODELS[network].__name__}.from_preset: " if name is not None else ""
        raise ValueError(
            f"{caller}preset must be one of {', '.join(known)}; got {preset!r}."
            f"{nearest_names(preset, known)}"
        )
    if own not in (None, found[1]):
        raise ValueError(f"{asked} {name!r} is a preset already, so {preset!r} cannot be another.")
    return found


def find_preset(name: str | None) -> str | None:
    """Return the name of `preset_names` that is meant, "unetrpp/synapse" is "synapse"; or None."""
    name = str(name).removeprefix(f"{UNETRPP.name}/")
    return name if name in preset_names() else None


def nearest_names(name: object, known: Iterable[str]) -> str:
    """Return what a message on an unknown name ends with: the nearest ones; nothing if none is."""
    known, text = list(known), str(name).lower()
    # "brats" is near to "segformer3d/brats", whatever the rest.
    near = [each for each in known if text in each.split("/")]
    near = near or difflib.get_close_matches(text, known, n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def preset_label(name: str) -> str:
    """Return a name of `preset_names` as it is shown: with the word, if it is a reconstruction."""
    network, _ = preset_names()[name]
    return f"{name} (reconstruction)" if MODELS[network].is_reconstruction else name


def model_label(name: str) -> str:
    """Return a key of `MODELS` as a list of networks shows it."""
    return f"{name} (a reconstruction)" if MODELS[name].is_reconstruction else name
