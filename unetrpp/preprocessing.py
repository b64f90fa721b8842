"""Volumes of a case -> tensors for the networks: reading, checking, preprocessing.

  Preprocessing     what inference must repeat exactly; stored in a checkpoint's config.json
  inference_transforms, load_case    read, check, turn, resample, normalise; nothing random

Axis order: every volume is turned to "SPL" (axis 0 runs to superior, 1 to posterior, 2 to left),
the depth-first order of SimpleITK arrays, in which the published variants were trained
(64x128x128: 64 slices). Patch sizes, strides and spacings are given in that order everywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai import transforms as mt
from monai.data import MetaTensor

from unetrpp.dataset import Case, open_nifti

__all__ = [
    "InOrder",
    "Preprocessing",
    "UnreadableImage",
    "foreground_intensity",
    "inference_transforms",
    "load_case",
    "volume_geometry",
]

ORIENTATION = "SPL"
# A voxel size that differs by less, relatively, is the same: nothing is interpolated.
SAME_SPACING = 0.01


class UnreadableImage(RuntimeError):
    """A file that exists but is no complete NIfTI volume; the message names the file."""


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
        labels: value by name, background included.
    """

    channels: list[str]
    normalization: list[str]
    intensity: list[dict | None]
    spacing: list[float] | None
    patch_size: list[int]
    labels: dict[str, int]

    def to_dict(self) -> dict:
        """Return plain lists and dicts that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Preprocessing:
        """Rebuild from `to_dict`; raises ValueError for a missing or unknown entry."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(
                f"Preprocessing.from_dict: missing {sorted(names - set(values))}, unknown "
                f"{sorted(set(values) - names)}; the checkpoint is of another version"
            )
        return cls(**values)


def volume_geometry(case: Case) -> tuple[list[int], list[float]]:
    """Return (shape in voxels, spacing in mm) in SPL order, from the header of the first image.

    Raises:
        UnreadableImage: the header cannot be read or its affine says no orientation.
    """
    path = case.images[0]
    try:
        image = open_nifti(path)
        spacing = [float(size) for size in nibabel.affines.voxel_sizes(image.affine)]
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.io_orientation(image.affine),
            nibabel.orientations.axcodes2ornt(ORIENTATION),
        )
    except Exception as error:
        raise UnreadableImage(f"{path} cannot be read as a NIfTI volume: {error}") from error
    # turn[i, 0] is the place that input axis i takes.
    axes = [int(np.flatnonzero(turn[:, 0] == axis)[0]) for axis in range(3)]
    return [int(image.shape[axis]) for axis in axes], [spacing[axis] for axis in axes]


