"""Dice, HD95 and the evaluate command against brute force, MONAI and constructed files."""

import csv
import json
import math

import numpy as np
import pytest

from unetrpp.evaluate import _surface_distances, dice_per_class, hd95, run_evaluate

nib = pytest.importorskip("nibabel")


def random_shape(seed, shape=(11, 13, 9), blobs=3):
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    mask = np.zeros(shape, bool)
    for _ in range(blobs):
        centre, radii = generator.uniform(0, shape), generator.uniform(1, 4, 3)
        mask |= (((grid - centre) / radii) ** 2).sum(-1) <= 1
    mask[tuple(generator.integers(0, shape))] = True
    return mask


def brute_force_hd95(a, b, spacing):
    """By its definition, voxel by voxel: no erosion, no distance transform, no box."""

    def surface(mask):
        points = []
        for index in zip(*np.nonzero(mask), strict=True):
            for axis in range(3):
                for step in (-1, 1):
                    other = list(index)
                    other[axis] += step
                    inside = 0 <= other[axis] < mask.shape[axis]
                    if not inside or not mask[tuple(other)]:
                        points.append(index)
        return np.unique(np.array(points), axis=0) * np.array(spacing)

    points_a, points_b = surface(a), surface(b)
    apart = np.linalg.norm(points_a[:, None] - points_b[None], axis=-1)
    return np.percentile(np.concatenate([apart.min(1), apart.min(0)]), 95)


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0), (0.7, 1.3, 5.0)])
@pytest.mark.parametrize("seed", range(6))
def test_hd95_matches_brute_force(seed, spacing):
    a, b = random_shape(seed), random_shape(seed + 100)
    expected = brute_force_hd95(a, b, spacing or (1, 1, 1))
    assert hd95(a, b, spacing) == pytest.approx(expected, rel=1e-12)
    assert hd95(b, a, spacing) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_surface_distances_match_monai(seed):
    """Both directions as MONAI has them; only how they are combined differs."""
    metrics = pytest.importorskip("monai.metrics")
    import torch

    a, b = random_shape(seed), random_shape(seed + 50)
    spacing = (0.8, 1.0, 2.5)
    kwargs = dict(include_background=True, percentile=95, spacing=spacing, directed=True)
    tensor_a, tensor_b = (torch.tensor(mask)[None, None] for mask in (a, b))
    directed = [
        metrics.compute_hausdorff_distance(tensor_a, tensor_b, **kwargs).item(),
        metrics.compute_hausdorff_distance(tensor_b, tensor_a, **kwargs).item(),
    ]
    both = _surface_distances(a, b, spacing)
    split = int((a & ~_eroded(a)).sum())
    assert np.percentile(both[:split], 95) == pytest.approx(directed[0], rel=1e-5)
    assert np.percentile(both[split:], 95) == pytest.approx(directed[1], rel=1e-5)


def _eroded(mask):
    from scipy import ndimage

    return ndimage.binary_erosion(mask)


def test_hd95_pools_instead_of_taking_the_worse_direction():
    """A large common slab and a far speck: the percentile over both directions does not see it."""
    a = np.zeros((40, 40, 40), bool)
    a[5:35, 5:35, 5:7] = True
    b = a.copy()
    b[0, 0, 39] = True
    assert hd95(a, b) == 0
    assert hd95(a, a) == 0


def test_hd95_of_empty_masks_is_undefined_unless_told():
    empty, full = np.zeros((4, 4, 4)), np.ones((4, 4, 4))
    for pair in ((empty, full), (full, empty), (empty, empty)):
        assert math.isnan(hd95(*pair))
        assert hd95(*pair, empty=0.0) == 0


def test_dice_of_empty_and_disjoint_classes():
    prediction = np.array([0, 1, 1, 4, 4, 5])
    label = np.array([0, 1, 2, 2, 4, 4])
    assert dice_per_class(prediction, label, [1, 2, 4, 3, [4, 5]]) == [2 / 3, 0, 0.5, 1, 0.8]
    with pytest.raises(ValueError, match="one shape"):
        dice_per_class(prediction, label[:3], [1])
    with pytest.raises(ValueError, match="one spacing per axis"):
        hd95(prediction, label, (1, 1))


def save(folder, name, labels, affine=None, dtype=np.uint8):
    folder.mkdir(exist_ok=True, parents=True)
    image = nib.Nifti1Image(np.asarray(labels, dtype), np.eye(4) if affine is None else affine)
    nib.save(image, folder / name)
    return folder / name


