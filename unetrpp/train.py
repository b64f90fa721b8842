"""Training: a folder of labelled volumes -> a checkpoint, its scores and its curves.

  run_train(TrainConfig) writes into the run folder
    config.yaml  plan.json     the full configuration; what was proposed from the data, the split
    best/  last/               checkpoints for prediction (weights as validated)
    resume.pt                  everything the next step needs, replaced atomically
    metrics.jsonl              one line per step {"step", "loss", ...} and per validation
                               {"step", "val_dice", "val_dice_per_class", ...}

Repeatable by construction: samples, augmentation and dropout of step s are functions of
(seed, s), never of what ran before, so a killed and resumed run ends with the same bits.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

__all__ = ["Interrupted", "NonFiniteLoss", "TrainConfig", "run_train"]

# Steps after which the time of a step is known well enough to turn minutes into steps.
MEASURED_STEPS = 12
WARM_UP_STEPS = 50
VALIDATIONS = 10


@dataclass
class TrainConfig:
    """Train UNETR++ on a folder of labelled volumes.

    Args:
        data: Folder with dataset.json, imagesTr and labelsTr (Decathlon or nnU-Net layout).
        output: New folder for the run: checkpoints, curves, report.
        resume: Run folder to continue where it stopped; all settings come from there.
        overwrite: Empty the output folder first if it holds an earlier run.
        recipe: short: AdamW, cosine, for minutes to hours. published: SGD 0.01, poly, 250000 steps.
        steps: Number of optimizer steps.
        minutes: Instead of steps: time budget of the run; becomes steps once a step is timed.
        patch_size: Network input, voxels along superior, posterior, left; e.g. [48,64,48].
        strides: Stem stride and three more, e.g. [[2,2,2],[2,2,2],[2,2,2],[2,2,2]].
        spacing: Voxel size in mm to resample to, same order; [0,0,0] for no resampling.
        preset: Widths: synapse, acdc, lung, tumor, btcv or tiny.
        model_args: Further arguments of the network, e.g. {"dims": [16,32,64,128]}.
        batch_size: Patches per step and process.
        learning_rate: Peak learning rate (short: 0.001, published: 0.01).
        weight_decay: Weight decay (short: 0.01, published: 3e-5).
        augmentation: full (published), light, or none (short: light, published: full).
        mirror: Flip patches at random along all axes (short: no, published: yes).
        foreground: Share of a batch that is centred on a labelled voxel.
        ema: Decay of the averaged weights that are validated and saved; 0 for none.
        fold: Which of the folds is held out for validation.
        folds: Number of folds.
        validate_every: Steps between validations; a tenth of the run if not given.
        save_minutes: Minutes between savings of resume.pt; each validation saves it too.
        seed: Seed of weights, samples, augmentation and dropout.
        accelerator: cpu, cuda, mps, or auto for the best there is.
        devices: Number of processes, one device each.
        precision: 32-true, bf16-mixed, or auto (bf16-mixed where the hardware is fast at it).
        workers: Loader processes; 0 prepares patches between steps; auto if not given.
        cache: Number of cases kept in memory, preprocessed; all if not given.
        report: Write report.html at the end.
    """

    data: Path | None = None
    output: Path | None = None
    resume: Path | None = None
    overwrite: bool = False
    recipe: Literal["short", "published"] = "short"
    steps: int | None = None
    minutes: float | None = None
    patch_size: list[int] | None = None
    strides: list[list[int]] | None = None
    spacing: list[float] | None = None
    preset: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    augmentation: Literal["full", "light", "none"] | None = None
    mirror: bool | None = None
    foreground: float = 0.33
    ema: float | None = None
    fold: int = 0
    folds: int = 5
    validate_every: int | None = None
    save_minutes: float = 5.0
    seed: int = 1
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 1
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    workers: int | None = None
    cache: int | None = None
    report: bool = True


# What a recipe decides where the user did not.
RECIPES = {
    "short": {
        "learning_rate": 1e-3, "weight_decay": 0.01, "augmentation": "light", "mirror": False,
        "ema": 0.99,
    },
    "published": {
        "learning_rate": 1e-2, "weight_decay": 3e-5, "augmentation": "full", "mirror": True,
        "ema": 0.0, "steps": 250_000,
    },
}
# These change where and how fast a run goes on, not what it computes.
RESUMABLE = ("data", "accelerator", "workers", "cache", "save_minutes", "report")


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient became NaN or infinite; names the cases and the saved batch."""


