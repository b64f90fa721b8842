"""What is trained: network, optimizer and averaged weights, and a step of them.

Dropout, learning rate and average of step s are functions of (seed, s), never of what ran before.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from unetrpp.files import replacing
from unetrpp.losses import deep_supervision_loss
from unetrpp.models import create_model
from unetrpp.processes import joint_batch_norm, same_everywhere
from unetrpp.train_config import ResolvedConfig, is_decayed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["NonFiniteLoss", "Trainee", "learning_rate_at", "make_optimizer"]

# nnU-Net (nnUNetTrainerV2), with which UNETR++ was trained: momentum, the power of the poly
# schedule, the steps that share one rate, and the largest norm of the gradients. The package clips
# the gradients of every network alike.
MOMENTUM = 0.99
POLY_POWER = 0.9
POLY_STEPS = 250
LARGEST_GRADIENT_NORM = 12.0
# SegFormer3D's cosine falls from 1e-4 to 6e-6, twice.
RESTARTS = 2
RESTART_FLOOR = 0.06


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient became NaN or infinite; names the cases and the saved batch."""


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
        return peak * (1 - step // POLY_STEPS * POLY_STEPS / (total or math.inf)) ** POLY_POWER
    if total is not None:
        warm_up = max(1, min(warm_up, total // 10))
    if step < warm_up or total is None:
        return peak * min(1.0, (step + 1) / max(1, warm_up))
    if schedule == "restarts":
        period = max(1, total // RESTARTS)
        t, floor = (step - warm_up) % period / period, RESTART_FLOOR
    else:
        t, floor = (step - warm_up) / max(1, total - warm_up), 0.0
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * t)))


def make_optimizer(model: nn.Module, config: ResolvedConfig) -> torch.optim.Optimizer:
    """SGD or AdamW, with decay on the parameters that `is_decayed` names."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if is_decayed(config, name, parameter) else kept).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}]
    if kept:
        groups.append({"params": kept, "weight_decay": 0})
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, rate, MOMENTUM, weight_decay=decay, nesterov=True)
    first, second = cast(list[float], config.betas)
    return torch.optim.AdamW(groups, rate, (first, second), weight_decay=decay, fused=True)


class Trainee:
    """A network in training.

    Args:
        config: options of the run.
        arguments: those of `unetrpp.create_model`.
        fabric: device, precision and processes.
        has_ignored: whether labels may be negative, of voxels to leave out of the loss.

    Attributes:
        step: number of steps taken.
        model: the network, without what `fabric` puts around it.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        arguments: Mapping[str, Any],
        fabric: Fabric,
        *,
        has_ignored: bool = False,
    ) -> None:
        from torch.optim.swa_utils import AveragedModel

        self.config, self.fabric, self.has_ignored = config, fabric, has_ignored
        self.step = 0
        torch.manual_seed(config.seed)
        self.model = create_model(**arguments)
        _supervise_deeply(self.model, True)
        if fabric.device.type == "cpu":
            # A step takes 0.85 times as long as with channels first (32x48x32, one thread).
            self.model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        if fabric.world_size > 1:
            self.model = joint_batch_norm(self.model, fabric.device)
        optimizer = make_optimizer(self.model, config)
        self.network, self.optimizer = fabric.setup(self.model, optimizer)
        self.average: AveragedModel | None = None
        if config.ema:
            self.average = AveragedModel(
                self.model, multi_avg_fn=self._average_weights, use_buffers=True
            )

    def describe(self) -> str:
        """Return the line that says what is trained, and where."""
        parameters = sum(p.numel() for p in self.model.parameters())
        label = " (a reconstruction)" if self.model.is_reconstruction else ""
        world = self.fabric.world_size
        processes = f", {world} processes with one joint batch" if world > 1 else ""
        return (
            f"{type(self.model).__name__}{label}: {parameters / 1e6:.2f} M parameters, on "
            f"{self.fabric.device} in {self.config.precision}{processes}"
        )

    def machine(self) -> str:
        """Return what the bits of a run depend on beside its options."""
        return (
            f"{self.fabric.device.type} ({platform.machine()}, torch {torch.__version__}, "
            f"{self.fabric.world_size} process(es))"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step needs."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: it belongs to another network, optimizer or average.
        """
        try:
            self.step = state["step"]
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if (state["average"] is not None) != (self.average is not None):
                raise ValueError("one has averaged weights (--ema), the other has none")
            if self.average is not None:
                self.average.load_state_dict(state["average"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"it does not belong to this run: {reason[:300]}") from error

    def take_step(self, batch: Mapping[str, Any], total: int | None) -> dict[str, float]:
        """Take one step.

        Args:
            batch: {"image" (B, C, *patch), "label" (B, 1, *patch), "name"}.
            total: steps of the run, as far as it is known.

        Returns: {"step", "loss", "learning_rate", "grad_norm"}.

        Raises:
            NonFiniteLoss: the loss or the gradients are NaN or infinite; the weights stay.
        """
        config, device = self.config, self.fabric.device
        torch.manual_seed(_dropout_seed(config.seed, self.step, self.fabric.global_rank))
        rate = learning_rate_at(
            self.step, total, config.learning_rate, config.schedule, config.warm_up or 0
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        image = batch["image"].to(device, non_blocking=True)  # (B, C, *patch)
        if device.type == "cpu":
            image = image.contiguous(memory_format=torch.channels_last_3d)
        label = batch["label"].to(device, non_blocking=True)  # (B, 1, *patch)
        self.network.train()
        loss = deep_supervision_loss(self.network(image), label, config.loss, self.has_ignored)
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(
            self.network,
            self.optimizer,
            max_norm=LARGEST_GRADIENT_NORM,
            error_if_nonfinite=False,
        )
        assert isinstance(norm, Tensor)  # None only of a clipping by value
        # The norm comes after the processes' gradients are averaged, so all of them stop here.
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            self._stop_non_finite(batch, loss, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        return {
            "step": self.step,
            "loss": loss.item(),
            "learning_rate": rate,
            "grad_norm": norm.item(),
        }

    @contextmanager
    def as_it_predicts(self) -> Iterator[nn.Module]:
        """Yield the network with one output and, where weights are averaged, those weights.

        The coarser heads have their weights all the same. With several processes it is that of the
        first, which saves it.
        """
        model = self.average.module if self.average is not None else self.model
        if self.fabric.world_size > 1:
            same_everywhere(model)
        _supervise_deeply(model, False)
        try:
            yield model
        finally:
            _supervise_deeply(model, True)

    @torch.no_grad()
    def _average_weights(self, averages: Any, values: Any, _: Any) -> None:
        from torch.optim.swa_utils import get_ema_multi_avg_fn

        # A short memory at first, so that the initial weights are soon forgotten: the rule of
        # TensorFlow's ExponentialMovingAverage with num_updates.
        keep = min(self.config.ema, (1 + self.step) / (10 + self.step))
        if averages[0].is_floating_point():
            get_ema_multi_avg_fn(keep)(averages, values, None)
        else:
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)

    def _stop_non_finite(self, batch: Mapping[str, Any], loss: Tensor, norm: Tensor) -> None:
        number = self.step + 1
        rank = f"_rank{self.fabric.global_rank}" if self.fabric.world_size > 1 else ""
        path = self.config.output / f"nonfinite_step_{number}{rank}.pt"
        content = {**batch, "step": number, "loss": loss.item(), "grad_norm": norm.item()}
        with replacing(path) as partial:
            torch.save(content, partial)
        raise NonFiniteLoss(
            f"train: loss {loss.item()}, gradient norm {norm.item()} at step {number}, cases "
            f"{', '.join(batch['name'])}; the batch is in {path}, all checkpoints are from before. "
            "Look at these cases; else try a lower --learning_rate or --precision 32-true"
        )


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Dropout of a step, the same whether or not the run was interrupted before it."""
    state = np.random.SeedSequence([seed, 2, step, rank]).generate_state(1, np.uint64)
    # As Python's integer: NumPy 1.26 shifts no uint64 by one.
    return int(state[0]) >> 1


def _supervise_deeply(model: Any, switch: bool) -> None:
    """Switch the coarser outputs for training on or off, where the network has some."""
    if model.has_deep_supervision:
        model.deep_supervision = switch
