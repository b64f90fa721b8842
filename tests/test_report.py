"""The report: complete, self-contained, honest about what is missing, pictures that show it."""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

nib = pytest.importorskip("nibabel")
pytest.importorskip("matplotlib")

from unetrpp.evaluate import run_evaluate  # noqa: E402
from unetrpp.report import write_report  # noqa: E402

VOID = {"meta", "img", "br", "path", "use", "rect"}


class Balanced(HTMLParser):
    """Collects tags and attributes, and fails on a tag that is not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(file):
    parser = Balanced()
    parser.feed(file.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


@pytest.fixture
def run(tmp_path):
    """A run with curves and four scored cases, the worst of which misses a class entirely."""
    folder = tmp_path / "run"
    (folder / "pred").mkdir(parents=True)
    (tmp_path / "labels").mkdir()
    (tmp_path / "images").mkdir()
    affine, inputs = np.diag([-1.0, 1.0, 2.0, 1.0]), {}
    for missed, case in enumerate(("all", "most", "some", "none")):
        reference = np.zeros((24, 20, 12), np.uint8)
        reference[4:20, 5:9, 3:9] = 1
        reference[4:20, 10:15, 3:9] = 2
        prediction = reference.copy()
        prediction[4 : 4 + 4 * missed] = 0
        if case == "none":
            prediction[prediction == 2] = 0
        image = np.random.default_rng(missed).normal(size=reference.shape) + 3 * (reference > 0)
        for where, values in (("labels", reference), ("run/pred", prediction), ("images", image)):
            values = values.astype(np.float32) if where == "images" else values
            nib.save(nib.Nifti1Image(values, affine), tmp_path / where / f"{case}.nii.gz")
        inputs[case] = [str(tmp_path / "images" / f"{case}.nii.gz")]
    record = {
        "labels": {"background": 0, "<b>left</b> & co": 1, "right": 2},
        "inputs": inputs,
        "seconds": dict.fromkeys(inputs, 1.5),
        "options": {"overlap": 0.5},
    }
    (folder / "pred" / "prediction.json").write_text(json.dumps(record), encoding="utf-8")
    run_evaluate(folder / "pred", tmp_path / "labels", folder / "scores", quiet=True)
    lines = [{"step": s, "loss": 2 / s, "seconds": 0.5 * s} for s in range(1, 101)]
    for step, dice in ((50, 0.4), (80, 0.75), (100, 0.7)):
        per_class = {"<b>left</b> & co": dice, "right": dice}
        lines.append({"step": step, "val_dice": dice, "val_dice_per_class": per_class})
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text(text + '\n{"step": 101, "lo', encoding="utf-8")
    (folder / "config.yaml").write_text("recipe: short\nlearning_rate: 0.001\n", encoding="utf-8")
    reasons = {"reasons": ["patch 16 because of <something>"]}
    split = {"training": ["a", "b"], "validation": ["c"]}
    (folder / "plan.json").write_text(
        json.dumps({"plan": reasons, "split": split}), encoding="utf-8"
    )
    return folder


def pictures(text):
    from PIL import Image

    found = re.findall(r"src='data:image/png;base64,([^']+)'", text)
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found
    ]


def test_report_is_complete_and_self_contained(run):
    file = write_report(run, run / "scores", title="A & B", notes=["mind the <gap>"])
    assert file == run / "report.html"
    page = parse(file)
    external = [link for link in page.links if not link.startswith(("data:", "#"))]
    assert external == []
    source = file.read_text(encoding="utf-8")
    assert not re.search(r"@import|url\((?!#)|<script|<link", source)
    text = " ".join(page.text)
    assert "chosen by its Dice" not in text, "these cases were not held out to choose by"
    scores = json.loads((run / "scores" / "scores.json").read_text(encoding="utf-8"))
    for expected in (
        "A & B", "mind the <gap>", "<b>left</b> & co", "patch 16 because of <something>",
        "learning_rate: 0.001", "0.7500", "step 80", "50 s", "100 steps", "1.5 s", "torch",
        f"{scores['summary']['mean']['dice']['mean']:.4f}",
        f"{scores['summary']['classes']['right']['hd95_mm']['mean']:.2f}",
    ):  # fmt: skip
        assert expected in text, expected
    assert "prefers-color-scheme:dark" in source
    svgs = re.findall(r"<svg.*?</svg>", source, re.S)
    assert len(svgs) == 2
    for svg in svgs:
        ElementTree.fromstring(svg)
        assert "var(--ink)" in svg and "#010203" not in svg
    ids = [found for svg in svgs for found in set(re.findall(r'<clipPath id="([^"]+)"', svg))]
    assert len(ids) == len(set(ids)), "two figures of one page must not share ids"


def test_report_says_that_the_network_is_a_reconstruction(run):
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    for name, expected in (("slim_unetrpp", True), ("slim_unetr", False)):
        plan["plan"]["model"] = {"name": name}
        (run / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        text = " ".join(parse(write_report(run, run / "scores")).text)
        assert ("SlimUNETRPP, the network of this run, is a RECONSTRUCTION: " in text) == expected


def test_worst_median_and_best_case_are_shown(run):
    source = write_report(run, run / "scores").read_text(encoding="utf-8")
    shown = re.findall(r"<figcaption><b>(\w+)</b> <span class='badge'>(\w+)</span>", source)
    assert shown == [("none", "worst"), ("most", "median"), ("all", "best")]
    worst, median, best = pictures(source)
    half = best.shape[0] // 2
    orange, blue = np.array([255, 138, 61]), np.array([47, 155, 255])

    def tinted(picture, color):
        """Pixels of the lower row that lie between grey and a class's colour."""
        lower = picture[half:].astype(float)
        tint = lower - 0.5 * color
        return int(((np.ptp(tint, axis=-1) < 6) & (np.ptp(lower, axis=-1) > 40)).sum())

    assert tinted(best, orange) > 500 and tinted(best, blue) > 500
    assert tinted(worst, blue) < 0.05 * tinted(best, blue), "this class was not predicted there"
    assert 0 < tinted(median, orange) < tinted(best, orange)
    upper = best[:half].astype(int)
    assert np.ptp(upper, axis=-1).max() < 12, "the upper row is the bare image"
    # The outline of the class that was not predicted is there all the same.
    light_blue = 0.55 * blue + 0.45 * 255
    near = np.abs(worst[half:] - light_blue).max(-1) < 12
    assert near.sum() > 100