class Interrupted(Exception):
    """Stopped by a signal after resume.pt was written.

    Attributes:
        exit_code: 128 + signal number, as shells report it.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


def deep_supervision_loss(logits: list[torch.Tensor], label: torch.Tensor) -> torch.Tensor:
    """Weighted sum of soft Dice + cross-entropy over the outputs: 4/7, 2/7, 1/7 for three.

    The published loss is CE - Dice; this is CE + (1 - Dice), the same gradient with a value that
    cannot go below zero. As there, the background counts in CE only; Dice sums over the batch.

    Args:
        logits: per output (B, K, *size), the finest first.
        label (B, 1, *patch): float32 class values; coarser outputs see it by nearest neighbour.
    """
    from monai.losses import DiceCELoss

    loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    weights = [0.5**i for i in range(len(logits))]
    total = torch.zeros((), device=label.device)
    for weight, output in zip(weights, logits, strict=True):
        target = label
        if output.shape[2:] != label.shape[2:]:
            target = F.interpolate(label, output.shape[2:], mode="nearest-exact")
        # Softmax and sums over a million voxels need float32 whatever the network ran in.
        total = total + weight / sum(weights) * loss(output.float(), target)
    return total


def learning_rate_at(step: int, total: int | None, peak: float, recipe: str) -> float:
    """Learning rate of a step: warm-up then half a cosine (short), or (1 - t)^0.9 (published).

    total is None while a time budget is being measured, which the warm-up outlasts.
    """
    if recipe == "published":
        # Constant within an "epoch" of 250 steps, as published.
        return peak * (1 - step // 250 * 250 / total) ** 0.9
    warm_up = WARM_UP_STEPS if total is None else max(1, min(WARM_UP_STEPS, total // 10))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))


class _StepSampler(torch.utils.data.Sampler):
    """Sample numbers of this process, batch by batch, from a step on."""

    def __init__(self, start: int, stop: int, batch_size: int, rank: int, world: int):
        self.start, self.stop = start, stop
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            first = (step * self.world + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


def run_train(config: TrainConfig) -> dict:
    """Train as configured, or resume; returns {"best_dice", "steps", "seconds", "output"}.

    Raises:
        FileExistsError: output holds something and neither resume nor overwrite was given.
        NonFiniteLoss: the loss or gradient became NaN or infinite; checkpoints stay as they were.
        Interrupted: SIGINT or SIGTERM, after resume.pt was written.
        ValueError, FileNotFoundError, UnreadableImage: data or options that do not fit.
    """
    config = _resumed(config) if config.resume else config
    return _Run(config).run()


def _resumed(config: TrainConfig) -> TrainConfig:
    """The run folder's own configuration, with what may change taken from the caller."""
    import yaml

    folder = Path(config.resume)
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder} holds no run to resume: {folder}/config.yaml is missing")
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    default = asdict(TrainConfig())
    given = {
        key: value for key, value in asdict(config).items()
        if value != default[key] and key not in ("resume", "output")
    }
    fixed = [k for k in given if k not in RESUMABLE and given[k] != stored.get(k)]
    if fixed:
        raise ValueError(
            f"--resume continues with the settings of {folder}/config.yaml; {', '.join(fixed)} "
            f"cannot change (what can: {', '.join(RESUMABLE)}); start a new run for that"
        )
    given = {key: value for key, value in given.items() if key in RESUMABLE}
    values = {**stored, **given, "output": folder, "resume": folder}
    values["data"] = Path(values["data"])
    return TrainConfig(**values)


