"""Sliding window and the predict command, on constructed files and on real ones where present."""

import errno
import json
import os
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch

nib = pytest.importorskip("nibabel")
pytest.importorskip("monai")

from unetrpp import memory, predict  # noqa: E402
from unetrpp.dataset import Case  # noqa: E402
from unetrpp.predict import predict_volume, run_predict  # noqa: E402
from unetrpp.preprocessing import Preprocessing, load_case, volume_geometry  # noqa: E402

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


class Thresholds(torch.nn.Module):
    """Voxel by voxel: class k where the sum of the channels lies between thresholds k-1 and k.

    Logits are linear in the intensity with hinges at the thresholds, so that the boundary after
    a resampling of the probabilities lies where the intensity crosses the threshold.
    """

    def __init__(self, *thresholds, steepness=4.0):
        super().__init__()
        self.thresholds, self.steepness = thresholds, steepness
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.windows = []

    def forward(self, x):
        self.windows.append(tuple(x.shape))
        value = x.sum(1, keepdim=True)
        logits = [torch.zeros_like(value)]
        for threshold in self.thresholds:
            logits.append(logits[-1] + self.steepness * (value - threshold))
        return torch.cat(logits, 1)


class Lopsided(torch.nn.Module):
    """Two classes whose logits depend on where in the window a voxel lies."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(2, 1, 3, 3, 3, generator=generator))

    def forward(self, x):
        ramp = torch.arange(x[0, 0].numel(), dtype=x.dtype).reshape(x.shape[2:]) / x[0, 0].numel()
        return torch.nn.functional.conv3d(x + ramp, self.weight, padding=1)


def volume(shape, seed=0):
    return torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed))


def test_windows_are_averaged_with_gaussian_weights_after_softmax():
    model, image, patch = Lopsided(), volume((12, 8, 8)), (8, 8, 8)
    weight = torch.ones(1)
    for axis in range(3):
        axis_shape = [8 if a == axis else 1 for a in range(3)]
        weight = weight * torch.exp(-((torch.arange(8) - 3.5) ** 2) / 2).reshape(axis_shape)
    weight = weight.clamp_min(1e-3)
    total, weights = torch.zeros(1, 2, 12, 8, 8), torch.zeros(12, 8, 8)
    for start in (0, 4):
        window = slice(start, start + 8)
        total[:, :, window] += weight * model(image[:, :, window]).softmax(1).detach()
        weights[window] += weight
    found = predict_volume(model, image, patch, overlap=0.5, batch_size=3)
    torch.testing.assert_close(found, total / weights, rtol=1e-4, atol=1e-5)
    one_by_one = predict_volume(model, image, patch, overlap=0.5, batch_size=1)
    torch.testing.assert_close(found, one_by_one)


def test_mirroring_averages_all_eight_flips():
    model, image = Lopsided(), volume((8, 8, 8))
    expected = 0
    for bits in np.ndindex(2, 2, 2):
        flip = [axis + 2 for axis in range(3) if bits[axis]]
        expected = expected + model(image.flip(flip)).softmax(1).flip(flip).detach() / 8
    found = predict_volume(model, image, (8, 8, 8), mirror=True)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, predict_volume(model, image, (8, 8, 8)), atol=1e-3)


@pytest.mark.parametrize("shape", [(5, 8, 3), (5, 20, 8), (1, 1, 1)])
def test_volume_smaller_than_the_patch(shape):
    model, image = Thresholds(0.3), volume(shape)
    found = predict_volume(model, image, (8, 8, 8))
    assert found.shape == (1, 2, *shape)
    torch.testing.assert_close(found, model(image).softmax(1), rtol=1e-4, atol=1e-5)
    assert {window[2:] for window in model.windows[:-1]} == {(8, 8, 8)}


def test_deep_supervision_training_mode_precision_and_errors():
    class Deep(Lopsided):
        def forward(self, x):
            assert not self.training
            full = super().forward(x)
            self.dtype = full.dtype
            return [full, full[..., ::2, ::2, ::2]]

    model, image = Deep(), volume((8, 8, 8))
    model.train()
    plain = predict_volume(model, image, (8, 8, 8))
    assert model.training, "the caller's mode is restored"
    torch.testing.assert_close(plain, predict_volume(Lopsided(), image, (8, 8, 8)))
    half = predict_volume(model, image, (8, 8, 8), precision="bf16")
    assert model.dtype == torch.bfloat16 and half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=0, atol=0.1)
    with pytest.raises(ValueError, match="one volume"):
        predict_volume(model, image[0], (8, 8, 8))
    with pytest.raises(ValueError, match="overlap"):
        predict_volume(model, image, (8, 8, 8), overlap=1.0)


@pytest.fixture
def checkpoint(monkeypatch, tmp_path):
    """Make `run_predict` load a given model with given preprocessing; returns the folder."""

    def install(model, channels=("T1",), spacing=None, patch=(16, 16, 16), labels=2):
        preprocessing = Preprocessing(
            channels=list(channels),
            normalization=["ct"] * len(channels),
            intensity=[{"lower": -1e9, "upper": 1e9, "mean": 0.0, "std": 1.0}] * len(channels),
            spacing=list(spacing) if spacing else None,
            patch_size=list(patch),
            labels={f"name {value}": value for value in range(labels)},
        )
        config = {"name": "unetrpp", "args": {}, "preprocessing": preprocessing.to_dict()}
        stub = types.SimpleNamespace(load_checkpoint=lambda folder, img_size=None: (model, config))
        monkeypatch.setitem(__import__("sys").modules, "unetrpp.checkpoint", stub)
        return tmp_path / "checkpoint"

    return install


def oblique(spacing=(1.0, 1.0, 1.0), codes="RAS", angle=0.3):
    """An affine with tilted axes, given handedness and an offset."""
    turn = np.eye(3)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    order = nib.orientations.axcodes2ornt(codes)
    start = np.zeros((3, 3))
    for axis, (target, sign) in enumerate(order):
        start[int(target), axis] = sign * spacing[axis]
    affine = np.eye(4)
    affine[:3, :3] = turn @ start
    affine[:3, 3] = (-12.5, 7.25, 31.0)
    return affine


def smooth(shape, seed=0):
    """A smooth random field with about unit deviation."""
    from scipy import ndimage

    field = np.random.default_rng(seed).standard_normal(shape)
    field = ndimage.gaussian_filter(field, 2.5)
    return (field / field.std()).astype(np.float32)


def save(file, values, affine=None, codes=(1, 1)):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, np.eye(4) if affine is None else affine)
    image.set_sform(image.affine, codes[0])
    image.set_qform(image.affine, codes[1])
    image.header["xyzt_units"] = 10
    nib.save(image, file)
    return file


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA"])
def test_label_map_lies_on_the_grid_of_its_input(tmp_path, checkpoint, codes):
    """A voxelwise network and no resampling: every voxel must come back where it was."""
    values, affine = smooth((21, 18, 9)), oblique((0.8, 0.8, 3.0), codes)
    source = save(tmp_path / "in" / "case.nii.gz", values, affine, codes=(2, 1))
    folder = checkpoint(Thresholds(-0.5, 0.5), labels=3)
    result = run_predict([source], tmp_path / "out", folder, quiet=True)
    assert not result.failures and list(result.outputs) == ["case"]
    original, written = nib.load(source), nib.load(tmp_path / "out" / "case.nii.gz")
    np.testing.assert_array_equal(
        np.asarray(written.dataobj), (values > -0.5).astype(int) + (values > 0.5)
    )
    assert written.get_data_dtype() == np.uint8
    for entry in ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "quatern_b",
                  "qoffset_x", "xyzt_units"):  # fmt: skip
        assert written.header[entry].tobytes() == original.header[entry].tobytes(), entry
    np.testing.assert_array_equal(written.affine, original.affine)
    assert written.header.get_zooms() == original.header.get_zooms()


def test_axes_half_way_between_two_directions_lead_back(tmp_path, checkpoint):
    """At 45 degrees an axis belongs to either: plan, reading and writing must choose alike."""
    values = smooth((21, 18, 9))
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[np.ix_([0, 2], [0, 2])] = [[0.7, -2.1], [0.7, 2.1]]
    source = save(tmp_path / "case.nii.gz", values, affine)
    shape, spacing = volume_geometry(Case("case", (source,)))
    folder = checkpoint(Thresholds(0.0), spacing=spacing)
    stored = Preprocessing(["T1"], ["zscore"], [None], spacing, [16] * 3, {"a": 0, "b": 1})
    item = load_case(Case("case", (source,)), stored)
    assert list(item["image"].shape[1:]) == shape
    np.testing.assert_allclose(item["image"].pixdim, spacing)
    assert not run_predict(source, tmp_path / "out", folder, quiet=True).failures
    found = np.asarray(nib.load(tmp_path / "out" / "case.nii.gz").dataobj)
    np.testing.assert_array_equal(found, values > 0)


@pytest.mark.parametrize("codes", ["RAS", "SLA"])
def test_resampled_probabilities_come_back_to_the_original_grid(tmp_path, checkpoint, codes):
    """Boundaries of a smooth field survive resampling there and back to half a fine voxel."""
    shape, spacing = (40, 36, 14), (0.7, 0.9, 2.4)
    values = smooth(shape)
    source = save(tmp_path / "case.nii.gz", values, oblique(spacing, codes))
    model = Thresholds(0.0, 1.0, steepness=2.0)
    folder = checkpoint(model, spacing=(1.0, 1.0, 1.0), labels=3)
    run_predict([source], tmp_path / "out", folder, quiet=True)
    found = np.asarray(nib.load(tmp_path / "out" / "case.nii.gz").dataobj)
    expected = (values > 0).astype(int) + (values > 1)
    assert found.shape == shape
    # A shift by one voxel along any axis would cost more than is allowed here.
    agreement = (found == expected).mean()
    shifted = max((np.roll(expected, 1, axis) == expected).mean() for axis in (0, 1))
    assert agreement > 0.95 > shifted


def test_several_channels_as_files_and_as_one_4d_file(tmp_path, checkpoint):
    first, second = smooth((17, 15, 6), 1), smooth((17, 15, 6), 2)
    affine = oblique(codes="LPS")
    save(tmp_path / "in" / "a_0000.nii.gz", first, affine)
    save(tmp_path / "in" / "a_0001.nii.gz", second, affine)
    save(tmp_path / "in" / "b.nii.gz", np.stack([first, second], -1), affine)
    save(tmp_path / "in" / "year_2024.nii.gz", np.stack([second, first], -1), affine)
    folder = checkpoint(Thresholds(0.2), channels=("Flair", "T1c"))
    result = run_predict([tmp_path / "in"], tmp_path / "out", folder, quiet=True)
    assert not result.failures
    assert set(result.outputs) == {"a", "b", "year_2024"}
    for file in result.outputs.values():
        image = nib.load(file)
        np.testing.assert_array_equal(np.asarray(image.dataobj), first + second > 0.2)
        np.testing.assert_array_equal(image.affine, nib.load(tmp_path / "in/b.nii.gz").affine)
    record = json.loads((tmp_path / "out" / "prediction.json").read_text(encoding="utf-8"))
    assert record["labels"] == {"name 0": 0, "name 1": 1}
    assert set(record["seconds"]) == {"a", "b", "year_2024"}


def shear():
    affine = oblique((0.8, 0.8, 1.5), "LPS")
    return affine @ np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


@pytest.mark.parametrize("unit", [1, 3])
@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("affine", [oblique((0.8, 0.9, 1.5), "PIR"), shear()], ids=["PIR", "shear"])
def test_other_units_come_back_to_the_original_grid(tmp_path, checkpoint, unit, spacing, affine):
    """A header in metre or micron is the volume in mm, and the label map has that header."""
    values, shape = smooth((24, 22, 14)), (24, 22, 14)
    folder, maps = checkpoint(Thresholds(0.0), spacing=spacing), []
    for code in (2, unit):
        scale = np.diag([{1: 0.001, 2: 1.0, 3: 1000.0}[code]] * 3 + [1.0])
        image = nib.Nifti1Image(values.reshape(*shape, 1, 1), scale @ affine)
        image.header["xyzt_units"] = code
        nib.save(image, tmp_path / f"a{code}.nii.gz")
        result = run_predict([tmp_path / f"a{code}.nii.gz"], tmp_path / "out", folder, quiet=True)
        assert not result.failures
        written = nib.load(tmp_path / "out" / f"a{code}.nii.gz")
        assert written.header["xyzt_units"] == code
        np.testing.assert_array_equal(written.affine, nib.load(tmp_path / f"a{code}.nii.gz").affine)
        maps.append(np.asarray(written.dataobj))
    # Headers hold float32, which rounds a place in metres and one in mm differently.
    assert (maps[0] == maps[1]).mean() > (0.999 if spacing else 0.9999)
    assert (maps[0] == (values > 0)).mean() > (0.94 if spacing else 0.9999)


def test_channels_that_lie_elsewhere_are_turned_or_warned_of(tmp_path, checkpoint):
    first, second = smooth((17, 15, 6), 1), smooth((17, 15, 6), 2)
    affine, inputs = oblique(), tmp_path / "in"
    flipped = affine @ nib.orientations.inv_ornt_aff([[0, -1], [1, 1], [2, -1]], first.shape)
    for name, values, where in (
        ("flipped", second[::-1, :, ::-1], flipped),
        ("shifted", second, affine + 3 * np.eye(4, k=3)),
        ("coarser", second, affine @ np.diag([2, 2, 2, 1])),
    ):
        save(inputs / f"{name}_0000.nii.gz", first, affine)
        save(inputs / f"{name}_0001.nii.gz", values, where)
    save(inputs / "ITK.NII.GZ", np.stack([first, second], -1)[:, :, :, None], affine)
    folder = checkpoint(Thresholds(0.2), channels=("Flair", "T1c"))
    with pytest.warns(UserWarning, match="shifted_0001.nii.gz lies up to 3 mm away"):
        result = run_predict([inputs], tmp_path / "out", folder, quiet=True)
    assert set(result.outputs) == {"flipped", "shifted", "ITK"}
    for file in result.outputs.values():
        np.testing.assert_array_equal(np.asarray(nib.load(file).dataobj), first + second > 0.2)
        np.testing.assert_array_equal(nib.load(file).affine, np.float32(affine))
    (reason,) = result.failures.values()
    assert "coarser_0001.nii.gz has voxels of 2x2x2 mm" in reason
    strict = run_predict([inputs], tmp_path / "2", folder, check_affine=True, quiet=True)
    assert set(strict.outputs) == {"flipped", "ITK"}


def test_bad_files_are_named_and_the_others_done(tmp_path, checkpoint, capsys):
    folder, inputs = checkpoint(Thresholds(0.0)), tmp_path / "in"
    values = smooth((12, 12, 12))
    for name in ("good", "also_good", "truncated", "not_nifti"):
        save(inputs / f"{name}.nii.gz", values)
    truncated = inputs / "truncated.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 2])
    (inputs / "not_nifti.nii.gz").write_text("hello", encoding="utf-8")
    holes = values.copy()
    holes[3, 3, 3] = np.nan
    save(inputs / "holes.nii.gz", holes)
    save(inputs / "channels.nii.gz", np.stack([values, values], -1))
    save(inputs / "._hidden.nii.gz", values)
    text = tmp_path / "notes.txt"
    text.write_text("no volume", encoding="utf-8")

    result = run_predict([inputs, tmp_path / "nowhere.nii.gz", text], tmp_path / "out", folder)
    assert set(result.outputs) == {"good", "also_good"}
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "also_good.nii.gz",
        "good.nii.gz",
        "prediction.json",
    ]
    reasons = {Path(name).name.split(".")[0]: why for name, why in result.failures.items()}
    assert set(reasons) == {"truncated", "not_nifti", "holes", "channels", "nowhere", "notes"}
    assert "NaN" in reasons["holes"] and "2 channel" in reasons["channels"]
    assert "does not exist" in reasons["nowhere"]
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == 6
    assert "2 volumes predicted" in printed and "6 failed" in printed


def test_missing_channel_is_named(tmp_path, checkpoint):
    folder = checkpoint(Thresholds(0.0), channels=("Flair", "T1c"))
    save(tmp_path / "in" / "a_0001.nii.gz", smooth((8, 8, 8)))
    save(tmp_path / "in" / "b_0000.nii.gz", smooth((8, 8, 8)))
    result = run_predict([tmp_path / "in"], tmp_path / "out", folder, quiet=True)
    assert not result.outputs
    reasons = {Path(name).name: why for name, why in result.failures.items()}
    assert "a_0000.nii.gz" in reasons["a_0001.nii.gz"]
    assert "1 channel" in reasons["b_0000.nii.gz"] and "T1c" in reasons["b_0000.nii.gz"]
    # It is there, and was not given.
    save(tmp_path / "in" / "b_0001.nii.gz", smooth((8, 8, 8)))
    result = run_predict(tmp_path / "in" / "b_0000.nii.gz", tmp_path / "out", folder, quiet=True)
    assert "b_0001.nii.gz lies beside it: name that as well" in next(iter(result.failures.values()))


def test_what_is_no_file_is_named_for_what_it_is(tmp_path, checkpoint):
    """git-annex and datalad leave links, some unpackers make a folder of the file's name."""
    folder = checkpoint(Thresholds(0.0))
    source = tmp_path / "in"
    save(source / "good.nii.gz", smooth((8, 8, 8)))
    (source / "folder.nii.gz").mkdir()
    (source / "link.nii.gz").symlink_to(".git/annex/objects/x")
    os.mkfifo(source / "pipe.nii.gz")
    for inputs in ([source], sorted(source.iterdir())):
        result = run_predict(inputs, tmp_path / "out", folder, quiet=True, overwrite=True)
        reasons = {Path(name).name: why for name, why in result.failures.items()}
        assert list(result.outputs) == ["good"] or len(inputs) > 1
        link = "is a link to .git/annex/objects/x, which does not exist; fetch the file behind it"
        assert link in reasons["link.nii.gz"]
    assert "is a pipe or device, and must be a file" in reasons["pipe.nii.gz"]


