"""The demo: its data are what it says, and it runs the commands' own code without a network."""

import json
import socket

import numpy as np
import pytest

nib = pytest.importorskip("nibabel")
datasets = pytest.importorskip("nilearn.datasets")
pytest.importorskip("monai")

from unetrpp.demo import LABELS, make_demo_data, run_demo  # noqa: E402


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the demo must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    return folder, make_demo_data(folder)


def load(folder, name):
    image = nib.load(folder / f"{name}.nii.gz")
    return np.asarray(image.dataobj), image.affine


def test_volumes_are_disjoint_parts_of_the_template(data):
    folder, _ = data
    template = datasets.load_mni152_template(resolution=1)
    whole = np.asarray(template.dataobj)
    taken = np.zeros(whole.shape, int)
    for group, name, side in (
        ("Tr", "left_back", -1),
        ("Tr", "left_front", -1),
        ("Ts", "right", 1),
    ):
        values, affine = load(folder / f"images{group}", name)
        start = np.linalg.solve(template.affine, affine[:, 3])[:3].round().astype(int)
        box = tuple(slice(a, a + size) for a, size in zip(start, values.shape, strict=True))
        np.testing.assert_allclose(values, whole[box], atol=1e-6)
        taken[box] += 1
        ends = affine[0, 3], affine[0, 3] + values.shape[0] - 1
        assert all(side * x > 0 for x in ends), "world x is negative on the left"
    assert taken.max() == 1
    middle = round(-template.affine[0, 3])
    brain = whole > 0
    brain[middle] = False
    assert taken[brain].min() == 1, "all of the brain beside the middle slice is in one of them"


def test_labels_are_the_most_probable_tissue(data):
    folder, _ = data
    labels, affine = load(folder / "labelsTs", "right")
    grey, white = (
        np.asarray(image(resolution=1).dataobj, np.float32)
        for image in (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    )
    origin = datasets.load_mni152_template(resolution=1).affine
    start = np.linalg.solve(origin, affine[:, 3])[:3].round().astype(int)
    box = tuple(slice(a, a + size) for a, size in zip(start, labels.shape, strict=True))
    grey, white = grey[box], white[box]
    assert set(np.unique(labels)) == set(LABELS.values())
    assert (grey[labels == 1] >= white[labels == 1]).all()
    assert (white[labels == 2] > grey[labels == 2]).all()
    assert ((grey + white)[labels == 0] <= 2 / 3 + 1e-6).all()


def test_right_half_mirrors_the_left_as_the_notes_say(data):
    """Why nothing may be flipped in training; if a new template is not symmetric, say so."""
    folder, front = data
    right, _ = load(folder / "imagesTs", "right")
    back, _ = load(folder / "imagesTr", "left_back")
    ahead, _ = load(folder / "imagesTr", "left_front")
    left = np.concatenate([back, ahead], axis=1)
    assert back.shape[1] == front
    np.testing.assert_array_equal(right, left[::-1])


def test_demo_runs_from_data_to_report(tmp_path):
    result = run_demo(tmp_path / "demo", steps=2)
    for file in (
        "data/dataset.json", "data/imagesTs/right.nii.gz", "data/labelsTs/right.nii.gz",
        "run/metrics.jsonl", "run/last/model.safetensors", "prediction/right.nii.gz",
        "scores/scores.csv", "scores/scores.json", "report.html", "demo.json",
    ):  # fmt: skip
        assert (tmp_path / "demo" / file).is_file(), file
    scores = json.loads((tmp_path / "demo/scores/scores.json").read_text(encoding="utf-8"))
    assert result["dice"] == {row["class"]: row["dice"] for row in scores["rows"]}
    assert set(result["dice"]) == set(result["dice_front"]) == {"grey matter", "white matter"}
    config = (tmp_path / "demo/run/config.yaml").read_text(encoding="utf-8")
    assert "mirror: false" in config, "a flip would show the network the test volume"
    plan = json.loads((tmp_path / "demo/run/plan.json").read_text(encoding="utf-8"))
    assert plan["split"] == {"training": ["left_back"], "validation": ["left_front"]}
    page = (tmp_path / "demo/report.html").read_text(encoding="utf-8")
    assert "exact mirror image" in page and "no clinical result" in page
    assert f"{scores['summary']['mean']['dice']['mean']:.4f}" in page
    with pytest.raises(FileExistsError, match="not empty"):
        run_demo(tmp_path / "demo", steps=2)


def test_options_of_the_demo_are_checked_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="run_demo: steps must be a whole number of at least 1"):
        run_demo(tmp_path / "demo", steps=0)
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file; name a new folder"):
        run_demo(str(file), overwrite=True)
    assert not (tmp_path / "demo").exists()
