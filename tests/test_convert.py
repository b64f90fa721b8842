"""`unetrpp convert`: weights of any origin become a checkpoint that predict takes."""

import json

import nibabel
import numpy as np
import pytest
import torch

pytest.importorskip("monai")

from unetrpp import cli  # noqa: E402
from unetrpp.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from unetrpp.convert import run_convert  # noqa: E402
from unetrpp.models import UNETRPP  # noqa: E402

VALUES = {
    "channels": ["MR"],
    "normalization": ["zscore"],
    "intensity": [None],
    "spacing": None,
    "patch_size": [32, 32, 32],
    "labels": {"background": 0, "ball": 1},
}
CT = {"lower": -100.0, "upper": 200.0, "mean": 40.0, "std": 20}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A published file: weights without preprocessing."""
    torch.manual_seed(0)
    state = UNETRPP.from_preset("tiny").state_dict()
    file = tmp_path_factory.mktemp("published") / "model_final_checkpoint.model"
    torch.save({"state_dict": {"module." + key: value for key, value in state.items()}}, file)
    return file


def write_json(file, content):
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def write_volume(file, seed=0, size=20):
    image = np.random.default_rng(seed).normal(size=(size,) * 3).astype(np.float32)
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(image, np.diag([1.0, 1.0, 2.0, 1.0])), file)
    return image


@pytest.mark.parametrize(
    "around",
    [lambda v: v, lambda v: {"preprocessing": v}, lambda v: {"plan": {"preprocessing": v}}],
)
def test_published_weights_predict(weights, tmp_path, capsys, around):
    file = write_json(tmp_path / "p.json", around(VALUES))
    checkpoint = tmp_path / "checkpoint"
    options = ["--preset", "tiny", "--preprocessing", str(file)]
    assert cli.main(["convert", str(weights), "-o", str(checkpoint), *options]) == 0
    assert f"--checkpoint {checkpoint}" in capsys.readouterr().out
    network, config = load_checkpoint(checkpoint)
    assert VALUES.items() <= config["preprocessing"].items()
    for key, value in torch.load(weights)["state_dict"].items():
        assert torch.equal(network.state_dict()[key.removeprefix("module.")], value)
    write_volume(tmp_path / "scan.nii.gz")
    out = tmp_path / "out"
    assert (
        cli.main(
            [
                "predict",
                str(tmp_path / "scan.nii.gz"),
                "-o",
                str(out),
                "--checkpoint",
                str(checkpoint),
            ]
        )
        == 0
    )
    assert nibabel.load(out / "scan.nii.gz").shape == (20, 20, 20)
    assert cli.main(["info", str(checkpoint)]) == 0
    assert "MR (zscore)" in capsys.readouterr().out


def test_a_checkpoint_without_preprocessing_is_completed(tmp_path, capsys):
    """save_checkpoint of a network as it comes is legal; predict says how to complete it."""
    bare = save_checkpoint(tmp_path / "bare", UNETRPP.from_preset("tiny", feature_size=6), {"a": 1})
    write_volume(tmp_path / "scan.nii.gz")
    predict = ["predict", str(tmp_path / "scan.nii.gz"), "-o", str(tmp_path / "out")]
    assert cli.main([*predict, "--checkpoint", str(bare)]) == 1
    message = capsys.readouterr().err
    assert f"unetrpp convert {bare} -o NEW --preprocessing FILE.json, or --data DIR" in message
    assert cli.main(["info", str(bare)]) == 0
    assert "convert it again with --preprocessing" in run_convert(bare, tmp_path / "again")

    for case in range(3):
        image = write_volume(tmp_path / "data" / "imagesTr" / f"c{case}_0000.nii.gz", case)
        label = (image > 1).astype(np.uint8)
        file = tmp_path / "data" / "labelsTr" / f"c{case}.nii.gz"
        file.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(label, np.diag([1.0, 1.0, 2.0, 1.0])), file)
    info = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "ball": 1},
        "file_ending": ".nii.gz",
        "numTraining": 3,
    }
    write_json(tmp_path / "data" / "dataset.json", info)
    run_convert(bare, tmp_path / "full", data=tmp_path / "data")
    network, config = load_checkpoint(tmp_path / "full")
    values = config["preprocessing"]
    assert config["a"] == 1 and network.config == config["model"]
    assert values["patch_size"] == [32, 32, 32] and values["spacing"] == [2.0, 1.0, 1.0]
    assert values["normalization"] == ["ct"] and values["intensity"][0]["lower"] >= 1
    assert cli.main([*predict, "--checkpoint", str(tmp_path / "full")]) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"channels": ["T1", "T2"]}, "channels must be 1 names"),
        ({"channels": "MR"}, "channels must be 1 names"),
        ({"normalization": ["min-max"]}, 'normalization must be "ct" or "zscore"'),
        ({"normalization": ["ct"]}, 'intensity must be .* for each channel with "ct"'),
        ({"normalization": ["ct"], "intensity": [{**CT, "mean": None}]}, "intensity must be"),
        ({"intensity": None}, "intensity must be"),
        ({"spacing": [1.0, 0.0, 1.0]}, "spacing must be three positive numbers in mm, or null"),
        ({"spacing": 1.0}, "spacing must be"),
        ({"patch_size": [32, 32, 64]}, r"patch_size must be \[32, 32, 32\], the input size"),
        ({"labels": {"background": 0}}, "labels must be the values 0 to 1"),
        ({"labels": {"background": 0, "ball": 3}}, "labels must be the values 0 to 1"),
        ({"labels": ["background", "ball"]}, "labels must be the values 0 to 1"),
        ({"ignore": "2"}, "ignore must be null, or the label value"),
        ({"window": 3}, "unknown .'window'"),
    ],
)
def test_preprocessing_is_checked(weights, tmp_path, changed, message):
    file = write_json(tmp_path / "p.json", {**VALUES, **changed})
    with pytest.raises(ValueError, match=f"p.json: .*{message}"):
        run_convert(weights, tmp_path / "out", preset="tiny", preprocessing=file)
    assert not (tmp_path / "out").exists()
    legal = {**VALUES, "normalization": ["ct"], "intensity": [CT], "spacing": [2, 1.5, 1]}
    run_convert(weights, tmp_path / "out", preset="tiny", preprocessing=write_json(file, legal))


def test_wrong_files_are_named_and_nothing_is_replaced(weights, tmp_path):
    for content in (b"", b"[1]", b"3", b'{"preprocessing"'):
        (tmp_path / "p.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"p.json (is truncated or no JSON|holds no JSON obj)"):
            run_convert(weights, tmp_path / "o", preset="tiny", preprocessing=tmp_path / "p.json")
    with pytest.raises(FileNotFoundError, match="nothing.json is no file"):
        run_convert(weights, tmp_path / "o", preset="tiny", preprocessing=tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="--preprocessing FILE or --data DIR, not both"):
        run_convert(weights, tmp_path / "o", preprocessing=tmp_path, data=tmp_path)
    with pytest.raises(ValueError, match="--spacing belongs to --data DIR"):
        run_convert(weights, tmp_path / "o", spacing=[1.0, 1.0, 1.0])
    with pytest.raises(FileExistsError, match="is not empty; name a new folder"):
        run_convert(weights, tmp_path, preset="tiny", overwrite=True)
    run_convert(weights, tmp_path / "o", preset="tiny")
    with pytest.raises(FileExistsError, match="is not empty"):
        run_convert(weights, tmp_path / "o", preset="tiny")
    run_convert(weights, tmp_path / "o", preset="tiny", overwrite=True)
    with pytest.raises(FileExistsError, match="is a file; name a new folder"):
        run_convert(weights, tmp_path / "p.json", preset="tiny")