def test_nothing_is_overwritten(tmp_path, checkpoint):
    folder = checkpoint(Thresholds(0.0))
    values = smooth((8, 8, 8))
    one = save(tmp_path / "one" / "case.nii.gz", values)
    two = save(tmp_path / "two" / "case.nii.gz", values)
    before = one.read_bytes()
    with pytest.raises(ValueError, match="both be written"):
        run_predict([one, two], tmp_path / "out", folder, quiet=True)
    with pytest.raises(ValueError, match="never overwritten"):
        run_predict([one], tmp_path / "one", folder, overwrite=True, quiet=True)
    os.symlink(tmp_path / "one", tmp_path / "link")
    with pytest.raises(ValueError, match="never overwritten"):
        run_predict([one], tmp_path / "link" / "case.nii.gz", folder, overwrite=True, quiet=True)
    with pytest.raises(ValueError, match="is one file"):
        other = save(tmp_path / "two" / "other.nii.gz", values)
        run_predict([one, other], tmp_path / "out.nii.gz", folder, quiet=True)
    with pytest.raises(ValueError, match="device"):
        run_predict([one], tmp_path / "out", folder, device="abacus", quiet=True)
    assert one.read_bytes() == before and not (tmp_path / "out").exists()

    target = tmp_path / "out" / "map.nii"
    assert not run_predict([one, one], target, folder, quiet=True).failures
    assert [f.name for f in target.parent.iterdir()] == ["map.nii"]
    again = run_predict([one], target, folder, quiet=True)
    assert "overwrite" in again.failures[str(one)]
    assert not run_predict([one], target, folder, overwrite=True, quiet=True).failures


