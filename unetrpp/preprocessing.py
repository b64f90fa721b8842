"""Volumes of a case -> tensors for the networks: one grid, preprocessing.

  Preprocessing     what inference must repeat exactly; stored in a checkpoint's config.json
  inference_transforms, load_case    read, check, turn, resample, normalise; nothing random

A file alone is read and checked by `unetrpp.volumes`; here a case as a whole.

Axis order: every volume is turned to "SPL" (axis 0 runs to superior, 1 to posterior, 2 to left),
the depth-first order of SimpleITK arrays, in which the published variants were trained
(64x128x128: 64 slices). Patch sizes, strides and spacings are given in that order everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai import transforms as mt
from monai.data import MetaTensor

from unetrpp.dataset import Case
from unetrpp.dataset_json import IGNORE
from unetrpp.memory import check_memory
from unetrpp.preprocessing_check import check_fit
from unetrpp.volumes import (
    SAME_SPACING,
    Grid,
    UnreadableImage,
    UnusableVolume,
    Volume,
    placed,
    read_grid,
    read_image,
    read_labels,
)

if TYPE_CHECKING:
    from unetrpp.models import Network

__all__ = [
    "SAME_SPACING",
    "InOrder",
    "Preprocessing",
    "UnreadableImage",
    "check_foreground",
    "foreground_intensity",
    "inference_transforms",
    "load_case",
    "volume_geometry",
]

ORIENTATION = "SPL"
# A voxel size so many times that of the model, or less, is a wrong unit.
WRONG_UNIT = 100
# Sums of squares of larger intensities do not fit into float32. Programs mark what lies outside the
# scan with the lowest number there is, -3.4e38.
LARGEST_INTENSITY = 1e12
# Bytes that resampling takes a voxel of its result, and more a channel: measured, 54 to 64.
RESAMPLED_VOXEL, RESAMPLED_VALUE = 48, 8


@dataclass
class Preprocessing:
    """Everything a model must see at inference exactly as in training.

    Args:
        channels: channel names of dataset.json, in file order.
        normalization: per channel "ct" (clip to the training set's foreground percentiles, then
            z-score with its mean and deviation) or "zscore" (with the volume's own; voxels that are
            exactly zero stay out of the statistics where they are more than a quarter).
        intensity: per channel {"lower", "upper", "mean", "std"} for "ct", None for "zscore".
        spacing: voxel size in mm to resample to, in SPL order; a volume within 1 % of it stays as
            it is, and with None every volume does.
        patch_size: network input in voxels, in SPL order.
        labels: value by class name, background included.
        ignore: label value of the voxels that are left out of training and scoring, or None.
    """

    channels: list[str]
    normalization: list[str]
    intensity: list[dict | None]
    spacing: list[float] | None
    patch_size: list[int]
    labels: dict[str, int]
    ignore: int | None = None

    @property
    def named_labels(self) -> dict[str, int]:
        """Every label value by name, as dataset.json says it: the classes, and "ignore" if any."""
        return self.labels if self.ignore is None else {**self.labels, IGNORE: self.ignore}

    def to_dict(self) -> dict:
        """Return plain lists and dicts that JSON can hold; "ignore" only where there is one."""
        values = asdict(self)
        if self.ignore is None:
            # So that earlier versions, which know no such entry, read it as well.
            del values["ignore"]
        return values

    @classmethod
    def from_dict(cls, values: dict) -> Preprocessing:
        """Rebuild from `to_dict`; raises ValueError for a missing or unknown entry."""
        names = {field.name for field in fields(cls)}
        # Checkpoints from before there was an ignore label are complete without it.
        missing, unknown = names - set(values) - {"ignore"}, set(values) - names
        if missing or unknown:
            raise ValueError(
                f"Preprocessing.from_dict: missing {sorted(missing)}, unknown {sorted(unknown)}; "
                "the checkpoint is of another version"
            )
        return cls(**values)

    @classmethod
    def of_network(cls, values: Any, network: Network, source: str) -> Preprocessing:
        """Rebuild from what a file says, checked against the network that it belongs to.

        Args:
            values: what `to_dict` returned, or anything that stands in its place.
            network: the network.
            source: where the values come from, for messages.

        Raises:
            ValueError: an entry is missing, unknown or illegal, or does not fit the network.
        """
        if not isinstance(values, dict):
            raise ValueError(
                f"{source} holds no JSON object with the entries of a Preprocessing, "
                f"{', '.join(field.name for field in fields(cls))}; got {values!r}"
            )
        try:
            found = cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        check_fit(found, network, source)
        return found


def volume_geometry(case: Case) -> tuple[list[int], list[float]]:
    """Return (shape in voxels, spacing in mm) in SPL order, from the header of the first image.

    Raises:
        FileNotFoundError, UnusableVolume: see `unetrpp.volumes.read_grid`.
    """
    return _in_network_order(read_grid(case.images[0]))


def _in_network_order(grid: Grid) -> tuple[list[int], list[float]]:
    """Shape and spacing of a grid in SPL order."""
    turned = grid.turned(_network_turn(grid))
    return list(turned.shape), list(turned.spacing)


def _network_turn(grid: Grid) -> np.ndarray:
    """The turn of a grid to SPL order: the one place where it is decided.

    Axes that lie 45 degrees between two directions belong to either, so nothing else may decide.
    """
    from nibabel.orientations import axcodes2ornt, inv_ornt_aff

    # The inverse leads from SPL to nibabel's directions, as an affine does.
    return grid.turn_to(np.linalg.inv(inv_ornt_aff(axcodes2ornt(ORIENTATION), (1, 1, 1))))


class _ReadCase:
    """Case -> {"image" (C,S,P,L) float32, "label" (1,S,P,L), "name"}, checked, still unturned.

    Labels are the classes 0, 1, ..., and -1 where the file has the value "ignore".
    """

    def __init__(self, preprocessing: Preprocessing, check_affine: bool = False):
        self.preprocessing, self.check_affine = preprocessing, check_affine

    def __call__(self, case: Case) -> dict:
        first = read_image(case.images[0])
        self._check_spacing(first)
        channels = [first.values]
        for path in case.images[1:]:
            channels.append(placed(read_image(path), first, self.check_affine).values)
        count = sum(values.shape[-1] for values in channels)
        # (X, Y, Z, C) as in the files, where X runs fastest -> (C, X, Y, Z), where Z does.
        image = np.empty((count, *first.grid.shape), np.float32)
        np.concatenate([np.moveaxis(values, -1, 0) for values in channels], out=image)
        expected = self.preprocessing.channels
        if image.shape[0] != len(expected):
            raise ValueError(
                f"{case.images[0]} has {image.shape[0]} channel(s), need {len(expected)}: "
                f"{', '.join(expected)}"
            )
        self._check_intensities(case, image)
        affine = torch.from_numpy(first.grid.affine)
        item = {"image": MetaTensor(torch.from_numpy(image), affine=affine), "name": case.name}
        if case.label is not None:
            label = self._read_label(case.label, first).astype(np.float32, order="C")
            item["label"] = MetaTensor(torch.from_numpy(label)[None], affine=affine)
        return item

    def _check_spacing(self, image: Volume) -> None:
        """Refuse what resampling could not hold, before it takes memory."""
        target = self.preprocessing.spacing
        if target is None:
            return
        shape, spacing = _in_network_order(image.grid)
        ratios = [size / wanted for size, wanted in zip(spacing, target, strict=True)]
        if not all(1 / WRONG_UNIT < ratio < WRONG_UNIT for ratio in ratios):
            sizes, wanted = ("x".join(f"{size:.4g}" for size in each) for each in (spacing, target))
            raise UnusableVolume(
                image.file,
                f"has voxels of {sizes} mm, and the network takes {wanted} mm (superior, "
                f"posterior, left): {WRONG_UNIT} times apart or more; correct the voxel size or "
                "its unit in the header",
            )
        voxels = math.prod(max(1, round(n * r)) for n, r in zip(shape, ratios, strict=True))
        check_memory(
            voxels * (RESAMPLED_VOXEL + RESAMPLED_VALUE * len(self.preprocessing.channels)),
            f"{image.file}: resampled to {voxels:,} voxels of {target} mm, it",
            "correct the voxel size in its header, or crop it",
        )

    def _check_intensities(self, case: Case, image: np.ndarray) -> None:
        """Refuse what a z-score cannot scale; "ct" clips it."""
        for number, kind in enumerate(self.preprocessing.normalization):
            low, high = float(image[number].min()), float(image[number].max())
            if kind == "zscore" and max(-low, high) > LARGEST_INTENSITY:
                raise UnusableVolume(
                    case.images[number if len(case.images) > 1 else 0],
                    f"holds intensities from {low:.3g} to {high:.3g}, and only numbers up to "
                    f"{LARGEST_INTENSITY:g} can be scaled by their mean and deviation; give voxels "
                    "outside the scan the value of the background, or correct the scale factor",
                )

    def _read_label(self, file: Path, image: Volume) -> np.ndarray:
        label = placed(read_labels(file), image, self.check_affine).values
        known = set(self.preprocessing.named_labels.values())
        unknown = sorted(set(np.unique(label).tolist()) - known)
        if unknown:
            raise ValueError(
                f"{file} holds label value(s) {unknown[:5]} that dataset.json does not name; "
                f"known: {self.preprocessing.named_labels}"
            )
        if self.preprocessing.ignore is None:
            return label
        return np.where(label == self.preprocessing.ignore, -1, label.astype(np.int32))


class _Turn(mt.InvertibleTransform):
    """Permute and flip the axes to SPL order; the inverse undoes what was done."""

    def __call__(self, item: dict) -> dict:
        image = item["image"]
        x, y, z = image.shape[1:]
        grid = Grid((x, y, z), image.affine.numpy())
        turn = _network_turn(grid)
        affine = torch.from_numpy(grid.turned(turn).affine)
        for key in ("image", "label"):
            if key in item:
                values = item[key].as_tensor().flip(self._flipped(turn))
                order = [0, *(1 + np.argsort(turn[:, 0])).tolist()]
                item[key] = MetaTensor(values.permute(order).contiguous(), affine=affine)
        extra = {"turn": turn.tolist(), "affine": image.affine}
        self.push_transform(item["image"], extra_info=extra)
        return item

    def inverse(self, item: dict) -> dict:
        done = self.pop_transform(item["image"])["extra_info"]
        turn = np.array(done["turn"])
        values = item["image"].as_tensor().permute(0, *(1 + turn[:, 0]).tolist())
        return {**item, "image": MetaTensor(values.flip(self._flipped(turn)), done["affine"])}

    @staticmethod
    def _flipped(turn: np.ndarray) -> list[int]:
        return [1 + axis for axis in range(3) if turn[axis, 1] < 0]


class _Normalize:
    """Scale the intensities of each channel as `Preprocessing.normalization` says."""

    def __init__(self, preprocessing: Preprocessing):
        self.preprocessing = preprocessing

    def __call__(self, item: dict) -> dict:
        image = item["image"]
        for channel, kind, statistics in zip(
            image, self.preprocessing.normalization, self.preprocessing.intensity, strict=True
        ):
            values = channel.as_tensor() if isinstance(channel, MetaTensor) else channel
            if kind == "ct":
                assert statistics is not None  # `intensity` has them for "ct"
                values.clamp_(statistics["lower"], statistics["upper"])
                values.sub_(statistics["mean"]).div_(max(statistics["std"], 1e-8))
                continue
            inside = values != 0
            if inside.sum() > 0.75 * values.numel() or not inside.any():
                inside = torch.ones_like(inside)
            std, mean = torch.std_mean(values[inside], correction=0)
            values.copy_(torch.where(inside, (values - mean) / std.clamp_min(1e-8), 0.0))
        return item


class _Resample(mt.Spacingd):
    """Spacingd that leaves a volume within `SAME_SPACING` of the target untouched, both ways."""

    def __init__(self, keys: Sequence[str], pixdim: Sequence[float], **options):
        super().__init__(keys, pixdim, **options)
        self.target = list(pixdim)

    def __call__(self, data: Any, lazy: bool | None = None) -> Any:
        # Image and label share one affine, so they are resampled both or neither.
        if np.allclose(data["image"].pixdim, self.target, rtol=SAME_SPACING, atol=0):
            return data
        return super().__call__(data, lazy)

    def inverse(self, data: Any) -> Any:
        done = data["image"].applied_operations
        if not done or done[-1]["class"] != "SpatialResample":
            return data
        return super().inverse(data)


class InOrder:
    """Run steps in order, without Compose's wrapping of every error in "applying transform"."""

    def __init__(self, steps: Sequence):
        self.steps = list(steps)

    def __call__(self, item):
        for step in self.steps:
            item = step(item)
        return item


