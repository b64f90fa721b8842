"""Training samples: random windows of preprocessed volumes, augmented.

train_transforms  the steps of unetrpp.preprocessing, a random window, the augmentation
TrainingPatches   sample i of a run as a function of (seed, i) alone: resuming needs no state
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from monai import transforms as mt
from monai.data import MetaTensor
from tqdm import tqdm

from unetrpp.dataset import Case
from unetrpp.preprocessing import InOrder, Preprocessing, inference_transforms
from unetrpp.train_config import Augmentation

__all__ = ["TrainingPatches", "train_transforms"]

AUGMENTATIONS = get_args(Augmentation)

# Positions per label that patches are centred on; more would only take memory.
FOREGROUND_VOXELS = 1000
# Share of the patch that is read beyond each side, so that a turned patch has few empty corners.
MARGIN = 1 / 8
# Ratio of the longest to the shortest side of a patch or voxel beyond which volumes are turned
# within slices only: nnU-Net's threshold for its "dummy 2-D" augmentation.
ANISOTROPY = 3


@dataclass(frozen=True)
class Strength:
    """How much "full" and "light" change a sample.

    The numbers of FULL are nnU-Net's (version 1, get_moreDA_augmentation as nnUNetTrainerV2 calls
    it), with which UNETR++ was trained; LIGHT has about half of them.

    Args:
        angle: largest turn around an axis, degrees.
        scale: smallest and largest change of size, as shares.
        intensity: factor of noise, blur, brightness, contrast, resolution and gamma.
    """

    angle: float
    scale: tuple[float, float]
    intensity: float


FULL = Strength(angle=30, scale=(-0.3, 0.4), intensity=1.0)
LIGHT = Strength(angle=15, scale=(-0.15, 0.15), intensity=0.5)
# nnU-Net turns with probability 0.2 and scales with 0.2; here both are drawn together: 1 - 0.8^2.
TURN_PROBABILITY = 0.36


class _ForegroundVoxels:
    """Add positions to centre patches on, up to FOREGROUND_VOXELS in each array.

    "voxels" has an array per label present. "labelled" has one of all that is not ignored, the
    background included, or is empty where nothing is ignored.
    """

    def __call__(self, item: dict) -> dict:
        label = item["label"].as_tensor()[0]
        # The smallest type that holds its numbers: these stay in memory.
        small = 0 <= label.min() and label.max() <= 255
        label = label.to(torch.uint8 if small else torch.int32)
        # A fixed seed: the same case always offers the same positions.
        generator = np.random.default_rng(0)
        item["voxels"] = []
        for value in torch.unique(label).tolist():
            if value <= 0:
                continue
            positions = torch.nonzero(label == value).numpy()
            if len(positions) > FOREGROUND_VOXELS:
                positions = generator.choice(positions, FOREGROUND_VOXELS, replace=False)
            item["voxels"].append(positions.astype(np.int32))
        item["labelled"] = []
        if label.min() < 0:
            known = np.flatnonzero(label.numpy() >= 0)
            known = generator.choice(known, min(len(known), FOREGROUND_VOXELS), replace=False)
            item["labelled"] = np.stack(np.unravel_index(known, label.shape), 1).astype(np.int32)
        item["label"] = MetaTensor(label[None], affine=item["label"].affine)
        return item


class _RandomWindow(mt.Randomizable, mt.Transform):
    """Cut patch plus margin at a random place, zero-padded; {"forced": True} centres on a label.

    Where voxels are ignored, a window that is not forced is centred on one that is not (as
    nnU-Net does), since most of a sparsely labelled volume teaches nothing.

    A volume shorter than the patch is padded equally on both sides, as sliding windows pad it.
    """

    def __init__(self, patch_size: Sequence[int], margin: Sequence[int]):
        self.patch_size = tuple(patch_size)
        self.margin = tuple(margin)

    def __call__(self, item: dict) -> dict:
        center = None
        if item.pop("forced", False) and item["voxels"]:
            positions = item["voxels"][self.R.randint(len(item["voxels"]))]
            center = positions[self.R.randint(len(positions))]
        elif len(item["labelled"]):
            center = item["labelled"][self.R.randint(len(item["labelled"]))]
        starts = []
        for axis, (size, patch) in enumerate(
            zip(item["image"].shape[1:], self.patch_size, strict=True)
        ):
            if size <= patch:
                starts.append(-((patch - size) // 2))
            elif center is not None:
                starts.append(int(np.clip(center[axis] - patch // 2, 0, size - patch)))
            else:
                starts.append(int(self.R.randint(size - patch + 1)))
        window = {"name": item["name"]}
        for key in ("image", "label"):
            window[key] = self._cut(item[key].as_tensor(), starts)
        return window

    def _cut(self, volume: torch.Tensor, starts: list[int]) -> torch.Tensor:
        shape = [
            patch + 2 * margin for patch, margin in zip(self.patch_size, self.margin, strict=True)
        ]
        window = torch.zeros((volume.shape[0], *shape), dtype=torch.float32)
        source, target = [slice(None)], [slice(None)]
        for size, start, margin, length in zip(
            volume.shape[1:], starts, self.margin, shape, strict=True
        ):
            first = start - margin
            source.append(slice(max(first, 0), min(first + length, size)))
            target.append(slice(source[-1].start - first, source[-1].stop - first))
        window[tuple(target)] = volume[tuple(source)]
        return window


def train_transforms(
    preprocessing: Preprocessing,
    augmentation: str = "full",
    mirror: bool = True,
    check_affine: bool = False,
) -> mt.Compose:
    """Return Case -> {"image" (C,*patch) float32, "label" (1,*patch) float32, "name"} at random.

    Labels are -1 where they are ignored; what lies outside the volume is background, of value 0.
    The deterministic steps of `inference_transforms` come first (`TrainingPatches` keeps
    their result), then a random window and the augmentation.

    Args:
        augmentation: "full", that of UNETR++ (nnU-Net's "moreDA"); "light", the same kinds at about
            half the strength, for short runs; "slim_unetr" (intensities scaled and shifted by up
            to 0.1, which Slim UNETR joins with mirror) and "segformer3d" (flip, rotation, blocks
            cut out of image and label, Gibbs noise), as published with these networks; "none".
            What is cut out becomes 0: the mean of images as normalised here, the minimum of those
            scaled to 0..1 as published.
        mirror: flip along each axis with probability 1/2 (not with "none").
        check_affine: as in `inference_transforms`.

    Raises:
        ValueError: another name of an augmentation.
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(
            f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {augmentation!r}"
        )
    patch = preprocessing.patch_size
    strength = {"full": FULL, "light": LIGHT}.get(augmentation)
    margin = [int(size * MARGIN) if strength is not None else 0 for size in patch]
    steps: list = [
        *inference_transforms(preprocessing, check_affine).transforms,
        _ForegroundVoxels(),
        _RandomWindow(patch, margin),
    ]
    if strength is not None:
        steps += [_turn(preprocessing, strength), *_change_intensities(strength.intensity)]
    elif augmentation == "slim_unetr":
        steps += _slim_unetr()
    elif augmentation == "segformer3d":
        steps += _segformer3d()
    if mirror and augmentation != "none":
        steps += [mt.RandFlipd(["image", "label"], 0.5, spatial_axis=a) for a in range(3)]
    return mt.Compose([*steps, _PlainTensors()])


def _slim_unetr() -> list:
    """Intensities scaled and shifted: the published code's transforms, as they are."""
    return [
        mt.RandScaleIntensityd(["image"], factors=0.1, prob=1.0),
        mt.RandShiftIntensityd(["image"], offsets=0.1, prob=1.0),
    ]


def _segformer3d() -> list:
    """Flip, rotation, blocks cut out, Gibbs noise: the published code's transforms, as they are."""
    both = ["image", "label"]
    return [
        mt.RandFlipd(both, 0.3, spatial_axis=1),
        mt.RandRotated(both, range_x=0.36, prob=0.5, mode=("bilinear", "nearest")),
        mt.RandCoarseDropoutd(both, holes=20, spatial_size=(-1, 7, 7), fill_value=0, prob=0.5),
        mt.RandGibbsNoised(["image"]),
    ]


def _turn(preprocessing: Preprocessing, strength: Strength) -> mt.Transform:
    """Rotation and scale; it leaves of a window with margin the patch alone."""
    patch, thick = preprocessing.patch_size, preprocessing.spacing or [1.0, 1.0, 1.0]
    angle = np.deg2rad(strength.angle)
    anisotropic = any(max(sizes) > ANISOTROPY * min(sizes) for sizes in (patch, thick))
    around = min(range(3), key=lambda axis: (-thick[axis], patch[axis]))
    angles = [angle if not anisotropic or axis == around else 0.0 for axis in range(3)]
    return mt.RandAffined(
        ["image", "label"],
        spatial_size=patch,
        prob=TURN_PROBABILITY,
        rotate_range=angles,
        scale_range=[strength.scale] * 3,
        mode=("bilinear", "nearest"),
        padding_mode="zeros",
    )


def _change_intensities(s: float) -> list:
    """Noise, blur, brightness, contrast, low resolution, gamma, in nnU-Net's order.

    At s = 1 the probabilities and ranges are nnU-Net's, see `Strength`.
    """
    image = ["image"]
    gamma = (1 - 0.3 * s, 1 + 0.5 * s)
    # MONAI before 1.6 has one contrast for all channels.
    options = inspect.signature(mt.RandScaleIntensityFixedMeand).parameters
    each_channel: dict[str, Any] = {"channel_wise": True} if "channel_wise" in options else {}
    return [
        mt.RandGaussianNoised(image, prob=0.1 * s, std=0.3 * s),
        mt.RandGaussianSmoothd(image, (0.5, 1.0), (0.5, 1.0), (0.5, 1.0), prob=0.2 * s),
        mt.RandScaleIntensityd(image, factors=0.25 * s, prob=0.15, channel_wise=True),
        mt.RandScaleIntensityFixedMeand(
            image, factors=0.25 * s, prob=0.15, preserve_range=True, **each_channel
        ),
        mt.RandSimulateLowResolutiond(image, prob=0.25 * s, zoom_range=(0.5, 1.0)),
        mt.RandAdjustContrastd(image, 0.1 * s, gamma, invert_image=True, retain_stats=True),
        mt.RandAdjustContrastd(image, 0.3 * s, gamma, retain_stats=True),
    ]


class _PlainTensors:
    """Strip MONAI's MetaTensor: slower in a network, and refused by torch.compile(fullgraph)."""

    def __call__(self, item: dict) -> dict:
        for key in ("image", "label"):
            value = item[key]
            item[key] = (value.as_tensor() if isinstance(value, MetaTensor) else value).contiguous()
        return item


class TrainingPatches(torch.utils.data.Dataset):
    """Sample i of a training run, a function of (seed, i) alone.

    Sample i belongs to batch i // batch_size. Each pass over the cases is a new permutation; the
    last samples of every batch, a share of `foreground`, are centred on a labelled voxel: of
    batch_size * foreground = n + r the last n always and the one before them with probability r
    (nnU-Net rounds instead: 0.33 of 2 is always 1 there, 0.66 on average here). Nothing depends
    on what was drawn before, so a resumed run goes on with exactly the samples it would have had,
    with any number of loader processes.

    Args:
        cache_num: cases whose preprocessed volumes stay in memory; None for all.

    Returns:
        {"image" (C,*patch), "label" (1,*patch), "name"}, plain float32 tensors.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        transforms: mt.Compose,
        *,
        batch_size: int,
        seed: int,
        foreground: float = 0.33,
        cache_num: int | None = None,
        progress: bool = False,
    ):
        self.cases = list(cases)
        self.transforms = transforms
        self.batch_size = batch_size
        self.seed = seed
        self.forced = batch_size * foreground
        first_random = next(
            i for i, step in enumerate(transforms.transforms) if isinstance(step, mt.Randomizable)
        )
        self.random_part = mt.Compose(list(transforms.transforms[first_random:]))
        self.prepare = InOrder(transforms.transforms[:first_random])
        kept = self.cases[:cache_num]
        with ThreadPoolExecutor(max_workers=4) as pool:
            items = pool.map(self.prepare, kept)
            self.items = list(
                tqdm(items, "reading cases", len(kept), disable=not progress, leave=False)
            )

    def __getitem__(self, index: int) -> dict:
        turn, place = divmod(index, len(self.cases))
        order = np.random.default_rng([self.seed, 0, turn]).permutation(len(self.cases))
        number = int(order[place])
        kept = number < len(self.items)
        item = dict(self.items[number]) if kept else self.prepare(self.cases[number])
        generator = np.random.default_rng([self.seed, 1, index])
        state = int(generator.integers(2**31))
        followers = self.batch_size - 1 - index % self.batch_size
        item["forced"] = bool(generator.random() < self.forced - followers)
        return self.random_part.set_random_state(seed=state)(item)