@pytest.mark.parametrize("codes", ["RAS", "SLA"])
def test_saved_network_labels_an_oblique_anisotropic_file_on_its_grid(tmp_path, codes):
    """Nothing replaced: save_checkpoint, load_checkpoint, resampling and a real network."""
    from unetrpp.checkpoint import save_checkpoint
    from unetrpp.models import UNETRPP

    torch.manual_seed(0)
    model = UNETRPP.from_preset("tiny", out_channels=3).eval()
    with torch.no_grad():
        # The random weights choose between classes 0 and 1 only.
        model.state_dict()["out1.conv.conv.bias"].copy_(torch.tensor([0.0, 0.0, -1e3]))
    labels = {"background": 0, "one": 1, "two": 2}
    preprocessing = Preprocessing(["MR"], ["zscore"], [None], [2.0, 0.8, 1.1], [32, 32, 32], labels)
    extra = {"preprocessing": preprocessing.to_dict(), "labels": labels}
    folder = save_checkpoint(tmp_path / "run" / "best", model, extra)
    values = smooth((40, 37, 15))
    source = save(tmp_path / "case.nii.gz", values, oblique((0.7, 0.9, 2.4), codes), codes=(2, 1))
    result = run_predict([source], tmp_path / "out", folder, device="cpu", quiet=True)
    assert not result.failures
    original, written = nib.load(source), nib.load(result.outputs["case"])
    assert written.shape == original.shape
    np.testing.assert_array_equal(written.affine, original.affine)
    for entry in ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "quatern_b"):
        assert written.header[entry].tobytes() == original.header[entry].tobytes(), entry
    assert written.header.get_zooms() == original.header.get_zooms()
    found = np.asarray(written.dataobj)
    assert set(np.unique(found)) == {0, 1}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (None, "holds model, preprocessing and no preprocessing"),
        ("ct", "holds no JSON object with the entries of a Preprocessing"),
        ({"spacing": [0, 0, 0]}, "spacing must be three positive numbers in mm, or null"),
        ({"patch_size": None}, "patch_size must be .16, 16, 16., the input size of the network"),
        ({"normalization": ["ct"]}, 'intensity must be .* for each channel with "ct"'),
        ({"labels": {"background": 0, "a": 1}}, "labels must be the values 0 to 2 by name"),
    ],
)
def test_an_illegal_preprocessing_of_a_checkpoint_is_named(tmp_path, changed, message):
    """By the file and the entry, before a volume is read; some ran, and gave a wrong label map."""
    from unetrpp.checkpoint import save_checkpoint
    from unetrpp.models import create_model

    preprocessing = Preprocessing(
        ["MRI"], ["zscore"], [None], [1.0] * 3, [16] * 3, {"background": 0, "a": 1, "b": 2}
    )
    values = changed
    if isinstance(changed, dict):
        values = {**preprocessing.to_dict(), **changed}
    model = create_model(
        "unetrpp", "tiny", img_size=[16] * 3, out_channels=3, strides=[[2] * 3] * 3 + [[1] * 3]
    )
    folder = save_checkpoint(tmp_path / "ck", model, {"preprocessing": values})
    source = save(tmp_path / "case.nii.gz", smooth((8, 8, 8)))
    with pytest.raises(ValueError, match=message) as refusal:
        run_predict(source, tmp_path / "out", folder)
    assert str(folder) in str(refusal.value) and not (tmp_path / "out").exists()


