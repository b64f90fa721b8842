"""What `unetrpp info` prints of a checkpoint or a preset."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import epa_kernels
from unetrpp.models import (
    MODELS,
    RECONSTRUCTION,
    Network,
    create_model,
    find_preset,
    nearest_names,
    preset_label,
    preset_names,
)
from unetrpp.models.network import size_multiples, size_text
from unetrpp.throughput import multiply_adds

__all__ = ["describe", "presets_named"]


def describe(model: str | None) -> str:
    """Describe a checkpoint folder or a preset: parameters, FLOPs, tokens, sizes, labels, backends.

    Raises:
        ValueError: model is neither a folder with a checkpoint nor the name of a preset.
    """
    preset = find_preset(model)
    if preset is not None:
        network = create_model(*preset_names()[preset])
        lines = [f"preset {preset_label(preset)}", *_network(network)]
    elif model is not None and Path(model).is_dir():
        from unetrpp.checkpoint import load_checkpoint

        network, config = load_checkpoint(Path(model))
        lines = [f"checkpoint {model}"]
        if "val_dice" in config:
            lines.append(f"  validation Dice  {config['val_dice']:.4f} after step {config['step']}")
        lines += _network(network)
        if config.get("preprocessing"):
            lines += _preprocessing(config["preprocessing"])
    else:
        if model in MODELS:
            raise ValueError(
                f"{model} is a network; name one of its presets: {', '.join(_presets_of(model))}"
            )
        listed = ", ".join(map(preset_label, preset_names()))
        raise ValueError(
            f"{model!r} is neither a checkpoint folder nor a preset ({listed})."
            f"{nearest_names(model, preset_names())}"
        )
    return "\n".join([*lines, *_backends(network)])


def presets_named(name: str | None) -> list[str]:
    """Return the preset of this name, those of a network, all if there is no name.

    Raises:
        ValueError: no preset has the name.
    """
    if name is None:
        return list(preset_names())
    preset = find_preset(name)
    if preset is None:
        if name in MODELS:
            return _presets_of(name)
        listed = ", ".join(map(preset_label, preset_names()))
        raise ValueError(
            f"{name!r} is no preset; throughput is measured of {listed}."
            f"{nearest_names(name, preset_names())}"
        )
    return [preset]


def _presets_of(network: str) -> list[str]:
    return [name for name, (owner, _) in preset_names().items() if owner == network]


def _network(network: Network) -> list[str]:
    settings = network.config["args"]
    lines = [f"  network          {type(network).__name__} ({network.name})"]
    if network.is_reconstruction:
        lines.append(f"                   {RECONSTRUCTION}")
    giga = multiply_adds(network) / 1e9
    multiples = size_multiples(network.strides)
    tokens = [f"{grid[0] * grid[1] * grid[2]} ({size_text(grid)})" for grid in network.grids]
    any_size = " and any other size" if network.takes_any_size else ""
    return [
        *lines,
        f"  parameters       {sum(p.numel() for p in network.parameters()):,}",
        f"  FLOPs            {2 * giga:.2f} G = {giga:.2f} G multiply-adds for one input (torch"
        ".utils.flop_counter: 2 per multiply-add; convolutions and matrix products)",
        f"  input            {settings['in_channels']} x {size_text(network.img_size)} voxels "
        f"(superior, posterior, left){any_size}; each axis a multiple of {size_text(multiples)}",
        f"  strides          {' '.join(size_text(stride) for stride in network.strides)}",
        f"  tokens per stage {', '.join(tokens)}",
        f"  output channels  {settings['out_channels']}",
    ]


def _preprocessing(values: Mapping[str, Any]) -> list[str]:
    channels = zip(values["channels"], values["normalization"], strict=True)
    spacing = values["spacing"]
    return [
        f"  labels           {values['labels']}",
        f"  channels         {', '.join(f'{name} ({kind})' for name, kind in channels)}",
        f"  spacing          {size_text(spacing) + ' mm' if spacing else 'as it is in the file'}",
    ]


def _backends(network: Network) -> list[str]:
    table = io.StringIO()
    with contextlib.redirect_stdout(table):
        for op, shape in network.attention_inputs.items():
            epa_kernels.explain(op, torch.zeros(shape))
    return [
        "backends, where the network first runs an op:",
        *("  " + line for line in table.getvalue().splitlines()),
    ]
