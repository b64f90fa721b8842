"""Trained network and volumes of any size -> label maps on the volumes' own grids.

  predict_volume   (1, C, X, Y, Z) -> class probabilities (1, K, X, Y, Z), by sliding window
  predict_cases    Case objects -> preprocessing of the checkpoint -> predict_volume
                   -> probabilities back on the file's grid -> arg-max -> NIfTI
  run_predict      NIfTI files and folders, grouped into Case objects -> predict_cases

Relies on unetrpp.preprocessing, so that a volume is seen exactly as in training, and on MONAI for
the sliding window and for undoing orientation and spacing.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch

from unetrpp.case_names import group_channels
from unetrpp.dataset import Case
from unetrpp.extras import names_extra
from unetrpp.faults import in_words
from unetrpp.files import make_folder
from unetrpp.memory import check_memory
from unetrpp.options import checked, choice, read_path, refusal
from unetrpp.prediction_output import check_folder, check_kind, is_done
from unetrpp.prediction_record import PredictionRecord
from unetrpp.volumes import is_nifti, nifti_files, why_no_file, write_labels

if TYPE_CHECKING:
    from monai.transforms import Compose

    from unetrpp.preprocessing import Preprocessing

__all__ = ["Prediction", "predict_cases", "predict_volume", "run_predict"]

Precision = Literal["fp32", "bf16"]


@names_extra
@torch.no_grad()
def predict_volume(
    model: torch.nn.Module,
    image: torch.Tensor,
    patch_size: Sequence[int],
    *,
    overlap: float = 0.5,
    mirror: bool = False,
    batch_size: int = 2,
    precision: Precision = "fp32",
    stitch_device: torch.device | str | None = None,
) -> torch.Tensor:
    """Class probabilities of a volume: sum_w g_w softmax(model(window_w)) / sum_w g_w.

    The windows have the size of the patch and overlap; g is a Gaussian with sigma = patch / 8,
    so that a voxel listens to the windows in whose middle it lies; weights below 1e-3 of the peak
    are raised to that. Softmax comes before the average, as in the published code. A volume
    smaller than the patch is padded with zeros.

    Args:
        model: maps (B, C, *patch_size) to logits (B, K, *patch_size); of a list (deep
            supervision) the first is used. Runs in eval mode and returns to its own after.
        image (1, C, X, Y, Z): preprocessed volume, on any device.
        patch_size: size of a window along each axis, in voxels.
        overlap: share of a window that it has in common with the next one, in [0, 1).
        mirror: average over the 8 combinations of flips along the axes; 8 times the work.
        batch_size: windows given to the model at once.
        precision: "bf16" runs the model under autocast; sums and softmax stay in float32.
        stitch_device: where the volume is put together; the model's device if not given.

    Returns:
        Probabilities (1, K, X, Y, Z), float32, on stitch_device.

    Raises:
        ValueError: image is not a batch of one volume, or an option is out of range.
    """
    from monai.inferers import sliding_window_inference

    if image.ndim != 5 or image.shape[0] != 1:
        raise ValueError(
            f"predict_volume: image must be one volume (1, C, X, Y, Z), got {tuple(image.shape)}"
        )
    sizes = {"patch_size": patch_size, "batch_size": batch_size}
    _check_options("predict_volume", precision, overlap=overlap, **sizes)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    axes = (2, 3, 4)
    flips = [f for n in range(4) for f in itertools.combinations(axes, n)] if mirror else [()]
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def probabilities(windows: torch.Tensor) -> torch.Tensor:  # (B, C, *patch) -> (B, K, *patch)
        total: Any = 0
        for flip in flips:
            with autocast:
                logits = model(windows.flip(flip) if flip else windows)
            if isinstance(logits, (list, tuple)):
                logits = logits[0]
            probability = logits.float().softmax(1)
            total = total + (probability.flip(flip) if flip else probability)
        return total / len(flips)

    # MONAI's tensor subclass would follow the data through the network and slow it down.
    image = image.as_tensor() if hasattr(image, "as_tensor") else image
    was_training = model.training
    model.eval()
    try:
        found = sliding_window_inference(
            image,
            roi_size=tuple(patch_size),
            sw_batch_size=batch_size,
            predictor=probabilities,
            overlap=overlap,
            mode="gaussian",
            sigma_scale=0.125,
            padding_mode="constant",
            sw_device=device,
            device=torch.device(stitch_device) if stitch_device is not None else device,
        )
        return cast(torch.Tensor, found)
    finally:
        model.train(was_training)


def _check_options(function: str, precision: str, **options: Any) -> dict[str, Any]:
    if precision not in get_args(Precision):
        raise ValueError(refusal(f"{function}: precision", choice(Precision), precision))
    return checked(f"{function}: ", options)


@dataclass
class Prediction:
    """What `run_predict` or `predict_cases` did.

    Attributes:
        outputs: case name to the label map that was written.
        failures: file or case name to the reason why it has no label map; empty if all went
            well, otherwise a command should end with a non-zero exit code.
        seconds: case name to the wall-clock time from reading to writing.
        inputs: case name to the files it was read from, for the predicted cases.
        skipped: case name to the label map that was there already, with skip_existing.
    """

    outputs: dict[str, Path] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, list[Path]] = field(default_factory=dict)
    skipped: dict[str, Path] = field(default_factory=dict)


@names_extra
def run_predict(
    inputs: Sequence[Path | str] | Path | str,
    output: Path | str,
    checkpoint: Path | str,
    *,
    overlap: float = 0.5,
    mirror: bool = False,
    batch_size: int = 2,
    device: str = "auto",
    precision: Precision = "fp32",
    overwrite: bool = False,
    check_affine: bool = False,
    skip_existing: bool = False,
    quiet: bool = False,
) -> Prediction:
    """Segment NIfTI volumes with a trained checkpoint.

    A label map has the affine (both forms and their codes), spacing and shape of its input and
    the smallest integer type that holds the labels. Several channels are one 4-D file or files
    named NAME_0000.nii.gz, NAME_0001.nii.gz, ...; the label map is then NAME.nii.gz, see
    `unetrpp.case_names.group_channels`. A file that cannot be used is named with the reason, and
    the others are still done.

    Args:
        inputs: NIfTI files, or folders with such files.
        output: Folder for the label maps; or the name of one, if there is one input.
        checkpoint: Checkpoint folder of a training run, e.g. RUN/best.
        overlap: Share of a window that it has in common with the next one.
        mirror: Average over all 8 mirrored versions; slower by 8, often slightly better.
        batch_size: Windows computed at once; lower it if memory runs out.
        device: cpu, cuda, cuda:1, mps, or auto for a GPU if there is one.
        precision: fp32, or bf16 (faster where the device has it).
        overwrite: Replace label maps that exist; without it such a case is an error.
        check_affine: Refuse a channel that lies elsewhere than the first one; if not given, it is
            used voxel by voxel, with a warning that says how many mm.
        skip_existing: Leave label maps that exist, and do the others; one that cannot be read is
            made again.
        quiet: Print nothing.

    Returns:
        Outputs, failures and timing. A folder also gets prediction.json with these, the class
        names and the options; it is written after each volume, and keeps what was done before.

    Raises:
        FileNotFoundError: no input at all.
        ValueError: two inputs would be written to the same place, an output would replace an
            input, an option is out of range, the device is unknown, the checkpoint holds no
            preprocessing, or the folder holds label maps of another checkpoint or option.
    """
    from unetrpp.checkpoint import load_checkpoint

    options = {"overlap": overlap, "batch_size": batch_size, "checkpoint": checkpoint}
    checkpoint = Path(_check_options("run_predict", precision, **options)["checkpoint"])
    paths = _paths(inputs)
    loaded = load_checkpoint(checkpoint)
    failures: dict[str, str] = {}
    channels = _preprocessing("run_predict", checkpoint, *loaded).channels
    cases = _collect(paths, channels, failures)
    check_folder(output, paths)
    return predict_cases(
        cases,
        output,
        checkpoint,
        overlap=overlap,
        mirror=mirror,
        batch_size=batch_size,
        device=device,
        precision=precision,
        overwrite=overwrite,
        check_affine=check_affine,
        skip_existing=skip_existing,
        quiet=quiet,
        loaded=loaded,
        failures=failures,
    )


@names_extra
def predict_cases(
    cases: Sequence[Case],
    output: Path | str,
    checkpoint: Path | str,
    *,
    overlap: float = 0.5,
    mirror: bool = False,
    batch_size: int = 2,
    device: str = "auto",
    precision: Precision = "fp32",
    overwrite: bool = False,
    check_affine: bool = False,
    skip_existing: bool = False,
    quiet: bool = False,
    loaded: tuple[torch.nn.Module, dict] | None = None,
    failures: Mapping[str, str] | None = None,
) -> Prediction:
    """Segment cases whose files are known, whatever the files' names; see `run_predict`.

    Args:
        cases: what `unetrpp.dataset.find_cases` returns; the labels are not read.
        output: folder for the label maps, NAME.nii.gz each; or the name of one, for one case.
        checkpoint: checkpoint folder of a training run.
        overlap, mirror, batch_size, device, precision, overwrite, check_affine, skip_existing,
            quiet: as in `run_predict`.
        loaded: what `load_checkpoint` returned for the checkpoint, if it was read already.
        failures: what is known to have failed already, to be reported with the rest.

    Returns:
        Outputs, failures and timing, as `run_predict`.

    Raises:
        ValueError: two cases would be written to the same place, an output would replace an
            input, an option is out of range, the device is unknown, the checkpoint holds no
            preprocessing, or the folder holds label maps of another checkpoint or option.
    """
    from tqdm import tqdm

    from unetrpp.checkpoint import load_checkpoint
    from unetrpp.preprocessing import inference_transforms

    options = {"overlap": overlap, "batch_size": batch_size}
    paths = {"output": output, "checkpoint": checkpoint}
    given = _check_options("predict_cases", precision, **options, **paths)
    output, checkpoint = Path(given["output"]), Path(given["checkpoint"])
    if overwrite and skip_existing:
        raise ValueError(
            "predict takes --overwrite or --skip_existing, not both: one replaces label maps that "
            "exist, the other leaves them"
        )
    result = Prediction(failures=dict(failures or {}))
    torch_device = _device(device)
    model, config = loaded or load_checkpoint(checkpoint)
    preprocessing = _preprocessing("predict_cases", checkpoint, model, config)
    cases = [
        replace(case, images=tuple(Path(image).absolute() for image in case.images), label=None)
        for case in cases
    ]
    targets = _targets(cases, output)
    is_file = is_nifti(output)
    check_kind(output, is_file)
    used = {
        "overlap": overlap,
        "mirror": mirror,
        "device": str(torch_device),
        "precision": precision,
    }
    record = PredictionRecord(
        None if is_file else output,
        checkpoint,
        preprocessing.to_dict(),
        used,
        overwrite=overwrite,
    )
    model.to(torch_device)

    make_folder(output.parent if is_file else output)
    unwritten = record.save(result.failures)
    for case in tqdm(cases, desc="predict", unit="volume", disable=True if quiet else None):
        start = time.perf_counter()
        target = targets[case.name]
        try:
            if skip_existing and is_done(target, case.images[0]):
                result.skipped[case.name] = target
                continue
            if target.exists() and not (overwrite or skip_existing):
                raise FileExistsError(
                    f"{target} exists; --overwrite replaces it, --skip_existing leaves it"
                )
            labels = _predict_case(
                model,
                case,
                inference_transforms(preprocessing, check_affine),
                preprocessing,
                overlap=overlap,
                mirror=mirror,
                batch_size=batch_size,
                precision=precision,
            )
            record.forget(case.name)
            write_labels(target, labels, case.images[0])
        except ModuleNotFoundError:
            raise
        except Exception as error:  # whatever one file does, the others are still done
            result.failures[str(case.images[0])] = in_words(error, "predict")
        else:
            seconds = time.perf_counter() - start
            result.inputs[case.name], result.outputs[case.name] = list(case.images), target
            result.seconds[case.name] = seconds
            record.add(case.name, case.images, target, seconds)
        unwritten = record.save(result.failures)
    if unwritten is not None:
        result.failures[str(record.file)] = unwritten

    if not quiet:
        for name, reason in result.failures.items():
            # Most reasons name the file themselves.
            print(f"FAILED {reason}" if name in reason else f"FAILED {name}: {reason}")
        there = f", {len(result.skipped)} were there already" if result.skipped else ""
        print(
            f"{len(result.outputs)} volumes predicted in {sum(result.seconds.values()):.1f} s, "
            f"{len(result.failures)} failed{there}; label maps in {output}"
        )
    return result


def _paths(inputs: Sequence[Path | str] | Path | str) -> list[Path]:
    """The inputs as paths, one path being a list of one."""
    listed = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    try:
        return [read_path(path) for path in listed]
    except (TypeError, ValueError):
        raise ValueError(
            f"run_predict: inputs must be paths of NIfTI files or folders, got {listed}; leave out "
            "what is empty"
        ) from None


def _preprocessing(
    function: str, checkpoint: Path, model: torch.nn.Module, config: Mapping[str, Any]
) -> Preprocessing:
    from unetrpp.models import Network
    from unetrpp.preprocessing import Preprocessing

    if config.get("preprocessing") is None:
        raise ValueError(
            f"{function}: a checkpoint must say how its network's input is prepared, but "
            f"config.json of {checkpoint} holds {', '.join(config)} and no preprocessing; add it "
            f"with unetrpp convert {checkpoint} -o NEW --preprocessing FILE.json, or --data DIR of "
            f"the training data, or with save_checkpoint(folder, model, {{"
            f'"preprocessing": unetrpp.preprocessing.Preprocessing(...).to_dict()}}); or take a '
            f"checkpoint of unetrpp train"
        )
    if not isinstance(model, Network):  # given as `loaded`, and its sizes are not known
        return Preprocessing.from_dict(config["preprocessing"])
    return Preprocessing.of_network(config["preprocessing"], model, str(checkpoint / "config.json"))


def _device(name: str) -> torch.device:
    if name == "auto":  # in the order in which training chooses
        has_mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"run_predict: device {name!r} cannot be used here ({str(error).splitlines()[0]}); "
            "'auto' takes what there is"
        ) from error
    return device


def _collect(
    inputs: Sequence[Path], channels: Sequence[str], failures: dict[str, str]
) -> list[Case]:
    """Group the files into cases; what is no usable input goes to failures."""
    files: dict[Path, None] = {}  # a dict keeps the order and drops a file that is given twice
    for path in inputs:
        if path.is_dir():
            found = nifti_files(path)
            if not found:
                failures[str(path)] = "the folder holds no .nii or .nii.gz file"
            files.update(dict.fromkeys(file.absolute() for file in found))
        elif not path.exists():
            failures[str(path)] = why_no_file(path)
        elif not is_nifti(path):
            failures[str(path)] = "only .nii and .nii.gz files are read"
        else:
            files[path.absolute()] = None
    if not files and not failures:
        raise FileNotFoundError("run_predict: no input was given")

    grouped, problems = group_channels(files, channels)
    failures.update((str(file), reason) for file, reason in problems.items())
    return [Case(name, images) for (_, name), images in grouped.items()]


def _targets(cases: Sequence[Case], output: Path) -> dict[str, Path]:
    """Case name to output file, refusing everything that would lose data."""
    if is_nifti(output):
        if len(cases) > 1:
            raise ValueError(
                f"run_predict: output {output} is one file, but there are {len(cases)} inputs; "
                "name a folder"
            )
        targets = {case.name: output for case in cases}
    else:
        by_name: dict[str, Path] = {}
        for case in cases:
            other = by_name.setdefault(case.name, case.images[0])
            if other != case.images[0]:
                raise ValueError(
                    f"run_predict: {other} and {case.images[0]} would both be written to "
                    f"{output / case.name}.nii.gz; predict them into different folders"
                )
        targets = {case.name: output / f"{case.name}.nii.gz" for case in cases}
    originals = {image.resolve() for case in cases for image in case.images}
    for target in targets.values():
        if target.resolve() in originals:
            raise ValueError(
                f"run_predict: the output {target} is one of the inputs, which are never "
                "overwritten; name another folder"
            )
    return targets


def _predict_case(
    model: torch.nn.Module,
    case: Case,
    transforms: Compose,
    preprocessing: Preprocessing,
    **options,
) -> np.ndarray:
    """The label map (X, Y, Z) of a case, on the grid of its files."""
    # MONAI undoes a transform only through the very object that applied it.
    item = cast(Any, case)
    for step in transforms.transforms:
        item = step(item)
    image = item["image"]  # (C, S, P, L)
    check_probabilities(case.images[0], image.shape[1:], len(preprocessing.labels))
    probabilities = predict_volume(
        model,
        image[None],
        preprocessing.patch_size,
        stitch_device=_stitch_device(model, image[0].numel() * len(preprocessing.labels)),
        **options,
    )[0].cpu()  # (K, S, P, L)
    if not torch.isfinite(probabilities).all():
        raise RuntimeError(
            "the network's output holds NaN or infinite values; try precision fp32, and check "
            "that the checkpoint comes from a finished training"
        )

    # One class at a time: on the file's grid all classes together may not fit into memory.
    for value, probability in enumerate(probabilities):
        turned = _like(probability[None], image)
        restored = transforms.inverse({"image": turned})["image"].as_tensor()[0]  # (X, Y, Z)
        if value == 0:
            best, labels = restored, torch.zeros(restored.shape, dtype=torch.int32)
            continue
        labels[restored > best] = value
        best = torch.maximum(best, restored)
    return labels.numpy().astype(np.min_scalar_type(len(probabilities) - 1))


def check_probabilities(file: Path, shape: Sequence[int], classes: int) -> None:
    """Refuse a volume whose class probabilities would take too much memory, see `unetrpp.memory`.

    Args:
        file: it is named. shape: of the volume as the network sees it. classes: with background.

    Raises:
        NotEnoughMemory: with the size, and what to do.
    """
    size = " x ".join(map(str, shape))
    check_memory(
        4 * classes * math.prod(shape),
        f"{file}: the probabilities of {classes} classes for {size} voxels",
        "crop it, free memory, or train on larger voxels (--spacing)",
    )


def _like(values: torch.Tensor, image: Any) -> Any:
    """values with the history of image, so that MONAI can undo it."""
    from monai.data import MetaTensor

    return MetaTensor(
        values,
        meta=dict(image.meta),
        applied_operations=list(image.applied_operations),
    )


def _stitch_device(model: torch.nn.Module, values: int) -> torch.device:
    """The model's device, or the CPU where the probabilities would fill more than half of it."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # The sum of weighted probabilities, its normalised copy and the weights, in float32.
        if 3 * 4 * values > free / 2:
            return torch.device("cpu")
    return device