def test_checkpoint_without_preprocessing_is_explained(tmp_path, capsys):
    """One of `load_published`, saved as its docstring shows, knows no spacing and no labels."""
    pytest.importorskip("jsonargparse")
    from unetrpp import cli
    from unetrpp.checkpoint import save_checkpoint
    from unetrpp.models import create_model

    folder = str(save_checkpoint(tmp_path / "ck", create_model("unetrpp", "tiny")))
    source = save(tmp_path / "case.nii.gz", smooth((8, 8, 8)))
    out = tmp_path / "out"
    assert cli.main(["predict", str(source), "-o", str(out), "--checkpoint", folder]) == 1
    message = capsys.readouterr().err
    assert message.startswith("unetrpp predict: run_predict: a checkpoint must say how its network")
    assert f"config.json of {folder} holds model and no preprocessing" in message
    assert "save_checkpoint(folder, model, {" in message and not out.exists()
    with pytest.raises(ValueError, match="predict_cases: .* holds model and no preprocessing"):
        predict.predict_cases([], out, folder, quiet=True)
    assert not out.exists()


def test_overlap_is_checked_once_before_anything_is_done(tmp_path, checkpoint):
    folder = checkpoint(Thresholds(0.0))
    source = save(tmp_path / "case.nii.gz", smooth((8, 8, 8)))
    with pytest.raises(ValueError, match="run_predict: overlap .* got 1.5"):
        run_predict([source], tmp_path / "out", folder, overlap=1.5, quiet=True)
    assert not (tmp_path / "out").exists()


