"""What a run trains on: cases, their split, the plan made from them, and the batches of a step."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from unetrpp.dataset import Case, find_cases, read_dataset_info, split_cases
from unetrpp.files import read_json
from unetrpp.plan import Plan, propose
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
        stored = read_json(config.output / "plan.json")
        plan, split = Plan.from_dict(stored["plan"]), stored["split"]
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
    say(f"{len(training)} cases to train on, {len(held_out)} held out for validation")
    patches = TrainingPatches(
        training,
        train_transforms(
            plan.preprocessing, config.augmentation, bool(config.mirror), config.check_affine
        ),
        batch_size=plan.batch_size,
        seed=config.seed,
        foreground=config.foreground,
        cache_num=config.cache,
        progress=fabric.is_global_zero and sys.stderr.isatty(),
    )
    return TrainingData(plan, split, held_out, patches)


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
