"""Training: a folder of labelled volumes -> a checkpoint, its scores and its curves.

  run_train(TrainConfig) writes into the run folder
    config.yaml  plan.json     the full configuration; what was proposed from the data, the split
    best/  last/               checkpoints for prediction (weights as validated)
    resume.pt                  everything the next step needs, replaced atomically
    metrics.jsonl              one line per step {"step", "loss", ...} and per validation
                               {"step", "val_dice", "val_dice_per_class", ...}

Repeatable by construction: samples, augmentation and dropout of step s are functions of
(seed, s), never of what ran before, so a killed and resumed run ends with the same bits.
Data come from train_data.py, network and optimizer from train_model.py, what several processes
and signals need from processes.py; here is the loop.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unetrpp.extras import names_extra
from unetrpp.folder_lock import held
from unetrpp.processes import Signals, agreed, launch, reduced
from unetrpp.run_folder import (
    CONFIG,
    STATE,
    Metrics,
    check_folder,
    read_state,
    remove_partial_files,
    save_state,
    start_folder,
)
from unetrpp.train_config import (
    ResolvedConfig,
    TrainConfig,
    fixed_options,
    resolved,
    resumed,
)
from unetrpp.train_model import NonFiniteLoss, Trainee

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from unetrpp.train_data import TrainingData

__all__ = ["Interrupted", "NonFiniteLoss", "TrainConfig", "run_train", "say"]

# Steps after which the time of a step is known well enough to turn minutes into steps; the first
# ones, slower than the rest, do not count.
MEASURED_STEPS = 12
SLOW_STEPS = 2
# Validations of a run where the user does not say how many, and the most steps between two.
VALIDATIONS = 10
MOST_STEPS_BETWEEN = 5000
# Of a time budget: what validations may take of it. A short one has fewer of them.
VALIDATION_SHARE = 0.3


class Interrupted(Exception):
    """Stopped by a signal after resume.pt was written.

    Attributes:
        exit_code: 128 + signal number, as shells report it.
        is_main: whether this is the process that speaks for all of them.
    """

    def __init__(self, signum: int, message: str, is_main: bool = True):
        super().__init__(message)
        self.exit_code = 128 + signum
        self.is_main = is_main


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
        FileExistsError: output holds something and neither resume nor overwrite was given; it holds
            more than a run writes; or another run is at work in it.
        NonFiniteLoss: the loss or gradient became NaN or infinite; checkpoints stay as they were.
        Interrupted: SIGINT, SIGTERM or SIGHUP, after resume.pt was written.
        OSError: a file could not be written; resume.pt and the checkpoints stay as they were.
        ValueError, FileNotFoundError, UnreadableImage: data, options or files of the run that do
            not fit.
    """
    settings = resumed(config) if config.resume else resolved(config)
    fabric = launch(settings)

    def say_once(text: str) -> None:
        if fabric.is_global_zero:
            say(text)

    with held(settings.output, say_once) if fabric.is_global_zero else nullcontext():
        return _train(settings, fabric, say_once, before_step)


def _train(
    settings: ResolvedConfig,
    fabric: Fabric,
    say: Callable[[str], None],
    before_step: Callable[[int], None] | None,
) -> dict:
    from unetrpp.train_data import load_data

    is_new = not settings.resume and fabric.is_global_zero
    if is_new:
        check_folder(settings.output, settings.overwrite)
    elif fabric.is_global_zero:
        remove_partial_files(settings.output)
    state = read_state(settings.output) if settings.resume else None
    data = load_data(settings, fabric, say)
    has_ignored = data.plan.preprocessing.ignore is not None
    trainee = Trainee(settings, data.plan.model, fabric, has_ignored=has_ignored)
    say(trainee.describe())
    if state is not None:
        _go_on(trainee, state, settings, say)
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