@pytest.fixture
def maps():
    """A reference with two classes and a prediction that misses one layer of the first."""
    reference = np.zeros((10, 10, 6), np.uint8)
    reference[2:6, 2:8, 1:5] = 1
    reference[7:9, 2:8, 1:5] = 2
    prediction = reference.copy()
    prediction[5, 2:8, 1:5] = 0
    return prediction, reference


def test_evaluate_writes_csv_json_and_table(tmp_path, maps, capsys):
    prediction, reference = maps
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    for case in ("one", "two"):
        save(tmp_path / "pred", f"{case}.nii.gz", prediction, affine)
        save(tmp_path / "labelsTr", f"{case}.nii.gz", reference, affine)
    # In the second case the second class was not predicted at all.
    save(tmp_path / "pred", "two.nii.gz", np.where(prediction == 2, 0, prediction), affine)
    (tmp_path / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "tumour": 1, "cyst": 2, "both": [1, 2]}}),
        encoding="utf-8",
    )
    result = run_evaluate(tmp_path / "pred", tmp_path / "labelsTr", tmp_path / "out")
    assert not result.failures

    with (tmp_path / "out" / "scores.csv").open(encoding="utf-8") as stream:
        rows = {(row["case"], row["class"]): row for row in csv.DictReader(stream)}
    assert len(rows) == 6
    tumour = rows["one", "tumour"]
    assert float(tumour["dice"]) == pytest.approx(2 * 72 / (72 + 96))
    assert float(tumour["hd95_voxels"]) == 1
    assert float(tumour["hd95_mm"]) == 2
    assert rows["one", "both"]["label"] == "1+2"
    cyst = rows["two", "cyst"]
    assert float(cyst["dice"]) == 0
    assert float(cyst["hd95_voxels"]) == 0, "as the published tables count an empty prediction"
    assert math.isnan(float(cyst["hd95_mm"]))

    content = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    summary = content["summary"]["classes"]["cyst"]
    assert summary["dice"] == {"mean": 0.5, "median": 0.5, "n": 2, "undefined": 0}
    assert summary["hd95_mm"] == {"mean": 0, "median": 0, "n": 1, "undefined": 1}
    assert summary["empty"] == 1
    mean = content["summary"]["mean"]["dice"]["mean"]
    assert mean == pytest.approx(
        np.mean([entry["dice"]["mean"] for entry in content["summary"]["classes"].values()])
    )
    table = capsys.readouterr().out
    assert "cyst" in table and "0.5000" in table and "2 cases scored, 0 failed" in table


def test_evaluate_names_bad_files_and_does_the_others(tmp_path, maps):
    prediction, reference = maps
    for case in ("good", "missing", "shape", "moved", "truncated", "fraction", "unlisted"):
        save(tmp_path / "labels", f"{case}.nii.gz", reference)
        save(tmp_path / "pred", f"{case}.nii.gz", prediction)
    (tmp_path / "pred" / "missing.nii.gz").unlink()
    save(tmp_path / "pred", "shape.nii.gz", prediction[:-1])
    moved = np.eye(4)
    moved[0, 3] = 3
    save(tmp_path / "pred", "moved.nii.gz", prediction, moved)
    broken = tmp_path / "pred" / "truncated.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-40])
    save(tmp_path / "pred", "fraction.nii.gz", prediction + 0.5, dtype=np.float32)
    save(tmp_path / "pred", "unlisted.nii.gz", np.where(prediction == 2, 7, prediction))

    result = run_evaluate(tmp_path / "pred", tmp_path / "labels", check_affine=True, quiet=True)
    assert {row["case"] for row in result.rows} == {"good"}
    reasons = {name.rsplit("/", 1)[-1].split(".")[0]: why for name, why in result.failures.items()}
    assert set(reasons) == {"missing", "shape", "moved", "truncated", "fraction", "unlisted"}
    assert "no prediction" in reasons["missing"]
    assert "(9, 10, 6)" in reasons["shape"] and "(10, 10, 6)" in reasons["shape"]
    assert "3 mm away" in reasons["moved"]
    assert "cannot be read" in reasons["truncated"]
    assert "whole numbers" in reasons["fraction"]
    assert "[7]" in reasons["unlisted"]
    written = json.loads((tmp_path / "pred" / "scores.json").read_text(encoding="utf-8"))
    assert written["failures"] == result.failures

    options = dict(quiet=True, only_predicted=True)
    with pytest.warns(UserWarning, match="3 mm away"):
        again = run_evaluate(tmp_path / "pred", tmp_path / "labels", **options)
    assert {row["case"] for row in again.rows} == {"good", "moved"}
    assert not any("missing" in name for name in again.failures)


