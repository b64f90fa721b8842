"""The loss of UNETR++ under deep supervision.

The published loss is CE - Dice; this is CE + (1 - Dice), the same gradient with a value that cannot
go below zero. As there, the background counts in CE only, and Dice sums over the batch.
"""

import torch
from torch.nn import functional as F

__all__ = ["deep_supervision_loss"]


def deep_supervision_loss(logits: list[torch.Tensor], label: torch.Tensor) -> torch.Tensor:
    """Weighted sum of soft Dice + cross-entropy over the outputs: 4/7, 2/7, 1/7 for three.

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