def _go_on(
    trainee: Trainee, state: Mapping[str, Any], settings: ResolvedConfig, say: Callable[[str], None]
) -> None:
    now_fixed, before_fixed = fixed_options(settings), state.get("options") or {}
    for name, value in before_fixed.items():
        if now_fixed.get(name, value) != value:
            raise ValueError(
                f"{settings.output / CONFIG}: {name} is {now_fixed[name]}, and {STATE} is of a run "
                f"with {value}; the settings of a run cannot change: put {value} back, or start a "
                "new run"
            )
    try:
        trainee.load_state_dict(state)
    except ValueError as error:
        raise ValueError(
            f"{settings.output / STATE}: {error}; restore it from a copy, or delete it and the run "
            "starts again at step 0"
        ) from error
    say(f"resumed after step {trainee.step}")
    before, now = state.get("machine"), trainee.machine()
    if before is not None and before != now:
        say(f"it ran on {before} and goes on on {now}, so not to the same bits")


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
        # Whether the validation after the last step is to come: a run may end in the midst of it.
        self.due = False
        self.validations, self.validated = VALIDATIONS, 0  # how many, and the step of the last one
        if state is not None:
            self.total, self.best, self.elapsed = state["total"], state["best"], state["elapsed"]
            self.due, self.validations = state["due"], state["validations"]
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
            self.metrics = Metrics(
                self.config.output, self.trainee.step, due=self.due, say=self.say
            )
        self.bar = tqdm(
            total=self.total,
            initial=self.trainee.step,
            unit="step",
            dynamic_ncols=True,
            disable=None if self.fabric.is_global_zero else True,
        )
        resume = f"unetrpp train --resume {self.config.output}"
        try:
            with Signals(self.fabric.is_global_zero, resume) as signals:
                self._take_steps(
                    batches(self.data, self.config, self.fabric, self.trainee.step), signals
                )
        finally:
            self.bar.close()
            if self.metrics is not None:
                self.metrics.close()

    def _take_steps(self, batches: Iterator[dict], signals: Signals) -> None:
        if self.due:
            self._validate_and_save(signals)
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
            if self.total is None and len(durations) == MEASURED_STEPS:
                self._save_state()
                signals.doing = "a validation"
                self._plan_steps(float(np.median(durations[SLOW_STEPS:])))
                signals.doing = "this step"
                # Again, since a killed run could not measure the total alike.
                self._save_state()
                saved = time.perf_counter()
            if self._validation_is_due():
                self._validate_and_save(signals)
                saved = time.perf_counter()
            stopped = agreed(self.fabric, signals.number)
            late = time.perf_counter() - saved >= 60 * self.config.save_minutes
            if stopped or late:
                self._save_state()
                saved = time.perf_counter()
            if stopped:
                # Until it is saved: whoever ends first takes the others along.
                self.fabric.barrier()
                raise Interrupted(
                    stopped,
                    f"stopped after step {self.trainee.step} of {self.total}; "
                    f"continue with: unetrpp train --resume {self.config.output}",
                    self.fabric.is_global_zero,
                )

    def _validate_and_save(self, signals: Signals) -> None:
        """Validate; saved before it, too, so that nothing is lost if it is ended in its midst."""
        self.due = True
        self._save_state()
        signals.doing = f"the validation on {len(self.data.held_out)} case(s)"
        self.validate()
        signals.doing, self.due = "this step", False
        self._save_state()

    def _write(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(record)

    def _validation_is_due(self) -> bool:
        step = self.trainee.step
        if self.total is None or step == self.validated:
            return False
        every = self.config.validate_every or min(
            -(-self.total // self.validations), MOST_STEPS_BETWEEN
        )
        return step % every == 0 or step == self.total

    def _plan_steps(self, seconds_per_step: float) -> None:
        """Turn the time budget into a number of steps, once and for all."""
        minutes = self.config.minutes or 0.0
        start = time.perf_counter()
        self.validate()
        validation = time.perf_counter() - start
        left = 60 * minutes - (time.perf_counter() - self.started)
        self.validations, steps = _within(
            left, seconds_per_step, validation, self.config.validate_every
        )
        self.total = self.trainee.step + max(1, steps)
        if self.fabric.world_size > 1:
            self.total, self.validations = self.fabric.broadcast((self.total, self.validations))
        self.bar.reset(self.total)
        self.bar.update(self.trainee.step)
        self.say(
            f"{seconds_per_step:.2f} s per step, {validation:.1f} s per validation: "
            f"{self.total} steps in {minutes:g} minutes"
        )
        if steps < MEASURED_STEPS:
            self.say(
                f"{minutes:g} minutes are too few to learn from this data; start anew with "
                f"--minutes {math.ceil(2 * minutes)} or more, or with --steps"
            )

    def validate(self) -> None:
        """Score the held-out cases by sliding window; write last/ and, if it is one, best/."""
        self.validated = self.trainee.step
        # Scored and saved as it predicts, with one output; the file has the other heads' weights.
        with self.trainee.as_it_predicts() as model:
            scores = _score(model, self.data, self.fabric, self.config)
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
            "labels": preprocessing.named_labels,
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

    def _save_state(self) -> None:
        if not self.fabric.is_global_zero:
            return
        state = {
            "total": self.total,
            "best": self.best,
            "elapsed": self.elapsed,
            "due": self.due,
            "validations": self.validations,
            "machine": self.trainee.machine(),
            "options": fixed_options(self.config),
            **self.trainee.state_dict(),
        }
        save_state(self.config.output / STATE, state)


def _within(seconds: float, step: float, validation: float, every: int | None) -> tuple[int, int]:
    """(validations, steps) that a time budget allows; no steps where it allows none.

    Args:
        step, validation: seconds that each takes.
        every: steps between two validations, where the user says how many.
    """
    # A long run has more validations than VALIDATIONS, as MOST_STEPS_BETWEEN says.
    with_all = step + validation / (every or MOST_STEPS_BETWEEN)
    count = max(1, min(VALIDATIONS, int(VALIDATION_SHARE * seconds / max(validation, 1e-6))))
    steps = (seconds - validation) / with_all
    if every is None:
        steps = min(steps, (seconds - count * validation) / step)
    return count, max(0, int(steps))


def say(text: str) -> None:
    """Print around a progress bar; a terminal, pipe or log that takes no words ends no run."""
    from tqdm import tqdm

    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        # What is left in the buffer would fail again, here and at the end of the program.
        with open(os.devnull, "w", encoding="utf-8") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


def _score(
    model: torch.nn.Module, data: TrainingData, fabric: Fabric, config: ResolvedConfig
) -> torch.Tensor:
    """Dice (cases, classes) of the held-out cases, each by one of the processes."""
    from unetrpp.evaluate import dice_per_class
    from unetrpp.predict import predict_volume
    from unetrpp.preprocessing import inference_transforms, load_case

    preprocessing = data.plan.preprocessing
    transforms = inference_transforms(preprocessing, config.check_affine)
    values = [value for value in preprocessing.labels.values() if value]
    scores = torch.zeros(len(data.held_out), len(values), device=fabric.device)
    for index in range(fabric.global_rank, len(data.held_out), fabric.world_size):
        item = load_case(data.held_out[index], preprocessing, transforms)
        probability = predict_volume(
            model,
            item["image"].as_tensor()[None].to(fabric.device),
            preprocessing.patch_size,
            precision="bf16" if config.precision == "bf16-mixed" else "fp32",
        )
        labels = probability[0].argmax(0).cpu().numpy()
        truth = item["label"].as_tensor()[0].numpy()
        labels[truth < 0] = 0  # ignored voxels are none of a class in either
        scores[index] = torch.tensor(dice_per_class(labels, truth, values))
    return reduced(fabric, scores, "sum")


def _write_report(config: ResolvedConfig, say: Callable[[str], None]) -> None:
    from unetrpp.report import write_report

    try:
        say(f"report: {write_report(config.output)}")
    except Exception as error:  # the training itself is done and saved
        say(
            f"the training is finished, but its report could not be written: {error}; "
            f"write it later with: unetrpp report {config.output}"
        )
