"""The losses of the training recipes, under deep supervision or of one output.

    dice_ce      UNETR++: cross-entropy + (1 - Dice) of the softmax, without the background in Dice
    dice         SegFormer3D: 1 - Dice of one sigmoid per class
    dice_focal   Slim UNETR, Slim UNETR++: 1 - Dice + focal loss (gamma 2) of one sigmoid per class

Voxels whose label is negative belong to nnU-Net's label "ignore" and are left out: a loss sees the
others only, those of the whole batch together where Dice sums over the batch (dice_ce), else those
of one volume after the other. Where there are none, the loss is 0.

UNETR++ publishes CE - Dice; dice_ce is the same gradient with a value that cannot go below zero. As
there, Dice sums over the batch: that of all processes together, where several train one model.

The siblings were trained on regions that overlap (whole tumour, core, enhancing), each with a
sigmoid of its own. The classes of a label map exclude each other, so here their losses see its
one-hot channels, the background as one more: its logit must be trained, because a voxel's label is
the arg-max. Prediction stays as for every network: the arg-max of the softmax, averaged over
windows. In a single window that is the arg-max of the sigmoids; where windows overlap, averages of
softmax and of sigmoids can differ in it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import distributed
from torch.nn import functional as F

__all__ = ["LOSSES", "Loss", "deep_supervision_loss"]

Loss = Literal["dice_ce", "dice", "dice_focal"]
LOSSES = get_args(Loss)


def deep_supervision_loss(
    logits: torch.Tensor | Sequence[torch.Tensor],
    label: torch.Tensor,
    loss: str = "dice_ce",
    has_ignored: bool = False,
) -> torch.Tensor:
    """Weighted sum of a loss over the outputs: 4/7, 2/7, 1/7 for three.

    Args:
        logits: per output (B, K, *size), the finest first; or those of the only output.
        label (B, 1, *patch): float32 class values; coarser outputs see it by nearest neighbour.
        loss: one of `LOSSES`.
        has_ignored: whether labels may be negative, of voxels to leave out.

    Returns:
        The loss of the joint batch of all processes. Its gradient with respect to the logits of
        this process is multiplied by their number, because DistributedDataParallel averages over
        them.
    """
    outputs = [logits] if isinstance(logits, torch.Tensor) else logits
    function = _function(loss)
    if has_ignored:
        function = partial(_of_labelled, function)
    weights = [0.5**i for i in range(len(outputs))]
    total = torch.zeros((), device=label.device)
    label = _joint(label)
    for weight, output in zip(weights, outputs, strict=True):
        target = label
        if output.shape[2:] != label.shape[2:]:
            target = F.interpolate(label, output.shape[2:], mode="nearest-exact")
        # Softmax and sums over a million voxels need float32 whatever the network ran in.
        total = total + weight / sum(weights) * function(_joint(output.float()), target)
    processes = label.shape[0] // outputs[0].shape[0]
    return total if processes == 1 else total + (processes - 1) * (total - total.detach())


def _joint(batch: torch.Tensor) -> torch.Tensor:
    """Return the batches of all processes as one; a gradient goes to the part of this process."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return batch
    own = batch.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, own)
    parts[distributed.get_rank()] = batch
    return torch.cat(parts)


def _of_labelled(function: Any, logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return a loss of the voxels whose label is not negative, as one row of them."""
    logits, label = logits.flatten(2), label.flatten(2)  # (B, K, voxels), (B, 1, voxels)
    if getattr(function, "dice", function).batch:
        logits, label = (each.movedim(1, 0).flatten(1)[None] for each in (logits, label))
    values = []
    for row, labels in zip(logits.split(1), label.split(1), strict=True):
        labelled = labels[0, 0] >= 0
        if labelled.any():
            values.append(function(row[..., labelled], labels[..., labelled]))
    return torch.stack(values).mean() if values else 0 * logits.sum()


def _function(loss: str) -> Callable[..., torch.Tensor]:
    from monai.losses import DiceCELoss, DiceFocalLoss, DiceLoss

    if loss == "dice_ce":
        return DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    if loss == "dice":
        return DiceLoss(to_onehot_y=True, sigmoid=True)
    if loss == "dice_focal":
        return DiceFocalLoss(to_onehot_y=True, sigmoid=True, gamma=2.0, smooth_nr=0, smooth_dr=1e-5)
    raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}.")
