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

import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from unetrpp.files import read_json, replacing, write_json, write_text
from unetrpp.losses import deep_supervision_loss
from unetrpp.run_folder import Metrics, check_folder
from unetrpp.train_config import TrainConfig, is_decayed, resolved, resumed

__all__ = ["Interrupted", "NonFiniteLoss", "TrainConfig", "run_train"]

# Steps after which the time of a step is known well enough to turn minutes into steps.
MEASURED_STEPS = 12
VALIDATIONS = 10


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


def learning_rate_at(
    step: int, total: int | None, peak: float, schedule: str, warm_up: int
) -> float:
    """Learning rate of a step.

    poly is peak (1 - t)^0.9, t the share of the run, constant within an "epoch" of 250 steps as
    published. The others rise over warm_up steps, a tenth of the run at most, then follow half a
    cosine: to zero at the end (cosine), or to 0.06 peak over half of the run, then once more from
    the peak (restarts, as SegFormer3D's). total is None while a time budget is being measured.
    """
    if schedule == "poly":
        return peak * (1 - step // 250 * 250 / (total or math.inf)) ** 0.9
    if total is not None:
        warm_up = max(1, min(warm_up, total // 10))
    if step < warm_up or total is None:
        return peak * min(1.0, (step + 1) / max(1, warm_up))
    if schedule == "restarts":
        period = max(1, total // 2)
        t, floor = (step - warm_up) % period / period, 0.06
    else:
        t, floor = (step - warm_up) / max(1, total - warm_up), 0.0
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t)))


def _optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW, with decay on the parameters that `is_decayed` names."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (decayed if is_decayed(config, name, parameter) else kept).append(parameter)
    groups: list[dict] = [{"params": decayed}]
    if kept:
        groups.append({"params": kept, "weight_decay": 0})
    options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.99, nesterov=True, **options)
    return torch.optim.AdamW(groups, betas=tuple(config.betas), fused=True, **options)


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
    """Train as configured, or resume.

    Returns:
        {"best_dice", "steps", "seconds", "output", "is_main"}; with several devices every process
        returns, one of them with is_main True.

    Raises:
        FileExistsError: output holds something and neither resume nor overwrite was given.
        NonFiniteLoss: the loss or gradient became NaN or infinite; checkpoints stay as they were.
        Interrupted: SIGINT or SIGTERM, after resume.pt was written.
        ValueError, FileNotFoundError, UnreadableImage: data or options that do not fit.
    """
    config = resumed(config) if config.resume else resolved(config)
    return _Run(config).run()


