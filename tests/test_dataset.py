"""dataset.json as people write it, and which files make a case, on tiny files."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel", reason="needs the extra 'train'")

from unetrpp.case_names import group_channels, pair_names  # noqa: E402
from unetrpp.dataset import find_cases, read_dataset_info  # noqa: E402
from unetrpp.dataset_json import class_names, read_dataset_json, split_ignore  # noqa: E402
from unetrpp.volumes import case_name  # noqa: E402

LABELS = {"background": 0, "lesion": 1}


def volume(path: Path, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (4, 4, 4) if channels == 1 else (4, 4, 4, channels)
    nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), path)
    return path


def described(root: Path, *, raw: bytes | None = None, **changes) -> Path:
    """Write a dataset.json."""
    content = {"channel_names": {"0": "MRI"}, "labels": LABELS, **changes}
    root.mkdir(parents=True, exist_ok=True)
    file = root / "dataset.json"
    file.write_bytes(json.dumps(content).encode() if raw is None else raw)
    return file


def of_files(root: Path, images: list[str], labels: list[str], channels: int = 1, **changes):
    """Write a data set of empty volumes; with "*2" after its name, a file of two channels."""
    for name in images:
        name, _, count = name.partition("*")
        volume(root / f"imagesTr/{name}.nii.gz", int(count or 1))
    for name in labels:
        volume(root / f"labelsTr/{name}.nii.gz")
    names = {str(number): f"C{number}" for number in range(channels)}
    described(root, channel_names=names, **changes)
    return root


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_every_encoding_of_json_is_read(tmp_path, encoding):
    text = json.dumps({"modality": {"0": "CT"}, "labels": {"0": "b", "1": "Läsion"}})
    described(tmp_path, raw=text.encode(encoding))
    assert read_dataset_info(tmp_path).labels == {"b": 0, "Läsion": 1}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ('{"labels": "Läsion"}'.encode("latin-1"), "not in UTF-8.*: byte 14 .*save it as UTF-8"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\0" * 50, "holds zero bytes only"),
        (b"\xff\xfe{\0\0\xd8", "not in UTF-16-LE, as its first bytes say: byte 5"),
        (b'{"labels": {"a": 1},}', "not valid JSON: line 1, column 2.*no comma after the last"),
        (b'{\n// the labels\n"labels": 1}', "line 2, column 1.*no comments"),
        (b"{'labels': 1}", "no single quotes"),
        (b'{"labels": {"a": 1, "a": 2}}', "'a' occurs twice with different values"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"labels": ' + b"9" * 5000 + b"}", "a number of 5000 digits; correct it"),
        (b"[]", r"holds \[\], and must be one object"),
        (b"null", "holds null"),
        (b"3", "holds 3"),
    ],
)
def test_a_damaged_dataset_json_is_named(tmp_path, raw, message):
    described(tmp_path, raw=raw)
    with pytest.raises(ValueError, match=f"{tmp_path}/dataset.json.*{message}"):
        read_dataset_info(tmp_path)


def test_a_folder_in_place_of_dataset_json_is_named(tmp_path):
    (tmp_path / "dataset.json").mkdir()
    with pytest.raises(ValueError, match=r"dataset.json is a folder; it must be a JSON file"):
        read_dataset_info(tmp_path)


@pytest.mark.parametrize(
    ("changes", "channels"),
    [
        ({"channel_names": {"1": "T2", "0": "T1"}}, ["T1", "T2"]),
        (
            {"channel_names": {"10": "k", **{str(i): str(i) for i in range(10)}}},
            [*"0123456789", "k"],
        ),
        ({"channel_names": {"0.0": "T1", " 1 ": "T2"}}, ["T1", "T2"]),
        ({"channel_names": {"T2": 1, "T1": 0}}, ["T1", "T2"]),
        ({"channel_names": {"T2": "1", "T1": 0.0}}, ["T1", "T2"]),
        ({"channel_names": ["T1", "T2"]}, ["T1", "T2"]),
        ({"channel_names": "CT"}, ["CT"]),
        ({"channel_names": None, "modality": {"0": "CT"}}, ["CT"]),
    ],
)
def test_channels_are_read_where_their_meaning_is_plain(tmp_path, changes, channels):
    assert read_dataset_json(described(tmp_path, **changes)).channels == channels


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["background", "a", "b"], {"background": 0, "a": 1, "b": 2}),
        ({"b": 2, "background": 0, "a": 1}, {"background": 0, "a": 1, "b": 2}),
        ({"background": "0", "a": 1.0}, {"background": 0, "a": 1}),
        ({"0.0": "background", "1": "a"}, {"background": 0, "a": 1}),
        ({"a": 1, "b": 2}, {"background": 0, "a": 1, "b": 2}),
        ({"clear": 0, "a": 1}, {"clear": 0, "a": 1}),
    ],
)
def test_labels_are_read_where_their_meaning_is_plain(tmp_path, labels, expected):
    assert read_dataset_json(described(tmp_path, labels=labels)).labels == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_names": {"0": None}}, "channel 0 is null; the name CT decides"),
        ({"channel_names": {"0": ""}}, "channel 0 is ''"),
        ({"channel_names": [None, "CT"]}, "channel 0 is null"),
        ({"channel_names": {"0": {"name": "CT"}}}, "channel 0 is {'name'"),
        ({"channel_names": {"0": "T1", "2": "T2"}}, "without gaps; got {'0': 'T1', '2'"),
        ({"channel_names": {"T1": 0, "T2": 0}}, "without gaps"),
        ({"channel_names": {"a": "MRI"}}, "without gaps"),
        ({"channel_names": 5}, "must give each channel a name.*got 5"),
        ({"channel_names": []}, "names no channels"),
        ({"labels": None}, "names no channels or no labels"),
        ({"labels": "lesion"}, "must be {\"background\": 0.*got 'lesion'"),
        ({"labels": ["a", "b"]}, 'a list must begin with "background"'),
        ({"labels": ["background", None]}, "got '1': null"),
        ({"labels": {"background": 0, "a": None}}, "got 'a': null"),
        ({"labels": {"background": 0, "a": True}}, "got 'a': True"),
        ({"labels": {"background": 0, "a": 1.5}}, "got 'a': 1.5"),
        ({"labels": {"background": 0, "a": float("nan")}}, "got 'a': nan"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "without gaps.*renumber"),
        ({"labels": {"background": 0, "a": -1}}, "without gaps"),
        ({"labels": {"background": 0}}, "at least one class"),
        ({"labels": {"background": 0, "a": 1, "both": [1, 2]}}, r"regions .*'both': \[1, 2\]"),
        ({"labels": {"0": "background", "1": "a", "2": "a"}}, "two labels are called 'a'"),
        (
            {"labels": {"a": 0, "background": 1}},
            "background must have the value 0, got 'b",
        ),
        ({"labels": {"a": 0, " Background": [1, 2]}}, "background must have the value 0"),
        ({"labels": {"0": "background", "1": "a", "2": "Ignore"}}, 'write "ignore" for those, or'),
        ({"labels": {"background": 0, "ignore": 1, "a": 2}}, 'the label "ignore" is reserved'),
        ({"labels": {"background": 0, "a": 1, "ignore": [2, 3]}}, 'the label "ignore" is reserved'),
        ({"file_ending": ".mha"}, "file_ending must be .nii.gz or .nii, got '.mha'.*NIfTI"),
        ({"file_ending": 5}, "file_ending must be"),
        ({"training": 5}, '"training" must be a list of entries, got 5'),
        ({"training": "imagesTr"}, '"training" must be a list of entries'),
        ({"training": [None]}, r'"training"\[0\] names no image, got null; an entry is'),
        ({"training": [{"img": "a.nii.gz"}]}, r'"training"\[0\] names no image, got {\'img\''),
        ({"training": [["a.nii.gz", "b.nii.gz"]]}, r'"training"\[0\] names no image'),
        ({"training": [{"image": [], "label": "a"}]}, "names no image"),
        ({"training": [{"image": "a.nii.gz", "label": 3}]}, r'label of "training"\[0\] is 3, not'),
        ({"training": [{"image": "a.nii.gz", "label": ["b"]}]}, "not a path"),
        ({"training": [{"image": "a.nii.gz", "label": "b.nii", "mask": "c.nii"}]}, "one thing"),
        (
            {"training": [{"image": "a.nii", "images": ["a.nii"]}]},
            "image and images, which are",
        ),
        ({"training": [{"image": "a.nii", "truth": "b.nii"}]}, "no label, but 'truth': b.nii; an"),
        ({"training": {"x": 1}}, r'"training"\[\'x\'\] names no image'),
        ({"test": [1]}, r'"test"\[0\] names no image'),
    ],
)
def test_what_is_not_plain_is_refused_with_file_and_entry(tmp_path, changes, message):
    described(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"{tmp_path}/dataset.json: .*{message}"):
        read_dataset_info(tmp_path)


@pytest.mark.parametrize("ignore", [2, 3, 255])
def test_ignore_is_no_class(tmp_path, ignore):
    info = read_dataset_json(
        described(tmp_path, labels={"background": 0, "ignore": ignore, "a": 1})
    )
    assert (info.labels, info.ignore) == ({"background": 0, "a": 1}, ignore)
    names = class_names(tmp_path / "dataset.json")
    assert split_ignore(names) == ({"a": 1}, ignore)


def test_ignore_beside_regions(tmp_path):
    described(tmp_path, labels={"background": 0, "whole": [1, 2], "core": 2, "ignore": 3})
    names = class_names(tmp_path / "dataset.json")
    assert split_ignore(names) == ({"whole": [1, 2], "core": 2}, 3)


@pytest.mark.parametrize(
    "training",
    [
        ["imagesTr/a.nii.gz", "./imagesTr/b.nii.gz"],
        [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in "ba"],
        [{"image": f"imagesTr\\{n}.nii.gz", "label": f".\\labelsTr\\{n}.nii.gz"} for n in "ab"],
        [{"image": [f"imagesTr/{n}.nii.gz"], "label": f"labelsTr/{n}.nii.gz"} for n in "abb"],
        [{"Image": f"imagesTr/{n}.nii.gz", "mask": f"labelsTr/{n}.nii.gz"} for n in "ab"],
        [{"image": "{root}/imagesTr/" + f"{n}.nii.gz", "fold": 0} for n in "ab"],
        {n: {"images": [f"imagesTr/{n}.nii.gz"], "label": f"labelsTr/{n}.nii.gz"} for n in "ab"},
        None,
        [],
    ],
)
def test_listed_files_are_read_where_their_meaning_is_plain(tmp_path, training):
    of_files(tmp_path, ["a", "b"], ["a", "b"])
    text = json.dumps({"channel_names": {"0": "M"}, "labels": LABELS, "training": training})
    described(tmp_path, raw=text.replace("{root}", str(tmp_path)).encode())
    cases = find_cases(tmp_path)
    assert [(c.name, c.images[0].name, c.label.name) for c in cases] == [
        (name, f"{name}.nii.gz", f"{name}.nii.gz") for name in "ab"
    ]


def test_nnunet_lists_files_elsewhere_as_a_dataset(tmp_path):
    of_files(tmp_path, ["a"], ["a"])
    entry = {"images": ["imagesTr/a.nii.gz"], "label": "labelsTr/a.nii.gz"}
    described(tmp_path, dataset={"a": entry})
    assert [case.name for case in find_cases(tmp_path)] == ["a"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image": "imagesTr/a.nii.gz", "label": "labelsTr/b.nii.gz"}, "b.nii.gz does not exist"),
        ({"image": "imagesTr", "label": "labelsTr/a.nii.gz"}, "only files that end in"),
        ({"image": "folder.nii.gz", "label": "labelsTr/a.nii.gz"}, "folder.nii.gz is a folder"),
        ({"image": "x" * 400 + ".nii.gz", "label": "labelsTr/a.nii.gz"}, "does not exist"),
        ({"image": "a\0.nii.gz", "label": "labelsTr/a.nii.gz"}, "does not exist"),
        ({"image": "a.mha", "label": "labelsTr/a.nii.gz"}, "convert the volumes to NIfTI"),
        ({"image": "other/c.nii.gz"}, "names no label, and beside its image"),
        ({"image": ["imagesTr/a.nii.gz"] * 2, "label": "labelsTr/a.nii.gz"}, "has 2 image files"),
    ],
)
def test_a_wrong_list_is_explained(tmp_path, entry, message):
    of_files(tmp_path, ["a"], ["a"], training=[entry])
    (tmp_path / "folder.nii.gz").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        find_cases(tmp_path)
    assert "dataset.json" in str(error.value)


@pytest.mark.parametrize("ending", [None, ".nii.gz", "nii.gz", ".NII.GZ"])
def test_endings_are_the_same_in_upper_case(tmp_path, ending):
    of_files(tmp_path, ["a_0000"], ["a"], file_ending=ending)
    for folder, name in (("imagesTr", "a_0000"), ("labelsTr", "a")):
        (tmp_path / folder / f"{name}.nii.gz").rename(tmp_path / folder / f"{name}.NII.GZ")
    (case,) = find_cases(tmp_path)
    assert (case.name, case.label.name) == ("a", "a.NII.GZ")
    assert case_name(Path("b.Nii")) == "b"


@pytest.mark.parametrize("is_listed", [False, True])
def test_accents_are_read_in_either_spelling(tmp_path, is_listed):
    """macOS writes u and the two dots apart, dataset.json and other systems one letter."""
    apart, joined = "Mu\u0308ller", "M\u00fcller"
    entry = {"image": f"imagesTr/{joined}.nii.gz", "label": f"labelsTr/{apart}.nii.gz"}
    changes = {"training": [entry]} if is_listed else {}
    of_files(tmp_path, [apart], [joined], **changes)
    (case,) = find_cases(tmp_path)
    assert case.images[0].is_file() and case.label.is_file()


NAMES = [
    # images ("*2": two channels in one file), labels, channels, expected cases
    (["STS24_Tr_0001", "STS24_Tr_0002"], None, 1, {"STS24_Tr_0001": 1, "STS24_Tr_0002": 1}),
    (["scan_2019"], None, 1, {"scan_2019": 1}),
    (["P_0000"], None, 1, {"P_0000": 1}),
    (["P_0000", "P_0001"], None, 1, {"P_0000": 1, "P_0001": 1}),
    (["P_0000*2", "P_0001*2", "P_0007*2"], None, 2, {"P_0000": 1, "P_0001": 1, "P_0007": 1}),
    (["p_0001_0000", "p_0002_0000"], ["p_0001", "p_0002"], 1, {"p_0001": 1, "p_0002": 1}),
    (["x_2021_0001", "x_2021_0000"], ["x_2021"], 2, {"x_2021": 2}),
    (["a_0000", "a_0001", "b*2"], ["a", "b"], 2, {"a": 2, "b": 1}),
    (["a_0000*2"], ["a"], 2, {"a": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("images", "labels", "channels", "expected"), NAMES)
@pytest.mark.parametrize("is_listed", [False, True])
def test_a_number_is_a_channel_only_where_all_channels_are_there(
    tmp_path, images, labels, channels, expected, is_listed
):
    labels = labels or [name.partition("*")[0] for name in images]
    of_files(tmp_path, images, labels, channels)
    names = {str(number): f"C{number}" for number in range(channels)}
    if is_listed:
        listed = [
            {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"}
            for name in labels
        ]
        described(tmp_path, channel_names=names, training=listed)
    cases = find_cases(tmp_path)
    assert {case.name: len(case.images) for case in cases} == expected
    assert all(case_name(case.label) == case.name for case in cases)
    # The same files, as inputs of predict.
    files = sorted((tmp_path / "imagesTr").iterdir())
    grouped, problems = group_channels(files, list(names.values()))
    assert {name: len(images) for (_, name), images in grouped.items()} == expected
    assert not problems


@pytest.mark.parametrize(
    ("images", "channels", "expected"),
    [
        (["a_0000"], 1, {"a"}),
        (["a_0000", "b_0000"], 1, {"a", "b"}),
        (["P_0000", "P_0001"], 1, {"P_0000", "P_0001"}),
        (["scan_2019", "STS_0001"], 1, {"scan_2019", "STS_0001"}),
        (["a_0000", "a_0001"], 2, {"a"}),
        (["P_0000*2", "P_0001*2"], 2, {"P_0000", "P_0001"}),
        (["year_2024*2"], 2, {"year_2024"}),
    ],
)
def test_names_of_files_without_labels(tmp_path, images, channels, expected):
    of_files(tmp_path, images, [], channels)
    files = sorted((tmp_path / "imagesTr").iterdir())
    grouped, problems = group_channels(files, ["C"] * channels)
    assert {name for _, name in grouped} == expected and not problems
    # One of a series keeps its name when it is given alone.
    alone, _ = group_channels(files[:1], ["C"] * channels) if channels == 1 else (grouped, {})
    assert set(alone) <= set(grouped)


@pytest.mark.parametrize(
    ("images", "channels", "message"),
    [
        (["a_0000", "a_0002"], 3, r"2 channels of 3 \(C0, C1, C2\), there is no a_0001.nii.gz;"),
        (["a_0000", "a_0002"], 2, "1 channel of 2 .* no a_0001.nii.gz, and a_0002.nii.gz is none"),
        (["a_0001", "a_0002"], 2, "no a_0000.nii.gz, and a_0002.nii.gz is none"),
        (["a_0000", "a_0001"], 1, "1 channel of 1 .*a_0001.nii.gz is none of them"),
        (["a_0001"], 2, "there is no a_0000.nii.gz"),
    ],
)
def test_a_gap_is_refused_by_name(tmp_path, images, channels, message):
    of_files(tmp_path, images, ["a"], channels)
    with pytest.raises(ValueError, match=f"case a has .*{message}"):
        find_cases(tmp_path)
    described(
        tmp_path,
        channel_names={str(number): f"C{number}" for number in range(channels)},
        training=[{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}],
    )
    with pytest.raises((ValueError, FileNotFoundError), match=r"a_0001|a_0000|a\.nii\.gz"):
        find_cases(tmp_path)


@pytest.mark.parametrize("channels", ["0", "01", "10"])
def test_channels_may_be_listed_one_by_one(tmp_path, channels):
    training = [
        {"image": f"imagesTr/a_000{channel}.nii.gz", "label": "labelsTr/a.nii.gz"}
        for channel in channels
    ]
    of_files(tmp_path, ["a_0000", "a_0001"], ["a"], 2, training=training)
    (case,) = find_cases(tmp_path)
    assert case.name == "a"
    assert [file.name for file in case.images] == ["a_0000.nii.gz", "a_0001.nii.gz"]


@pytest.mark.parametrize(("number", "name"), [(0, "a"), (1, "a_0001")])
def test_one_of_several_files_may_be_listed_as_the_only_channel(tmp_path, number, name):
    entry = {"image": f"imagesTr/a_000{number}.nii.gz", "label": "labelsTr/a.nii.gz"}
    of_files(tmp_path, ["a_0000", "a_0001"], ["a"], training=[entry])
    (case,) = find_cases(tmp_path)
    assert case.name == name and case.images == (tmp_path / entry["image"],)


def test_one_channel_in_two_endings_is_refused(tmp_path):
    of_files(tmp_path, ["a_0000"], ["a"])
    volume(tmp_path / "imagesTr/a_0000.nii")
    with pytest.raises(ValueError, match="same channel of one case"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    ("predictions", "references", "pairs"),
    [
        (["a", "b"], ["a", "b"], {"a": "a", "b": "b"}),
        (["a_0000"], ["a"], {"a_0000": "a"}),
        (["a"], ["a_0000"], {"a": "a_0000"}),
        (["P_0000", "P_0001"], ["P_0000", "P_0001"], {"P_0000": "P_0000", "P_0001": "P_0001"}),
        (["P_0000", "P"], ["P"], {"P": "P"}),
        (["STS_0001"], ["STS"], {}),
        (["Mu\u0308ller"], ["M\u00fcller"], {"Mu\u0308ller": "M\u00fcller"}),
        (["M\u00fcller_0000"], ["Mu\u0308ller"], {"M\u00fcller_0000": "Mu\u0308ller"}),
    ],
)
def test_label_maps_are_paired_by_name(predictions, references, pairs):
    assert dict(pair_names(predictions, references)) == pairs


VALUES = [None, [], {}, 0, -1, 3, 1.5, 1e300, True, "", "x", "0", "a/b\\c", [None], [[]], {"a": {}},
          {"0": None}, {"image": 1}, ["x", {}], "\ud800", "\0", 10**30]  # fmt: skip


def mutated(value, draw: random.Random):
    """Replace one value or key, anywhere in it."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.15:
        return draw.choice(VALUES)
    places = list(value) if isinstance(value, dict) else range(len(value))
    place = draw.choice(list(places))
    changed = dict(value) if isinstance(value, dict) else list(value)
    kind = draw.random()
    if kind < 0.1:
        del changed[place]
    elif kind < 0.2 and isinstance(changed, dict):
        changed[str(draw.choice(VALUES))] = changed.pop(place)
    else:
        changed[place] = mutated(value[place], draw)
    return changed


