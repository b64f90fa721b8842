"""A training loop of MONAI with UNETR++, on synthetic volumes.

    pip install ".[train]"
    python examples/monai_training_loop.py

UNETRPP is a network like any other of MONAI: it maps (B, C, X, Y, Z) to logits. In training mode
with deep supervision it returns a list of them, the finest first.
"""

import numpy as np
import torch
from monai.data import DataLoader, Dataset, create_test_image_3d
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks import one_hot
from monai.transforms import Compose, EnsureTyped, NormalizeIntensityd, RandFlipd

from unetrpp import create_model

SIZE = (32, 32, 32)
KEYS = ("image", "label")


def make_volumes(count: int, size: int, random_state: np.random.RandomState) -> list[dict]:
    """Volumes with bright balls on noise, and labels of the balls."""
    volumes = []
    for _ in range(count):
        image, label = create_test_image_3d(
            size, size, size, num_objs=4, rad_max=8, rad_min=4, noise_max=0.3, num_seg_classes=1,
            channel_dim=0, random_state=random_state,
        )  # fmt: skip
        volumes.append({"image": image, "label": label})
    return volumes


def main() -> float:
    torch.manual_seed(0)
    random_state = np.random.RandomState(0)
    prepare = [EnsureTyped(KEYS), NormalizeIntensityd("image")]
    augment = Compose([*prepare, RandFlipd(KEYS, prob=0.5, spatial_axis=0)])
    augment.set_random_state(0)
    train = Dataset(make_volumes(8, 32, random_state), augment)
    test = Dataset(make_volumes(2, 48, random_state), Compose(prepare))

    model = create_model("unetrpp", "tiny", img_size=SIZE, out_channels=2)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for epoch in range(4):
        losses = []
        for batch in DataLoader(train, batch_size=2, shuffle=True):
            logits = model(batch["image"])
            finest = logits if isinstance(logits, torch.Tensor) else logits[0]
            loss = loss_function(finest, batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {np.mean(losses):.3f}")

    dice = DiceMetric(include_background=False)
    model.eval()
    with torch.no_grad():
        for batch in DataLoader(test):
            logits = sliding_window_inference(batch["image"], SIZE, 2, model, overlap=0.5)
            dice(one_hot(logits.argmax(1, keepdim=True), 2), one_hot(batch["label"], 2))
    score = dice.aggregate().item()
    print(f"Dice on larger, new volumes {score:.2f}")
    return score


if __name__ == "__main__":
    main()
