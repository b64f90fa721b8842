"""Reading, checking, preprocessing and sampling of labelled volumes, on small synthetic files."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

nibabel = pytest.importorskip("nibabel", reason="needs the extra 'train'")
pytest.importorskip("monai", reason="needs the extra 'train'")

from unetrpp import dataset, dataset_json, memory  # noqa: E402
from unetrpp import preprocessing as volumes  # noqa: E402
from unetrpp.dataset import Case  # noqa: E402
from unetrpp.plan import _spacing  # noqa: E402
from unetrpp.preprocessing import Preprocessing  # noqa: E402
from unetrpp.sampling import AUGMENTATIONS, TrainingPatches, train_transforms  # noqa: E402

LABELS = {"background": 0, "lesion": 1}


def save(path: Path, array: np.ndarray, affine=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def preprocessing(**changes) -> Preprocessing:
    values = {
        "channels": ["MRI"],
        "normalization": ["zscore"],
        "intensity": [None],
        "spacing": None,
        "patch_size": [8, 8, 8],
        "labels": LABELS,
        **changes,
    }
    return Preprocessing(**values)


def image_of(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


@pytest.fixture
def case(tmp_path) -> Case:
    image = image_of((11, 12, 13))
    label = np.zeros((11, 12, 13), np.uint8)
    label[2:6, 3:8, 4:9] = 1
    return Case("a", (save(tmp_path / "a.nii.gz", image),), save(tmp_path / "a_l.nii.gz", label))


def test_decathlon_and_nnunet_folders_list_the_same_cases(tmp_path):
    for layout in ("decathlon", "nnunet"):
        root = tmp_path / layout
        suffix = "_0000" if layout == "nnunet" else ""
        for name in ("b", "a"):
            save(root / f"imagesTr/{name}{suffix}.nii.gz", image_of((8, 8, 8)))
            save(root / f"labelsTr/{name}.nii.gz", np.ones((8, 8, 8), np.uint8))
        if layout == "decathlon":
            content = {
                "modality": {"0": "MRI"},
                "labels": {"0": "background", "1": "lesion"},
                "training": [
                    {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"}
                    for n in ("b", "a")
                ],
            }
        else:
            content = {"channel_names": {"0": "MRI"}, "labels": LABELS, "file_ending": ".nii.gz"}
        (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
        info = dataset.read_dataset_info(root)
        assert (info.channels, info.labels) == (["MRI"], LABELS)
        cases = dataset.find_cases(root)
        assert [case.name for case in cases] == ["a", "b"]
        assert all(case.label.exists() and len(case.images) == 1 for case in cases)


def test_nnunet_channels_are_grouped_in_order(tmp_path):
    for name in ("x_2021_0001", "x_2021_0000"):
        save(tmp_path / f"imagesTr/{name}.nii.gz", image_of((8, 8, 8)))
    save(tmp_path / "labelsTr/x_2021.nii.gz", np.ones((8, 8, 8), np.uint8))
    content = {"channel_names": {"0": "T1", "1": "T2"}, "labels": LABELS, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    (found,) = dataset.find_cases(tmp_path)
    assert found.name == "x_2021"
    assert [path.name[-8] for path in found.images] == ["0", "1"]
    item = volumes.load_case(
        found,
        preprocessing(channels=["T1", "T2"], normalization=["zscore"] * 2, intensity=[None] * 2),
    )
    assert item["image"].shape == (2, 8, 8, 8)
    # RAS file, SPL array.
    assert item["image"].affine[2, 0] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": LABELS}, "names no channels"),
        ({"channel_names": {"0": "MRI"}, "labels": {"background": 0, "b": 2}}, "without gaps"),
        ({"channel_names": {"0": "MRI"}, "labels": {"background": 0, "b": [1, 2]}}, "one integer"),
    ],
)
def test_bad_dataset_json_is_explained(tmp_path, content, message):
    (tmp_path / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        dataset.read_dataset_info(tmp_path)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"background": 0, "liver": 1, "both": [1, 2]}, {"liver": 1, "both": [1, 2]}),
        ({"0": "background", "1": "liver"}, {"liver": 1}),
        ({"0": "background", "1": "2"}, {"2": 1}),
        ({"0": 0, "1": 1}, {"1": 1}),
        ({"liver": "1", "background": "0"}, {"liver": 1}),
    ],
)
def test_labels_have_one_reader(tmp_path, labels, expected):
    """Training and scoring read the same classes from one dataset.json."""
    content = {"labels": labels, "channel_names": {"0": "MR"}}
    (tmp_path / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    assert dataset_json.class_names(tmp_path / "dataset.json") == expected
    if "both" not in labels:
        found = dataset.read_dataset_info(tmp_path).labels
        assert {name: value for name, value in found.items() if value} == expected


def test_class_names_of_a_bad_file_are_explained(tmp_path):
    for text in ("", "{}", "[]", '{"labels": 3}', '{"labels": {"liver": "one"}, "b": 1}'):
        (tmp_path / "names.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="names.json must be a JSON file with 'labels'"):
            dataset_json.class_names(tmp_path / "names.json")
    with pytest.raises(ValueError, match="gave FileNotFoundError"):
        dataset_json.class_names(tmp_path / "nowhere.json")


def listed(root: Path, *images: str) -> Path:
    """dataset.json of two channels that lists the images, all with one label map."""
    save(root / "labelsTr/l.nii.gz", np.ones((8, 8, 8), np.uint8))
    content = {
        "modality": {"0": "T1", "1": "T2"},
        "labels": {"0": "background", "1": "lesion"},
        "training": [{"image": image, "label": "labelsTr/l.nii.gz"} for image in images],
    }
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def test_two_cases_of_one_name_are_refused(tmp_path):
    names = [f"imagesTr/{folder}/t1.nii.gz" for folder in "ab"]
    for name in names:
        save(tmp_path / name, image_of((8, 8, 8)))
    with pytest.raises(ValueError, match=r"named t1: .*a/t1.nii.gz and .*b/t1.nii.gz; .*rename"):
        dataset.find_cases(listed(tmp_path, *names))


def test_nnunet_v1_lists_names_without_channel_numbers(tmp_path):
    for name in ("la_003_0000", "la_003_0001", "la_0031_0000"):
        save(tmp_path / f"imagesTr/{name}.nii.gz", image_of((8, 8, 8)))
    (case,) = dataset.find_cases(listed(tmp_path, "./imagesTr/la_003.nii.gz"))
    assert case.name == "la_003"
    assert [path.name for path in case.images] == ["la_003_0000.nii.gz", "la_003_0001.nii.gz"]
    with pytest.raises(FileNotFoundError, match="la_004.nii.gz"):
        dataset.find_cases(listed(tmp_path, "imagesTr/la_004.nii.gz"))


def test_tiny_voxels_are_not_singular(tmp_path):
    path = save(tmp_path / "t.nii.gz", image_of((8, 8, 8)), np.diag([5e-4, 5e-4, 5e-4, 1]))
    assert volumes.load_case(Case("t", (path,)), preprocessing())["image"].shape == (1, 8, 8, 8)


def test_missing_dataset_json_shows_the_smallest_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="smallest dataset.json"):
        dataset.find_cases(tmp_path)


def test_unusable_files_are_named_with_the_reason(case, tmp_path):
    whole = case.images[0].read_bytes()
    truncated = tmp_path / "truncated.nii.gz"
    truncated.write_bytes(whole[: len(whole) // 2])
    broken = image_of((11, 12, 13))
    broken[0, 0, 0] = np.nan
    nan = save(tmp_path / "nan.nii.gz", broken)
    two = save(tmp_path / "two.nii.gz", np.stack([image_of((11, 12, 13))] * 2, -1))
    lowest = image_of((11, 12, 13))
    lowest[0] = np.finfo(np.float32).min
    lowest = save(tmp_path / "lowest.nii.gz", lowest)
    large = save(tmp_path / "large.nii.gz", image_of((11, 12, 13)).astype(np.float64) * 1e300)
    short = save(tmp_path / "short.nii.gz", np.zeros((11, 12, 12), np.uint8))
    seven = save(tmp_path / "seven.nii.gz", np.full((11, 12, 13), 7, np.uint8))
    good = case.images[0]
    for images, label, error, message in [
        (truncated, None, volumes.UnreadableImage, "truncated.nii.gz cannot be read"),
        (nan, None, ValueError, "nan.nii.gz holds 1 NaN"),
        (lowest, None, ValueError, "lowest.nii.gz holds intensities from -3.4e.38 to"),
        (large, None, ValueError, "large.nii.gz holds .* voxels beyond 3.4e38, too large"),
        (two, None, ValueError, r"two.nii.gz has 2 channel\(s\), need 1: MRI"),
        (tmp_path / "none.nii.gz", None, FileNotFoundError, "none.nii.gz does not exist"),
        (good, short, ValueError, "short.nii.gz has shape"),
        (good, seven, ValueError, r"seven.nii.gz holds label value\(s\) \[7"),
    ]:
        with pytest.raises(error, match=message):
            volumes.load_case(Case("x", (images,), label), preprocessing())


def test_volumes_are_turned_to_slices_first_and_back(tmp_path):
    # Stored (left, posterior, superior): the same head as the (right, anterior, superior) file.
    image = image_of((6, 7, 5))
    ras = save(tmp_path / "ras.nii.gz", image, np.diag([1.5, 2.0, 3.0, 1.0]))
    flipped = np.diag([-1.5, -2.0, 3.0, 1.0])
    flipped[:2, 3] = [1.5 * 5, 2.0 * 6]
    lps = save(tmp_path / "lps.nii.gz", image[::-1, ::-1].copy(), flipped)
    turned = [
        volumes.load_case(Case("a", (path,)), preprocessing())["image"] for path in (ras, lps)
    ]
    assert turned[0].shape == (1, 5, 7, 6)
    assert torch.equal(turned[0].as_tensor(), turned[1].as_tensor())
    expected = image[::-1, ::-1].transpose(2, 1, 0)
    expected = (expected - expected.mean()) / expected.std()
    np.testing.assert_allclose(turned[0].as_tensor()[0], expected, atol=1e-5)
    assert volumes.volume_geometry(Case("a", (lps,))) == ([5, 7, 6], [3.0, 2.0, 1.5])

    transforms = volumes.inference_transforms(preprocessing(spacing=[2.0, 2.0, 2.0]))
    item = volumes.load_case(Case("a", (lps,)), preprocessing(), transforms)
    assert item["image"].shape[1] > 5
    back = transforms.inverse({"image": item["image"]})["image"]
    assert back.shape == (1, 6, 7, 5)
    np.testing.assert_allclose(back.affine, flipped, atol=1e-4)


def test_only_volumes_of_another_spacing_are_resampled_and_all_lead_back(tmp_path):
    image = image_of((12, 14, 10))
    for size, resampled in ((1.0, False), (1.005, False), (0.5, True)):
        affine = np.diag([size, size, size, 1.0])
        path = save(tmp_path / f"{size}.nii.gz", image, affine)
        label = save(tmp_path / "l.nii.gz", (image > 100).astype(np.uint8), affine)
        case = Case("a", (path,), label)
        plain = volumes.load_case(case, preprocessing())
        plan = preprocessing(spacing=[1.0, 1.0, 1.0])
        transforms = volumes.inference_transforms(plan)
        item = volumes.load_case(case, plan, transforms)
        for key in ("image", "label"):
            if resampled:
                assert item[key].shape == (1, 6, 8, 6)
            else:
                assert torch.equal(item[key].as_tensor(), plain[key].as_tensor())
        back = transforms.inverse({"image": item["image"]})["image"]
        assert back.shape == (1, 12, 14, 10)
        np.testing.assert_allclose(back.affine, np.diag([size, size, size, 1.0]), atol=1e-6)


def test_ct_is_clipped_and_scaled_with_training_statistics(case):
    measured = volumes.foreground_intensity([case], preprocessing())
    inside = nibabel.load(case.images[0]).get_fdata()[nibabel.load(case.label).get_fdata() > 0]
    # Drawn with replacement from 100 voxels, so the statistics are close, not equal.
    assert measured[0]["mean"] == pytest.approx(inside.mean(), abs=1.0)
    assert measured[0]["lower"] == pytest.approx(np.percentile(inside, 0.5), abs=3.0)
    ct = preprocessing(channels=["CT"], normalization=["ct"], intensity=measured)
    image = volumes.load_case(case, ct)["image"].as_tensor()
    low, mean, std = (measured[0][key] for key in ("lower", "mean", "std"))
    assert image.min().item() == pytest.approx((low - mean) / std, abs=1e-4)


def test_zero_background_stays_out_of_the_statistics(tmp_path):
    image = np.zeros((10, 10, 10), np.float32)
    image[:5, :5] = image_of((5, 5, 10))
    path = save(tmp_path / "stripped.nii.gz", image)
    out = volumes.load_case(Case("a", (path,)), preprocessing())["image"].as_tensor()
    inside = out[out != 0]
    assert inside.numel() == 250
    assert inside.mean().abs() < 1e-5 and (inside.std(correction=0) - 1).abs() < 1e-5


def test_differing_label_affine_warns_and_keeps_the_grid(case, tmp_path):
    label = nibabel.load(case.label).get_fdata().astype(np.uint8)
    shifted = np.eye(4)
    shifted[:3, 3] = 3, 0, 4
    moved = save(tmp_path / "moved.nii.gz", label, shifted)
    with pytest.warns(UserWarning, match=r"moved.nii.gz lies up to 5 mm away .*a.nii.gz"):
        item = volumes.load_case(Case("a", case.images, moved), preprocessing())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference = volumes.load_case(case, preprocessing())
    assert torch.equal(item["label"].as_tensor(), reference["label"].as_tensor())


def test_channels_and_labels_in_another_order_lie_on_the_first_channel(tmp_path):
    first, second = image_of((6, 7, 5)), image_of((6, 7, 5), 1)
    affine = np.diag([1.5, 2.0, 3.0, 1.0])
    flipped = np.diag([-1.5, -2.0, 3.0, 1.0])
    flipped[:2, 3] = [1.5 * 5, 2.0 * 6]
    names = [save(tmp_path / "a_0000.nii.gz", first, affine)]
    label = np.uint8(first > 110)
    plan = preprocessing(channels=["A", "B"], normalization=["zscore"] * 2, intensity=[None] * 2)

    def load(turn, to):
        files = (*names, save(tmp_path / "a_0001.nii.gz", turn(second), to))
        truth = save(tmp_path / "l.nii.gz", turn(label), to)
        return volumes.load_case(Case("a", files, truth), plan)

    expected = load(lambda x: x, affine)
    for turn, to in (
        (lambda x: x[::-1, ::-1].copy(), flipped),
        (lambda x: x.transpose(2, 0, 1).copy(), affine[:, [2, 0, 1, 3]]),
    ):
        found = load(turn, to)
        for key in ("image", "label"):
            assert torch.equal(found[key].as_tensor(), expected[key].as_tensor())

    shifted = affine.copy()
    shifted[0, 3] = 2
    files = (*names, save(tmp_path / "s_0001.nii.gz", second, shifted))
    with pytest.warns(UserWarning, match=r"s_0001.nii.gz lies up to 2 mm away"):
        volumes.load_case(Case("a", files), plan)
    strict = volumes.inference_transforms(plan, check_affine=True)
    with pytest.raises(ValueError, match=r"s_0001.nii.gz lies up to 2 mm away"):
        volumes.load_case(Case("a", files), plan, strict)


def test_channels_as_itk_writes_them(tmp_path):
    both = np.stack([image_of((6, 7, 5)), image_of((6, 7, 5), 1)], -1)
    plan = preprocessing(channels=["A", "B"], normalization=["zscore"] * 2, intensity=[None] * 2)
    found = [
        volumes.load_case(Case("a", (save(tmp_path / f"{name}.nii.gz", array),)), plan)["image"]
        for name, array in (("usual", both), ("itk", both[:, :, :, None]))
    ]
    assert torch.equal(found[0].as_tensor(), found[1].as_tensor())


def test_plan_and_loader_take_one_voxel_size_for_true(tmp_path):
    """An sform of 0.5 mm beside pixdim 1 made 20^3 voxels 39^3."""
    image = nibabel.Nifti1Image(image_of((20, 20, 20)), np.diag([0.5, 0.5, 0.5, 1]))
    image.header["qform_code"], image.header["pixdim"][1:4] = 0, 1
    (tmp_path / "a.nii").write_bytes(image.to_bytes())
    case = Case("a", (tmp_path / "a.nii",))
    _, spacing = volumes.volume_geometry(case)
    item = volumes.load_case(case, preprocessing(spacing=spacing))["image"]
    assert spacing == [0.5] * 3 == item.pixdim.tolist()
    assert item.shape == (1, 20, 20, 20)


def test_a_voxel_size_that_cannot_be_meant_is_named(tmp_path, monkeypatch):
    plan = preprocessing(spacing=[1.0, 1.0, 1.0])
    for name, size in (("metres", 0.001), ("microns", 1000.0)):
        file = save(tmp_path / f"{name}.nii.gz", image_of((8, 8, 8)), np.diag([size] * 3 + [1]))
        with pytest.raises(ValueError, match=f"{name}.nii.gz has voxels of .* unit in the header"):
            volumes.load_case(Case("a", (file,)), plan)
    file = save(tmp_path / "thick.nii.gz", image_of((8, 8, 8)), np.diag([50.0, 50, 50, 1]))
    monkeypatch.setattr(memory, "free_memory", lambda: 10**9)
    with pytest.raises(MemoryError, match="thick.nii.gz: resampled to 64,000,000 voxels .* 3.58 G"):
        volumes.load_case(Case("a", (file,)), plan)


def test_more_than_256_classes_do_not_wrap(tmp_path):
    label = np.zeros((8, 8, 8), np.uint16)
    label[:4], label[4:] = 1, 300
    names = {"background": 0, **{f"class {value}": value for value in range(1, 301)}}
    case = Case(
        "a",
        (save(tmp_path / "i.nii.gz", image_of((8, 8, 8))),),
        save(tmp_path / "l.nii.gz", label),
    )
    sample = patches(case, "none", mirror=False, labels=names)[0]
    assert sample["label"].unique().tolist() == [1, 300]


def test_split_is_disjoint_complete_and_repeatable():
    cases = [Case(f"c{i:02d}", (Path("x"),)) for i in range(13)]
    held_out = []
    for fold in range(5):
        training, validation = dataset.split_cases(cases, fold)
        assert (training, validation) == dataset.split_cases(cases, fold)
        assert sorted(c.name for c in training + validation) == [c.name for c in cases]
        held_out += [c.name for c in validation]
    assert sorted(held_out) == [c.name for c in cases]
    training, validation = dataset.split_cases(cases[:2], 4)
    assert len(training) == len(validation) == 1
    with pytest.raises(ValueError, match="fold must lie in 0..4"):
        dataset.split_cases(cases, 5)


def patches(case, augmentation, *, mirror=True, **changes):
    plan = preprocessing(**changes)
    transforms = train_transforms(plan, augmentation, mirror=mirror)
    return TrainingPatches([case, case], transforms, batch_size=3, seed=5, foreground=1 / 3)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_a_sample_is_a_function_of_its_number(case, augmentation):
    first, second = patches(case, augmentation), patches(case, augmentation)
    # Backwards and alone, as after a resume.
    later = [second[i] for i in (6, 3)]
    earlier = [first[i] for i in range(7)]
    for a, b in ((later[0], earlier[6]), (later[1], earlier[3])):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
    # Not all 7: what segformer3d cuts out of so small a patch can be all of it.
    assert len({sample["image"].numpy().tobytes() for sample in earlier}) > 3
    assert type(earlier[0]["image"]) is torch.Tensor


def test_small_volumes_are_padded_equally_and_labels_stay_aligned(case):
    sample = patches(case, "none", patch_size=[16, 16, 16])[0]
    whole = volumes.load_case(case, preprocessing())
    assert sample["image"].shape == (1, 16, 16, 16)
    shape = whole["image"].shape[1:]
    inner = tuple(slice((16 - s) // 2, (16 - s) // 2 + s) for s in shape)
    for key in ("image", "label"):
        assert torch.equal(sample[key][0][inner], whole[key].as_tensor()[0].float())
        assert sample[key].abs().sum() == pytest.approx(sample[key][0][inner].abs().sum().item())


def test_forced_samples_hold_foreground(tmp_path):
    # One labelled voxel in 40^3: a random 8^3 patch misses it 99 times in 100.
    label = np.zeros((40, 40, 40), np.uint8)
    label[39, 0, 20] = 1
    lonely = Case(
        "a",
        (save(tmp_path / "i.nii.gz", image_of((40, 40, 40))),),
        save(tmp_path / "l.nii.gz", label),
    )
    samples = patches(lonely, "none")
    held = [bool(samples[i]["label"].any()) for i in range(12)]
    assert all(held[2::3])
    assert sum(held) <= 5


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_the_share_of_forced_samples_is_the_wanted_one(case, batch_size, monkeypatch):
    transforms = train_transforms(preprocessing(), "none")
    samples = TrainingPatches([case], transforms, batch_size=batch_size, seed=5, foreground=0.33)

    class Seen:
        def set_random_state(self, seed):
            return lambda item: item["forced"]

    monkeypatch.setattr(samples, "random_part", Seen())
    count = 1200 // batch_size * batch_size
    forced = np.array([samples[i] for i in range(count)])
    assert abs(forced.mean() - 0.33) < 0.04
    assert forced.tolist() == [samples[i] for i in range(count)]
    always, sometimes = divmod(batch_size * 0.33, 1)
    by_place = forced.reshape(-1, batch_size).mean(0)[::-1]
    assert (by_place[: int(always)] == 1).all() and (by_place[int(always) + 1 :] == 0).all()
    assert abs(by_place[int(always)] - sometimes) < 0.1


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_augmentation_keeps_label_values_and_size(case, augmentation):
    samples = patches(case, augmentation, patch_size=[8, 16, 8])
    for index in range(10):
        sample = samples[index]
        assert sample["image"].shape == sample["label"].shape == (1, 8, 16, 8)
        assert set(sample["label"].unique().tolist()) <= {0.0, 1.0}
        assert torch.isfinite(sample["image"]).all()


def test_slim_unetr_scales_and_shifts_intensities_and_nothing_else(case):
    plain, changed = (patches(case, name, mirror=False) for name in ("none", "slim_unetr"))
    scales, shifts = [], []
    for index in range(12):
        before, after = plain[index], changed[index]
        assert torch.equal(before["label"], after["label"])
        x, y = before["image"].double().flatten(), after["image"].double().flatten()
        scale = (x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()
        shift = y.mean() - scale * x.mean()
        torch.testing.assert_close(scale * x + shift, y, atol=1e-5, rtol=0)
        scales.append(scale.item() - 1)
        shifts.append(shift.item())
    for values in (scales, shifts):
        assert 0.05 < max(map(abs, values)) < 0.1 + 1e-5 and min(values) < 0 < max(values)


def test_segformer3d_cuts_blocks_out_of_image_and_label(case):
    plain, changed = (patches(case, name) for name in ("none", "segformer3d"))
    lost = []
    for index in range(12):
        before, after = plain[index], changed[index]
        lost.append((before["label"].sum() - after["label"].sum()).item())
    assert max(lost) > 0, "no label was ever cut"


def test_preprocessing_survives_json_and_refuses_other_entries():
    values = preprocessing()
    assert Preprocessing.from_dict(json.loads(json.dumps(values.to_dict()))) == values
    with pytest.raises(ValueError, match="unknown"):
        Preprocessing.from_dict({**values.to_dict(), "extra": 1})


def sparse(tmp_path, *, ignored=2, modality="MRI") -> Path:
    """Write a data set in which all is ignored, except one slab with one labelled block."""
    root = tmp_path / "sparse"
    for name in "ab":
        label = np.full((20, 20, 20), ignored, np.uint8)
        label[8:12] = 0
        label[9:11, 4:8, 4:8] = 1
        image = image_of((20, 20, 20), seed=ord(name))
        image[label == ignored] = 5000
        save(root / f"imagesTr/{name}_0000.nii.gz", image)
        save(root / f"labelsTr/{name}.nii.gz", label)
    labels = {**LABELS, "ignore": ignored}
    content = {"channel_names": {"0": modality}, "labels": labels}
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return root


@pytest.mark.parametrize("ignored", [2, 255])
def test_ignored_voxels_are_no_class_of_the_plan_and_out_of_its_statistics(tmp_path, ignored):
    from unetrpp.plan import Plan, propose

    root = sparse(tmp_path, ignored=ignored, modality="CT")
    plan = propose(dataset.find_cases(root), dataset.read_dataset_info(root), on_gpu=False)
    assert plan.model["out_channels"] == 2
    assert plan.preprocessing.labels == LABELS and plan.preprocessing.ignore == ignored
    assert plan.preprocessing.named_labels == {**LABELS, "ignore": ignored}
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.preprocessing.intensity[0]["upper"] < 300
    assert any(f"label {ignored}, ignore: left out" in reason for reason in plan.reasons)
    item = volumes.load_case(dataset.find_cases(root)[0], plan.preprocessing)
    assert item["label"].unique().tolist() == [-1, 0, 1]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_patches_keep_ignored_voxels_and_are_centred_on_others(tmp_path, augmentation):
    case = dataset.find_cases(sparse(tmp_path))[0]
    samples = patches(case, augmentation, patch_size=[8, 8, 4], ignore=2)
    seen = [samples[index]["label"] for index in range(30)]
    assert set(torch.cat(seen).unique().tolist()) == {-1.0, 0.0, 1.0}
    # A patch anywhere would meet the slab 7 times in 17.
    assert sum(bool((label >= 0).any()) for label in seen) >= 28
    forced = seen[2::3]
    assert sum(bool((label == 1).any()) for label in forced) >= 0.5 * len(forced)


def test_what_lies_outside_the_volume_is_background(tmp_path):
    case = dataset.find_cases(sparse(tmp_path))[0]
    label = patches(case, "none", patch_size=[24, 24, 24], ignore=2)[0]["label"][0]
    assert (label[:2] == 0).all() and (label[-2:] == 0).all() and (label[2, 2:-2, 2] == -1).all()


@pytest.mark.parametrize("modality", ["MRI", "CT"])
@pytest.mark.parametrize("value", [0, 2])
def test_data_without_a_labelled_voxel_are_refused_before_training(tmp_path, modality, value):
    from unetrpp.plan import propose

    root = sparse(tmp_path, modality=modality)
    for file in (root / "labelsTr").iterdir():
        save(file, np.full((20, 20, 20), value, np.uint8))
    with pytest.raises(ValueError, match=r"no labelled voxel .* all 2 label maps, .*a\.nii\.gz"):
        propose(dataset.find_cases(root), dataset.read_dataset_info(root), on_gpu=False)


def test_one_labelled_case_among_many_is_found_for_ct(tmp_path):
    (labelled, _) = dataset.find_cases(sparse(tmp_path))
    empty = save(tmp_path / "empty.nii.gz", np.zeros((20, 20, 20), np.uint8))
    cases = [Case("e", labelled.images, empty), labelled, Case("f", labelled.images, empty)]
    plan = preprocessing(ignore=2)
    assert volumes.foreground_intensity(cases, plan, 2)[0]["mean"] == pytest.approx(100, abs=15)


def test_checkpoints_from_before_the_ignore_label_are_read():
    values = preprocessing().to_dict()
    assert "ignore" not in values
    assert Preprocessing.from_dict(values) == preprocessing()


def test_voxel_sizes_of_a_microscope_are_said(tmp_path):
    _, reason = _spacing(np.full((3, 3), 0.0005), None)
    assert "0.0005x0.0005x0.0005 mm" in reason
