"""Training: a folder of labelled volumes -> a checkpoint, its scores and its curves.

  run_train(TrainConfig) writes into the run folder
    config.yaml  plan.json     the full configuration; what was proposed from the data, the split
    best/  last/               checkpoints for prediction (weights as validated)
    resume.pt                  everything the next step needs, replaced atomically
    metrics.jsonl              one line per step {"step", "loss", ...} and per validation
                               {"step", "val_dice", "val_dice_per_class", ...}

Repeatable by construction: samples, augmentation and dropout of step s are functions of
(seed, s), never of what ran before, so a killed and resumed run ends with the same bits.
Data come from train_data.py, network and optimizer from train_model.py; here is the loop.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unetrpp.extras import names_extra
from unetrpp.run_folder import Metrics, check_folder, save_state, start_folder
from unetrpp.train_config import ResolvedConfig, TrainConfig, resolved, resumed
from unetrpp.train_model import NonFiniteLoss, Trainee

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from unetrpp.train_data import TrainingData

__all__ = ["Interrupted", "NonFiniteLoss", "TrainConfig", "run_train"]

# Steps after which the time of a step is known well enough to turn minutes into steps; the first
# ones, slower than the rest, do not count.
MEASURED_STEPS = 12
SLOW_STEPS = 2
# Validations of a run where the user does not say how many, and the most steps between two.
VALIDATIONS = 10
MOST_STEPS_BETWEEN = 5000


class Interrupted(Exception):
    """Stopped by a signal after resume.pt was written.

    Attributes:
        exit_code: 128 + signal number, as shells report it.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


@names_extra
def run_train(config: TrainConfig, *, before_step: Callable[[int], None] | None = None) -> dict:
    """Train as configured, or resume.

    Args:
        config: options of the run.
        before_step: called with the number of steps taken so far, before each step. An exception
            that it raises ends the run as any other would.

    Returns:
        {"best_dice", "steps", "seconds", "output", "is_main"}; with several devices every process
        returns, one of them with is_main True.

    Raises:
        FileExistsError: output holds something and neither resume nor overwrite was given.
        NonFiniteLoss: the loss or gradient became NaN or infinite; checkpoints stay as they were.
        Interrupted: SIGINT or SIGTERM, after resume.pt was written.
        ValueError, FileNotFoundError, UnreadableImage: data or options that do not fit.
    """
    from unetrpp.train_data import load_data

    settings = resumed(config) if config.resume else resolved(config)
    fabric = _launch(settings)
    is_new = not settings.resume and fabric.is_global_zero
    if is_new:
        check_folder(settings.output, settings.overwrite)

    def say(text: str) -> None:
        if fabric.is_global_zero:
            _say(text)

    data = load_data(settings, fabric, say)
    state = _read_state(settings) if settings.resume else None
    trainee = Trainee(settings, data.plan.model, fabric, state)
    say(trainee.describe())
    if state is not None:
        say(f"resumed after step {trainee.step}")
    elif settings.resume:
        say("no resume.pt: starting again at step 0")
    if is_new:
        # Only now, since all that can be wrong with data and options has been found.
        values = {k: v for k, v in asdict(settings).items() if k not in ("resume", "overwrite")}
        start_folder(settings.output, values, data.plan.to_dict(), data.split)
    loop = Loop(settings, fabric, data, trainee, say, state=state, before_step=before_step)
    loop.run()
    if settings.report and fabric.is_global_zero:
        _write_report(settings, say)
    return {
        "best_dice": loop.best,
        "steps": trainee.step,
        "seconds": loop.elapsed,
        "output": str(settings.output),
        "is_main": fabric.is_global_zero,
    }