class _ReadCase:
    """Case -> {"image" (C,S,P,L) float32, "label" (1,S,P,L), "name"}, checked, still unturned."""

    def __init__(self, preprocessing: Preprocessing):
        self.preprocessing = preprocessing
        self.read = mt.LoadImage(reader="NibabelReader", image_only=True, ensure_channel_first=True)

    def _read(self, path: Path) -> MetaTensor:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist")
        try:
            image = self.read(path)
        except Exception as error:
            # MONAI wraps the reader's error in pages of advice on other readers.
            cause = error.__cause__ or error
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise UnreadableImage(
                f"{path} cannot be read as a NIfTI volume (truncated or damaged?): {reason}"
            ) from error
        if image.ndim != 4:
            raise ValueError(f"{path} has {image.ndim - 1} spatial axes, need 3")
        if not torch.isfinite(image).all():
            count = int((~torch.isfinite(image)).sum())
            raise ValueError(f"{path} holds {count} NaN or infinite voxels; repair it first")
        affine = np.asarray(image.affine, dtype=float)[:3, :3]
        # Against the volume of a voxel, which may be tiny: 0.5 um are 5e-4 mm.
        volume = np.prod(np.linalg.norm(affine, axis=0))
        if not np.isfinite(affine).all() or not abs(np.linalg.det(affine)) > 1e-6 * volume:
            raise ValueError(f"{path} has a singular affine, so its axes have no direction")
        return image

    def __call__(self, case: Case) -> dict:
        channels = [self._read(path) for path in case.images]
        for path, channel in zip(case.images, channels, strict=True):
            if channel.shape[1:] != channels[0].shape[1:]:
                raise ValueError(
                    f"{path} has shape {tuple(channel.shape[1:])}, but the first channel "
                    f"{case.images[0]} has {tuple(channels[0].shape[1:])}"
                )
        image = channels[0]
        if len(channels) > 1:
            stacked = torch.cat([channel.as_tensor() for channel in channels])
            image = MetaTensor(stacked, meta=image.meta)
        expected = self.preprocessing.channels
        if image.shape[0] != len(expected):
            raise ValueError(
                f"{case.images[0]} has {image.shape[0]} channel(s), need {len(expected)}: "
                f"{', '.join(expected)}"
            )
        item = {"image": image, "name": case.name}
        if case.label is not None:
            item["label"] = self._read_label(case.label, case.images[0], image)
        return item

    def _read_label(self, file: Path, image_file: Path, image: MetaTensor) -> MetaTensor:
        label = self._read(file)
        if label.shape[0] != 1 or label.shape[1:] != image.shape[1:]:
            raise ValueError(
                f"{file} has shape {tuple(label.shape[1:])} and {label.shape[0]} channel(s), "
                f"but its image {image_file} has {tuple(image.shape[1:])}; they must share one "
                "voxel grid"
            )
        known = set(self.preprocessing.labels.values())
        unknown = sorted(set(torch.unique(label.as_tensor()).tolist()) - known)
        if unknown:
            raise ValueError(
                f"{file} holds label value(s) {unknown[:5]} that dataset.json does not name; "
                f"known: {self.preprocessing.labels}"
            )
        affine = image.affine
        if not torch.allclose(label.affine, affine, rtol=1e-3, atol=1e-2):
            # Sloppy headers are common; the voxel grid is what annotators drew on.
            warnings.warn(f"{file}: affine differs from its image's, which is used", stacklevel=2)
        return MetaTensor(label.as_tensor(), affine=affine)


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


def inference_transforms(preprocessing: Preprocessing) -> mt.Compose:
    """Return Case -> {"image" (C,S,P,L), "label" (1,S,P,L) if any, "name"}, nothing random.

    Steps: read and check, turn to SPL, resample to `preprocessing.spacing` (linear; labels
    nearest) unless within 1 % of it, normalise. Images are MetaTensors that remember the turn and
    the resampling, so `monai.transforms.Invertd` or `Compose.inverse` lead back to the file's grid.
    """
    keys = ["image", "label"]
    steps: list = [
        _ReadCase(preprocessing),
        # labels=None takes left and right from each file's affine alone.
        mt.Orientationd(keys, axcodes=ORIENTATION, allow_missing_keys=True, labels=None),
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
        FileNotFoundError, UnreadableImage: missing or truncated file. ValueError: NaNs, channels or
        label values that do not fit, image and label of different shape. Each names the file.
    """
    transforms = transforms or inference_transforms(preprocessing)
    return InOrder(transforms.transforms)(case)


def foreground_intensity(
    cases: Sequence[Case], preprocessing: Preprocessing, maximum_cases: int = 50
) -> list[dict]:
    """Measure, per channel, the 0.5 and 99.5 percentile, mean and deviation of labelled voxels.

    At most `maximum_cases` cases, evenly spaced in the list, and 10000 voxels of each are read.

    Raises:
        ValueError: no labelled voxel in any of them; and whatever reading a case raises.
    """
    read, generator = _ReadCase(preprocessing), np.random.default_rng(0)
    samples = []
    for index in np.unique(np.linspace(0, len(cases) - 1, min(len(cases), maximum_cases)).round()):
        item = read(cases[int(index)])
        values = item["image"].as_tensor()[:, item["label"].as_tensor()[0] > 0].numpy()
        if values.shape[1]:
            samples.append(values[:, generator.integers(values.shape[1], size=10_000)])
    if not samples:
        raise ValueError("no labelled voxel in the training cases, nothing to learn from")
    values = np.concatenate(samples, axis=1).astype(np.float64)  # (C, voxels)
    lower, upper = np.percentile(values, [0.5, 99.5], axis=1)
    return [
        {"lower": float(a), "upper": float(b), "mean": float(c), "std": float(d)}
        for a, b, c, d in zip(lower, upper, values.mean(1), values.std(1), strict=True)
    ]