def test_distances_in_mm_follow_the_affine(tmp_path, maps):
    """Whatever pixdim says, and whatever the order of the stored axes is."""
    prediction, reference = maps
    image = nib.Nifti1Image(reference, np.diag([2.0, 2, 2, 1]))
    image.header["qform_code"], image.header["pixdim"][1:4] = 0, 1
    (tmp_path / "r.nii").write_bytes(image.to_bytes())
    for flip in (False, True):
        affine, stored = np.diag([2.0, 2, 2, 1]), prediction
        if flip:
            affine, stored = np.diag([-2.0, 2, 2, 1]), prediction[::-1]
            affine[0, 3] = 18
        file = save(tmp_path, "p.nii.gz", stored[..., None], affine)
        rows = run_evaluate(file, tmp_path / "r.nii", check_affine=True, quiet=True).rows
        assert rows[0]["dice"] == pytest.approx(2 * 72 / (72 + 96))
        assert (rows[0]["hd95_voxels"], rows[0]["hd95_mm"]) == (1, 2)


def test_evaluate_pairs_two_files_and_reads_decathlon_names(tmp_path, maps):
    prediction, reference = maps
    first = save(tmp_path / "a", "prediction.nii", prediction.astype(np.float32), dtype=np.float32)
    second = save(tmp_path / "b", "truth.nii.gz", reference)
    names = tmp_path / "names.json"
    names.write_text(
        json.dumps({"labels": {"0": "background", "1": "liver", "2": "spleen"}}), encoding="utf-8"
    )
    result = run_evaluate(first, second, tmp_path / "out", names=names, quiet=True)
    assert [row["class"] for row in result.rows] == ["liver", "spleen"]
    assert result.rows[1]["dice"] == 1
    save(tmp_path / "c", "other.nii.gz", reference)
    with pytest.raises(FileNotFoundError, match="has the name of one"):
        run_evaluate(first.parent, tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run_evaluate(tmp_path / "nowhere", second)
    with pytest.raises(FileNotFoundError, match="holds no"):
        run_evaluate(tmp_path / "out", second)


def test_hundreds_of_failures_leave_the_table_on_the_screen(tmp_path, maps, capsys):
    prediction, reference = maps
    for number in range(15):
        save(tmp_path / "labels", f"case{number:02d}.nii.gz", reference)
    save(tmp_path / "pred", "case00.nii.gz", prediction)
    result = run_evaluate(tmp_path / "pred", tmp_path / "labels", tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert len(result.failures) == 14
    assert sum(line.startswith("FAILED ") for line in lines) == 11
    assert f"FAILED 4 more, all listed in {tmp_path / 'out' / 'scores.json'}" in lines
    assert len(json.loads((tmp_path / "out" / "scores.json").read_text())["failures"]) == 14


def test_scores_that_cannot_be_written_are_failures_beside_the_others(tmp_path, maps, monkeypatch):
    from unetrpp import evaluate

    prediction, reference = maps
    for case in ("good", "missing"):
        save(tmp_path / "labels", f"{case}.nii.gz", reference)
    save(tmp_path / "pred", "good.nii.gz", prediction)
    run_evaluate(tmp_path / "pred", tmp_path / "labels", tmp_path / "out", quiet=True)
    before = (tmp_path / "out" / "scores.json").read_bytes()

    def full(file, text):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(evaluate, "write_json", full)
    monkeypatch.setattr(evaluate, "write_text", full)
    result = run_evaluate(tmp_path / "pred", tmp_path / "labels", tmp_path / "out", quiet=True)
    assert [row["case"] for row in result.rows] == ["good", "good"]
    assert set(map(lambda name: name.rsplit("/", 1)[-1], result.failures)) == {
        "missing.nii.gz", "scores.csv", "scores.json",
    }  # fmt: skip
    said = result.failures[str(tmp_path / "out" / "scores.json")]
    assert "scores.json: No space left on device (errno 28); make room on that disk" in said
    assert (tmp_path / "out" / "scores.json").read_bytes() == before


def test_paths_of_evaluate_are_checked_before_any_scoring(tmp_path, maps):
    _, reference = maps
    one = save(tmp_path / "a", "one.nii.gz", reference)
    save(tmp_path / "b", "one.nii.gz", reference)
    result = run_evaluate(
        str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "out"), quiet=True
    )
    assert result.rows[0]["dice"] == 1
    for same in (tmp_path / "a", one):
        with pytest.raises(ValueError, match="predictions and labels are both"):
            run_evaluate(same, same, tmp_path / "out", quiet=True)
    with pytest.raises(ValueError, match="is a file; name a folder for the scores"):
        run_evaluate(tmp_path / "a", tmp_path / "b", one, quiet=True)
    text = tmp_path / "text.txt"
    text.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="text.txt is no .nii or .nii.gz file"):
        run_evaluate(text, tmp_path / "b", quiet=True)
    with pytest.raises(ValueError, match="labels must be the path of a file or folder, got ''"):
        run_evaluate(tmp_path / "a", "", quiet=True)