def test_auto_takes_the_gpu_there_is(monkeypatch):
    for cuda, mps, expected in ((1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=cuda: bool(found))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda found=mps: bool(found))
        assert predict._device("auto").type == expected


def test_failed_write_leaves_nothing_behind(tmp_path, checkpoint, monkeypatch):
    folder = checkpoint(Thresholds(0.0))
    source = save(tmp_path / "case.nii.gz", smooth((8, 8, 8)))

    def full_disk(image, file):
        Path(file).write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(nib, "save", full_disk)
    result = run_predict([source], tmp_path / "out", folder, quiet=True)
    assert "no space left" in result.failures[str(source)]
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["prediction.json"]


def record_of(folder):
    return json.loads((folder / "prediction.json").read_text(encoding="utf-8"))


def test_half_done_folder_is_finished_and_its_record_kept(tmp_path, checkpoint, monkeypatch):
    """Stopped at the second of three volumes: the record is true, --skip_existing does the rest."""
    folder, out = checkpoint(Thresholds(0.0)), tmp_path / "out"
    files = [save(tmp_path / "in" / f"{name}.nii.gz", smooth((8, 8, 8))) for name in "abc"]
    before = predict._predict_case

    def stop(model, case, *arguments, **options):
        if case.name == "b":
            raise KeyboardInterrupt
        return before(model, case, *arguments, **options)

    monkeypatch.setattr(predict, "_predict_case", stop)
    with pytest.raises(KeyboardInterrupt):
        run_predict(files, out, folder, quiet=True)
    assert sorted(os.listdir(out)) == ["a.nii.gz", "prediction.json"]
    assert list(record_of(out)["outputs"]) == ["a"]
    first = (out / "a.nii.gz").stat().st_mtime_ns

    monkeypatch.setattr(predict, "_predict_case", before)
    result = run_predict(files, out, folder, skip_existing=True, quiet=True)
    assert list(result.skipped) == ["a"] and list(result.outputs) == ["b", "c"]
    assert not result.failures and (out / "a.nii.gz").stat().st_mtime_ns == first
    record = record_of(out)
    assert set(record["outputs"]) == set(record["inputs"]) == set(record["seconds"]) == set("abc")
    again = run_predict(files, out, folder, skip_existing=True, quiet=True)
    assert list(again.skipped) == list("abc") and record_of(out) == record

    # A label map that is cut short is made again, one of another shape is left and named.
    (out / "b.nii.gz").write_bytes((out / "b.nii.gz").read_bytes()[:60])
    save(out / "c.nii.gz", np.zeros((8, 8, 9), np.uint8))
    result = run_predict(files, out, folder, skip_existing=True, quiet=True)
    assert list(result.outputs) == ["b"] and "(8, 8, 9)" in result.failures[str(files[2])]
    with pytest.raises(ValueError, match="--overwrite or --skip_existing, not both"):
        run_predict(files, out, folder, skip_existing=True, overwrite=True, quiet=True)