@pytest.mark.parametrize("channels", [["MR"], ["T1", "FLAIR"]], ids=["one", "two"])
def test_held_out_cases_are_predicted_and_scored_once(tmp_path, channels):
    """A run folder as training leaves it; no file's name tells case and channel by a pattern."""
    pytest.importorskip("monai")
    import yaml

    import unetrpp
    from unetrpp.checkpoint import save_checkpoint
    from unetrpp.preprocessing import Preprocessing

    data, run = tmp_path / "data", tmp_path / "run"
    run.mkdir()
    listed = []
    for name in ("a", "b", "c"):
        values = np.random.default_rng(ord(name)).normal(size=(20, 24, 18)).astype(np.float32)
        images = [f"scan_{name}", f"{name}_flair"][: len(channels)]
        volumes = {**dict.fromkeys(images, values), f"truth_{name}": np.uint8(values > 1)}
        data.mkdir(exist_ok=True)
        for file, volume in volumes.items():
            nib.save(nib.Nifti1Image(volume, np.eye(4)), data / f"{file}.nii.gz")
        images = [f"{image}.nii.gz" for image in images]
        image = images if len(channels) > 1 else images[0]
        listed.append({"image": image, "label": f"truth_{name}.nii.gz"})
    labels = {"background": 0, "bright": 1}
    named = {str(index): channel for index, channel in enumerate(channels)}
    description = {"channel_names": named, "labels": labels, "training": listed}
    (data / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    (run / "config.yaml").write_text(yaml.safe_dump({"data": str(data)}), encoding="utf-8")
    split = {"training": ["scan_b"], "validation": ["scan_a", "scan_c"]}
    (run / "plan.json").write_text(json.dumps({"plan": {}, "split": split}), encoding="utf-8")
    kinds, nothing = ["zscore"] * len(channels), [None] * len(channels)
    preprocessing = Preprocessing(channels, kinds, nothing, None, [32, 32, 32], labels)
    model = unetrpp.create_model("unetrpp", preset="tiny", in_channels=len(channels))
    extra = {"preprocessing": preprocessing.to_dict(), "labels": labels}
    save_checkpoint(run / "best", model, extra)

    source = write_report(run).read_text(encoding="utf-8")
    rows = json.loads((run / "validation" / "scores.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["case"], row["class"]) for row in rows] == [
        ("scan_a", "bright"),
        ("scan_c", "bright"),
    ]
    assert len(pictures(source)) == 2
    assert "chosen by its Dice on these same held-out cases" in source
    written = (run / "validation" / "scores.json").stat().st_mtime_ns
    write_report(run)
    assert (run / "validation" / "scores.json").stat().st_mtime_ns == written, "not done twice"


def test_report_of_a_run_with_nothing_yet(tmp_path):
    (tmp_path / "run").mkdir()
    file = write_report(tmp_path / "run", output=tmp_path / "elsewhere" / "report.html")
    text = " ".join(parse(file).text)
    assert "neither curves nor scores" in text and "No volume was scored" in text
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="scores.json"):
        write_report(tmp_path / "run", tmp_path)


def test_moved_volumes_and_failures_are_said(run):
    (run.parent / "images" / "none.nii.gz").unlink()
    (run.parent / "labels" / "extra.nii.gz").write_bytes(b"")
    run_evaluate(run / "pred", run.parent / "labels", run / "scores", quiet=True)
    source = write_report(run, run / "scores").read_text(encoding="utf-8")
    assert "none.nii.gz is gone" in source
    assert len(pictures(source)) == 2
    assert "extra.nii.gz" in source and "Not scored" in source


DAMAGED_SCORES = [b"", b'{"rows": [{"case": "a", "cl', b"[1]", b"\xff\xfe", b"{}",
                  b'{"rows": 3}', b'{"rows": [3]}', b'{"rows": [{"case": "a"}]}']  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED_SCORES)
