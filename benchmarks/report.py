"""What a run of the benchmarks leaves: tables on the terminal, as CSV, and as a plot."""

import csv
import math
from pathlib import Path
from typing import NamedTuple

import torch

from unetrpp.throughput import processor

REFERENCE, COMPILED = "reference", "reference compiled"
# Okabe and Ito's colours, told apart by everyone; the reference is grey.
COLOURS = ("#999999", "#56B4E9", "#E69F00", "#0072B2", "#009E73", "#D55E00")


class Row(NamedTuple):
    """One benchmark; times in milliseconds, None where there is no floor or nothing is kept."""

    case: str
    dtype: str
    direction: str
    backend: str
    median_ms: float
    q1_ms: float
    q3_ms: float
    floor_ms: float | None
    kept_bytes: int | None


def collect(session):
    """{"ops": rows of bench_ops.py, ...}."""
    tables = {}
    for benchmark in session.benchmarks:
        name = Path(benchmark.fullname.split("::")[0]).stem.removeprefix("bench_")
        stats = benchmark.stats
        times = {
            "median_ms": stats.median * 1e3,
            "q1_ms": stats.q1 * 1e3,
            "q3_ms": stats.q3 * 1e3,
        }
        tables.setdefault(name, []).append(Row(**times, **benchmark.extra_info))
    return tables


def _by_backend(rows):
    """{(case, dtype, direction): {backend: row}}, in the order of the run."""
    groups = {}
    for row in rows:
        groups.setdefault((row.case, row.dtype, row.direction), {})[row.backend] = row
    return groups


def markdown(rows):
    """Lines of the table; "x eager" is how many times faster than the reference of the same run."""
    yield (
        "| case | dtype | backend | median ms | quartiles | x eager | x compiled | floor ms "
        "| x floor | kept for backward |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for (case, dtype, direction), group in _by_backend(rows).items():
        for row in group.values():
            cells = [
                f"{case} {direction}",
                dtype,
                row.backend,
                f"{row.median_ms:.2f}",
                f"{row.q1_ms:.2f} - {row.q3_ms:.2f}",
                *(
                    f"{group[peer].median_ms / row.median_ms:.2f}" if peer in group else ""
                    for peer in (REFERENCE, COMPILED)
                ),
                "" if row.floor_ms is None else f"{row.floor_ms:.2f}",
                "" if row.floor_ms is None else f"{row.median_ms / row.floor_ms:.1f}",
                "" if row.kept_bytes is None else f"{row.kept_bytes / 2**20:.2f} MiB",
            ]
            yield f"| {' | '.join(cells)} |"


def cpu():
    """The processor, and how many of its threads torch uses."""
    return f"{torch.get_num_threads()} threads of {processor()}"


def write_csv(rows, device, path):
    """The rows, each with what it was measured on: a device of `benchmarks.device`."""
    machine = {"threads": torch.get_num_threads(), "processor": processor()}
    if device.is_gpu:
        found = device.describe()
        machine = {"device": found["name"], "driver": found["driver"]}
    machine["torch"] = torch.__version__
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow((*Row._fields, *machine))
        for row in rows:
            cells = (round(cell, 4) if isinstance(cell, float) else cell for cell in row)
            writer.writerow((*cells, *machine.values()))


def plots(rows, title, stem):
    """<stem>.png of the rows that have a floor; of several dtypes one each, which it names."""
    rows = [row for row in rows if row.floor_ms is not None]
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    for dtype in dtypes:
        path = f"{stem}_{dtype}.png" if len(dtypes) > 1 else f"{stem}.png"
        plot([row for row in rows if row.dtype == dtype], f"{title}, {dtype}", path)


def plot(rows, title, path):
    """Bars of the median, one panel per direction, with the floor as a black line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {(row.case, row.direction): {} for row in rows}
    for row in rows:
        groups[row.case, row.direction][row.backend] = row
    directions = list(dict.fromkeys(row.direction for row in rows))
    cases = list(dict.fromkeys(row.case for row in rows))
    backends = list(dict.fromkeys(row.backend for row in rows))
    width = 0.84 / len(backends)
    height = 2.6 * len(directions) + 0.6
    figure, panels = pyplot.subplots(
        len(directions), figsize=(9, height), sharex=True, squeeze=False, layout="constrained"
    )
    for panel, direction in zip(panels[:, 0], directions, strict=True):
        found = [groups.get((case, direction), {}) for case in cases]
        for i, backend in enumerate(backends):
            bars = panel.bar(
                [j + (i + 0.5) * width - 0.42 for j in range(len(cases))],
                [group[backend].median_ms if backend in group else math.nan for group in found],
                0.92 * width,
                label=backend,
                color=COLOURS[i % len(COLOURS)],
            )
            panel.bar_label(bars, fmt=_short, fontsize=7, padding=1)
        at, floors = zip(
            *((j, next(iter(group.values())).floor_ms) for j, group in enumerate(found) if group),
            strict=True,
        )
        panel.hlines(
            floors, [j - 0.45 for j in at], [j + 0.45 for j in at],
            color="black", linewidth=1.8, label="floor",
        )  # fmt: skip
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.margins(y=0.15)
        panel.set_ylabel("milliseconds, median")
        panel.set_title(direction, loc="left", fontsize=10, fontweight="bold")
        panel.set_xticks(range(len(cases)), cases)
        panel.tick_params(axis="x", length=0)
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _short(value):
    """Three digits; nothing where there is no bar."""
    return "" if math.isnan(value) else f"{value:.3g}" if value < 100 else f"{value:.0f}"