def test_commands_that_write_into_one_folder_at_a_time_share_its_record(tmp_path, checkpoint):
    """As the jobs of an array do: each adds its cases, and replaces none of the others'."""
    from unetrpp.prediction_record import PredictionRecord

    out, options = tmp_path / "out", {"overlap": 0.5}
    files = [save(tmp_path / "in" / f"{n}.nii.gz", smooth((8, 8, 8))) for n in "abc"]
    run_predict(files[:1], out, checkpoint(Thresholds(0.0)), quiet=True)
    stored = record_of(out)
    parts = (tmp_path / "checkpoint", stored["preprocessing"], {**stored["options"], **options})
    one, two = (PredictionRecord(out, *parts, overwrite=True) for _ in range(2))
    for record, name in ((one, "a"), (two, "b")):
        record.forget(name)
        target = shutil.copy(files[0], out / f"{name}.nii.gz")
        record.add(name, [tmp_path / f"{name}.nii.gz"], target, 1.0)
    assert one.save({}) is None and two.save({}) is None and one.save({}) is None
    assert set(record_of(out)["outputs"]) == {"a", "b"}
    two.forget("b")
    assert one.save({}) is None and set(record_of(out)["outputs"]) == {"a"}
    assert not (out / ".prediction.lock").exists()


def test_a_folder_that_takes_no_files_is_named_before_the_work(tmp_path, checkpoint, monkeypatch):
    def read_only(path, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    source = save(tmp_path / "a.nii.gz", smooth((8, 8, 8)))
    monkeypatch.setattr(Path, "touch", read_only)
    monkeypatch.setattr(predict, "_predict_case", lambda *_, **__: pytest.fail("worked in vain"))
    with pytest.raises(OSError, match=r"Read-only file system: '.*out'"):
        run_predict([source], tmp_path / "out", checkpoint(Thresholds(0.0)), quiet=True)


def test_record_of_another_checkpoint_or_option_is_not_mixed_in(tmp_path, checkpoint):
    folder, out = checkpoint(Thresholds(0.0)), tmp_path / "out"
    one, two = (save(tmp_path / "in" / f"{n}.nii.gz", smooth((8, 8, 8))) for n in "ab")
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"first weights")
    run_predict([one], out, folder, quiet=True)
    first = record_of(out)
    for options in ({"overlap": 0.25}, {"mirror": True}, {"overlap": 0.25, "skip_existing": True}):
        with pytest.raises(ValueError, match="prediction.json says that label maps here come from"):
            run_predict([two], out, folder, quiet=True, **options)
    (folder / "model.safetensors").write_bytes(b"better weights")
    with pytest.raises(ValueError, match="name another folder, or replace them with --overwrite"):
        run_predict([two], out, folder, quiet=True)
    assert record_of(out) == first and not (out / "b.nii.gz").exists()

    # Where it may replace, what stays is listed with the weights that it came from.
    run_predict([two], out, folder, overwrite=True, quiet=True)
    record = record_of(out)
    assert list(record["outputs"]) == ["b"] and record["weights"] != first["weights"]
    (earlier,) = record["earlier"]
    assert list(earlier["outputs"]) == ["a"] and earlier["weights"] == first["weights"]
    run_predict([one], out, folder, overwrite=True, quiet=True)
    record = record_of(out)
    assert set(record["outputs"]) == {"a", "b"} and record["earlier"] == []

    # Once the label maps are gone, nothing is mixed.
    (folder / "model.safetensors").write_bytes(b"third weights")
    (out / "a.nii.gz").unlink()
    (out / "b.nii.gz").unlink()
    run_predict([one], out, folder, quiet=True)
    assert list(record_of(out)["outputs"]) == ["a"]


