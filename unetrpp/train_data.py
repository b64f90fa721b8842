"""What a run trains on: cases, their split, the plan made from them, and the batches of a step."""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from unetrpp.dataset import Case, find_cases, read_dataset_info, split_cases
from unetrpp.evaluate import check_labelled
from unetrpp.memory import SHARE, check_memory, free_memory, size_in_words
from unetrpp.models import create_model
from unetrpp.options import checked
from unetrpp.plan import Plan, propose
from unetrpp.predict import check_probabilities
from unetrpp.preprocessing import (
    Preprocessing,
    inference_transforms,
    load_case,
    volume_geometry,
)
from unetrpp.preprocessing_check import check_preprocessing
from unetrpp.processes import ignore_signals
from unetrpp.run_folder import PLAN, read_plan
from unetrpp.sampling import TrainingPatches, train_transforms
from unetrpp.train_config import ResolvedConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["TrainingData", "batches", "load_data"]

# Options of a run that `propose` takes where the user gave them.
GIVEN = ("model", "patch_size", "strides", "spacing", "preset", "model_args", "batch_size")


@dataclass
class TrainingData:
    """Data of a run.

    Args:
        plan: what was proposed from the training cases.
        split: {"training": names, "validation": names}.
        held_out: the cases of "validation".
        patches: sample i of the run.
    """

    plan: Plan
    split: dict[str, list[str]]
    held_out: list[Case]
    patches: TrainingPatches


def load_data(config: ResolvedConfig, fabric: Fabric, say: Callable[[str], None]) -> TrainingData:
    """Find and split the cases, plan the run or read its plan, and read the training volumes.

    Raises:
        ValueError, FileNotFoundError, UnreadableImage: data or options that do not fit.
    """
    cases = find_cases(config.data)
    if config.resume:
        plan, split = _stored_plan(config.output)
        by_name = {case.name: case for case in cases}
        gone = [name for names in split.values() for name in names if name not in by_name]
        if gone:
            raise ValueError(f"{config.data} no longer holds case(s) {gone[:3]} of this run")
        training, held_out = (
            [by_name[name] for name in split[part]] for part in ("training", "validation")
        )
    else:
        training, held_out = split_cases(cases, config.fold, config.folds)
        split = {
            "training": [case.name for case in training],
            "validation": [case.name for case in held_out],
        }
        plan = propose(
            training,
            read_dataset_info(config.data),
            on_gpu=fabric.device.type == "cuda",
            **{option: getattr(config, option) for option in GIVEN},
        )
        for reason in plan.reasons:
            say(f"  {reason}")
    _check_batch(plan)
    noun = "case" if len(training) == 1 else "cases"
    say(f"{len(training)} {noun} to train on, {len(held_out)} held out for validation")
    progress = fabric.is_global_zero and sys.stderr.isatty()
    _check(
        held_out[fabric.global_rank :: fabric.world_size],
        plan.preprocessing,
        config.check_affine,
        progress,
    )
    patches = TrainingPatches(
        training,
        train_transforms(
            plan.preprocessing, config.augmentation, bool(config.mirror), config.check_affine
        ),
        # A step's patches are the same, whether one process or several take it.
        batch_size=plan.batch_size * fabric.world_size,
        seed=config.seed,
        foreground=config.foreground,
        cache_num=_kept(training, plan.preprocessing, config.cache, fabric.world_size, say),
        progress=progress,
    )
    return TrainingData(plan, split, held_out, patches)


def _stored_plan(folder: Path) -> tuple[Plan, dict[str, list[str]]]:
    values, split = read_plan(folder)
    try:
        for entry in ("model", "preprocessing"):
            if not isinstance(values.get(entry), dict):
                raise ValueError(f"{entry} must hold values by name, got {values.get(entry)!r}")
        plan = Plan.from_dict(values)
        _check_plan(plan)
        return plan, split
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / PLAN} is no plan of this version ({error}); resume with the version that "
            "wrote it, or restore it from a copy"
        ) from error