def test_damaged_scores_are_named(run, content):
    file = run / "scores" / "scores.json"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        write_report(run, run / "scores")
    assert str(error.value).startswith(f"{file} cannot be read as the scores of unetrpp evaluate (")
    assert not (run / "report.html").exists()


def test_damaged_scores_of_the_held_out_cases_are_made_again(run):
    from unetrpp import report

    best = run / "best" / "model.safetensors"
    best.parent.mkdir()
    best.write_bytes(b"")
    file = run / "scores" / "scores.json"
    assert not report._is_scored(file, best), "the checkpoint is newer"
    os.utime(best, (0, 0))
    assert report._is_scored(file, best)
    for content in DAMAGED_SCORES:
        file.write_bytes(content)
        assert not report._is_scored(file, best)


def each_place(value, path=()):
    """The paths of all leaves of nested lists and mappings."""
    if isinstance(value, dict | list) and value:
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from each_place(value[key], (*path, key))
    else:
        yield path


def put(content, path, value):
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


@pytest.mark.parametrize("name", ["scores/scores.json", "pred/prediction.json", "plan.json"])
def test_markup_in_any_place_of_a_foreign_file_stays_text(run, name):
    """All leaves at once except those that pair rows and files, then the keys."""
    file, markup = run / name, "<script>alert('x')</script><img src=x onerror=alert(1)>"
    content = json.loads(file.read_text(encoding="utf-8"))
    names = ("case", "class", "prediction", "reference", "inputs")
    for path in list(each_place(content)):
        if not set(names) & set(map(str, path)):
            put(content, path, markup)
    if "rows" in content:
        content["summary"]["classes"][markup] = content["summary"]["mean"]
        content["rows"].append({**content["rows"][0], "case": markup, "class": markup})
        content["files"][markup] = {"prediction": markup, "reference": markup}
        content["failures"] = {markup: markup}
    file.write_text(json.dumps(content), encoding="utf-8")
    source = write_report(run, run / "scores").read_text(encoding="utf-8")
    parse(run / "report.html")
    assert "<script" not in source and "<img src=x" not in source
    assert "&lt;script&gt;" in source


DAMAGED = [b"", b"\xff", b"[1, 2]", b'{"step": "<b>"}', b'{"plan": [1], "inputs": 3}',
           b'{"step": 1, "loss": Infinity, "val_dice": "<i>"}']  # fmt: skip


@pytest.mark.parametrize("name", ["metrics.jsonl", "plan.json", "pred/prediction.json"])
@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_file_of_a_run_leaves_the_rest_of_the_report(run, monkeypatch, name, content):
    monkeypatch.setattr("unetrpp.report.overlay", lambda *files: b"")
    (run / name).write_bytes(content)
    text = " ".join(parse(write_report(run, run / "scores")).text)
    assert "mean of classes" in text and "learning_rate: 0.001" in text
    if content in (b"\xff", b"[1, 2]"):
        assert f"{run / name}" in text, "the report names what it could not read"


def test_text_serves_as_paths_and_only_a_page_is_replaced(run):
    file = write_report(str(run), str(run / "scores"), output=str(run / "page.html"))
    assert file == run / "page.html"
    (run / "folder.html").mkdir()
    volume = run / "pred" / "all.nii.gz"
    before = volume.read_bytes()
    for output in (run / "scores", run / "folder.html", volume, run / "plan.json", "/dev/null"):
        with pytest.raises(ValueError, match="output must be the name of a page, NAME.html"):
            write_report(run, run / "scores", output=output)
    assert volume.read_bytes() == before
    with pytest.raises(FileNotFoundError, match="plan.json is a file; name a folder"):
        write_report(run / "plan.json")
    with pytest.raises(ValueError, match="run must be the path"):
        write_report("")
