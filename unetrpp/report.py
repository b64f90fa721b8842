"""One HTML file that tells how a run went: curves, scores, pictures, settings.

  write_report     RUN/metrics.jsonl, scores.json and the volumes -> RUN/report.html
  score_validation the held-out cases of RUN, predicted and scored into RUN/validation

The file needs nothing beside it and no network: curves are inline SVG in the colours of the page
(light or dark), pictures are PNGs in base64.
"""

from __future__ import annotations

import base64
import html
import io
import platform
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unetrpp.extras import names_extra
from unetrpp.faults import in_words
from unetrpp.files import make_folder, read_json, write_text
from unetrpp.options import checked
from unetrpp.report_pictures import BACKGROUND, PALETTE, color_of, overlay
from unetrpp.report_sources import Sources, number, read_scores
from unetrpp.report_style import STYLE
from unetrpp.run_folder import read_config

__all__ = ["score_validation", "write_report"]

# matplotlib draws with these, the page then replaces them by its own colours.
INK, GRID = "#010203", "#030201"
CHOSEN_ON_THEM = (
    "The checkpoint best/ was chosen by its Dice on these same held-out cases, so the scores here "
    "are somewhat too good; cases that played no part in training or choice give an unbiased one."
)
SCORES = (("dice", "Dice", 4), ("hd95_voxels", "HD95 voxels", 2), ("hd95_mm", "HD95 mm", 2))