class _Run:
    """One training run: data, model, optimizer, and the loop over steps."""

    def __init__(self, config: TrainConfig):
        from lightning_fabric import Fabric

        # Its notes on devices and precision repeat what is printed here.
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        self.config, self.folder = config, Path(config.output)
        self.fabric = Fabric(
            accelerator=config.accelerator,
            devices=config.devices,
            strategy="ddp" if config.devices > 1 else "auto",
            precision=config.precision,
        )
        self.fabric.launch()
        self.main = self.fabric.is_global_zero
        if not config.resume and self.main:
            check_folder(self.folder, config.overwrite)
        self._load_data()
        self._build_model()
        if not config.resume and self.main:
            self._start_folder()

    def say(self, text: str) -> None:
        """Print on the main process only, around a progress bar."""
        if self.main:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def _load_data(self) -> None:
        from unetrpp.dataset import find_cases, read_dataset_info, split_cases
        from unetrpp.plan import Plan, propose
        from unetrpp.sampling import TrainingPatches, train_transforms

        config, plan_file = self.config, self.folder / "plan.json"
        cases = find_cases(config.data)
        if config.resume:
            stored = read_json(plan_file)
            self.plan, self.split = Plan.from_dict(stored["plan"]), stored["split"]
            by_name = {case.name: case for case in cases}
            gone = [n for names in self.split.values() for n in names if n not in by_name]
            if gone:
                raise ValueError(f"{config.data} no longer holds case(s) {gone[:3]} of this run")
            training, held_out = (
                [by_name[n] for n in self.split[k]] for k in ("training", "validation")
            )
        else:
            training, held_out = split_cases(cases, config.fold, config.folds)
            given = {
                key: getattr(config, key)
                for key in (
                    "model",
                    "patch_size",
                    "strides",
                    "spacing",
                    "preset",
                    "model_args",
                    "batch_size",
                )
            }
            self.plan = propose(
                training,
                read_dataset_info(config.data),
                on_gpu=self.fabric.device.type == "cuda",
                **given,
            )
            self.split = {
                "training": [case.name for case in training],
                "validation": [case.name for case in held_out],
            }
            for reason in self.plan.reasons:
                self.say(f"  {reason}")
        self.say(f"{len(training)} cases to train on, {len(held_out)} held out for validation")
        self.held_out = held_out
        self.patches = TrainingPatches(
            training,
            train_transforms(self.plan.preprocessing, self.config.augmentation, self.config.mirror),
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
        write_json(self.folder / "plan.json", stored)
        values = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in asdict(self.config).items()
            if key not in ("resume", "overwrite")
        }
        # Last, because a folder with config.yaml can be resumed.
        write_text(self.folder / "config.yaml", yaml.safe_dump(values, sort_keys=False))

    def _build_model(self) -> None:
        from torch.optim.swa_utils import AveragedModel

        import unetrpp

        config = self.config
        torch.manual_seed(config.seed)
        self.model = unetrpp.create_model(**self.plan.model)
        self._supervise_deeply(True)
        if self.fabric.device.type == "cpu":
            # A step takes 0.85 times as long as with channels first (32x48x32, one thread).
            self.model.to(memory_format=torch.channels_last_3d)
        parameters = sum(p.numel() for p in self.model.parameters())
        label = " (a reconstruction)" if self.model.is_reconstruction else ""
        self.say(
            f"{type(self.model).__name__}{label}: {parameters / 1e6:.2f} M parameters, on "
            f"{self.fabric.device} in {config.precision}"
        )
        optimizer = _optimizer(self.model, config)
        self.step, self.total, self.best, self.elapsed = 0, config.steps, -1.0, 0.0
        state = None
        if config.resume and (self.folder / "resume.pt").is_file():
            state = torch.load(self.folder / "resume.pt", map_location="cpu", weights_only=True)
            self.step, self.total = state["step"], state["total"]
            self.best, self.elapsed = state["best"], state["elapsed"]
            self.model.load_state_dict(state["model"])
        self.network, self.optimizer = self.fabric.setup(self.model, optimizer)
        self.average = None
        if config.ema:
            self.average = AveragedModel(
                self.model, multi_avg_fn=self._average_weights, use_buffers=True
            )
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.say(f"resumed after step {self.step}")
        elif config.resume:
            self.say("no resume.pt: starting again at step 0")

    def _supervise_deeply(self, switch: bool, model: torch.nn.Module | None = None) -> None:
        """Switch the coarser outputs for training on or off, where the network has some."""
        model = model or self.model
        if model.has_deep_supervision:
            model.deep_supervision = switch

    @torch.no_grad()
    def _average_weights(self, averages: list, values: list, _) -> None:
        # A short memory at first, so that the initial weights are soon forgotten.
        keep = min(self.config.ema, (1 + self.step) / (10 + self.step))
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
        previous = {
            s: signal.signal(s, lambda number, _: setattr(self, "signal", number)) for s in signals
        }
        self.started = time.perf_counter() - self.elapsed
        self.metrics = Metrics(self.folder, self.step) if self.main else None
        self.bar = tqdm(
            total=self.total,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            disable=None if self.main else True,
        )
        workers = self.config.workers
        if workers is None:
            # On a CPU, loader processes would only take cores from the network.
            on_cpu = self.fabric.device.type == "cpu"
            workers = 0 if on_cpu else min(8, (os.cpu_count() or 1) // self.fabric.world_size)
        sampler = _StepSampler(
            self.step, 2**40, self.plan.batch_size, self.fabric.global_rank, self.fabric.world_size
        )
        loader = torch.utils.data.DataLoader(
            self.patches,
            batch_sampler=sampler,
            num_workers=workers,
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

            try:
                self.say(f"report: {write_report(self.folder)}")
            except Exception as error:  # the training itself is done and saved
                self.say(
                    f"the training is finished, but its report could not be written: {error}; "
                    f"write it later with: unetrpp report {self.folder}"
                )
        return {
            "best_dice": self.best,
            "steps": self.step,
            "seconds": self.elapsed,
            "output": str(self.folder),
            "is_main": self.main,
        }

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
            planned = self.total is None and len(durations) == MEASURED_STEPS
            if planned:
                self._plan_steps(float(np.median(durations[2:])))
            due = self._validation_is_due()
            if due:
                self._validate()
            stopped = self._agreed_signal()
            late = time.perf_counter() - saved >= 60 * self.config.save_minutes
            # Also once the total is known, which a killed run could not measure alike again.
            if due or planned or stopped or late:
                self._save_resume()
                saved = time.perf_counter()
            if stopped:
                raise Interrupted(
                    stopped,
                    f"stopped after step {self.step} of {self.total}; "
                    f"continue with: unetrpp train --resume {self.folder}",
                )

    def _validation_is_due(self) -> bool:
        if self.total is None:
            return False
        every = self.config.validate_every or min(-(-self.total // VALIDATIONS), 5000)
        return self.step % every == 0 or self.step == self.total

    def _train_step(self, batch: dict) -> dict:
        config, number = self.config, self.step + 1
        # Dropout of this step, the same whether or not the run was interrupted before it.
        seed = np.random.SeedSequence([config.seed, 2, self.step, self.fabric.global_rank])
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
        rate = learning_rate_at(
            self.step, self.total, config.learning_rate, config.schedule, config.warm_up
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        image = batch["image"].to(self.fabric.device, non_blocking=True)  # (B, C, *patch)
        if self.fabric.device.type == "cpu":
            image = image.contiguous(memory_format=torch.channels_last_3d)
        label = batch["label"].to(self.fabric.device, non_blocking=True)  # (B, 1, *patch)
        self.network.train()
        loss = deep_supervision_loss(self.network(image), label, config.loss)
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(
            self.network, self.optimizer, max_norm=12.0, error_if_nonfinite=False
        )
        # The norm comes after the processes' gradients are averaged, so all of them stop here.
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            self._stop_non_finite(batch, loss, norm, number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step = number
        return {
            "step": number,
            "loss": loss.item(),
            "learning_rate": rate,
            "grad_norm": norm.item(),
            "seconds": round(self.elapsed, 2),
        }

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
        left = 60 * self.config.minutes
        left -= time.perf_counter() - self.started + VALIDATIONS * validation
        self.total = self.step + max(1, int(left / seconds_per_step))
        if self.fabric.world_size > 1:
            self.total = int(self.fabric.broadcast(self.total))
        self.bar.reset(self.total)
        self.bar.update(self.step)
        self.say(
            f"{seconds_per_step:.2f} s per step, {validation:.1f} s per validation: "
            f"{self.total} steps in {self.config.minutes:g} minutes"
        )

    def _validate(self) -> None:
        """Score the held-out cases by sliding window; write last/ and, if it is one, best/."""
        model = self.average.module if self.average is not None else self.model
        # Scored and saved as it predicts, with one output; the file has the other heads' weights.
        self._supervise_deeply(False, model)
        try:
            self._score_and_save(model)
        finally:
            self._supervise_deeply(True, model)

    def _score_and_save(self, model: torch.nn.Module) -> None:
        from unetrpp.checkpoint import save_checkpoint
        from unetrpp.evaluate import dice_per_class
        from unetrpp.predict import predict_volume
        from unetrpp.preprocessing import load_case

        preprocessing = self.plan.preprocessing
        classes = {name: value for name, value in preprocessing.labels.items() if value}
        half = self.config.precision == "bf16-mixed"
        scores = torch.zeros(len(self.held_out), len(classes), device=self.fabric.device)
        for index in range(self.fabric.global_rank, len(self.held_out), self.fabric.world_size):
            item = load_case(self.held_out[index], preprocessing)
            probability = predict_volume(
                model,
                item["image"].as_tensor()[None].to(self.fabric.device),
                preprocessing.patch_size,
                precision="bf16" if half else "fp32",
            )
            dice = dice_per_class(
                probability[0].argmax(0).cpu().numpy(),
                item["label"].as_tensor()[0].numpy(),
                list(classes.values()),
            )
            scores[index] = torch.tensor(dice)
        if self.fabric.world_size > 1:
            scores = self.fabric.all_reduce(scores, reduce_op="sum")
        if not self.main:
            return
        per_class = dict(zip(classes, scores.mean(0).tolist(), strict=True))
        mean = scores.mean().item()
        self.metrics.write(
            {
                "step": self.step,
                "val_dice": mean,
                "val_dice_per_class": per_class,
                "val_dice_per_case": dict(
                    zip(self.split["validation"], scores.mean(1).tolist(), strict=True)
                ),
                "seconds": round(time.perf_counter() - self.started, 2),
            }
        )
        extra = {
            "preprocessing": preprocessing.to_dict(),
            "labels": preprocessing.labels,
            "split": self.split,
            "step": self.step,
            "val_dice": mean,
        }
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
            "step": self.step,
            "total": self.total,
            "best": self.best,
            "elapsed": self.elapsed,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
        }
        with replacing(self.folder / "resume.pt") as partial:
            torch.save(state, partial)
