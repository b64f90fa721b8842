"""Scores of label maps: Dice and the 95 % Hausdorff distance, per case and per class.

  in   predicted and reference label maps (X, Y, Z), paired by file name
  out  scores.csv (one row per case and class), scores.json (the same, and the summary), a table

The distance is computed twice: in voxels and with the conventions of the published tables, so that
numbers can be compared with those, and in millimetres, which is what a reader usually wants.

A training run chooses RUN/best by its Dice on the held-out cases: scores of RUN/best on those same
cases are somewhat too good, and only cases that played no part in the run give an unbiased figure.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unetrpp.case_names import pair_names
from unetrpp.dataset_json import IGNORE, class_names, split_ignore
from unetrpp.extras import names_extra
from unetrpp.faults import in_words
from unetrpp.files import make_folder, write_json, write_text
from unetrpp.memory import NotEnoughMemory
from unetrpp.options import checked
from unetrpp.volumes import UnusableVolume, case_name, is_nifti, nifti_files, placed, read_labels

__all__ = [
    "Evaluation",
    "check_labelled",
    "dice_per_class",
    "evaluate_pairs",
    "format_table",
    "hd95",
    "run_evaluate",
    "summarize",
]

MOST_FAILURES_PRINTED = 10  # of hundreds, no terminal shows the table above them
COLUMNS = (
    "case",
    "class",
    "label",
    "dice",
    "hd95_voxels",
    "hd95_mm",
    "prediction_voxels",
    "reference_voxels",
)
DEFINITIONS = {
    "dice": "2 |A and B| / (|A| + |B|); 1 where both are empty, 0 where exactly one is",
    "hd95_voxels": (
        "95th percentile of the surface distances of both directions taken together, in voxels; "
        "0 where either mask is empty (as in the published tables)"
    ),
    "hd95_mm": (
        "the same percentile in millimetres; undefined where either mask is empty: left out of "
        "mean and median, and counted under 'undefined'"
    ),
}


def dice_per_class(
    prediction: np.ndarray, label: np.ndarray, classes: Sequence[int | Sequence[int]]
) -> list[float]:
    """Dice of every class: 2 |A and B| / (|A| + |B|).

    Args:
        prediction (any shape): integer label map.
        label (same shape): integer reference.
        classes: label values; a class may be several values together (a region, as BraTS's
            whole tumour 1, 2, 3).

    Returns:
        One value in [0, 1] per class: 1 where the class is in neither map, 0 where it is in
        exactly one (as the published code does).

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> dice_per_class(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]), [1, 2, 3])
        [0.6666666666666666, 0.6666666666666666, 1.0]
    """
    prediction, label = np.asarray(prediction), np.asarray(label)
    _check_shapes("dice_per_class", prediction, label)
    return [_dice(_mask(prediction, value), _mask(label, value)) for value in classes]


@names_extra
def hd95(
    prediction: np.ndarray,
    label: np.ndarray,
    spacing: Sequence[float] | None = None,
    *,
    empty: float = math.nan,
) -> float:
    """95 % Hausdorff distance, both directions pooled: P95 of {d(a, B)} together with {d(b, A)}.

    a and b run over the surface voxels (those with a face neighbour outside the mask, or outside
    the volume) of one mask, d is the Euclidean distance to the nearest surface voxel of the other.
    This is the definition of medpy, which the published tables use; MONAI takes the larger of the
    two directed percentiles instead.

    Args:
        prediction (X, Y, Z): mask; everything that is not 0 belongs to it. Any number of axes.
        label (X, Y, Z): reference mask.
        spacing: size of a voxel along each axis, in mm; None counts in voxels.
        empty: what to return where either mask is empty; the published tables take 0.

    Returns:
        The distance, in mm or voxels.

    Raises:
        ValueError: the shapes differ, or the number of spacings is not that of the axes.

    Example:
        >>> a, b = np.zeros((9, 9)), np.zeros((9, 9))
        >>> a[2:4, 2:4] = 1
        >>> b[2:4, 5:7] = 1
        >>> hd95(a, b)
        3.0
    """
    prediction, label = np.asarray(prediction) != 0, np.asarray(label) != 0
    _check_shapes("hd95", prediction, label)
    if spacing is not None and len(spacing) != prediction.ndim:
        raise ValueError(
            f"hd95: one spacing per axis is needed, got {tuple(spacing)} for masks with "
            f"{prediction.ndim} axes"
        )
    if not prediction.any() or not label.any():
        return empty
    distances = _surface_distances(prediction, label, spacing)
    return float(np.percentile(distances, 95))


@dataclass
class Evaluation:
    """What `run_evaluate` found.

    Attributes:
        rows: one mapping per case and class with the columns of scores.csv.
        summary: per class and for the mean over classes, see `summarize`.
        failures: file or case name to the reason it could not be scored; empty if all went well,
            otherwise a command should end with a non-zero exit code.
        unmatched: names of predictions for which there is no reference (not a failure).
        files: case name to {"prediction", "reference"}, absolute paths, for the scored cases.
    """

    rows: list[dict] = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    files: dict[str, dict[str, str]] = field(default_factory=dict)


@names_extra
def run_evaluate(
    predictions: Path | str,
    labels: Path | str,
    output: Path | str | None = None,
    *,
    names: Path | str | None = None,
    only_predicted: bool = False,
    check_affine: bool = False,
    quiet: bool = False,
) -> Evaluation:
    """Score predicted label maps against references, write CSV and JSON and print a table.

    Files are paired by name (case.nii.gz with case.nii.gz). A pair that cannot be scored is named
    with the reason, and the others are still done.

    Args:
        predictions: Folder with predicted label maps (NIfTI), or one file.
        labels: Folder with the reference label maps, or one file.
        output: Folder for scores.csv and scores.json; the predictions' folder if not given.
        names: dataset.json with the class names; looked for beside the labels if not given.
        only_predicted: Score what was predicted; a reference without prediction is no error.
        check_affine: Refuse a pair that lies at different places; if not given, it is scored
            voxel by voxel, with a warning that says how many mm.
        quiet: Print nothing.

    Returns:
        Rows, summary and failures.

    Raises:
        FileNotFoundError: a path does not exist or holds no NIfTI file, or no two names agree.
        ValueError: names is not a dataset.json, a folder holds a case twice, predictions and
            labels are the same, or output is a file.
    """
    paths = {"predictions": predictions, "labels": labels, "output": output, "names": names}
    given = checked("run_evaluate: ", {k: v for k, v in paths.items() if v is not None})
    predictions, labels = Path(given["predictions"]), Path(given["labels"])
    output, names = given.get("output"), given.get("names")
    if predictions.exists() and labels.exists() and predictions.samefile(labels):
        raise ValueError(
            f"run_evaluate: predictions and labels are both {predictions}, and would score as "
            "perfect; name the folder of the references second"
        )
    predicted, references = _volumes(predictions), _volumes(labels)
    failures: dict[str, str] = {}
    unmatched: list[str] = []
    if predictions.is_file() and labels.is_file():
        # Two files named by the user are a pair whatever their names.
        ((name, prediction), (reference,)) = *predicted.items(), references.values()
        pairs = {name: (prediction, reference)}
    else:
        named = pair_names(predicted, references)
        pairs = {case: (predicted[name], references[case]) for name, case in named.items()}
        unmatched = sorted(set(predicted) - set(named))
        if not pairs:
            raise FileNotFoundError(
                f"run_evaluate: no file in {predictions} has the name of one in {labels} "
                f"({next(iter(predicted))} ... against {next(iter(references))} ...)"
            )
        if not only_predicted:
            for case in sorted(set(references) - set(pairs)):
                failures[str(references[case])] = (
                    f"there is no prediction named {case}.nii.gz in {predictions}; to score only "
                    "what was predicted: --only-predicted"
                )
    return evaluate_pairs(
        pairs,
        Path(output) if output is not None else _folder(predictions),
        classes=_class_names(names, labels, predictions),
        check_affine=check_affine,
        failures=failures,
        unmatched=unmatched,
        quiet=quiet,
    )


@names_extra
def evaluate_pairs(
    pairs: Mapping[str, tuple[Path, Path]],
    output: Path,
    *,
    classes: Mapping[str, int | list[int]] | None = None,
    check_affine: bool = False,
    failures: Mapping[str, str] | None = None,
    unmatched: Sequence[str] = (),
    quiet: bool = False,
) -> Evaluation:
    """Score given pairs of files; see `run_evaluate`, which finds the pairs by name.

    Args:
        pairs: case name to (prediction, reference).
        output: folder for scores.csv and scores.json.
        classes: class name to label value(s), background left out; if not given, one class per
            value in the references. Voxels of the reference with the value of "ignore", if that
            is named, are left out of every score.
        check_affine: refuse a pair that lies at different places, see `unetrpp.volumes.placed`.
        failures: what is known to have failed already, to be reported with the rest.
        unmatched: predictions without reference, to be reported.
        quiet: print nothing.
    """
    from tqdm import tqdm

    result = Evaluation(failures=dict(failures or {}), unmatched=list(unmatched))
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a folder for the scores")
    # Before the scoring, which may take hours.
    make_folder(output)
    if classes is None:
        classes = _classes_in([reference for _, reference in pairs.values()])
    for case in tqdm(sorted(pairs), desc="evaluate", unit="case", disable=True if quiet else None):
        prediction_file, reference_file = map(Path, pairs[case])
        try:
            result.rows += _score(case, prediction_file, reference_file, classes, check_affine)
        except UnusableVolume as error:
            result.failures[str(error.file)] = error.reason
            continue
        except ModuleNotFoundError:
            raise
        except Exception as error:  # whatever one case does, the others are still scored
            result.failures[str(prediction_file)] = in_words(error, "evaluate")
            continue
        result.files[case] = {
            "prediction": str(prediction_file.absolute()),
            "reference": str(reference_file.absolute()),
        }
    result.summary = summarize(result.rows)

    for file, write in ((output / "scores.csv", _write_csv), (output / "scores.json", _write_json)):
        try:
            write(file, result)
        except OSError as error:  # the table and the failures are still printed
            result.failures[str(file)] = in_words(error, "evaluate")
    if not quiet:
        print(format_table(result.summary))
        if result.unmatched:
            print(f"not scored, no reference: {', '.join(result.unmatched)}")
        for name, reason in list(result.failures.items())[:MOST_FAILURES_PRINTED]:
            print(f"FAILED {reason}" if name in reason else f"FAILED {name}: {reason}")
        if (more := len(result.failures) - MOST_FAILURES_PRINTED) > 0:
            print(f"FAILED {more} more, all listed in {output / 'scores.json'}")
        print(
            f"{len(result.files)} cases scored, {len(result.failures)} failed; scores in {output}"
        )
    return result


def summarize(rows: Sequence[Mapping]) -> dict:
    """Mean and median over the cases, per class, and the mean of those over the classes.

    Args:
        rows: mappings with the columns of scores.csv; an undefined value is nan or None.

    Returns:
        {"classes": {class: {score: {"mean", "median", "n", "undefined"}}}, "mean": {score: {...}}}
        for the scores dice, hd95_voxels, hd95_mm. n counts the values that entered, undefined
        those that could not (an empty mask has no distance in mm). Each class also has "empty":
        the number of cases in which the prediction, the reference or both are empty, since the
        published convention scores those 0 voxels.
    """
    scores = ("dice", "hd95_voxels", "hd95_mm")
    summary: dict = {"classes": {}, "mean": {}}
    for name in dict.fromkeys(row["class"] for row in rows):
        of_class = [row for row in rows if row["class"] == name]
        entry: dict = {score: _statistics(row[score] for row in of_class) for score in scores}
        entry["empty"] = sum(
            1 for row in of_class if not (row["prediction_voxels"] and row["reference_voxels"])
        )
        summary["classes"][name] = entry
    for score in scores:
        entries = [entry[score] for entry in summary["classes"].values()]
        summary["mean"][score] = {
            "mean": _statistics(entry["mean"] for entry in entries)["mean"],
            "median": _statistics(entry["median"] for entry in entries)["mean"],
            "n": sum(entry["n"] for entry in entries),
            "undefined": sum(entry["undefined"] for entry in entries),
        }
    return summary


def format_table(summary: Mapping) -> str:
    """The summary as a plain-text table: one line per class, then the mean over classes."""
    width = max([len("mean of classes"), *(len(name) for name in summary["classes"])])
    lines = [
        f"{'':{width}}  {'Dice':^15}  {'HD95 voxels':^15}  {'HD95 mm':^15}  cases  undefined mm",
        f"{'class':{width}}  " + 3 * f"{'mean':>7} {'median':>7}  ",
    ]
    rows = [*summary["classes"].items(), ("mean of classes", summary["mean"])]
    for name, entry in rows:
        cells = "  ".join(
            f"{_number(entry[score]['mean'], digits):>7} "
            f"{_number(entry[score]['median'], digits):>7}"
            for score, digits in (("dice", 4), ("hd95_voxels", 2), ("hd95_mm", 2))
        )
        cases = "" if entry is summary["mean"] else entry["dice"]["n"]
        counts = f"{cases:>5}  {entry['hd95_mm']['undefined']:>12}"
        lines.append(f"{name:{width}}  {cells}  {counts}")
    return "\n".join(lines)


def _mask(labels: np.ndarray, value: int | Sequence[int]) -> np.ndarray:
    return labels == value if np.isscalar(value) else np.isin(labels, value)


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    size = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / size if size else 1.0


def _surface_distances(a: np.ndarray, b: np.ndarray, spacing: Sequence[float] | None) -> np.ndarray:
    """Distances from every surface voxel of a to the surface of b, and the reverse (1-D)."""
    from scipy import ndimage

    # Nothing outside the box that holds both masks can be nearest to anything, and the cost of
    # a distance transform is that of the volume.
    box = ndimage.find_objects((a | b).astype(np.uint8))[0]
    a, b = a[box], b[box]
    surface_a = a & ~ndimage.binary_erosion(a)
    surface_b = b & ~ndimage.binary_erosion(b)
    to_b = ndimage.distance_transform_edt(~surface_b, sampling=spacing)
    to_a = ndimage.distance_transform_edt(~surface_a, sampling=spacing)
    return np.concatenate([to_b[surface_a], to_a[surface_b]])


def _score(
    case: str,
    prediction_file: Path,
    reference_file: Path,
    classes: Mapping[str, int | list[int]],
    check_affine: bool,
) -> list[dict]:
    classes, ignore = split_ignore(classes)
    truth = read_labels(reference_file)
    prediction = placed(read_labels(prediction_file), truth, check_affine).values
    reference, spacing = truth.values, truth.grid.spacing
    listed = {0}.union(*(np.atleast_1d(value).tolist() for value in classes.values()))
    for file, labels in ((prediction_file, prediction), (reference_file, reference)):
        unknown = sorted(set(np.unique(labels).tolist()) - listed)
        if labels is reference and ignore in unknown:
            unknown.remove(ignore)
        if ignore in unknown:
            raise UnusableVolume(
                file,
                f'has the labels {unknown}, and {ignore} is "{IGNORE}", which only a reference '
                f"may hold; give those voxels one of the classes {dict(classes)} or 0",
            )
        if unknown:
            raise UnusableVolume(
                file,
                f"has the labels {unknown}, which are none of the classes {dict(classes)}; "
                "give the dataset.json that names them with --names",
            )
    if ignore is not None:
        ignored = reference == ignore
        check_labelled(reference_file, ignored)
        prediction, reference = (np.where(ignored, 0, each) for each in (prediction, reference))
    isotropic = max(spacing) - min(spacing) <= 1e-6 * max(spacing)
    rows = []
    for name, value in classes.items():
        a, b = _mask(prediction, value), _mask(reference, value)
        voxels = hd95(a, b)
        # One transform is enough where a voxel is a cube.
        mm = voxels * spacing[0] if isotropic else hd95(a, b, spacing)
        rows.append(
            {
                "case": case,
                "class": name,
                "label": value,
                "dice": _dice(a, b),
                "hd95_voxels": 0.0 if math.isnan(voxels) else voxels,
                "hd95_mm": mm,
                "prediction_voxels": int(a.sum()),
                "reference_voxels": int(b.sum()),
            }
        )
    return rows


def check_labelled(file: Path, ignored: np.ndarray) -> None:
    """Refuse a reference whose voxels are all ignored: an empty one would score as perfect.

    Args:
        file: the reference.
        ignored (any shape): which of its voxels are.
    """
    if ignored.all():
        raise UnusableVolume(
            file,
            f'has the label "{IGNORE}" in every voxel, so nothing can be scored; label some of '
            "them, or leave its case out",
        )


def _check_shapes(function: str, prediction: np.ndarray, label: np.ndarray) -> None:
    if prediction.shape != label.shape:
        raise ValueError(
            f"{function}: prediction and label must have one shape, got {prediction.shape} and "
            f"{label.shape}"
        )


def _volumes(path: Path) -> dict[str, Path]:
    """Case name to NIfTI file, for a folder or one file."""
    if path.is_file():
        if not is_nifti(path):
            raise ValueError(f"run_evaluate: {path} is no .nii or .nii.gz file; name one")
        return {case_name(path): path}
    if not path.exists():
        raise FileNotFoundError(f"run_evaluate: {path} does not exist")
    files = nifti_files(path)
    if not files:
        raise FileNotFoundError(f"run_evaluate: {path} holds no .nii or .nii.gz file")
    volumes = {case_name(file): file for file in files}
    if len(volumes) < len(files):
        twice = sorted(set(files) - set(volumes.values()))
        raise ValueError(f"run_evaluate: .nii and .nii.gz of one case, remove one of them: {twice}")
    return volumes


def _folder(path: Path) -> Path:
    return path.parent if path.is_file() else path


def _class_names(
    names: Path | None, labels: Path, predictions: Path
) -> dict[str, int | list[int]] | None:
    """Class name to label value(s), from the file that is given or lies beside the maps."""
    if names is None:
        candidates = [
            _folder(labels) / "dataset.json",
            _folder(labels).resolve().parent / "dataset.json",
            _folder(predictions) / "prediction.json",
        ]
        names = next((file for file in candidates if file.is_file()), None)
    return class_names(Path(names)) if names is not None else None


def _classes_in(files: Sequence[Path]) -> dict[str, int]:
    """One class per label value that occurs in the readable references."""
    values: set[int] = set()
    for file in files:
        try:
            values |= set(np.unique(read_labels(file).values).tolist())
        except (UnusableVolume, OSError, NotEnoughMemory):
            continue  # named when its turn to be scored comes
    return {f"label {value}": value for value in sorted(values - {0})}


def _statistics(values) -> dict:
    values = list(values)
    known = [v for v in values if v is not None and not math.isnan(v)]
    return {
        "mean": float(np.mean(known)) if known else None,
        "median": float(np.median(known)) if known else None,
        "n": len(known),
        "undefined": len(values) - len(known),
    }


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _write_csv(file: Path, result: Evaluation) -> None:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS)
    writer.writeheader()
    for row in result.rows:
        value = row["label"]
        label = value if np.isscalar(value) else "+".join(str(part) for part in value)
        writer.writerow({**row, "label": label})
    write_text(file, stream.getvalue())


def _write_json(file: Path, result: Evaluation) -> None:
    # JSON has no nan: an undefined distance is null.
    rows = [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        for row in result.rows
    ]
    content = {
        "summary": result.summary,
        "rows": rows,
        "failures": result.failures,
        "unmatched": result.unmatched,
        "files": result.files,
        "definitions": DEFINITIONS,
    }
    write_json(file, content)