class Loop:
    """The steps of a run, with its metrics, validations and files.

    Args:
        config, fabric, data, trainee: the run's.
        say: prints a line, on the main process only.
        state: what resume.pt held, to go on from there.
        before_step: as in `run_train`.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        fabric: Fabric,
        data: TrainingData,
        trainee: Trainee,
        say: Callable[[str], None],
        *,
        state: Mapping[str, Any] | None = None,
        before_step: Callable[[int], None] | None = None,
    ) -> None:
        self.config, self.fabric, self.data, self.trainee = config, fabric, data, trainee
        self.say, self.before_step = say, before_step
        self.total, self.best, self.elapsed = config.steps, -1.0, 0.0
        if state is not None:
            self.total, self.best, self.elapsed = state["total"], state["best"], state["elapsed"]
        self.started = 0.0
        self.metrics: Metrics | None = None

    def run(self) -> None:
        """Go through the steps.

        Raises:
            Interrupted, NonFiniteLoss: see `run_train`.
        """
        from tqdm import tqdm

        from unetrpp.train_data import batches

        self.started = time.perf_counter() - self.elapsed
        if self.fabric.is_global_zero:
            self.metrics = Metrics(self.config.output, self.trainee.step)
        self.bar = tqdm(
            total=self.total,
            initial=self.trainee.step,
            unit="step",
            dynamic_ncols=True,
            disable=None if self.fabric.is_global_zero else True,
        )
        try:
            with _catching_signals() as signals:
                self._take_steps(
                    batches(self.data, self.config, self.fabric, self.trainee.step), signals
                )
        finally:
            self.bar.close()
            if self.metrics is not None:
                self.metrics.close()

    def _take_steps(self, batches: Iterator[dict], signals: list[int]) -> None:
        saved = time.perf_counter()
        durations: list[float] = []
        while self.total is None or self.trainee.step < self.total:
            if self.before_step is not None:
                self.before_step(self.trainee.step)
            start = time.perf_counter()
            record = self.trainee.take_step(next(batches), self.total)
            durations.append(time.perf_counter() - start)
            self._write({**record, "seconds": round(self.elapsed, 2)})
            self.elapsed = time.perf_counter() - self.started
            self.bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
            self.bar.update()
            planned = self.total is None and len(durations) == MEASURED_STEPS
            if planned:
                self._plan_steps(float(np.median(durations[SLOW_STEPS:])))
            due = self._validation_is_due()
            if due:
                self.validate()
            stopped = self._agreed(signals)
            late = time.perf_counter() - saved >= 60 * self.config.save_minutes
            # Also once the total is known, which a killed run could not measure alike again.
            if due or planned or stopped or late:
                self._save_state()
                saved = time.perf_counter()
            if stopped:
                raise Interrupted(
                    stopped,
                    f"stopped after step {self.trainee.step} of {self.total}; "
                    f"continue with: unetrpp train --resume {self.config.output}",
                )

    def _write(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(record)

    def _validation_is_due(self) -> bool:
        if self.total is None:
            return False
        every = self.config.validate_every or min(-(-self.total // VALIDATIONS), MOST_STEPS_BETWEEN)
        return self.trainee.step % every == 0 or self.trainee.step == self.total

    def _plan_steps(self, seconds_per_step: float) -> None:
        """Turn the time budget into a number of steps, once and for all."""
        minutes = self.config.minutes or 0.0
        start = time.perf_counter()
        self.validate()
        validation = time.perf_counter() - start
        left = 60 * minutes - (time.perf_counter() - self.started + VALIDATIONS * validation)
        self.total = self.trainee.step + max(1, int(left / seconds_per_step))
        if self.fabric.world_size > 1:
            self.total = int(self.fabric.broadcast(self.total))
        self.bar.reset(self.total)
        self.bar.update(self.trainee.step)
        self.say(
            f"{seconds_per_step:.2f} s per step, {validation:.1f} s per validation: "
            f"{self.total} steps in {minutes:g} minutes"
        )

    def validate(self) -> None:
        """Score the held-out cases by sliding window; write last/ and, if it is one, best/."""
        # Scored and saved as it predicts, with one output; the file has the other heads' weights.
        with self.trainee.as_it_predicts() as model:
            scores = _score(model, self.data, self.fabric, self.config.precision)
            if self.fabric.is_global_zero:
                self._record_scores(model, scores)

    def _record_scores(self, model: torch.nn.Module, scores: torch.Tensor) -> None:
        """scores (cases, classes): Dice of the held-out cases."""
        from unetrpp.checkpoint import save_checkpoint

        preprocessing, step = self.data.plan.preprocessing, self.trainee.step
        classes = [name for name, value in preprocessing.labels.items() if value]
        per_class = dict(zip(classes, scores.mean(0).tolist(), strict=True))
        per_case = dict(zip(self.data.split["validation"], scores.mean(1).tolist(), strict=True))
        mean = scores.mean().item()
        self._write(
            {
                "step": step,
                "val_dice": mean,
                "val_dice_per_class": per_class,
                "val_dice_per_case": per_case,
                "seconds": round(time.perf_counter() - self.started, 2),
            }
        )
        extra = {
            "preprocessing": preprocessing.to_dict(),
            "labels": preprocessing.labels,
            "split": self.data.split,
            "step": step,
            "val_dice": mean,
        }
        save_checkpoint(self.config.output / "last", model, extra)
        if mean > self.best:
            self.best = mean
            save_checkpoint(self.config.output / "best", model, extra)
        listed = ", ".join(f"{name} {value:.3f}" for name, value in per_class.items())
        self.say(f"step {step}: validation Dice {mean:.4f} ({listed}), best {self.best:.4f}")

    def _agreed(self, signals: list[int]) -> int:
        """The signal that any process got, so that all of them stop after the same step."""
        number = signals[-1] if signals else 0
        if self.fabric.world_size == 1:
            return number
        return int(_reduced(self.fabric, torch.tensor(float(number)), "max"))

    def _save_state(self) -> None:
        if not self.fabric.is_global_zero:
            return
        state = {
            "total": self.total,
            "best": self.best,
            "elapsed": self.elapsed,
            **self.trainee.state_dict(),
        }
        save_state(self.config.output / "resume.pt", state)


def _launch(config: ResolvedConfig) -> Fabric:
    from lightning_fabric import Fabric

    # Its notes on devices and precision repeat what is printed here.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=config.devices,
        strategy="ddp" if config.devices > 1 else "auto",
        precision=config.precision,
    )
    fabric.launch()
    return fabric


def _say(text: str) -> None:
    """Print around a progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def _read_state(config: ResolvedConfig) -> dict[str, Any] | None:
    file = config.output / "resume.pt"
    return torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else None


