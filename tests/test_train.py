"""Training on small synthetic volumes: what is written, resumed, refused and stopped."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

nibabel = pytest.importorskip("nibabel", reason="needs the extra 'train'")
pytest.importorskip("monai", reason="needs the extra 'train'")
pytest.importorskip("lightning_fabric", reason="needs the extra 'train'")

from safetensors.torch import load_file  # noqa: E402

from unetrpp import train as training  # noqa: E402
from unetrpp import train_model  # noqa: E402
from unetrpp.dataset import find_cases, read_dataset_info, split_cases  # noqa: E402
from unetrpp.files import read_json  # noqa: E402
from unetrpp.models import MODELS  # noqa: E402
from unetrpp.plan import propose  # noqa: E402
from unetrpp.train import Interrupted, NonFiniteLoss, TrainConfig, run_train  # noqa: E402
from unetrpp.train_config import resolved  # noqa: E402

HIPPOCAMPUS = Path(__file__).parents[2] / "shared" / "data" / "Task04_Hippocampus"
SMALL = {
    "patch_size": [16, 16, 16],
    "strides": [[2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 1, 1]],
    "preset": "tiny",
    "model_args": {"num_heads": 2, "proj_sizes": [8, 8, 8, 4], "decoder_proj_sizes": [8, 8, 8]},
    "folds": 4,
    "accelerator": "cpu",
    "precision": "32-true",
    "report": False,
}


def make_data(root: Path, cases: int = 4, channel: str = "MRI", shape=(20, 18, 17)) -> Path:
    """Bright boxes on noise, in Decathlon layout."""
    random = np.random.default_rng(0)
    listed = []
    for number in range(cases):
        label = np.zeros(shape, np.uint8)
        corner = random.integers(2, 6, 3)
        label[tuple(slice(c, c + 8) for c in corner)] = 1
        image = random.normal(0, 0.3, shape) + label
        for folder, array in (("imagesTr", image.astype(np.float32)), ("labelsTr", label)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            path = root / folder / f"box_{number}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
        listed.append(
            {"image": f"imagesTr/box_{number}.nii.gz", "label": f"labelsTr/box_{number}.nii.gz"}
        )
    content = {
        "modality": {"0": channel},
        "labels": {"0": "background", "1": "box"},
        "training": listed,
    }
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("boxes"))


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run_train(TrainConfig(data=data, output=run, steps=8, **SMALL))
    return run


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "unetrpp", "train", *map(str, arguments)]


def small_options() -> list[str]:
    return [
        f"--{key}={json.dumps(value) if not isinstance(value, str) else value}"
        for key, value in SMALL.items()
    ]


def assert_same_end(run: Path, expected: Path) -> None:
    """Weights, optimizer, averages and the metrics' losses agree bit by bit."""
    ours, theirs = (torch.load(r / "resume.pt", weights_only=True) for r in (run, expected))
    assert ours["step"] == theirs["step"] and ours["best"] == theirs["best"]
    for part in ("model", "average"):
        assert ours[part].keys() == theirs[part].keys()
        for name, value in theirs[part].items():
            assert torch.equal(ours[part][name], value), f"{part} {name}"
    for index, entry in theirs["optimizer"]["state"].items():
        for name, value in entry.items():
            assert torch.equal(ours["optimizer"]["state"][index][name], value)
    for name in ("best", "last"):
        ours, theirs = (load_file(r / name / "model.safetensors") for r in (run, expected))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert losses(run) == losses(expected)


def losses(run: Path) -> list[tuple]:
    records = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [(r["step"], r.get("loss"), r.get("val_dice")) for r in records]


def interrupt_at(number: int):
    """Return a `before_step` that interrupts the step after `number` others."""

    def before_step(step: int) -> None:
        if step == number:
            signal.raise_signal(signal.SIGINT)

    return before_step


def wait_for_steps(run: Path, process: subprocess.Popen, steps: int) -> None:
    deadline = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text(encoding="utf-8").count('"loss"') < steps:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.005)


def test_a_run_learns_and_writes_everything(data, tmp_path):
    run = tmp_path / "run"
    result = run_train(
        TrainConfig(
            data=data,
            output=run,
            steps=50,
            validate_every=25,
            augmentation="none",
            learning_rate=0.005,
            **{**SMALL, "model_args": {}},
        )
    )
    assert result["steps"] == 50
    first, last = losses(run)[0][1], losses(run)[-2][1]
    assert last < 0.7 * first
    assert result["best_dice"] > 0.5
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    assert len(plan["split"]["validation"]) == 1 and len(plan["split"]["training"]) == 3
    for name in ("best", "last"):
        config = json.loads((run / name / "config.json").read_text(encoding="utf-8"))
        assert config["preprocessing"]["patch_size"] == [16, 16, 16]
        assert config["labels"] == {"background": 0, "box": 1}
        assert (run / name / "model.safetensors").is_file()
    import yaml

    assert (
        yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["learning_rate"] == 0.005
    )
    assert not list(run.rglob(".partial.*"))