@pytest.mark.parametrize("content", [b"", b'{"outputs": {"a"', b"[1]", b'{"outputs": 3}', b"\xff"])
def test_damaged_record_is_named(content, tmp_path, checkpoint):
    folder, out = checkpoint(Thresholds(0.0)), tmp_path / "out"
    one = save(tmp_path / "in" / "a.nii.gz", smooth((8, 8, 8)))
    out.mkdir()
    (out / "prediction.json").write_bytes(content)
    with pytest.raises(ValueError, match="prediction.json should be the record of unetrpp predict"):
        run_predict([one], out, folder, quiet=True)
    assert not run_predict([one], out, folder, overwrite=True, quiet=True).failures
    assert list(record_of(out)["outputs"]) == ["a"]


def test_record_that_cannot_be_written_is_a_failure_beside_the_others(
    tmp_path, checkpoint, monkeypatch, capsys
):
    from unetrpp import prediction_record

    def full(file, content):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(prediction_record, "write_json", full)
    one = save(tmp_path / "in" / "a.nii.gz", smooth((8, 8, 8)))
    out = tmp_path / "out"
    result = run_predict([one, tmp_path / "gone.nii.gz"], out, checkpoint(Thresholds(0.0)))
    assert list(result.outputs) == ["a"]
    assert set(result.failures) == {str(tmp_path / "gone.nii.gz"), str(out / "prediction.json")}
    printed = capsys.readouterr().out
    assert "prediction.json: No space left on device (errno 28); make room" in printed


def test_memory_that_runs_out_is_said_for_each_volume(tmp_path, checkpoint):
    class Greedy(Thresholds):
        def forward(self, x):
            raise RuntimeError("could not create a primitive")

    one = save(tmp_path / "a.nii.gz", smooth((8, 8, 8)))
    result = run_predict([one], tmp_path / "out", checkpoint(Greedy(0.0)), quiet=True)
    said = result.failures[str(one)]
    assert said.startswith("memory ran out") and "--batch_size of 1" in said


def test_probabilities_that_memory_cannot_hold_are_refused(tmp_path, checkpoint, monkeypatch):
    files = [save(tmp_path / f"{n}.nii.gz", smooth((8, 8, n))) for n in (8, 16)]

    def check(needed, what, remedy):
        if needed == 2 * 8 * 8 * 16 * 4:
            raise memory.NotEnoughMemory(f"{what} would take {needed}; {remedy}")

    monkeypatch.setattr(predict, "check_memory", check)
    result = run_predict(files, tmp_path / "out", checkpoint(Thresholds(0.0)), quiet=True)
    assert list(result.outputs) == ["8"]
    (said,) = result.failures.values()
    assert "16.nii.gz: the probabilities of 2 classes for 16 x 8 x 8 voxels would take" in said


