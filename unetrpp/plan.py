"""What to train, proposed from the data: patch size, strides, spacing, preset, batch size.

  propose(cases, info, on_gpu) -> Plan     every choice comes with its reason, and can be overruled

The stem rule is the one that the four published variants follow: 1 or 2 where that leaves at most
32 tokens along an axis, else 4 (64x128x128 -> 2,4,4; 16x160x160 and 32x192x192 -> 1,4,4;
128x128x128 -> 4,4,4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from unetrpp.dataset import Case, DatasetInfo
from unetrpp.dataset_json import IGNORE
from unetrpp.models import MODELS, RECONSTRUCTION
from unetrpp.models.network import (
    STAGES,
    Widths,
    nearest_legal_size,
    size_multiples,
    size_text,
)
from unetrpp.preprocessing import (
    SAME_SPACING,
    Preprocessing,
    check_foreground,
    foreground_intensity,
    volume_geometry,
)

__all__ = ["Plan", "propose"]

# Voxels of a patch: the published 64x128x128 on a GPU; on a CPU what a step of seconds allows.
GPU_PATCH_VOXELS = 64 * 128 * 128
CPU_PATCH_VOXELS = 48 * 64 * 48
# Tokens along an axis up to which a stem of 1 or 2 is enough.
STEM_TOKENS = 32
# UNETR++'s, and a short run's of any network.
BATCH_SIZE = 2
# Axes of so few voxels keep them all: a few slices are all the context there is along them.
FEW_SLICES = 16


@dataclass
class Plan:
    """What a run trains, complete enough to build the model and the data anew.

    Args:
        preprocessing: what inference must repeat.
        model: arguments of `unetrpp.create_model`.
        batch_size: patches per step and process.
        reasons: one sentence per choice, to be printed.
    """

    preprocessing: Preprocessing
    model: dict[str, Any]
    batch_size: int
    reasons: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Return plain lists and dicts that JSON can hold."""
        return {**asdict(self), "preprocessing": self.preprocessing.to_dict()}

    @classmethod
    def from_dict(cls, values: dict) -> Plan:
        """Rebuild from `to_dict`."""
        return cls(**{**values, "preprocessing": Preprocessing.from_dict(values["preprocessing"])})


def propose(
    cases: Sequence[Case],
    info: DatasetInfo,
    *,
    on_gpu: bool,
    model: str = "unetrpp",
    patch_size: Sequence[int] | None = None,
    strides: Sequence[Sequence[int]] | None = None,
    spacing: Sequence[float] | None = None,
    preset: str | None = None,
    model_args: dict[str, Any] | None = None,
    batch_size: int | None = None,
) -> Plan:
    """Choose what the caller left open, from the headers of the training cases.

    Args:
        cases: training cases only; nothing of the held-out ones may enter.
        on_gpu: size the patch and the network for a GPU rather than for a CPU.
        model: network, a key of `unetrpp.models.MODELS`.
        patch_size, strides, spacing, preset, model_args, batch_size: taken as given where given;
            sizes in SPL order. spacing [0, 0, 0] means no resampling.

    Raises:
        ValueError: a given patch size that the strides do not divide, with the legal multiples;
            or three values are needed and not given; or no labelled voxel in any case.
    """
    network = MODELS[model]
    geometry = [volume_geometry(case) for case in cases]
    sizes = np.array([shape for shape, _ in geometry], dtype=float)  # (cases, 3)
    spacings = np.array([spacing for _, spacing in geometry])  # (cases, 3)
    reasons = []

    target, reason = _spacing(spacings, spacing)
    reasons.append(reason)
    if target is not None:
        resampled = ~np.isclose(spacings, target, rtol=SAME_SPACING, atol=0).all(1, keepdims=True)
        sizes = np.where(resampled, sizes * spacings / np.array(target), sizes)
    median = np.median(sizes, axis=0)

    budget = GPU_PATCH_VOXELS if on_gpu else CPU_PATCH_VOXELS
    given_strides = strides is not None
    if strides is not None:
        strides = [list(map(int, stride)) for stride in strides]
        if len(strides) != STAGES or any(len(step) != 3 or min(step) < 1 for step in strides):
            raise ValueError(
                f"strides must be {STAGES} steps of three integers (superior, posterior, left), "
                f"each at least 1; got {strides}"
            )
    if patch_size is None:
        patch, strides = _patch_and_strides(median, budget, strides)
        reasons.append(
            f"patch {size_text(patch)} voxels: the median volume is "
            f"{size_text(np.rint(median))}, and a patch on a {'GPU' if on_gpu else 'CPU'} "
            f"should hold at most {budget} voxels"
        )
    else:
        patch = _three("patch_size", patch_size)
        strides = strides or _strides(patch)
        reasons.append(f"patch {size_text(patch)} voxels: given")
    legal = nearest_legal_size(patch, strides)
    if tuple(patch) != legal:
        raise ValueError(
            f"patch size {size_text(patch)} does not fit strides {strides}: each axis must be a "
            f"multiple of {size_text(size_multiples(strides))}; nearest legal size "
            f"{size_text(legal)}"
        )
    reasons.append(
        f"strides {' '.join(size_text(stride) for stride in strides)}: "
        + (
            "given"
            if given_strides
            else f"a stem of 1 or 2 where that leaves at most {STEM_TOKENS} tokens along an axis, "
            "else 4; then halvings"
        )
    )

    if network.is_reconstruction:
        reasons.append(f"{model} is {RECONSTRUCTION}")
    if preset is None:
        widths = network.gpu_widths if on_gpu else network.cpu_widths
    else:
        widths = Widths(preset, f"{model}, preset {preset}: given")
    reasons.append(widths.reason)
    if batch_size is None:
        batch_size = BATCH_SIZE
        published = network.recipe.get("batch_size", BATCH_SIZE)
        reasons.append(
            f"batch size {BATCH_SIZE}: the published one"
            if published == BATCH_SIZE
            else f"batch size {BATCH_SIZE}: UNETR++'s, for a short run of any network; the "
            f"published one of {model} is {published}, with --recipe published"
        )
    else:
        reasons.append(f"batch size {batch_size}: given, or the published recipe's")

    kinds = ["ct" if channel.strip().lower() == "ct" else "zscore" for channel in info.channels]
    preprocessing = Preprocessing(
        channels=info.channels,
        normalization=kinds,
        intensity=[None] * len(kinds),
        spacing=target,
        patch_size=patch,
        labels=info.labels,
        ignore=info.ignore,
    )
    if "ct" in kinds:
        measured = foreground_intensity(cases, preprocessing)
        preprocessing.intensity = [
            values if kind == "ct" else None for values, kind in zip(measured, kinds, strict=True)
        ]
    else:
        check_foreground(cases, preprocessing)
    if info.ignore is not None:
        reasons.append(
            f"voxels of label {info.ignore}, {IGNORE}: left out of loss, validation and scores"
        )
    reasons.append(
        "normalisation "
        + ", ".join(
            f"{channel}: "
            + (
                "clip and z-score with the training set's foreground"
                if kind == "ct"
                else "z-score per volume"
            )
            for channel, kind in zip(info.channels, kinds, strict=True)
        )
    )
    arguments = {
        "name": model,
        "preset": widths.preset,
        "in_channels": len(info.channels),
        "out_channels": len(info.labels),
        "img_size": patch,
        "strides": strides,
        **widths.settings,
        **(model_args or {}),
    }
    return Plan(preprocessing, arguments, batch_size, reasons)