@contextmanager
def _catching_signals() -> Iterator[list[int]]:
    """Yield the list that SIGINT and SIGTERM go to, instead of ending the process."""
    caught: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: caught.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _score(
    model: torch.nn.Module, data: TrainingData, fabric: Fabric, precision: str
) -> torch.Tensor:
    """Dice (cases, classes) of the held-out cases, each by one of the processes."""
    from unetrpp.evaluate import dice_per_class
    from unetrpp.predict import predict_volume
    from unetrpp.preprocessing import load_case

    preprocessing = data.plan.preprocessing
    values = [value for value in preprocessing.labels.values() if value]
    scores = torch.zeros(len(data.held_out), len(values), device=fabric.device)
    for index in range(fabric.global_rank, len(data.held_out), fabric.world_size):
        item = load_case(data.held_out[index], preprocessing)
        probability = predict_volume(
            model,
            item["image"].as_tensor()[None].to(fabric.device),
            preprocessing.patch_size,
            precision="bf16" if precision == "bf16-mixed" else "fp32",
        )
        labels = probability[0].argmax(0).cpu().numpy()
        truth = item["label"].as_tensor()[0].numpy()
        scores[index] = torch.tensor(dice_per_class(labels, truth, values))
    return _reduced(fabric, scores, "sum") if fabric.world_size > 1 else scores


def _reduced(fabric: Fabric, value: torch.Tensor, operation: str) -> torch.Tensor:
    result = fabric.all_reduce(value.to(fabric.device), reduce_op=operation)
    assert isinstance(result, torch.Tensor)  # what goes in is one
    return result


def _write_report(config: ResolvedConfig, say: Callable[[str], None]) -> None:
    from unetrpp.report import write_report

    try:
        say(f"report: {write_report(config.output)}")
    except Exception as error:  # the training itself is done and saved
        say(
            f"the training is finished, but its report could not be written: {error}; "
            f"write it later with: unetrpp report {config.output}"
        )
