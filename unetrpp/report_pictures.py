"""The pictures of the report: three orthogonal planes of a case, with reference and prediction."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unetrpp.volumes import placed, read_image, read_labels

__all__ = ["BACKGROUND", "PALETTE", "color_of", "overlay"]

# Told apart on white, on black and on a grey picture.
PALETTE = ("#ff8a3d", "#2f9bff", "#2fbf71", "#e84fa4", "#9b7bff", "#1fb8c4", "#e8c02f", "#f0524f")
# Around a picture, and behind the words in it.
BACKGROUND = "#101214"


def color_of(index: int) -> str:
    """Return the colour of a class, by its place among the classes."""
    return PALETTE[index % len(PALETTE)]


def overlay(image_file: str | None, files: Mapping, classes: Mapping) -> bytes:
    """PNG: image above, reference contour and filled prediction below, three orthogonal planes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    volumes = [truth := read_labels(files["reference"])]
    volumes.append(placed(read_labels(files["prediction"]), truth))
    if image_file is not None:
        volumes.append(placed(read_image(image_file), truth))
    # Axes that run to the patient's right, to the front and upwards.
    turned = [volume.turned(truth.grid.turn_to(np.eye(4))) for volume in volumes]
    reference, prediction = (volume.values for volume in turned[:2])
    spacing = turned[0].grid.spacing
    image = turned[2].values[..., 0] if image_file is not None else np.zeros(reference.shape)
    known = np.isin(reference, _values(classes))
    structure = known if known.any() else np.isin(prediction, _values(classes))
    centre = _middle(structure)
    window = _crop(structure | np.isin(prediction, _values(classes)), spacing)
    low, high = np.percentile(image[window], [0.5, 99.5])

    planes = [(2, "axial", "L→R"), (1, "coronal", "L→R"), (0, "sagittal", "P→A")]
    sizes = [(s.stop - s.start) * mm for s, mm in zip(window, spacing, strict=True)]
    shapes = [[sizes[axis] for axis in range(3) if axis != plane[0]] for plane in planes]
    tallest, gap = max(height for _, height in shapes), 0.08
    inches = min(10 / sum(width for width, _ in shapes), 2.8 / tallest)  # per mm
    width = sum(width for width, _ in shapes) * inches + 4 * gap
    height = 2 * tallest * inches + 3 * gap
    figure = Figure(figsize=(width, height), dpi=120, facecolor=BACKGROUND)
    left = gap
    for (normal, plane, ends), (wide, high_mm) in zip(planes, shapes, strict=True):
        across, up = (axis for axis in range(3) if axis != normal)
        index: list[Any] = list(window)
        index[normal] = centre[normal]
        # Transposed: rows run up, columns across.
        gray, predicted, referenced = (
            volume[tuple(index)].T for volume in (image, prediction, reference)
        )
        gray = np.clip((gray - low) / max(float(high - low), 1e-9), 0, 1)
        picture = np.repeat(np.asarray(gray, float)[..., None], 3, 2)
        filled = picture.copy()
        for order, value in enumerate(classes.values()):
            area = np.isin(predicted, value)
            filled[area] = 0.5 * filled[area] + 0.5 * np.array(to_rgb(color_of(order)))
        box = np.array([wide * inches / width, high_mm * inches / height])
        middle = (tallest - high_mm) * inches / 2
        for row, shown in enumerate((filled, picture)):
            bottom = (gap + row * (tallest * inches + gap) + middle) / height
            axes = figure.add_axes((left / width, bottom, *box))
            axes.imshow(shown, origin="lower", aspect="auto", interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                _draw_contours(axes, referenced, classes)
        # In a flat slice the words would hide the picture: above it there is room then.
        flat = high_mm * inches < 0.5
        axes.text(
            0.02, 1.05 if flat else 0.98, f"{plane}, {ends}", color="white", fontsize=8,
            va="bottom" if flat else "top", transform=axes.transAxes,
            path_effects=[withStroke(linewidth=2.5, foreground=BACKGROUND)],
        )  # fmt: skip
        left += wide * inches + gap
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def _draw_contours(axes, labels: np.ndarray, classes: Mapping) -> None:
    """Outline every class of a slice (rows, columns), along the voxels' edges."""
    from matplotlib.patheffects import withStroke

    limits = axes.get_xlim(), axes.get_ylim()
    for order, value in enumerate(classes.values()):
        # A border of background closes outlines that would run out of the picture, and every
        # voxel is 4 x 4 points so that the outline keeps its corners.
        area = np.pad(np.isin(labels, value), 1)
        if not area.any():
            continue
        fine = np.kron(area, np.ones((4, 4)))
        rows, columns = ((np.arange(size) + 0.5) / 4 - 1.5 for size in fine.shape)
        outline = axes.contour(
            columns, rows, fine, levels=[0.5], colors=[_lighter(color_of(order))], linewidths=1.1
        )
        outline.set_path_effects([withStroke(linewidth=2.2, foreground=(0, 0, 0, 0.55))])
    axes.set(xlim=limits[0], ylim=limits[1])


def _values(classes: Mapping) -> list[int]:
    return [int(part) for value in classes.values() for part in np.atleast_1d(value)]


def _middle(structure: np.ndarray) -> list[int]:
    """Per axis the slice nearest to the structure's middle that holds some of it."""
    if not structure.any():
        return [size // 2 for size in structure.shape]
    centre = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        amount = structure.sum(others)
        middle = float((np.arange(len(amount)) * amount).sum() / amount.sum())
        occupied = np.flatnonzero(amount)
        centre.append(int(occupied[np.abs(occupied - middle).argmin()]))
    return centre


def _crop(structure: np.ndarray, spacing: Sequence[float]) -> tuple[slice, ...]:
    """The box of the structure with a margin of half its longest side, within the volume."""
    if not structure.any():
        return tuple(slice(0, size) for size in structure.shape)
    places = np.nonzero(structure)
    bounds = [(int(p.min()), int(p.max()) + 1) for p in places]
    margin = 0.5 * max((b - a) * mm for (a, b), mm in zip(bounds, spacing, strict=True))
    return tuple(
        slice(max(0, int(a - margin / mm)), min(size, int(b + margin / mm) + 1))
        for (a, b), mm, size in zip(bounds, spacing, structure.shape, strict=True)
    )


def _lighter(color: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(0.55 * channel + 0.45 for channel in to_rgb(color))