def _spacing(spacings: np.ndarray, given: Sequence[float] | None) -> tuple[list | None, str]:
    median = np.median(spacings, axis=0)
    listed = f"{'x'.join(f'{size:.4g}' for size in median)} mm"
    if given is not None:
        given = [float(value) for value in given]
        if len(given) != 3 or not (all(v > 0 for v in given) or given == [0.0, 0.0, 0.0]):
            raise ValueError(
                f"spacing must be three positive numbers in mm, or 0 0 0 for none, got {given}"
            )
        return (given if any(given) else None), "spacing: given"
    target = [float(value) for value in median]
    if np.allclose(spacings, median, rtol=SAME_SPACING, atol=0):
        return target, f"spacing {listed}: that of every training volume already"
    return target, f"resample to the median spacing {listed}"


def _patch_and_strides(
    median: np.ndarray, budget: int, strides: Sequence[Sequence[int]] | None
) -> tuple[list[int], list[list[int]]]:
    """Cover the median volume, then shorten what covers it most until the budget holds."""
    size = median.copy()
    while True:
        chosen = strides or _strides(size.tolist())
        multiple = np.array(size_multiples(chosen))
        patch = np.array(nearest_legal_size(size.tolist(), chosen), dtype=int)
        share = np.where(patch > np.maximum(multiple, FEW_SLICES), patch / median, 0)
        if np.prod(patch) <= budget or not share.any():
            return patch.tolist(), [list(stride) for stride in chosen]
        longest = int(np.argmax(share))
        size[longest] = patch[longest] - multiple[longest]


def _strides(size: Sequence[float]) -> list[list[int]]:
    """Stem and three further strides: see the module's rule; an axis of 2 tokens is not halved."""
    stem = [next((s for s in (1, 2) if length / s <= STEM_TOKENS), 4) for length in size]
    strides, tokens = [stem], [length / s for length, s in zip(size, stem, strict=True)]
    for _ in range(3):
        strides.append([2 if count >= 3.5 else 1 for count in tokens])
        tokens = [count / s for count, s in zip(tokens, strides[-1], strict=True)]
    return strides


def _three(name: str, values: Sequence[int]) -> list[int]:
    values = [int(value) for value in values]
    if len(values) != 3:
        raise ValueError(f"{name} needs three values (superior, posterior, left), got {values}")
    return values