def errors_of_mutations(root: Path, seeds) -> list[str]:
    of_files(root, ["a", "b_0000", "b_0001"], ["a", "b"], 2)
    entries = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in "ab"]
    names = {"0": "T1", "1": "T2"}
    wholes = [
        {"channel_names": names, "labels": {**LABELS, "ignore": 2}, "file_ending": ".nii.gz"},
        {"modality": names, "labels": {"0": "background", "1": "x"}, "training": entries},
        {"modality": names, "labels": LABELS, "dataset": {e["label"]: e for e in entries}},
    ]
    bad = []
    for seed in seeds:
        draw = random.Random(seed)
        content = draw.choice(wholes)
        for _ in range(draw.randint(1, 3)):
            content = mutated(content, draw)
        described(root, raw=json.dumps(content).encode())
        for read in (find_cases, read_dataset_info, lambda d: class_names(d / "dataset.json")):
            try:
                read(root)
            except (ValueError, FileNotFoundError) as error:
                if "dataset.json" not in str(error) and "imagesTr" not in str(error):
                    bad.append(f"{seed}: {error!r} of {content}")
            except Exception as error:
                bad.append(f"{seed}: {error!r} of {content}")
    return bad


def test_mutations_of_dataset_json_end_in_sentences(tmp_path):
    assert not errors_of_mutations(tmp_path, range(150))


@pytest.mark.exhaustive
def test_many_mutations_of_dataset_json_end_in_sentences(tmp_path):
    assert not errors_of_mutations(tmp_path, range(1000, 6000))


def test_names_that_are_no_utf_8_are_read_and_printed_with_escapes(tmp_path, capsys):
    pytest.importorskip("jsonargparse", reason="needs the extra 'train'")
    from unetrpp.cli import main

    name = "f\udce4ll.nii.gz"
    try:
        file = volume(tmp_path / "predictions" / name)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    volume(tmp_path / "labels" / name)
    described(tmp_path)
    out = tmp_path / "o\udce4"
    assert main(["evaluate", str(file), str(tmp_path / "labels" / name), "-o", str(out)]) == 0
    assert "scores in" in capsys.readouterr().out
    assert "f\\udce4ll,lesion" in (out / "scores.csv").read_text(encoding="utf-8")
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert Path(scores["files"]["f\udce4ll"]["prediction"]) == file
    (file.parent / name).write_bytes(b"")
    assert main(["evaluate", str(file), str(tmp_path / "labels" / name), "-o", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "f\\udce4ll.nii.gz" in printed