def inference_transforms(preprocessing: Preprocessing, check_affine: bool = False) -> mt.Compose:
    """Return Case -> {"image" (C,S,P,L), "label" (1,S,P,L) if any, "name"}, nothing random.

    Steps: read and check, turn to SPL, resample to `preprocessing.spacing` (linear; labels
    nearest) unless within 1 % of it, normalise. Ignored labels are -1. Images are MetaTensors that
    remember the turn and the resampling, so `monai.transforms.Invertd` or `Compose.inverse` lead
    back to the file's grid.

    Args:
        check_affine: refuse channels and labels whose affine differs, see `unetrpp.volumes.placed`.
    """
    keys = ["image", "label"]
    steps: list = [
        _ReadCase(preprocessing, check_affine),
        _Turn(),
    ]
    if preprocessing.spacing is not None:
        steps.append(
            _Resample(
                keys,
                preprocessing.spacing,
                mode=("bilinear", "nearest"),
                padding_mode="border",
                allow_missing_keys=True,
            )
        )
    return mt.Compose([*steps, _Normalize(preprocessing)])


def load_case(
    case: Case, preprocessing: Preprocessing, transforms: mt.Compose | None = None
) -> dict:
    """Read and preprocess one case; see `inference_transforms` for what comes back.

    Args:
        transforms: `inference_transforms(preprocessing)`, given by a caller who wants to invert
            with it: MONAI inverts only with the very objects that did the forward step.

    Raises:
        FileNotFoundError, UnreadableImage: missing or damaged file. ValueError: NaNs, channels or
        label values that do not fit, image and label on different grids. NotEnoughMemory: it would
        take too much. Each names the file.
    """
    transforms = transforms or inference_transforms(preprocessing)
    return InOrder(transforms.transforms)(case)


