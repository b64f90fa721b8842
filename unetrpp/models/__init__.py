"""Networks, and the function that builds one by name."""

from typing import Any

from .network import Network
from .presets import PRESETS
from .segformer3d import SegFormer3D
from .slim_unetr import SlimUNETR
from .slim_unetrpp import SlimUNETRPP
from .unetrpp import UNETRPP

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
    "preset_label",
    "preset_names",
]

# What a user must know of a network whose `is_reconstruction` is set.
RECONSTRUCTION = (
    "a RECONSTRUCTION: only parts of it were published, how they are joined is this package's "
    "guess; nothing is known of its accuracy"
)

MODELS: dict[str, type[Network]] = {
    network.name: network for network in (UNETRPP, SegFormer3D, SlimUNETR, SlimUNETRPP)
}


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
        preset if network == "unetrpp" else f"{network}/{preset}": (network, preset)
        for network, presets in PRESETS.items()
        for preset in presets
    }


def find_preset(name: str | None) -> str | None:
    """Return the name of `preset_names` that is meant, "unetrpp/synapse" is "synapse"; or None."""
    name = str(name).removeprefix("unetrpp/")
    return name if name in preset_names() else None


def preset_label(name: str) -> str:
    """Return a name of `preset_names` as it is shown: with the word, if it is a reconstruction."""
    network, _ = preset_names()[name]
    return f"{name} (reconstruction)" if MODELS[network].is_reconstruction else name
