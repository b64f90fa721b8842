"""Draw the two pictures of the README into docs/images.

    make demo
    python -m benchmarks.pictures --demo runs/demo

demo.png: a slice of the demo's test volume, its true labels and the prediction.
time.png: time of the layer against the number of tokens, from benchmarks/results/ops.csv.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.tables import KERNELS, PLAIN, REFERENCE, ROOT, by_backend, read

IMAGES = ROOT / "docs" / "images"
# Okabe and Ito's colours, which everyone can tell apart; the reference is grey.
GREY_MATTER, WHITE_MATTER = "#E69F00", "#56B4E9"
LINES = {
    REFERENCE: ("#999999", "published form, plain PyTorch (reference)"),
    PLAIN: ("#56B4E9", "two passes, plain PyTorch (two_pass)"),
    KERNELS: ("#D55E00", "two passes, C++ kernels (cpu)"),
}


def demo(folder: Path, path: Path) -> None:
    """Draw the slice with most grey and white matter: image, truth, prediction."""
    import nibabel as nib
    import numpy as np
    from matplotlib.colors import ListedColormap, to_rgba

    def load(name: str) -> Any:
        return np.asarray(nib.load(folder / name / "right.nii.gz").dataobj)

    image, truth, prediction = load("data/imagesTs"), load("data/labelsTs"), load("prediction")
    at = int((truth > 0).sum((0, 1)).argmax())
    colours = ListedColormap([(0, 0, 0, 0), to_rgba(GREY_MATTER), to_rgba(WHITE_MATTER)])
    figure, panels = new_figure(1, 3, (5.4, 3.9))
    for panel, title, labels in zip(
        panels, ("T1 image", "truth", "prediction"), (None, truth, prediction), strict=True
    ):
        # The second axis of the volume points to the front, which is drawn upwards.
        panel.imshow(image[:, :, at].T, cmap="gray", origin="lower")
        if labels is not None:
            panel.imshow(
                labels[:, :, at].T, colours, origin="lower", alpha=0.6, vmin=0, vmax=2,
                interpolation="nearest",
            )  # fmt: skip
        panel.set_title(title, fontsize=10)
        panel.axis("off")
    marks = [
        panels[0].scatter([], [], color=colour, marker="s", label=label)
        for colour, label in ((GREY_MATTER, "grey matter"), (WHITE_MATTER, "white matter"))
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def time(path: Path) -> None:
    """Draw forward + backward of the layers of the Synapse network against their tokens."""
    import torch

    from unetrpp import create_model

    with torch.device("meta"):
        grids = create_model("unetrpp", "synapse").grids
    measured = by_backend(read("ops.csv"))
    figure, (panel,) = new_figure(1, 1, (6.4, 3.6))
    tokens = [depth * height * width for depth, height, width in grids]
    for backend, (colour, label) in LINES.items():
        times = [
            float(measured[f"synapse/stage{i + 1}", "forward+backward"][backend]["median_ms"])
            for i in range(len(tokens))
        ]
        panel.plot(tokens, times, "o-", color=colour, label=label)
        panel.annotate(
            f"{times[0]:.0f} ms", (tokens[0], times[0]), (6, 0), textcoords="offset points",
            fontsize=8, va="center", color=colour,
        )  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(tokens, [f"{count:,}" for count in tokens])
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_xlim(right=tokens[0] * 2.4)
    panel.set_xlabel("tokens N (stages 4 to 1 of UNETR++ on Synapse; C = 256, 128, 64, 32)")
    panel.set_ylabel("forward + backward, ms")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def new_figure(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure and its panels in one list; nothing is shown on a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        rows, columns, figsize=inches, squeeze=False, layout="constrained"
    )
    return figure, panels.ravel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--demo", type=Path, help="output folder of `unetrpp demo`")
    arguments = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    time(IMAGES / "time.png")
    if arguments.demo:
        demo(arguments.demo, IMAGES / "demo.png")


if __name__ == "__main__":
    main()