class _Run:
    """One training run: data, model, optimizer, and the loop over steps."""

    def __init__(self, config: TrainConfig):
        from lightning_fabric import Fabric

        if config.data is None or config.output is None:
            raise ValueError("train needs --data DIR and --output RUN (or --resume RUN)")
        self.config, self.folder = config, Path(config.output)
        on_gpu = config.accelerator != "cpu" and torch.cuda.is_available()
        precision = config.precision
        if precision == "auto":
            matrix_unit = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16")
            precision = "bf16-mixed" if on_gpu or matrix_unit else "32-true"
        self.fabric = Fabric(
            accelerator=config.accelerator,
            devices=config.devices,
            strategy="ddp" if config.devices > 1 else "auto",
            precision=precision,
        )
        self.fabric.launch()
        self.main = self.fabric.is_global_zero
        if not config.resume and self.main:
            _check_folder(self.folder, config.overwrite)
        recipe = RECIPES[config.recipe]
        self.options = {**asdict(config), **{k: v for k, v in recipe.items()
                                             if getattr(config, k) is None},
                        "precision": precision}
        if config.minutes and config.steps:
            raise ValueError("give --steps or --minutes, not both")
        if config.minutes:
            self.options["steps"] = None
        elif self.options["steps"] is None:
            self.options["minutes"] = 25.0
        self._load_data(on_gpu)
        self._build_model()

    def say(self, text: str) -> None:
        """Print on the main process only, around a progress bar."""
        if self.main:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def _load_data(self, on_gpu: bool) -> None:
        from unetrpp.data import (
            TrainingPatches,
            find_cases,
            read_dataset_info,
            split_cases,
            train_transforms,
        )
        from unetrpp.plan import Plan, propose

        config, plan_file = self.config, self.folder / "plan.json"
        cases = find_cases(config.data)
        if config.resume:
            stored = json.loads(plan_file.read_text())
            self.plan, self.split = Plan.from_dict(stored["plan"]), stored["split"]
            by_name = {case.name: case for case in cases}
            gone = [n for names in self.split.values() for n in names if n not in by_name]
            if gone:
                raise ValueError(f"{config.data} no longer holds case(s) {gone[:3]} of this run")
            training, held_out = ([by_name[n] for n in self.split[k]]
                                  for k in ("training", "validation"))
        else:
            training, held_out = split_cases(cases, config.fold, config.folds)
            given = {key: getattr(config, key) for key in (
                "patch_size", "strides", "spacing", "preset", "model_args", "batch_size")}
            self.plan = propose(training, read_dataset_info(config.data), on_gpu=on_gpu, **given)
            self.split = {"training": [case.name for case in training],
                          "validation": [case.name for case in held_out]}
            for reason in self.plan.reasons:
                self.say(f"  {reason}")
            if self.main:
                self._start_folder()
        self.say(f"{len(training)} cases to train on, {len(held_out)} held out for validation")
        self.held_out = held_out
        self.patches = TrainingPatches(
            training,
            train_transforms(self.plan.preprocessing, self.options["augmentation"],
                             self.options["mirror"]),
            batch_size=self.plan.batch_size,
            seed=config.seed,
            foreground=config.foreground,
            cache_num=config.cache,
            progress=self.main and sys.stderr.isatty(),
        )

    def _start_folder(self) -> None:
        import yaml

        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        stored = {"plan": self.plan.to_dict(), "split": self.split}
        _write_text(self.folder / "plan.json", json.dumps(stored, indent=1) + "\n")
        values = {key: str(value) if isinstance(value, Path) else value
                  for key, value in self.options.items() if key not in ("resume", "overwrite")}
        # Last, because a folder with config.yaml can be resumed.
        _write_text(self.folder / "config.yaml", yaml.safe_dump(values, sort_keys=False))

    def _build_model(self) -> None:
        from torch.optim.swa_utils import AveragedModel

        import unetrpp

        options = self.options
        torch.manual_seed(options["seed"])
        self.model = unetrpp.create_model(**self.plan.model, deep_supervision=True)
        parameters = sum(p.numel() for p in self.model.parameters())
        self.say(f"{parameters / 1e6:.2f} M parameters, on {self.fabric.device} in "
                 f"{options['precision']}")
        if options["recipe"] == "published":
            optimizer = torch.optim.SGD(
                self.model.parameters(), options["learning_rate"], momentum=0.99, nesterov=True,
                weight_decay=options["weight_decay"],
            )
        else:
            # Decay pulls a norm's scale or a temperature towards zero, where it means nothing.
            groups = [
                {"params": [p for p in self.model.parameters() if p.ndim > 1]},
                {"params": [p for p in self.model.parameters() if p.ndim <= 1], "weight_decay": 0},
            ]
            optimizer = torch.optim.AdamW(
                groups, options["learning_rate"], weight_decay=options["weight_decay"], fused=True
            )
        self.step, self.total, self.best, self.elapsed = 0, options["steps"], -1.0, 0.0
        state = None
        if self.config.resume and (self.folder / "resume.pt").is_file():
            state = torch.load(self.folder / "resume.pt", map_location="cpu", weights_only=True)
            self.step, self.total = state["step"], state["total"]
            self.best, self.elapsed = state["best"], state["elapsed"]
            self.model.load_state_dict(state["model"])
        self.network, self.optimizer = self.fabric.setup(self.model, optimizer)
        self.average = None
        if options["ema"]:
            self.average = AveragedModel(
                self.model, multi_avg_fn=self._average_weights, use_buffers=True
            )
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.say(f"resumed after step {self.step}")

    @torch.no_grad()
    def _average_weights(self, averages: list, values: list, _) -> None:
        # A short memory at first, so that the initial weights are soon forgotten.
        keep = min(self.options["ema"], (1 + self.step) / (10 + self.step))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, 1 - keep)
        else:
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)

    def run(self) -> dict:
        """Go through the steps; returns the summary of `run_train`."""
        from tqdm import tqdm

        signals = (signal.SIGINT, signal.SIGTERM)
        self.signal = 0
        previous = {s: signal.signal(s, lambda number, _: setattr(self, "signal", number))
                    for s in signals}
        self.started = time.perf_counter() - self.elapsed
        self.metrics = _Metrics(self.folder, self.step) if self.main else None
        self.bar = tqdm(total=self.total, initial=self.step, unit="step", dynamic_ncols=True,
                        disable=None if self.main else True)
        workers = self.config.workers
        if workers is None:
            # On a CPU, loader processes would only take cores from the network.
            on_cpu = self.fabric.device.type == "cpu"
            workers = 0 if on_cpu else min(8, (os.cpu_count() or 1) // self.fabric.world_size)
        sampler = _StepSampler(self.step, 2**40, self.plan.batch_size, self.fabric.global_rank,
                               self.fabric.world_size)
        loader = torch.utils.data.DataLoader(
            self.patches, batch_sampler=sampler, num_workers=workers,
            pin_memory=self.fabric.device.type == "cuda",
        )
        try:
            self._loop(iter(loader))
        finally:
            self.bar.close()
            if self.metrics:
                self.metrics.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.main and self.config.report:
            from unetrpp.report import write_report

            self.say(f"report: {write_report(self.folder)}")
        return {"best_dice": self.best, "steps": self.step, "seconds": self.elapsed,
                "output": str(self.folder)}

    def _loop(self, batches: Iterator[dict]) -> None:
        saved = time.perf_counter()
        durations: list[float] = []
        while self.total is None or self.step < self.total:
            start = time.perf_counter()
            record = self._train_step(next(batches))
            durations.append(time.perf_counter() - start)
            self.elapsed = time.perf_counter() - self.started
            if self.main:
                self.metrics.write(record)
                self.bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
                self.bar.update()
            if self.total is None and len(durations) == MEASURED_STEPS:
                self._plan_steps(float(np.median(durations[2:])))
            every = self.config.validate_every or (
                max(1, -(-self.total // VALIDATIONS)) if self.total else 0)
            due = bool(every) and (self.step % every == 0 or self.step == self.total)
            if due:
                self._validate()
            stopped = self._agreed_signal()
            if due or stopped or time.perf_counter() - saved >= 60 * self.config.save_minutes:
                self._save_resume()
                saved = time.perf_counter()
            if stopped:
                raise Interrupted(stopped, f"stopped after step {self.step} of {self.total}; "
                                  f"continue with: unetrpp train --resume {self.folder}")

    def _train_step(self, batch: dict) -> dict:
        config, number = self.config, self.step + 1
        # Dropout of this step, the same whether or not the run was interrupted before it.
        seed = np.random.SeedSequence([config.seed, 2, self.step, self.fabric.global_rank])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        rate = learning_rate_at(
            self.step, self.total, self.options["learning_rate"], config.recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        image = batch["image"].to(self.fabric.device, non_blocking=True)  # (B, C, *patch)
        label = batch["label"].to(self.fabric.device, non_blocking=True)  # (B, 1, *patch)
        self.network.train()
        loss = deep_supervision_loss(self.network(image), label)
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(
            self.network, self.optimizer, max_norm=12.0, error_if_nonfinite=False)
        # The norm comes after the processes' gradients are averaged, so all of them stop here.
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            self._stop_non_finite(batch, loss, norm, number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step = number
        return {"step": number, "loss": loss.item(), "learning_rate": rate,
                "grad_norm": norm.item(), "seconds": round(self.elapsed, 2)}

    def _stop_non_finite(self, batch: dict, loss, norm, number: int) -> None:
        rank = f"_rank{self.fabric.global_rank}" if self.fabric.world_size > 1 else ""
        path = self.folder / f"nonfinite_step_{number}{rank}.pt"
        torch.save({**batch, "step": number, "loss": loss.item(), "grad_norm": norm.item()}, path)
        raise NonFiniteLoss(
            f"train: loss {loss.item()}, gradient norm {norm.item()} at step {number}, cases "
            f"{', '.join(batch['name'])}; the batch is in {path}, all checkpoints are from before. "
            "Look at these cases; else try a lower --learning_rate or --precision 32-true"
        )

    def _plan_steps(self, seconds_per_step: float) -> None:
        """Turn the time budget into a number of steps, once and for all."""
        start = time.perf_counter()
        self._validate()
        validation = time.perf_counter() - start
        left = 60 * self.config.minutes if self.config.minutes else 60 * self.options["minutes"]
        left -= time.perf_counter() - self.started + VALIDATIONS * validation
        self.total = self.step + max(1, int(left / seconds_per_step))
        if self.fabric.world_size > 1:
            self.total = int(self.fabric.broadcast(self.total))
        self.bar.reset(self.total)
        self.bar.update(self.step)
        self.say(f"{seconds_per_step:.2f} s per step, {validation:.1f} s per validation: "
                 f"{self.total} steps in {self.options['minutes']:g} minutes")

    def _validate(self) -> None:
        """Score the held-out cases by sliding window; write last/ and, if it is one, best/."""
        from unetrpp.checkpoint import save_checkpoint
        from unetrpp.data import load_case
        from unetrpp.evaluate import dice_per_class
        from unetrpp.predict import predict_volume

        preprocessing = self.plan.preprocessing
        model = self.average.module if self.average is not None else self.model
        classes = {name: value for name, value in preprocessing.labels.items() if value}
        half = self.options["precision"] == "bf16-mixed"
        scores = torch.zeros(len(self.held_out), len(classes), device=self.fabric.device)
        for index in range(self.fabric.global_rank, len(self.held_out), self.fabric.world_size):
            item = load_case(self.held_out[index], preprocessing)
            probability = predict_volume(
                model, item["image"].as_tensor()[None].to(self.fabric.device),
                preprocessing.patch_size, precision="bf16" if half else "fp32")
            dice = dice_per_class(probability[0].argmax(0).cpu().numpy(),
                                  item["label"].as_tensor()[0].numpy(), list(classes.values()))
            scores[index] = torch.tensor(dice)
        if self.fabric.world_size > 1:
            scores = self.fabric.all_reduce(scores, reduce_op="sum")
        if not self.main:
            return
        per_class = dict(zip(classes, scores.mean(0).tolist(), strict=True))
        mean = scores.mean().item()
        self.metrics.write({
            "step": self.step, "val_dice": mean, "val_dice_per_class": per_class,
            "val_dice_per_case": dict(zip(self.split["validation"], scores.mean(1).tolist(),
                                          strict=True)),
            "seconds": round(time.perf_counter() - self.started, 2),
        })
        extra = {"preprocessing": preprocessing.to_dict(), "labels": preprocessing.labels,
                 "split": self.split, "step": self.step, "val_dice": mean}
        save_checkpoint(self.folder / "last", model, extra)
        if mean > self.best:
            self.best = mean
            save_checkpoint(self.folder / "best", model, extra)
        listed = ", ".join(f"{name} {value:.3f}" for name, value in per_class.items())
        self.say(f"step {self.step}: validation Dice {mean:.4f} ({listed}), best {self.best:.4f}")

    def _agreed_signal(self) -> int:
        """The signal that any process got, so that all of them stop after the same step."""
        if self.fabric.world_size == 1:
            return self.signal
        number = torch.tensor(float(self.signal), device=self.fabric.device)
        return int(self.fabric.all_reduce(number, reduce_op="max"))

    def _save_resume(self) -> None:
        if not self.main:
            return
        state = {
            "step": self.step, "total": self.total, "best": self.best, "elapsed": self.elapsed,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
        }
        temporary = self.folder / "resume.pt.tmp"
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / "resume.pt")


class _Metrics:
    """metrics.jsonl, and TensorBoard where installed; what came after step `start` is dropped."""

    def __init__(self, folder: Path, start: int):
        path = folder / "metrics.jsonl"
        kept = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            # A killed run may leave half a line.
            if line.endswith("}") and json.loads(line)["step"] <= start:
                kept.append(line + "\n")
        _write_text(path, "".join(kept))
        self.file = open(path, "a")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)
        except ImportError:
            self.board = None

    def write(self, record: dict) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board is not None:
            for key, value in record.items():
                if isinstance(value, float) and key != "seconds":
                    self.board.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is an earlier run and may be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} is not empty; continue that run with --resume {folder}, replace it "
            "with --overwrite, or name another folder"
        )
    if not (folder / "plan.json").is_file():
        raise FileExistsError(f"{folder} is not an earlier run, so --overwrite leaves it alone")


def _write_text(path: Path, text: str) -> None:
    """Replace a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