@pytest.mark.parametrize(
    "options, said",
    [
        ({"batch_size": 0}, "run_predict: batch_size must be a whole number from 1 to 1024, got 0"),
        ({"batch_size": 1.5}, "run_predict: batch_size must be"),
        ({"overlap": float("nan")}, "run_predict: overlap must be at least 0 and below 1, got nan"),
        ({"overlap": -0.1}, "run_predict: overlap must be"),
        ({"precision": "fp16"}, "run_predict: precision must be one of fp32, bf16, got 'fp16'"),
        ({"output": ""}, "output must be the path of a file or folder, got ''"),
        ({"checkpoint": ""}, "checkpoint must be the path of a file or folder, got ''"),
        ({"inputs": [""]}, "inputs must be paths"),
        ({"output": "label.mha"}, "must end in .nii or .nii.gz"),
        ({"output": "a.nii.gz/"}, "has the name of a file, but is a folder"),
        ({"output": "text"}, "is a file; name a folder"),
        ({"inputs": "in", "output": "in"}, "is the folder of the inputs"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, said, tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = save(tmp_path / "in" / "one.nii.gz", smooth((8, 8, 8)))
    (tmp_path / "a.nii.gz").mkdir()
    (tmp_path / "text").write_text("", encoding="utf-8")
    given = {"inputs": [one], "output": "out", "checkpoint": checkpoint(Thresholds(0.0))}
    with pytest.raises(ValueError) as refused:
        run_predict(**{**given, **options}, quiet=True)
    assert said in str(refused.value) and not (tmp_path / "out").exists()


def test_text_serves_as_paths(tmp_path, checkpoint):
    one = save(tmp_path / "one.nii.gz", smooth((8, 8, 8)))
    result = run_predict(
        str(one), str(tmp_path / "out"), str(checkpoint(Thresholds(0.0))), quiet=True
    )
    assert list(result.outputs) == ["one"] and not result.failures


def test_broken_network_writes_no_label_map(tmp_path, checkpoint):
    model = Thresholds(0.0, steepness=float("nan"))
    source = save(tmp_path / "case.nii.gz", smooth((8, 8, 8)))
    result = run_predict([source], tmp_path / "out", checkpoint(model), quiet=True)
    assert "NaN" in result.failures[str(source)] and not result.outputs


def real(*names):
    """Copies under the nnU-Net names are links: the data stays where it is."""
    files = [REAL / name for name in names]
    if not all(file.exists() for file in files):
        pytest.skip(f"{files[0]} is not there (real volumes beside the repository)")
    return files


@pytest.mark.parametrize(
    "name, spacing",
    [
        ("acdc_subset/imagesTr/patient041_frame01.nii.gz", None),
        ("totalsegmentator_example/example_mr_sm.nii.gz", (4.0, 3.0, 3.5)),
        ("totalsegmentator_example/example_ct_sm.nii.gz", (5.0, 5.0, 5.0)),
    ],
)
def test_real_file_keeps_its_grid(tmp_path, checkpoint, name, spacing):
    (source,) = real(name)
    values = np.asarray(nib.load(source).dataobj, np.float32)
    threshold = float(np.median(values) + 50)
    model = Thresholds(threshold, steepness=0.05)
    folder = checkpoint(model, spacing=spacing, patch=(16, 64, 64))
    result = run_predict([source], tmp_path, folder, quiet=True)
    assert not result.failures
    original, written = nib.load(source), nib.load(next(iter(result.outputs.values())))
    assert written.shape == original.shape
    np.testing.assert_array_equal(written.affine, original.affine)
    for entry in ("sform_code", "qform_code"):
        assert written.header[entry] == original.header[entry]
    agreement = (np.asarray(written.dataobj) == (values > threshold)).mean()
    assert agreement == 1 if spacing is None else agreement > 0.85


def test_real_two_channel_volume(tmp_path, checkpoint):
    stem = "brats2013_sample/brats_2013_pat0005_1_{}_subtrMeanDivStd.nii.gz"
    files = real(stem.format("Flair"), stem.format("T1c"))
    (tmp_path / "in").mkdir()
    for channel, file in enumerate(files):
        os.symlink(file, tmp_path / "in" / f"pat0005_{channel:04d}.nii.gz")
    folder = checkpoint(Thresholds(1.0), channels=("Flair", "T1c"), patch=(96, 128, 128))
    result = run_predict([tmp_path / "in"], tmp_path / "out", folder, quiet=True)
    assert not result.failures and list(result.outputs) == ["pat0005"]
    written = nib.load(result.outputs["pat0005"])
    total = sum(np.asarray(nib.load(file).dataobj, np.float32) for file in files)
    assert (np.asarray(written.dataobj) == (total > 1)).mean() > 0.9999
    np.testing.assert_array_equal(written.affine, nib.load(files[0]).affine)
