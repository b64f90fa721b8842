"""The demo: grey and white matter of a real brain template, in minutes, without a download.

  data        T1 template and tissue probability maps (MNI ICBM152 2009a, 1 mm) from nilearn's wheel
  training    left hemisphere, without its front; the front is the validation volume
  test        right hemisphere

What its Dice can and cannot say: it is ONE brain, an average of 152, and the template is the
symmetric one, whose right half is the exact mirror image of the left. So nothing is flipped in
training: a flip to the left or right would show the network the very test volume. Even so this
is an easy test, no clinical result. The front of the right hemisphere is scored on its own as
well: neither it nor its mirror image was trained on.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from unetrpp.files import replacing, write_json
from unetrpp.options import checked

__all__ = ["make_demo_data", "run_demo"]

LABELS = {"background": 0, "grey matter": 1, "white matter": 2}
# Share of the volume's length from the back that is trained on; the rest, the front, is held out.
TRAINED_SHARE = 0.75
# Small enough for a CPU. Windows lie anywhere (foreground 0), so that air is learned, too; the
# cosine ends at a rate of zero, so there is nothing for averaged weights to smooth.
SETTINGS: dict[str, Any] = {
    "preset": "tiny",
    "patch_size": [48, 48, 48],
    "strides": [[2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
    "batch_size": 2,
    "learning_rate": 5e-3,
    "augmentation": "none",
    "mirror": False,
    "foreground": 0.0,
    "ema": 0.0,
}
NOTES = (
    "One average brain, learned on its left half and tested on its right: an easy test that shows "
    "that the program works, and no clinical result.",
    "The template is symmetric: its right half is the exact mirror image of the left. Therefore "
    "nothing was mirrored in training or prediction.",
)


def run_demo(
    output: Path | str,
    *,
    steps: int = 360,
    seed: int = 1,
    overwrite: bool = False,
) -> dict:
    """Train on the left hemisphere of a brain template, predict and score the right one.

    Needs no download and about 3 minutes on 2 CPU cores. Uses the same functions as the commands
    train, predict and evaluate, on a data folder as a user would make it.

    Args:
        output: New folder for data, run, prediction, scores and report.
        steps: Number of training steps.
        seed: Seed of weights, patches and augmentation.
        overwrite: Replace an earlier demo in the output folder.

    Returns:
        {"dice": {class: value}, "mean_dice", "dice_front": {class: value}, "seconds", "report"};
        dice_front is that of the part of which not even the mirror image was trained on.

    Raises:
        FileExistsError: output holds something and overwrite was not given.
        ValueError: output is a file, or an option is out of range.
        ModuleNotFoundError: nilearn is not installed.
    """
    from unetrpp.dataset import find_cases, split_cases
    from unetrpp.evaluate import run_evaluate
    from unetrpp.predict import run_predict
    from unetrpp.report import write_report
    from unetrpp.train import TrainConfig, run_train

    start = time.perf_counter()
    given = checked("run_demo: ", {"output": output, "steps": steps, "seed": seed})
    output, steps, seed = Path(given["output"]), given["steps"], given["seed"]
    if output.exists() and not output.is_dir():
        raise ValueError(f"run_demo: output {output} is a file; name a new folder")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(
            f"run_demo: {output} is not empty; name a new folder, or replace it with --overwrite"
        )
    data = output / "data"
    front = make_demo_data(data)
    print(f"data from the nilearn wheel written to {data}", flush=True)
    cases = find_cases(data)
    fold = next(f for f in (0, 1) if split_cases(cases, f, 2)[1][0].name == "left_front")
    run_train(
        TrainConfig(
            data=data,
            output=output / "run",
            overwrite=overwrite,
            steps=steps,
            seed=seed,
            fold=fold,
            folds=2,
            validate_every=max(1, steps // 3),
            report=False,
            **SETTINGS,
        )
    )
    # The last checkpoint, not the best: nothing is chosen by a score of this one brain.
    prediction = run_predict(
        [data / "imagesTs"], output / "prediction", output / "run" / "last", overwrite=True
    )
    scores = run_evaluate(output / "prediction", data / "labelsTs", output / "scores")
    failures = {**prediction.failures, **scores.failures}
    if failures:
        raise RuntimeError(f"run_demo: {failures}")
    dice = {row["class"]: row["dice"] for row in scores.rows}
    dice_front = _front_dice(output, front)
    listed = ", ".join(f"{name} {value:.4f}" for name, value in dice_front.items())
    notes = (
        *NOTES,
        f"Front of the right hemisphere, not even mirrored in training: Dice {listed}.",
    )
    report = write_report(
        output / "run",
        output / "scores",
        output=output / "report.html",
        title="Demo: grey and white matter of the MNI152 template",
        notes=notes,
    )
    result = {
        "dice": dice,
        "mean_dice": float(np.mean(list(dice.values()))),
        "dice_front": dice_front,
        "seconds": round(time.perf_counter() - start, 1),
        "report": str(report),
    }
    write_json(output / "demo.json", result)
    for note in notes:
        print(note)
    for name, value in dice.items():
        print(f"Dice {name}: {value:.4f}")
    print(f"Dice mean: {result['mean_dice']:.4f}, in {result['seconds']:.0f} s")
    print(f"report: {report}")
    return result


def make_demo_data(folder: Path) -> int:
    """Write the hemispheres as a Decathlon-style folder: dataset.json, imagesTr, labelsTr, ...

    The label of a voxel is the most probable of grey matter g, white matter w and anything else
    1 - g - w. The mid-sagittal slice belongs to neither hemisphere.

    Args:
        folder: made if missing; left_back and left_front go to imagesTr and labelsTr, right to
            imagesTs and labelsTs.

    Returns:
        The first slice of the front, counted along the second axis of the right hemisphere's file.

    Raises:
        ModuleNotFoundError: nilearn is not installed.
    """
    import nibabel as nib

    try:
        from nilearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the demo takes its brain from nilearn's wheel; pip install 'epa-kernels[demo]'"
        ) from error
    image, grey, white = (
        load(resolution=1)
        for load in (
            datasets.load_mni152_template,
            datasets.load_mni152_gm_template,
            datasets.load_mni152_wm_template,
        )
    )
    affine = image.affine
    intensity, grey, white = (
        np.asarray(volume.dataobj, np.float32) for volume in (image, grey, white)
    )
    labels = np.stack([1 - grey - white, grey, white]).argmax(0).astype(np.uint8)

    middle = round(-affine[0, 3] / affine[0, 0])  # the slice at x = 0 mm
    (left, right), (back, front), (bottom, top) = (
        (int(places.min()), int(places.max()) + 1) for places in np.nonzero(intensity)
    )
    edge = back + round(TRAINED_SHARE * (front - back))
    boxes = {
        ("Tr", "left_back"): (slice(left, middle), slice(back, edge), slice(bottom, top)),
        ("Tr", "left_front"): (slice(left, middle), slice(edge, front), slice(bottom, top)),
        ("Ts", "right"): (slice(middle + 1, right), slice(back, front), slice(bottom, top)),
    }
    for (group, name), box in boxes.items():
        moved = affine.copy()
        moved[:3, 3] += affine[:3, :3] @ [part.start for part in box]
        for kind, values in (("images", intensity), ("labels", labels)):
            file = folder / f"{kind}{group}" / f"{name}.nii.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as partial:
                nib.save(nib.Nifti1Image(values[box], moved), partial)
    description = {
        "name": "MNI152 tissues",
        "description": "Hemispheres of the symmetric ICBM152 2009a template, labels from its maps",
        "channel_names": {"0": "T1"},
        "labels": LABELS,
        "file_ending": ".nii.gz",
        "numTraining": 2,
    }
    write_json(folder / "dataset.json", description)
    return edge - back


def _front_dice(output: Path, front: int) -> dict[str, float]:
    from unetrpp.evaluate import dice_per_class
    from unetrpp.volumes import read_labels

    prediction, reference = (
        read_labels(output / folder / "right.nii.gz").values[:, front:]
        for folder in ("prediction", "data/labelsTs")
    )
    names = [name for name in LABELS if LABELS[name]]
    values = dice_per_class(prediction, reference, [LABELS[name] for name in names])
    return dict(zip(names, values, strict=True))