def _check_plan(plan: Plan) -> None:
    """Refuse a plan of which no network and no patches can be made."""
    checked("", {"batch_size": plan.batch_size})
    with torch.device("meta"):  # where it costs no memory
        create_model(**plan.model)
    check_preprocessing(
        "preprocessing",
        plan.preprocessing,
        channels=plan.model["in_channels"],
        classes=plan.model["out_channels"],
        patch_size=plan.model["img_size"],
    )


def _kept(
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    wanted: int | None,
    processes: int,
    say: Callable[[str], None],
) -> int:
    """Return how many cases stay in memory, preprocessed: as many as fit, or as many as wanted."""
    sizes = [_preprocessed_bytes(case, preprocessing) for case in cases]
    totals = list(itertools.accumulate(sizes))
    free = free_memory()
    # Each process keeps cases of its own.
    limit = math.inf if free is None else SHARE * free / processes
    kept = sum(total <= limit for total in totals) if wanted is None else min(wanted, len(cases))
    taken = processes * sum(sizes[:kept])
    known = f", of {size_in_words(free)} that are free" if free is not None else ""
    say(f"{kept} of {len(cases)} cases are kept in memory: {size_in_words(taken)}{known}")
    if sum(sizes[:kept]) > limit:
        say(f"  that is more than {SHARE:.0%}; where memory runs out, lower --cache {wanted}")
    if kept < len(cases):
        say("  the others are read anew for each patch; --workers N reads them ahead")
    return kept


def _check_batch(plan: Plan) -> None:
    """Refuse a batch whose patches alone take too much memory; the network takes far more."""
    patch = plan.preprocessing.patch_size
    check_memory(
        plan.batch_size * math.prod(patch) * _voxel_bytes(plan.preprocessing),
        f"--batch_size {plan.batch_size}: patches of {patch} voxels",
        "lower --batch_size or --patch_size",
    )


def _preprocessed_bytes(case: Case, preprocessing: Preprocessing) -> int:
    shape, spacing = volume_geometry(case)
    voxels = float(math.prod(shape))
    if preprocessing.spacing is not None:
        voxels *= math.prod(spacing) / math.prod(preprocessing.spacing)
    return math.ceil(voxels * _voxel_bytes(preprocessing))


def _voxel_bytes(preprocessing: Preprocessing) -> int:
    """Channels in float32, and a label of two bytes at most."""
    return 4 * len(preprocessing.channels) + 2


def _check(
    cases: Sequence[Case], preprocessing: Preprocessing, check_affine: bool, progress: bool
) -> None:
    """Read cases and keep nothing: what is wrong with them is said now, not after hours."""

    transforms = inference_transforms(preprocessing, check_affine)

    def check(case: Case) -> None:
        item = load_case(case, preprocessing, transforms)
        shape, label = item["image"].shape[1:], item["label"].as_tensor()
        check_probabilities(case.images[0], shape, len(preprocessing.labels))
        assert case.label is not None  # `find_cases` refuses training cases without
        check_labelled(case.label, label.numpy() < 0)

    with ThreadPoolExecutor(max_workers=4) as pool:
        read = pool.map(check, cases)
        for _ in tqdm(read, "checking held-out cases", len(cases), disable=not progress):
            pass


def batches(
    data: TrainingData, config: ResolvedConfig, fabric: Fabric, step: int
) -> Iterator[dict[str, Any]]:
    """Return the batches of this process from a step on, without end."""
    workers = config.workers
    if workers is None:
        # On a CPU, loader processes would only take cores from the network.
        on_cpu = fabric.device.type == "cpu"
        workers = 0 if on_cpu else min(8, (os.cpu_count() or 1) // fabric.world_size)
    sampler = _StepSampler(step, data.plan.batch_size, fabric.global_rank, fabric.world_size)
    loader = torch.utils.data.DataLoader(
        data.patches,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=fabric.device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    return iter(loader)


class _StepSampler(torch.utils.data.Sampler):
    """Sample numbers of this process, batch by batch, from a step on."""

    def __init__(self, start: int, batch_size: int, rank: int, world: int):
        self.start, self.batch_size, self.rank, self.world = start, batch_size, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self.start):
            first = (step * self.world + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