def test_memory_that_runs_out_is_said_for_its_case(tmp_path, maps, monkeypatch):
    from unetrpp import evaluate

    prediction, reference = maps
    for case in ("big", "small"):
        save(tmp_path / "labels", f"{case}.nii.gz", reference)
        save(tmp_path / "pred", f"{case}.nii.gz", prediction)
    score = evaluate._score

    def greedy(case, *arguments):
        if case == "big":
            raise MemoryError
        return score(case, *arguments)

    monkeypatch.setattr(evaluate, "_score", greedy)
    result = run_evaluate(tmp_path / "pred", tmp_path / "labels", quiet=True)
    assert {row["case"] for row in result.rows} == {"small"}
    assert result.failures[str(tmp_path / "pred" / "big.nii.gz")].startswith("memory ran out")


def test_ignored_voxels_are_out_of_every_score(tmp_path):
    """As nnU-Net scores: counts over the voxels whose reference is not "ignore"."""
    random = np.random.default_rng(0)
    reference = random.integers(0, 4, (12, 11, 10)).astype(np.uint8)  # 3: ignore
    prediction = random.integers(0, 3, (12, 11, 10)).astype(np.uint8)
    save(tmp_path / "labels", "a.nii.gz", reference)
    save(tmp_path / "pred", "a.nii.gz", prediction)
    labels = {"background": 0, "one": 1, "both": [1, 2], "ignore": 3}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}), encoding="utf-8")
    result = run_evaluate(tmp_path / "pred", tmp_path / "labels", quiet=True)
    assert not result.failures and [row["class"] for row in result.rows] == ["one", "both"]
    used = reference != 3
    for row, values in zip(result.rows, ([1], [1, 2]), strict=True):
        a, b = (np.isin(labels, values) & used for labels in (prediction, reference))
        assert row["dice"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
        assert row["hd95_voxels"] == pytest.approx(hd95(a, b))
        assert (row["prediction_voxels"], row["reference_voxels"]) == (a.sum(), b.sum())
    # What nobody has labelled does not count, whatever is predicted there.
    save(tmp_path / "pred", "a.nii.gz", np.where(used, prediction, 1).astype(np.uint8))
    again = run_evaluate(tmp_path / "pred", tmp_path / "labels", quiet=True)
    assert again.rows == result.rows
    # A prediction itself never holds the label.
    save(tmp_path / "pred", "a.nii.gz", reference)
    failed = run_evaluate(tmp_path / "pred", tmp_path / "labels", quiet=True)
    assert "[3]" in next(iter(failed.failures.values()))
    assert '3 is "ignore", which only a reference may hold' in str(failed.failures)


def test_reference_with_ignored_voxels_alone_is_named(tmp_path):
    """Nothing is in both maps then, which would score as a Dice of 1."""
    for name, value in (("a", 1), ("b", 2)):
        save(tmp_path / "labels", f"{name}.nii.gz", np.full((5, 5, 5), value, np.uint8))
        save(tmp_path / "pred", f"{name}.nii.gz", np.ones((5, 5, 5), np.uint8))
    labels = {"background": 0, "one": 1, "ignore": 2}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}), encoding="utf-8")
    result = run_evaluate(tmp_path / "pred", tmp_path / "labels", quiet=True)
    assert [row["case"] for row in result.rows] == ["a"]
    ((file, reason),) = result.failures.items()
    assert file.endswith("b.nii.gz") and 'has the label "ignore" in every voxel' in reason