@names_extra
def write_report(
    run: Path | str,
    evaluation: Path | str | None = None,
    *,
    output: Path | str | None = None,
    title: str | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write a self-contained HTML report of a training run.

    Whatever is missing or damaged (no curves yet, no scores, volumes that have moved) is left out,
    and the report says so. RUN/best was chosen by its Dice on the held-out cases: where those are
    the scored ones, the report says that too.

    Args:
        run: Folder of a training run.
        evaluation: Folder with the scores.json of `run_evaluate`. If not given, the held-out
            cases of the run are predicted with RUN/best and scored into RUN/validation.
        output: The file to write; RUN/report.html if not given.
        title: Heading; the name of the run folder if not given.
        notes: Sentences that a reader must know, shown under the heading.

    Returns:
        The file that was written.

    Raises:
        FileNotFoundError: there is no such run folder, or no scores.json in evaluation.
        ValueError: evaluation's scores.json is damaged, or output is no name of a page.
    """
    paths = {"run": run, "evaluation": evaluation, "output": output}
    given = checked("write_report: ", {k: v for k, v in paths.items() if v is not None})
    run = Path(given["run"])
    evaluation = Path(given["evaluation"]) if evaluation is not None else None
    output = Path(given["output"]) if output is not None else run / "report.html"
    # Any other file that is there may be data.
    if output.is_dir() or output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(
            "write_report: output must be the name of a page, NAME.html, and no folder; got "
            f"{output}"
        )
    if not run.is_dir():
        what = "is a file" if run.exists() else "does not exist"
        raise FileNotFoundError(
            f"write_report: the run folder {run} {what}; name a folder of train"
        )
    make_folder(output.parent)
    unscored = []
    if evaluation is None:
        try:
            evaluation = score_validation(run)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # curves and settings are worth a page all the same
            unscored = [f"The held-out cases could not be scored: {in_words(error, 'report')}"]
    elif not (evaluation / "scores.json").is_file():
        raise FileNotFoundError(
            f"write_report: {evaluation} holds no scores.json; write it with unetrpp evaluate"
        )
    scores = read_scores(evaluation / "scores.json") if evaluation is not None else {}
    found = Sources(run, scores)

    sections = [
        _tiles(found, scores),
        _choice(found, scores),
        _section("Training", _curves(found.steps, found.validations)),
        _section("Scores", _score_tables(scores)),
        _section("Pictures", _pictures(scores, found.prediction)),
        _section("Settings", _settings(found)),
    ]
    heading = html.escape(title or f"Run {run.absolute().name}")
    notes = "".join(
        f"<p class='note'>{html.escape(note)}</p>"
        for note in [*notes, *_reconstruction(found.model), *unscored, *found.damaged]
    )
    written = time.strftime("%Y-%m-%d %H:%M")
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><title>{heading}</title>"
        f"<style>:root{{--picture:{BACKGROUND}}}{STYLE}</style></head><body><main><header><h1>{heading}</h1>"
        f"<p class='muted'>Training report, written {written}</p></header>{notes}"
        f"{''.join(sections)}</main></body></html>\n"
    )
    # A file's name that is not UTF-8 is shown with escapes.
    write_text(output, page.encode("utf-8", "backslashreplace").decode("utf-8"))
    return output


@names_extra
def score_validation(run: Path) -> Path | None:
    """Predict the held-out cases of a run with RUN/best and score them into RUN/validation.

    Done anew only if RUN/best is newer than the scores. RUN/best was chosen by its Dice on these
    very cases, so the scores are somewhat too good; see `write_report`.

    Returns:
        RUN/validation, or None where the run has no checkpoint, no split or no readable data yet.
    """
    from unetrpp.dataset import find_cases
    from unetrpp.evaluate import evaluate_pairs
    from unetrpp.predict import predict_cases
    from unetrpp.preprocessing import Preprocessing

    run = Path(run)
    folder, best = run / "validation", run / "best" / "model.safetensors"
    config = read_config(run)
    data, check_affine = config.get("data"), bool(config.get("check_affine"))
    held_out = Sources(run, {}).names("validation")
    if not best.is_file() or not held_out or data is None or not Path(data).is_dir():
        return None
    if _is_scored(folder / "scores.json", best):
        return folder
    # As dataset.json lists them: no file's name need say which case or channel it belongs to.
    cases = [case for case in find_cases(data) if case.name in held_out]
    predicted = predict_cases(
        cases, folder, run / "best", overwrite=True, check_affine=check_affine
    )
    labels = {case.name: case.label for case in cases if case.label is not None}
    pairs = {name: (file, labels[name]) for name, file in predicted.outputs.items()}
    stored = read_json(run / "best" / "config.json")["preprocessing"]
    named = Preprocessing.from_dict(stored).named_labels
    classes = {name: value for name, value in named.items() if value}
    evaluate_pairs(
        pairs,
        folder,
        classes=classes,
        check_affine=check_affine,
        failures=predicted.failures,
    )
    return folder


def _is_scored(scores: Path, best: Path) -> bool:
    """Whether whole scores are there, and no older than the checkpoint."""
    if not scores.is_file() or scores.stat().st_mtime < best.stat().st_mtime:
        return False
    try:
        read_scores(scores)
    except ValueError:
        return False
    return True


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _tiles(found: Sources, scores: Mapping) -> str:
    steps, validations = found.steps, found.validations
    tiles = []
    rows = scores.get("rows", [])
    if rows:
        mean = scores["summary"]["mean"]
        cases = len({row["case"] for row in rows})
        noun = "case" if cases == 1 else "cases"
        tiles.append(("Mean Dice", _number(mean["dice"].get("mean"), 4), f"{cases} {noun}"))
        tiles.append(
            ("Mean HD95", f"{_number(mean['hd95_mm'].get('mean'), 2)} mm", "where defined")
        )
    if validations:
        best = max(validations, key=lambda record: record["val_dice"])
        tiles.append(("Best validation Dice", _number(best["val_dice"], 4), f"step {best['step']}"))
    if steps:
        known = [number(r.get("seconds")) for r in [*steps, *validations]]
        seconds = max((value for value in known if not np.isnan(value)), default=0.0)
        tiles.append(("Training", _duration(seconds), f"{steps[-1]['step']} steps"))
    if found.prediction.get("seconds"):
        times = [number(value) for value in found.prediction["seconds"].values()]
        tiles.append(("Prediction", f"{_mean(times):.1f} s", "per volume"))
    if not tiles:
        return "<p class='note'>This run has neither curves nor scores yet.</p>"
    cells = "".join(
        f"<div class='tile'><span>{name}</span><b>{value}</b><span>{html.escape(detail)}</span>"
        "</div>"
        for name, value, detail in tiles
    )
    return f"<div class='tiles'>{cells}</div>"


def _choice(found: Sources, scores: Mapping) -> str:
    """Says so where the scored checkpoint was chosen by its score on the scored cases."""
    scored = {row["case"] for row in scores.get("rows", [])}
    by_best = Path(found.prediction.get("checkpoint", "")).name == "best"
    on_them = by_best and scored & set(found.names("validation"))
    return f"<p class='note'>{CHOSEN_ON_THEM}</p>" if on_them else ""


def _reconstruction(model: Any) -> list[str]:
    """The sentence that says so of a network that was not published as a whole."""
    from unetrpp.models import MODELS, RECONSTRUCTION

    network = MODELS.get(model) if isinstance(model, str) else None
    if network is None or not network.is_reconstruction:
        return []
    return [f"{network.__name__}, the network of this run, is {RECONSTRUCTION}."]


def _curves(steps: Sequence[Mapping], validations: Sequence[Mapping]) -> str:
    """Loss over steps, and validation Dice per class over steps, as inline SVG."""
    if not steps:
        return "<p class='muted'>There are no training curves in this run's folder.</p>"
    figures = []
    figure, axes = _axes("Training loss")
    step = np.array([record["step"] for record in steps])
    loss = np.array([record["loss"] for record in steps], float)
    axes.plot(step, loss, color=PALETTE[1], alpha=0.3, linewidth=0.8)
    window = max(1, len(loss) // 40)
    if window > 1:
        kernel = np.ones(window) / window
        middle = step[window // 2 : window // 2 + len(loss) - window + 1]
        axes.plot(middle, np.convolve(loss, kernel, "valid"), color=PALETTE[1], linewidth=2)
    axes.set_ylim(0, max(np.percentile(loss, 99.5) * 1.05, 1e-6))
    figures.append(_svg(figure))

    if validations:
        figure, axes = _axes("Validation Dice")
        scored = [record["step"] for record in validations]
        names = list(validations[-1].get("val_dice_per_class", {}))
        for index, name in enumerate(names):
            values = [number(record["val_dice_per_class"].get(name)) for record in validations]
            axes.plot(
                scored,
                values,
                color=color_of(index),
                linewidth=1.4,
                marker="o",
                markersize=3,
            )
        mean = [record["val_dice"] for record in validations]
        axes.plot(scored, mean, color=INK, linewidth=2, marker="o", markersize=4)
        axes.set_ylim(0, 1.02)
        legend = _legend([*((name, color_of(i)) for i, name in enumerate(names)), ("mean", "ink")])
        figures.append(_svg(figure) + legend)
    return "<div class='curves'>" + "".join(f"<figure>{f}</figure>" for f in figures) + "</div>"


def _axes(title: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.set_xlabel("step", color=INK, fontsize=9)
    axes.grid(True, axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    axes.margins(x=0.02)
    return figure, axes


def _svg(figure) -> str:
    """The figure as SVG that takes text and grid colours from the page."""
    import matplotlib

    stream = io.StringIO()
    # The salt makes the ids inside the SVG differ from those of the page's other figures.
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": figure.axes[0].get_title(loc="left")}
    with matplotlib.rc_context(options):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "var(--ink)").replace(GRID, "var(--line)")
    # A fixed width would not shrink with the page, and fonts are the page's.
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%"', text, count=1)
    text = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1inherit", text)
    return text


def _score_tables(scores: Mapping) -> str:
    rows = scores.get("rows", [])
    if not rows:
        return "<p class='muted'>No volume was scored.</p>" + _failures(scores)
    summary = scores["summary"]
    head = "".join(f"<th colspan='2'>{label}</th>" for _, label, _ in SCORES)
    body = ""
    for name, entry in [*summary["classes"].items(), ("mean of classes", summary["mean"])]:
        is_mean = entry is summary["mean"]
        cells = "".join(
            f"<td>{_number(entry[key].get('mean'), digits)}</td>"
            f"<td class='muted'>{_number(entry[key].get('median'), digits)}</td>"
            for key, _, digits in SCORES
        )
        cases = "" if is_mean else entry["dice"].get("n")
        body += (
            f"<tr{' class=total' if is_mean else ''}><th>{_text(name)}</th>{cells}"
            f"<td>{_text(cases)}</td><td>{_text(entry['hd95_mm'].get('undefined'))}</td></tr>"
        )
    table = (
        f"<div class='scroll'><table><thead><tr><th></th>{head}<th></th><th></th></tr>"
        f"<tr><th>class</th>{len(SCORES) * '<th>mean</th><th>median</th>'}"
        f"<th>cases</th><th>no mm distance</th></tr></thead><tbody>{body}</tbody></table></div>"
    )
    definitions = scores.get("definitions", {})
    explained = "".join(
        f"<li><b>{label}</b>: {_text(definitions.get(key, ''))}</li>" for key, label, _ in SCORES
    )
    return (
        table
        + _failures(scores)
        + f"<details><summary>Every case</summary>{_case_table(rows)}</details>"
        + f"<details><summary>How the scores are defined</summary><ul>{explained}</ul></details>"
    )


def _case_table(rows: Sequence[Mapping]) -> str:
    body = ""
    for case in _ranked(rows):
        for row in (row for row in rows if row["case"] == case):
            cells = "".join(f"<td>{_number(row[key], digits)}</td>" for key, _, digits in SCORES)
            body += (
                f"<tr><th>{_text(case)}</th><td class='text'>{_text(row['class'])}</td>"
                f"{cells}<td>{_text(row['reference_voxels'])}</td>"
                f"<td>{_text(row['prediction_voxels'])}</td></tr>"
            )
    head = "".join(f"<th>{label}</th>" for _, label, _ in SCORES)
    return (
        "<div class='scroll'><table><thead><tr><th>case, worst first</th><th class='text'>class"
        f"</th>{head}<th>reference voxels</th><th>predicted voxels</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _failures(scores: Mapping) -> str:
    items = "".join(
        f"<li>{'' if name in str(reason) else f'<b>{_text(name)}</b>: '}{_text(reason)}</li>"
        for name, reason in scores.get("failures", {}).items()
    )
    return f"<p class='note'>Not scored:</p><ul>{items}</ul>" if items else ""


def _case_dice(rows: Sequence[Mapping], case: str) -> float:
    return _mean([number(row["dice"]) for row in rows if row["case"] == case])


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _ranked(rows: Sequence[Mapping]) -> list[str]:
    """Case names, the lowest mean Dice over the classes first."""
    cases = dict.fromkeys(row["case"] for row in rows)
    return sorted(cases, key=lambda case: _case_dice(rows, case))


def _pictures(scores: Mapping, prediction: Mapping) -> str:
    """The worst, the median and the best case, or those of them that there are."""
    rows = scores.get("rows", [])
    if not rows:
        return ""
    ranked = _ranked(rows)
    places = {"worst": 0, "median": len(ranked) // 2, "best": len(ranked) - 1}
    if len(ranked) < 3:
        places.pop("median")
    if len(ranked) == 1:
        places = {"the only case": 0}
    classes = {row["class"]: row["label"] for row in rows}
    shown = ""
    for name, place in places.items():
        case = ranked[place]
        files = scores.get("files", {}).get(case)
        if files is None:
            shown += f"<p class='muted'>{_text(case)}: scores.json names no files of it.</p>"
            continue
        images = prediction.get("inputs", {}).get(case)
        images = [str(image) for image in images] if isinstance(images, list) else []
        missing = [f for f in [*files.values(), *images] if not Path(f).is_file()]
        if missing:
            shown += f"<p class='muted'>{_text(case)}: {_text(missing[0])} is gone.</p>"
            continue
        try:
            picture = overlay(images[0] if images else None, files, classes)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # one volume that cannot be drawn leaves the page whole
            why = _text(in_words(error, "report"))
            shown += f"<p class='muted'>{_text(case)}: no picture ({why}).</p>"
            continue
        dice = ", ".join(
            f"{_text(row['class'])} {_number(row['dice'], 3)}"
            for row in rows
            if row["case"] == case
        )
        shown += (
            f"<figure class='picture'><figcaption><b>{_text(case)}</b> "
            f"<span class='badge'>{name}</span> mean Dice {_number(_case_dice(rows, case), 4)} "
            f"<span class='muted'>({dice})</span></figcaption>"
            f"<div><img alt='{_text(case)}: three slices with reference and prediction' "
            f"src='data:image/png;base64,{base64.b64encode(picture).decode()}'></div></figure>"
        )
    legend = _legend(
        [(name, color_of(index)) for index, name in enumerate(classes)],
        "<span><i class='line'></i>line: reference</span>"
        "<span><i class='fill'></i>filled: prediction</span>",
    )
    explained = (
        "<p class='muted'>Slices through the middle of the reference structure. L→R: from the "
        "patient's left to the right; P→A: from the back to the front.</p>"
    )
    return explained + legend + shown


def _legend(entries: Sequence[tuple[str, str]], more: str = "") -> str:
    items = "".join(
        f"<span><i style='background:{'var(--ink)' if color == 'ink' else color}'></i>"
        f"{_text(name)}</span>"
        for name, color in entries
    )
    return f"<div class='legend'>{items}{more}</div>"


def _settings(found: Sources) -> str:
    parts = []
    reasons = found.plan.get("reasons")
    if isinstance(reasons, list) and reasons:
        items = "".join(f"<li>{_text(reason)}</li>" for reason in reasons)
        parts.append(f"<p>What was proposed from the data, and why:</p><ul>{items}</ul>")
    if found.split:
        training = len(found.names("training"))
        parts.append(
            f"<p>{training} case{'s' * (training != 1)} to train on, "
            f"{len(found.names('validation'))} held out.</p>"
        )
    if found.config is not None:
        parts.append(
            "<details><summary>Configuration</summary>"
            f"<pre>{html.escape(found.config)}</pre></details>"
        )
    if found.prediction:
        shown = {"checkpoint": found.prediction["checkpoint"], **found.prediction["options"]}
        lines = "\n".join(f"{key}: {value}" for key, value in shown.items())
        parts.append(
            f"<details><summary>Prediction</summary><pre>{html.escape(lines)}</pre></details>"
        )
    versions = "\n".join(f"{name}: {value}" for name, value in _versions().items())
    parts.append(
        f"<details><summary>Versions</summary><pre>{html.escape(versions)}</pre></details>"
    )
    return "".join(parts)


def _versions() -> dict[str, str]:
    """What this report was made with."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in ("epa-kernels", "torch", "monai", "nibabel", "numpy", "scipy", "matplotlib"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["torch threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _number(value: Any, digits: int) -> str:
    """A number for the page; what else stands in its place is shown as text."""
    if value is None or not np.isnan(number(value)):
        return "&ndash;" if value is None else f"{number(value):.{digits}f}"
    return "&ndash;" if isinstance(value, float) else _text(value)


def _text(value: Any) -> str:
    """Any value as text of the page, without markup."""
    return html.escape(str(value))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