def test_ignored_voxels_go_through_all_commands(tmp_path, capsys):
    """Most of each volume is ignored, bright and called a box nowhere: none of it counts."""
    from unetrpp import cli

    data, run, out = make_data(tmp_path / "data"), tmp_path / "run", tmp_path / "out"
    for file in sorted((data / "labelsTr").iterdir()):
        label = np.asarray(nibabel.load(file).dataobj).copy()
        label[:, :2] = 2
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), file)
    content = read_json(data / "dataset.json")
    content["labels"]["2"] = "ignore"
    (data / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    options = small_options()[:-1]
    arguments = ["--data", data, "-o", run, "--steps", 3, *options, "--report=true"]
    assert cli.main(["train", *map(str, arguments)]) == 0
    config = read_json(run / "best/config.json")
    assert config["labels"] == {"background": 0, "box": 1, "ignore": 2}
    assert config["model"]["args"]["out_channels"] == 2
    scored = read_json(run / "validation/scores.json")
    assert {row["class"] for row in scored["rows"]} == {"box"} and not scored["failures"]
    validated = [
        json.loads(line)["val_dice_per_case"]
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if "val_dice_per_case" in line
    ]
    best = max(validated, key=lambda scores: sum(scores.values()))
    assert {row["case"]: row["dice"] for row in scored["rows"]} == pytest.approx(best, abs=1e-5)
    scans = str(data / "imagesTr")
    assert cli.main(["predict", scans, "-o", str(out), "--checkpoint", str(run / "best")]) == 0
    for file in out.glob("*.nii.gz"):
        assert np.asarray(nibabel.load(file).dataobj).max() <= 1
    # Without dataset.json beside the labels, the prediction's record names the classes.
    (data / "dataset.json").unlink()
    assert cli.main(["evaluate", str(out), str(data / "labelsTr")]) == 0
    assert "4 cases scored, 0 failed" in capsys.readouterr().out


def test_held_out_volume_with_ignored_voxels_alone_is_named_before_the_first_step(tmp_path):
    """Its Dice would be 1 whatever is predicted, and choose the best checkpoint."""
    data, run = make_data(tmp_path / "data"), tmp_path / "run"
    content = read_json(data / "dataset.json")
    content["labels"]["2"] = "ignore"
    (data / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    _, held_out = split_cases(find_cases(data), 0, SMALL["folds"])
    file = held_out[0].label
    nibabel.save(nibabel.Nifti1Image(np.full((20, 18, 17), 2, np.uint8), np.eye(4)), file)
    with pytest.raises(ValueError, match=f'{file.name} has the label "ignore" in every voxel'):
        run_train(TrainConfig(data=data, output=run, steps=1, **SMALL))
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize("recipe", ["short", "published"])
@pytest.mark.parametrize("model", ["segformer3d", "slim_unetr", "slim_unetrpp"])
def test_every_network_goes_through_the_same_commands(
    data, tmp_path, model, recipe, capsys, monkeypatch
):
    from unetrpp import cli

    loss, used = train_model.deep_supervision_loss, set()

    def recorded(logits, label, name, has_ignored):
        used.add(name)
        return loss(logits, label, name, has_ignored)

    monkeypatch.setattr(train_model, "deep_supervision_loss", recorded)
    run, out = tmp_path / "run", tmp_path / "out"
    options = [option for option in small_options() if not option.startswith("--model_args")]
    sizes = ["--steps", 2, "--batch_size", 2]
    arguments = ["--data", data, "-o", run, "--model", model, "--recipe", recipe, *sizes, *options]
    assert cli.main(["train", *map(str, arguments)]) == 0
    assert np.isfinite([loss for _, loss, _ in losses(run) if loss is not None]).all()
    assert used == {"dice_ce" if recipe == "short" else MODELS[model].recipe["loss"]}
    assert read_json(run / "best/config.json")["model"]["name"] == model
    scans = str(data / "imagesTr")
    assert cli.main(["predict", scans, "-o", str(out), "--checkpoint", str(run / "best")]) == 0
    assert cli.main(["evaluate", str(out), str(data / "labelsTr")]) == 0
    assert (out / "scores.csv").is_file()
    assert cli.main(["info", str(run / "best")]) == 0
    assert ("RECONSTRUCTION" in capsys.readouterr().out) == (model == "slim_unetrpp")


# Daily, the same of a run that SIGTERM ends and of one that an interrupt ends before any saving.
@pytest.mark.exhaustive
def test_killed_and_resumed_run_ends_with_the_same_bits(data, uninterrupted, tmp_path):
    run = tmp_path / "run"
    arguments = ["--data", data, "-o", run, "--steps", 8, "--save_minutes", 0, *small_options()]
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True)
    wait_for_steps(run, process, 3)
    process.kill()
    process.wait()
    assert losses(run)[-1][0] < 8, "killed too late to test anything"
    run_train(TrainConfig(resume=run))
    assert_same_end(run, uninterrupted)


@pytest.mark.parametrize("model", ["segformer3d", "slim_unetr", "slim_unetrpp"])
def test_resumed_run_of_any_network_ends_with_the_same_bits(data, tmp_path, model):
    options = {**SMALL, "model": model, "model_args": {}, "data": data, "steps": 4}
    run_train(TrainConfig(output=tmp_path / "whole", **options))
    with pytest.raises(Interrupted):
        run_train(TrainConfig(output=tmp_path / "run", **options), before_step=interrupt_at(1))
    assert losses(tmp_path / "run")[-1][0] == 2
    run_train(TrainConfig(resume=tmp_path / "run"))
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_sigterm_saves_and_exits_143(data, uninterrupted, tmp_path):
    """Sent to the loader processes, too, as SLURM and systemd send it."""
    run = tmp_path / "run"
    arguments = ["--data", data, "-o", run, "--steps", 8, "--workers", 2, *small_options()]
    process = subprocess.Popen(
        command(*arguments), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for_steps(run, process, 2)
    os.killpg(process.pid, signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "unetrpp train --resume" in message and "Traceback" not in message
    stopped = torch.load(run / "resume.pt", weights_only=True)["step"]
    assert 2 <= stopped < 8
    run_train(TrainConfig(resume=run))
    assert_same_end(run, uninterrupted)


def test_interrupt_at_a_step_and_before_any_saving(data, uninterrupted, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Interrupted) as stop:
        config = TrainConfig(data=data, output=run, steps=8, **SMALL)
        run_train(config, before_step=interrupt_at(4))
    assert stop.value.exit_code == 130
    assert losses(run)[-1][0] == 5
    # Killed before anything was saved: the run starts again from its configuration.
    unsaved = tmp_path / "unsaved"
    shutil.copytree(run, unsaved, ignore=shutil.ignore_patterns("resume.pt"))
    for folder in (run, unsaved):
        run_train(TrainConfig(resume=folder))
        assert_same_end(folder, uninterrupted)


def test_non_finite_loss_names_the_cases_and_spares_the_checkpoints(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    loss = train_model.deep_supervision_loss
    calls = []

    def broken(*arguments):
        calls.append(1)
        return loss(*arguments) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(train_model, "deep_supervision_loss", broken)
    with pytest.raises(NonFiniteLoss, match=r"loss nan.* at step 3, cases box_\d, box_\d"):
        run_train(TrainConfig(data=data, output=run, steps=8, validate_every=2, **SMALL))
    batch = torch.load(run / "nonfinite_step_3.pt", weights_only=True)
    assert batch["image"].shape == (2, 1, 16, 16, 16) and len(batch["name"]) == 2
    state = torch.load(run / "resume.pt", weights_only=True)
    assert state["step"] == 2
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert json.loads((run / "last/config.json").read_text(encoding="utf-8"))["step"] == 2


def test_nothing_is_overwritten_unasked(data, uninterrupted, tmp_path):
    before = (uninterrupted / "resume.pt").read_bytes()
    config = TrainConfig(data=data, output=uninterrupted, steps=1, **SMALL)
    with pytest.raises(FileExistsError, match="--resume"):
        run_train(config)
    assert (uninterrupted / "resume.pt").read_bytes() == before
    (tmp_path / "thesis.txt").write_text("not a run", encoding="utf-8")
    with pytest.raises(FileExistsError, match="not an earlier run"):
        run_train(replace(config, output=tmp_path, overwrite=True))
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16-mixed"}, "bf16-mixed needs a CUDA device"),
        ({"minutes": 1.0}, "--steps or --minutes, not both"),
        ({"data": None}, "needs --data DIR"),
        ({"fold": 7}, "fold must lie in 0..3"),
        ({"preset": "huge"}, "preset must be one of"),
        ({"model": "unet"}, "--model must be one of unetrpp, segformer3d, .*; got 'unet'"),
        ({"model_args": {"widths": [8]}}, "UNETRPP: got an unexpected keyword argument 'widths'"),
        ({"model_args": {"dims": [8, 16]}}, "UNETRPP: dims must have 4 entries, got 2"),
    ],
)
def test_wrong_options_are_explained_before_anything_is_written(data, tmp_path, options, message):
    values = {"data": data, "output": tmp_path / "run", "steps": 1, **SMALL, **options}
    with pytest.raises(ValueError, match=message):
        run_train(TrainConfig(**values))
    assert not (tmp_path / "run").exists()


def test_saved_models_have_one_output_and_the_weights_of_all_heads(uninterrupted):
    from unetrpp.checkpoint import load_checkpoint

    image = torch.zeros(1, 1, 16, 16, 16)
    for name in ("best", "last"):
        model, config = load_checkpoint(uninterrupted / name)
        assert config["model"]["args"]["deep_supervision"] is False
        assert model(image).shape == (1, 2, 16, 16, 16)
        model, _ = load_checkpoint(uninterrupted / name, deep_supervision=True)
        assert len(model(image)) == 3


def test_resume_refuses_bf16_without_a_gpu(uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    text = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(text.replace("32-true", "bf16-mixed"), encoding="utf-8")
    with pytest.raises(ValueError, match="bf16-mixed needs a CUDA device.*resume it on a GPU"):
        run_train(TrainConfig(resume=run, accelerator="cpu"))


def test_a_failing_report_does_not_fail_the_training(data, tmp_path, monkeypatch, capsys):
    from unetrpp import report

    def broken(run):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(report, "write_report", broken)
    run = tmp_path / "run"
    result = run_train(TrainConfig(data=data, output=run, steps=1, **{**SMALL, "report": True}))
    assert result["steps"] == 1
    printed = capsys.readouterr().out
    assert "no fonts" in printed and f"unetrpp report {run}" in printed


def test_half_a_line_of_metrics_is_dropped(tmp_path):
    from unetrpp.run_folder import Metrics

    whole = '{"step": 1, "loss": 0.5}\n'
    half = '{"step": 2, "val_dice_per_class": {"box": 0.5}'
    (tmp_path / "metrics.jsonl").write_text(whole + half, encoding="utf-8")
    Metrics(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == whole


def test_a_measured_total_outlives_a_kill(data, tmp_path):
    run = tmp_path / "run"

    def killed(step):
        if step == training.MEASURED_STEPS:
            raise MemoryError

    with pytest.raises(MemoryError):
        config = TrainConfig(data=data, output=run, minutes=1, validate_every=10**6, **SMALL)
        run_train(config, before_step=killed)
    assert torch.load(run / "resume.pt", weights_only=True)["total"] > training.MEASURED_STEPS


def test_the_data_folder_is_stored_absolute(data, tmp_path, monkeypatch, capsys):
    import yaml

    monkeypatch.chdir(data.parent)
    run = tmp_path / "run"
    run_train(TrainConfig(data=Path(data.name), output=run, steps=1, **SMALL))
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"] == str(data)
    monkeypatch.chdir(tmp_path)
    (run / "resume.pt").unlink()
    run_train(TrainConfig(resume=run))
    assert "no resume.pt: starting again at step 0" in capsys.readouterr().out


def test_resume_refuses_other_settings(uninterrupted, tmp_path):
    with pytest.raises(ValueError, match="takes no other --output"):
        run_train(TrainConfig(resume=uninterrupted, output=tmp_path / "other"))
    with pytest.raises(ValueError, match="learning_rate cannot change"):
        run_train(TrainConfig(resume=uninterrupted, learning_rate=0.5))
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        run_train(TrainConfig(resume=tmp_path))


def test_minutes_become_steps(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "VALIDATIONS", 2)
    run = tmp_path / "run"
    start = time.monotonic()
    result = run_train(TrainConfig(data=data, output=run, minutes=0.05, **SMALL))
    assert result["steps"] > training.MEASURED_STEPS
    assert torch.load(run / "resume.pt", weights_only=True)["total"] == result["steps"]
    # Generous, because the machine may be busy with other work after the step was timed.
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    "seconds, step, validation, every",
    (
        (90, 0.41, 12.7, None),  # ten validations would take all of it
        (900, 0.41, 12.7, None),
        (36000, 0.1, 20, None),  # more than ten, at most 5000 steps apart
        (600, 0.4, 10, 50),
        (20, 0.4, 12.7, None),
    ),
)
def test_a_time_budget_is_shared_by_steps_and_validations(seconds, step, validation, every):
    count, steps = training._within(seconds, step, validation, every)
    between = every or min(-(-steps // count), training.MOST_STEPS_BETWEEN)
    taken = steps * step + -(-steps // between) * validation
    assert seconds - step - 2 * validation <= taken <= seconds + validation
    assert steps * step >= 0.36 * seconds


def test_a_budget_that_allows_no_step_says_so(data, tmp_path, monkeypatch):
    from unetrpp.run_folder import read_metrics

    said, score = [], training._score
    monkeypatch.setattr(training, "say", said.append)

    def slow(*arguments):
        time.sleep(0.3)
        return score(*arguments)

    monkeypatch.setattr(training, "_score", slow)
    run = tmp_path / "run"
    run_train(TrainConfig(data=data, output=run, minutes=0.001, **SMALL))
    assert any(
        "are too few to learn from this data; start anew with --minutes 1" in s for s in said
    )
    # None of them twice.
    steps = [r["step"] for r in read_metrics(run) if "val_dice" in r]
    assert steps == [training.MEASURED_STEPS, training.MEASURED_STEPS + 1]


@pytest.mark.exhaustive
def test_two_processes_train_one_model(data, tmp_path):
    run = tmp_path / "run"
    arguments = ["--data", data, "-o", run, "--steps", 2, "--devices", 2, *small_options()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert [step for step, loss, _ in losses(run) if loss is not None] == [1, 2]
    assert (run / "best/model.safetensors").is_file()
    assert done.stdout.count("done: best validation Dice") == 1
    assert done.stdout.count("predict with: ") == 1


def test_loss_is_the_published_one_up_to_a_constant():
    torch.manual_seed(0)
    label = torch.randint(0, 3, (2, 1, 8, 8, 8)).float()
    logits = [torch.randn(2, 3, size, size, size) for size in (8, 4, 2)]
    expected = 0.0
    for weight, output in zip((4 / 7, 2 / 7, 1 / 7), logits, strict=True):
        target = torch.nn.functional.interpolate(label, output.shape[2:], mode="nearest-exact")
        target = target[:, 0].long()
        hot = torch.nn.functional.one_hot(target, 3).movedim(-1, 1).float()
        soft = output.softmax(1)
        true = (soft * hot).sum((0, 2, 3, 4))
        dice = 2 * true / (soft.sum((0, 2, 3, 4)) + hot.sum((0, 2, 3, 4)))
        entropy = torch.nn.functional.cross_entropy(output, target)
        expected = expected + weight * (entropy + 1 - dice[1:].mean())
    torch.testing.assert_close(
        train_model.deep_supervision_loss(logits, label), expected, atol=1e-5, rtol=1e-5
    )


def ignoring(size=8, batch=2):
    """Random logits, and a label map whose last class is "ignore" in about half of the voxels."""
    torch.manual_seed(1)
    label = torch.randint(0, 3, (batch, 1, size, size, size)).float()
    label[torch.rand(label.shape) < 0.5] = -1
    sizes = (size, size // 2, size // 4)
    logits = [torch.randn(batch, 3, n, n, n, requires_grad=True) for n in sizes]
    return logits, label


def test_ignored_voxels_are_left_out_of_the_loss_as_in_nnunet():
    """nnU-Net: cross-entropy with ignore_index, and soft Dice whose sums are masked."""
    logits, label = ignoring()
    expected = 0.0
    for weight, output in zip((4 / 7, 2 / 7, 1 / 7), logits, strict=True):
        target = torch.nn.functional.interpolate(label, output.shape[2:], mode="nearest-exact")
        mask, target = target >= 0, target[:, 0].long()
        entropy = torch.nn.functional.cross_entropy(output, target, ignore_index=-1)
        hot = torch.nn.functional.one_hot(target.clamp_min(0), 3).movedim(-1, 1).float() * mask
        soft = output.softmax(1) * mask
        true = (soft * hot).sum((0, 2, 3, 4))
        dice = 2 * true / (soft.sum((0, 2, 3, 4)) + hot.sum((0, 2, 3, 4)))
        expected = expected + weight * (entropy + 1 - dice[1:].mean())
    found = train_model.deep_supervision_loss(logits, label, has_ignored=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.backward()
    for output in logits:
        target = torch.nn.functional.interpolate(label, output.shape[2:], mode="nearest-exact")
        by_voxel = output.grad.abs().sum(1, keepdim=True)
        assert not by_voxel[target < 0].any() and by_voxel[target >= 0].all()


@pytest.mark.parametrize("loss", ["dice_ce", "dice", "dice_focal"])
def test_every_loss_sees_labelled_voxels_only(loss):
    logits, label = ignoring()
    function = train_model.deep_supervision_loss
    found = function(logits[0], label, loss, has_ignored=True)
    # Whatever the network says where nobody has labelled.
    other = logits[0].detach() + 5 * torch.randn(logits[0].shape) * (label < 0)
    torch.testing.assert_close(found, function(other, label, loss, has_ignored=True))
    torch.testing.assert_close(
        function(logits[0], label.abs(), loss, has_ignored=True),
        function(logits[0], label.abs(), loss),
    )
    # A volume, or a whole batch, without any labelled voxel teaches nothing and breaks nothing.
    label[0] = -1
    alone = function(logits[0][1:], label[1:], loss, has_ignored=True)
    torch.testing.assert_close(function(logits[0], label, loss, has_ignored=True), alone)
    nothing = function(logits, torch.full_like(label, -1), loss, has_ignored=True)
    nothing.backward()
    assert nothing == 0 and not logits[0].grad.any()


def test_learning_rates_of_the_schedules():
    rate = train_model.learning_rate_at
    short = [rate(s, 1000, 1.0, "cosine", 50) for s in range(1000)]
    assert short[0] == pytest.approx(1 / 50) and max(short) == pytest.approx(1.0)
    assert short[-1] < 1e-4 and short[50:] == sorted(short[50:], reverse=True)
    assert rate(9, 100, 1.0, "cosine", 50) == 1.0 > rate(8, 100, 1.0, "cosine", 50)
    published = [rate(s, 250_000, 0.01, "poly", 0) for s in (0, 249, 250)]
    assert published == pytest.approx([0.01, 0.01, 0.01 * 0.999**0.9])
    # 800 epochs, 20 of them warm-up, restarted after 400, down to 6e-6.
    restarts = [rate(s, 800, 1e-4, "restarts", 20) for s in range(800)]
    assert restarts[:20] == pytest.approx([1e-4 * (s + 1) / 20 for s in range(20)])
    assert restarts[20] == restarts[420] == 1e-4
    assert restarts[419] == pytest.approx(6e-6, rel=1e-3)
    assert restarts[21:419] == sorted(restarts[21:419], reverse=True)
    # While the time of a step is measured the total is unknown.
    assert [rate(s, None, 1.0, "cosine", 4) for s in (0, 3, 9)] == [0.25, 1.0, 1.0]


def test_published_recipes_are_the_described_ones():
    data = {"data": Path("d"), "output": Path("r"), "recipe": "published"}
    of = {name: resolved(TrainConfig(model=name, **data)) for name in MODELS}
    described = {
        name: (c.optimizer, c.schedule, c.loss, c.learning_rate, c.weight_decay, c.batch_size)
        for name, c in of.items()
    }
    assert described == {
        "unetrpp": ("sgd", "poly", "dice_ce", 1e-2, 3e-5, None),
        "segformer3d": ("adamw", "restarts", "dice", 1e-4, 0.01, 8),
        "slim_unetr": ("adamw", "cosine", "dice_focal", 1e-3, 0.05, 2 * 16),
        "slim_unetrpp": ("adamw", "cosine", "dice_focal", 1e-3, 0.05, 2 * 3),
    }
    slim = of["slim_unetr"]
    assert slim.betas == [0.9, 0.95] and slim.mirror
    assert abs(slim.warm_up - slim.steps * 5 / 300) < 1
    assert of["segformer3d"].warm_up / of["segformer3d"].steps == pytest.approx(20 / 800)
    assert all(config.minutes is None and config.ema == 0.0 for config in of.values())


def test_another_optimizer_than_the_recipes_has_its_settings():
    data = {"data": Path("d"), "output": Path("r"), "recipe": "published", "optimizer": "adamw"}
    assert resolved(TrainConfig(**data)).betas == [0.9, 0.999]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd", "betas": [0.9, 0.99]}, "--betas has no effect with optimizer sgd"),
        ({"schedule": "poly", "warm_up": 9}, "--warm_up has no effect with schedule poly, got 9"),
        ({"recipe": "published", "warm_up": 9}, "--warm_up has no effect with schedule poly"),
        ({"augmentation": "none", "mirror": True}, "--mirror has no effect with augmentation none"),
    ],
)
def test_an_option_without_effect_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        resolved(TrainConfig(data="d", output="r", **options))


@pytest.mark.parametrize("recipe", ["short", "published"])
@pytest.mark.parametrize("model", MODELS)
def test_a_stored_configuration_can_be_given_again(model, recipe):
    for options in ({}, {"optimizer": "sgd", "schedule": "poly", "augmentation": "none"}):
        config = resolved(TrainConfig(data="d", output="r", model=model, recipe=recipe, **options))
        assert resolved(config) == config
    # No effect is wanted, and none is said.
    assert resolved(replace(config, mirror=False, warm_up=0)).mirror is False


def test_a_loss_that_is_none_is_refused():
    logits, label = torch.zeros(1, 2, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2)
    with pytest.raises(ValueError, match="loss must be one of dice_ce, .*; got 'ce'"):
        train_model.deep_supervision_loss(logits, label, "ce")


@pytest.mark.parametrize("loss", ["dice", "dice_focal"])
def test_sigmoid_losses_see_every_class_of_the_label_map(loss):
    torch.manual_seed(0)
    label = torch.randint(0, 3, (2, 1, 8, 8, 8)).float()
    logits = torch.randn(2, 3, 8, 8, 8, requires_grad=True)
    hot = torch.nn.functional.one_hot(label[:, 0].long(), 3).movedim(-1, 1).float()
    soft, axes = logits.sigmoid(), (2, 3, 4)
    top, bottom = (1e-5, 1e-5) if loss == "dice" else (0.0, 1e-5)
    dice = (2 * (soft * hot).sum(axes) + top) / (soft.sum(axes) + hot.sum(axes) + bottom)
    expected = (1 - dice).mean()
    if loss == "dice_focal":
        entropy = torch.nn.functional.binary_cross_entropy(soft, hot, reduction="none")
        expected = expected + ((soft - hot).abs() ** 2 * entropy).mean()
    found = train_model.deep_supervision_loss(logits, label, loss)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.backward()
    assert logits.grad.flatten(2).abs().sum((0, 2)).all(), "a class, the background too, is idle"


def test_short_recipe_decays_no_temperatures_and_the_published_one_all():
    from unetrpp import create_model

    model = create_model(
        "unetrpp",
        in_channels=1,
        out_channels=2,
        img_size=SMALL["patch_size"],
        strides=SMALL["strides"],
        preset="tiny",
        **SMALL["model_args"],
    )
    options = {
        "learning_rate": 0.1,
        "weight_decay": 0.5,
        "optimizer": "adamw",
        "betas": [0.9, 0.95],
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = train_model.make_optimizer(model, TrainConfig(**options)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.5, 0)
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    temperatures = {i for i, name in names.items() if "temperature" in name}
    assert temperatures and temperatures <= {id(parameter) for parameter in kept["params"]}
    others = [p for p in kept["params"] if id(p) not in temperatures]
    assert others and all(parameter.ndim <= 1 for parameter in others)
    for name in ("adamw", "sgd"):
        published = TrainConfig(
            model="unetrpp", recipe="published", **{**options, "optimizer": name}
        )
        (group,) = train_model.make_optimizer(model, published).param_groups
        assert group["weight_decay"] == 0.5 and len(group["params"]) == len(names)
        assert group.get("betas", (0.9, 0.95)) == (0.9, 0.95)


@pytest.mark.parametrize("name", ["segformer3d", "slim_unetr", "slim_unetrpp"])
def test_published_recipe_decays_as_the_published_optimizer(name):
    """torch's on all parameters; timm's neither on biases nor on norms, on all others."""
    from unetrpp import create_model

    config = resolved(TrainConfig(data="d", output="r", model=name, recipe="published"))
    model = create_model(name, "tiny")
    decayed, *kept = train_model.make_optimizer(model, config).param_groups
    assert decayed["weight_decay"] == MODELS[name].recipe["weight_decay"]
    if name == "segformer3d":
        assert not kept and len(decayed["params"]) == len(list(model.parameters()))
        return
    (kept,) = kept
    assert kept["weight_decay"] == 0
    kept = {id(parameter) for parameter in kept["params"]}
    assert kept == {id(p) for key, p in model.named_parameters() if p.ndim <= 1}
    assert {id(p) for key, p in model.named_parameters() if key.endswith("bias")} <= kept


@pytest.mark.parametrize(
    ("shape", "patch", "stem"),
    [
        ((64, 128, 128), [64, 128, 128], [2, 4, 4]),
        ((16, 160, 160), [16, 160, 160], [1, 4, 4]),
        ((32, 192, 160), [32, 192, 160], [1, 4, 4]),
        ((128, 128, 64), [128, 128, 64], [4, 4, 2]),
    ],
)
def test_published_shapes_give_the_published_stems(tmp_path, shape, patch, stem):
    make_data(tmp_path, 2, shape=shape[::-1])
    plan = propose(find_cases(tmp_path), read_dataset_info(tmp_path), on_gpu=True)
    assert plan.preprocessing.patch_size == patch
    assert plan.model["strides"] == [stem, [2, 2, 2], [2, 2, 2], [2, 2, 2]]


def test_ct_gets_training_statistics_and_big_volumes_a_smaller_patch(tmp_path):
    make_data(tmp_path, 2, channel="CT", shape=(90, 100, 110))
    plan = propose(find_cases(tmp_path), read_dataset_info(tmp_path), on_gpu=False)
    assert plan.preprocessing.normalization == ["ct"]
    assert plan.preprocessing.intensity[0]["mean"] == pytest.approx(1.0, abs=0.1)
    assert np.prod(plan.preprocessing.patch_size) <= 48 * 64 * 48
    multiple = np.prod(plan.model["strides"], axis=0)
    assert all(
        size % unit == 0 for size, unit in zip(plan.preprocessing.patch_size, multiple, strict=True)
    )


def test_the_training_spacing_is_kept_unless_declined(tmp_path):
    make_data(tmp_path, 2)
    arguments = (find_cases(tmp_path), read_dataset_info(tmp_path))
    # Also where no training volume needs resampling: another scanner's volumes may.
    assert propose(*arguments, on_gpu=False).preprocessing.spacing == [1.0, 1.0, 1.0]
    assert propose(*arguments, on_gpu=False, spacing=[0, 0, 0]).preprocessing.spacing is None


@pytest.mark.parametrize("preset", [None, "tiny"])
def test_the_plan_says_what_is_a_reconstruction(data, preset):
    arguments = (find_cases(data), read_dataset_info(data))
    of = {
        name: " ".join(propose(*arguments, on_gpu=False, model=name, preset=preset).reasons)
        for name in ("slim_unetr", "slim_unetrpp")
    }
    assert "slim_unetrpp is a RECONSTRUCTION: " in of["slim_unetrpp"]
    assert "RECONSTRUCTION" not in of["slim_unetr"]
    if preset is None:
        assert "preset brats: Slim UNETR's widths" in of["slim_unetrpp"]
        assert "preset brats: the published widths" in of["slim_unetr"]


@pytest.mark.parametrize(
    ("model", "batch_size", "reason"),
    [
        ("unetrpp", None, "batch size 2: the published one"),
        (
            "slim_unetr",
            None,
            "batch size 2: UNETR[+]{2}'s, .* one of slim_unetr is 32, with --recipe p",
        ),
        ("slim_unetr", 32, "batch size 32: given, or the published recipe's"),
    ],
)
def test_the_plan_gives_true_reasons(data, model, batch_size, reason):
    arguments = (find_cases(data), read_dataset_info(data))
    options = {"on_gpu": False, "model": model, "batch_size": batch_size}
    reasons = propose(*arguments, **options).reasons
    assert any(re.fullmatch(f"{reason}.*", line) for line in reasons)
    assert any(line.startswith("strides ") and "a stem of 1 or 2 where" in line for line in reasons)
    reasons = propose(*arguments, strides=[[1, 1, 1]] + 3 * [[2, 2, 2]], **options).reasons
    assert "strides 1x1x1 2x2x2 2x2x2 2x2x2: given" in reasons


def test_illegal_patch_names_multiples_and_the_nearest_size(data):
    with pytest.raises(ValueError, match="multiple of 16x16x16; nearest legal size 16x32x16"):
        propose(
            find_cases(data),
            read_dataset_info(data),
            on_gpu=False,
            patch_size=[20, 28, 16],
            strides=[[2, 2, 2]] * 4,
        )


@pytest.mark.skipif(
    not HIPPOCAMPUS.is_dir(), reason="needs ../shared/data/Task04_Hippocampus beside the repository"
)
def test_hippocampus_plan_covers_the_median_volume():
    cases = find_cases(HIPPOCAMPUS)
    assert len(cases) == 208
    plan = propose(cases, read_dataset_info(HIPPOCAMPUS), on_gpu=False)
    assert plan.preprocessing.spacing == pytest.approx([1.0, 1.0, 1.0])
    assert plan.model["out_channels"] == 3
    assert all(size >= 32 for size in plan.preprocessing.patch_size)


def test_seed_of_dropout_needs_no_shift_of_uint64(monkeypatch):
    """NumPy 1.26 raises TypeError for one; the value stays that of NumPy 2."""
    expected = train_model._dropout_seed(1, 7, 0)
    state = np.random.SeedSequence([1, 2, 7, 0]).generate_state(1, np.uint64)
    assert type(expected) is int and expected == int(state[0]) // 2

    class Unsigned(int):
        def __rshift__(self, other):
            raise TypeError("ufunc 'right_shift' not supported for the input types")

    class Sequence(np.random.SeedSequence):
        def generate_state(self, words, dtype):
            return [Unsigned(word) for word in super().generate_state(words, dtype)]

    monkeypatch.setattr(np.random, "SeedSequence", Sequence)
    assert train_model._dropout_seed(1, 7, 0) == expected
