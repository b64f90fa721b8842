"""The processes of a run: who starts them, what stops them, and what makes them one.

launch             Fabric on the devices of a run; other launchers' processes are joined or refused
Signals            SIGINT, SIGTERM and SIGHUP as wishes to stop; the loop asks after each step
agreed, reduced    a value that all processes have in common
joint_batch_norm   batch normalisation over the batches of all processes
same_everywhere    the first process's weights and statistics in all of them
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from unetrpp.signals import HANGUP, STOPPING, stopping

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from unetrpp.train_config import ResolvedConfig

__all__ = [
    "Signals",
    "agreed",
    "ignore_signals",
    "joint_batch_norm",
    "launch",
    "reduced",
    "same_everywhere",
]


def launch(config: ResolvedConfig) -> Fabric:
    """Return Fabric on the devices of a run, after its other processes were started or joined.

    Raises:
        ValueError: another launcher has started processes, and not one for each device.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment

    launcher, started = _started(os.environ)
    if launcher and (started != config.devices or launcher == "mpirun"):
        remedy = "" if launcher == "mpirun" else f"give --devices {started}, or "
        raise ValueError(
            f"{launcher} has started {started} process(es), and --devices is {config.devices}: "
            f"they would not train as one job; {remedy}start the command without {launcher} and "
            "let --devices N start the other processes"
        )
    # Of a queue's variables alone (an allocation of several tasks) no process has been started.
    environment = LightningEnvironment() if started == 1 else None
    if started == 1 and os.environ.get("LOCAL_RANK") == "0":
        del os.environ["LOCAL_RANK"]  # left by an earlier run; Fabric would wait for the others
    # Its notes on devices and precision repeat what is printed here.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=config.devices,
        strategy="ddp" if config.devices > 1 else "auto",
        precision=config.precision,
        plugins=environment,
    )
    fabric.launch()
    return fabric


def _started(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return which launcher has started how many processes of this command; "", 1 without one."""

    def number(name: str) -> int:
        text = environment.get(name, "")
        return int(text) if text.isdigit() else 1

    # Fabric itself sets WORLD_SIZE and LOCAL_RANK, but no RANK.
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return "torchrun", number("WORLD_SIZE")
    # Of a step that srun starts; SLURM_NTASKS is also set in a batch script, which is one process.
    if number("SLURM_STEP_NUM_TASKS") > 1:
        return "srun", number("SLURM_STEP_NUM_TASKS")
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if number(name) > 1:
            return "mpirun", number(name)
    return "", 1


class Signals:
    """with Signals(...) as signals: SIGINT, SIGTERM and SIGHUP stop a run when it next asks.

    The first one is noted in `number` and answered with what the run waits for; a second SIGINT or
    SIGTERM ends the run at once, by KeyboardInterrupt or SystemExit(143). Under nohup a closed
    terminal stops nothing. Python handles signals on the main thread only, so on another one
    nothing is caught.

    Args:
        is_main: whether this process answers.
        resume: the command with which the run goes on.

    Attributes:
        number: of the last signal; 0 before one.
        doing: what the run does until it asks, for the answer.
    """

    def __init__(self, is_main: bool, resume: str) -> None:
        self.is_main, self.resume = is_main, resume
        self.number, self.doing = 0, "this step"
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._handle) for number in stopping()}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.previous.items():
            # None stands for a handler that Python has not set.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.number and number == HANGUP:
            return
        if self.number:
            self._answer(f"second {name}: ended at once; continue with: {self.resume}")
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self.number = number
        self._answer(
            f"{name}: waiting for the end of {self.doing}, then the run is saved and stops; "
            "a second one ends it at once"
        )

    def _answer(self, text: str) -> None:
        if self.is_main:
            # Not through sys.stderr, which the signal may have interrupted in the midst of a write.
            with suppress(OSError):  # of a terminal that is gone
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())


def ignore_signals(worker: int = 0) -> None:
    """Let signals pass that stop a run: a loader process ends with the process that it serves.

    SLURM and systemd signal all processes of a job. A loader process that went first would take
    the run with it before it could be saved.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def agreed(fabric: Fabric, number: int) -> int:
    """Return the largest of the processes' numbers, so that all of them do the same."""
    if fabric.world_size == 1:
        return number
    return int(reduced(fabric, torch.tensor(float(number)), "max"))


def reduced(fabric: Fabric, value: torch.Tensor, operation: str) -> torch.Tensor:
    """Return the sum or maximum of the processes' values."""
    if fabric.world_size == 1:
        return value
    result = fabric.all_reduce(value.to(fabric.device), reduce_op=operation)
    assert isinstance(result, torch.Tensor)  # what goes in is one
    return result


@torch.no_grad()
def same_everywhere(model: nn.Module) -> None:
    """Give all processes the first one's parameters and buffers."""
    for value in model.state_dict().values():
        whole = value.contiguous()  # what a broadcast takes; channels last is not
        distributed.broadcast(whole, 0)
        value.copy_(whole)


def joint_batch_norm(model: nn.Module, device: torch.device) -> Any:
    """Let the batch normalisation of a model see the batches of all processes; names stay."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm3d:
            module.__class__ = _JointBatchNorm3d
    return model


class _JointBatchNorm3d(nn.BatchNorm3d):
    """nn.SyncBatchNorm for CPUs, which torch has for GPUs only.

    mean = sum of the processes' means / P; var = sum of (their var + (their mean - mean)^2) / P,
    for P processes with batches of one size.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, *size) -> the same."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        processes = distributed.get_world_size()
        axes, shape = (0, 2, 3, 4), (1, -1, 1, 1, 1)
        own_var, own_mean = torch.var_mean(x, axes, correction=0)
        mean = _sum_of_processes(own_mean) / processes
        var = _sum_of_processes(own_var + (own_mean - mean).square()) / processes
        with torch.no_grad():
            count = processes * x.numel() / x.shape[1]
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = var * (count / max(1.0, count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return x * scale.view(shape) + shift.view(shape)


def _sum_of_processes(value: torch.Tensor) -> torch.Tensor:
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(value)