def foreground_intensity(
    cases: Sequence[Case], preprocessing: Preprocessing, maximum_cases: int = 50
) -> list[dict]:
    """Measure, per channel, the 0.5 and 99.5 percentile, mean and deviation of labelled voxels.

    At most `maximum_cases` cases, evenly spaced in the list, and 10000 voxels of each are read.

    Voxels of the label "ignore" are not labelled. Where these cases have no labelled voxel, the
    others are read as well.

    Raises:
        ValueError: no labelled voxel in any case; and whatever reading a case raises.
    """
    read, generator = _ReadCase(preprocessing), np.random.default_rng(0)
    spaced = np.linspace(0, len(cases) - 1, min(len(cases), maximum_cases)).round()
    first = [int(index) for index in np.unique(spaced)]
    samples: list[np.ndarray] = []
    for index in [*first, *sorted(set(range(len(cases))) - set(first))]:
        if samples and index not in first:
            break
        item = read(cases[index])
        values = item["image"].as_tensor()[:, item["label"].as_tensor()[0] > 0].numpy()
        if values.shape[1]:
            samples.append(values[:, generator.integers(values.shape[1], size=10_000)])
    if not samples:
        raise _nothing_labelled(cases)
    values = np.concatenate(samples, axis=1).astype(np.float64)  # (C, voxels)
    lower, upper = np.percentile(values, [0.5, 99.5], axis=1)
    return [
        {"lower": float(a), "upper": float(b), "mean": float(c), "std": float(d)}
        for a, b, c, d in zip(lower, upper, values.mean(1), values.std(1), strict=True)
    ]


def check_foreground(cases: Sequence[Case], preprocessing: Preprocessing) -> None:
    """Read label maps until one has a labelled voxel.

    Raises:
        ValueError: none has one, so there is nothing to learn.
    """
    without = [0] if preprocessing.ignore is None else [0, preprocessing.ignore]
    for case in cases:
        assert case.label is not None  # `find_cases` refuses training cases without
        if not np.isin(read_labels(case.label).values, without).all():
            return
    raise _nothing_labelled(cases)


def _nothing_labelled(cases: Sequence[Case]) -> ValueError:
    return ValueError(
        f"no labelled voxel in the training cases, nothing to learn from: all {len(cases)} label "
        f"maps, {cases[0].label} the first, hold background or ignored voxels only; check that "
        "these are the right files"
    )
