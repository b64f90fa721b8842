"""Opening, checking and laying on one grid, on files as people have them and as they break."""

import gzip
import warnings
from itertools import permutations, product

import numpy as np
import pytest

nib = pytest.importorskip("nibabel", reason="needs the extra 'train'")

from unetrpp import memory, volumes  # noqa: E402
from unetrpp.volumes import (  # noqa: E402
    UnreadableImage,
    UnusableVolume,
    placed,
    read_grid,
    read_image,
    read_labels,
    write_labels,
)

SHAPE = (7, 6, 5)
AFFINE = np.array([[0.8, 0, 0, -20], [0, 1.0, 0.1, 30], [0, -0.1, 2.0, 5], [0, 0, 0, 1]])


def values(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def save(path, array, affine=AFFINE, kind=nib.Nifti1Image, **header):
    image = kind(array, affine, dtype=array.dtype)
    for name, value in header.items():
        image.header[name] = value
    path.write_bytes(
        gzip.compress(image.to_bytes()) if path.name.lower().endswith("gz") else image.to_bytes()
    )
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII", "A.NII.GZ", "a.Nii.Gz"])
def test_endings_count_in_small_and_large_letters(tmp_path, name):
    file = save(tmp_path / name, values())
    assert volumes.is_nifti(file) and volumes.case_name(file).lower() == "a"
    assert volumes.nifti_files(tmp_path) == [file]
    np.testing.assert_array_equal(read_image(file).values[..., 0], values())


def test_a_file_is_read_by_its_content_under_either_name(tmp_path):
    plain, packed = save(tmp_path / "a.nii", values()), save(tmp_path / "b.nii.gz", values())
    plain.rename(tmp_path / "c.nii.gz")
    packed.rename(tmp_path / "c.nii")
    for name in ("c.nii", "c.nii.gz"):
        np.testing.assert_array_equal(read_image(tmp_path / name).values[..., 0], values())


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((7, 6, 5), (7, 6, 5, 1)),
        ((7, 6, 5, 1), (7, 6, 5, 1)),
        ((7, 6, 5, 1, 1), (7, 6, 5, 1)),
        ((7, 6, 5, 3), (7, 6, 5, 3)),
        ((7, 6, 5, 3, 1), (7, 6, 5, 3)),
        ((7, 6, 5, 1, 3), (7, 6, 5, 3)),
        ((7, 6, 1, 1, 3), (7, 6, 1, 3)),
        ((1, 6, 5), (1, 6, 5, 1)),
    ],
)
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_axes_beyond_the_third_are_channels(tmp_path, shape, expected, ending):
    """(X, Y, Z, 1, C) is what ITK writes for several channels."""
    file = save(tmp_path / f"a.{ending}", values(shape))
    found = read_image(file)
    assert found.values.shape == expected and found.values.dtype == np.float32
    np.testing.assert_array_equal(found.values, values(shape).reshape(expected))
    assert read_grid(file).shape == found.grid.shape == expected[:3]


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4", "f8", "i8"])
def test_types_versions_and_byte_orders_are_read(tmp_path, kind, endian, dtype):
    array = np.abs(values()).astype(dtype)
    header = kind.header_class(endianness=endian)
    header.set_data_dtype(dtype)
    image = kind(array, AFFINE, header)
    file = tmp_path / "a.nii"
    file.write_bytes(image.to_bytes())
    found = read_image(file)
    assert found.values.dtype == np.dtype(np.float32)  # in this machine's byte order
    np.testing.assert_array_equal(found.values[..., 0], array.astype(np.float32))
    if dtype != "f4" and dtype != "f8":
        np.testing.assert_array_equal(read_labels(file).values, array)
    write_labels(tmp_path / "l.nii.gz", np.ones(SHAPE, np.uint8), file)
    assert isinstance(nib.load(tmp_path / "l.nii.gz"), kind)
    np.testing.assert_allclose(nib.load(tmp_path / "l.nii.gz").affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize(("slope", "inter", "scaled"), [
    (2.0, -1024.0, True), (np.nan, np.nan, False), (0.0, 0.0, False), (np.inf, 0.0, False),
])  # fmt: skip
def test_scale_of_a_header_counts_where_it_is_one(tmp_path, slope, inter, scaled):
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    raw = bytearray(nib.Nifti1Image(array, AFFINE).to_bytes())
    raw[112:120] = np.array([slope, inter], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    expected = array * slope + inter if scaled else array
    np.testing.assert_array_equal(read_image(tmp_path / "a.nii").values[..., 0], expected)


@pytest.mark.parametrize(("unit", "millimetres"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (5, 1)])
def test_units_of_the_header_are_honoured(tmp_path, unit, millimetres):
    file = save(tmp_path / "a.nii", values(), xyzt_units=unit | 8)  # and seconds
    scale = np.diag([millimetres] * 3 + [1.0])
    np.testing.assert_allclose(read_grid(file).affine, scale @ AFFINE, rtol=1e-6)


def test_the_affine_says_the_voxel_size_where_pixdim_differs(tmp_path):
    image = nib.Nifti1Image(values(), np.diag([0.5, 0.5, 2, 1]))
    image.header["qform_code"], image.header["pixdim"][1:4] = 0, 1
    (tmp_path / "a.nii").write_bytes(image.to_bytes())
    assert read_grid(tmp_path / "a.nii").spacing == (0.5, 0.5, 2)


# What is no usable volume, and a part of the reason that must be given.
def with_header(raw, **changes):
    header = nib.Nifti1Header(raw[:348], check=False)
    for name, value in changes.items():
        header[name] = value
    return header.binaryblock + raw[348:]


def zero_affine(raw):
    zero = dict.fromkeys(("srow_x", "srow_y", "srow_z"), 0)
    return with_header(raw, sform_code=1, **zero)


BROKEN = {
    "an empty file": (lambda raw: b"", "no NIfTI file"),
    "text": (lambda raw: b"hello" * 100, "no NIfTI file"),
    "no axis of length": (lambda raw: with_header(raw, dim=[3, 7, 6, 0, 1, 1, 1, 1]), "length 0"),
    "a negative axis": (lambda raw: with_header(raw, dim=[3, 7, -6, 5, 1, 1, 1, 1]), "length -6"),
    "two axes": (lambda raw: with_header(raw, dim=[2, 7, 6, 1, 1, 1, 1, 1]), "has 2 axes"),
    "six axes": (lambda raw: with_header(raw, dim=[5, 7, 1, 1, 3, 10, 1, 1]), "at most one more"),
    "a claim": (lambda raw: with_header(raw, dim=[3, 3000, 3000, 3000, 1, 1, 1, 1]), "cannot hold"),
    "a claim beyond": (lambda raw: with_header(raw, dim=[3, 7, 6, 6, 1, 1, 1, 1]), "cannot"),
    "a smaller claim": (lambda raw: with_header(raw, dim=[3, 7, 6, 4, 1, 1, 1, 1]), "bytes follow"),
    "a short file": (lambda raw: raw[:-40], "cannot"),
    "only a header": (lambda raw: raw[:348], "cannot"),
    "half a header": (lambda raw: raw[:200], "no NIfTI file"),
    "two files": (lambda raw: raw + raw, "bytes follow"),
    "an affine of zeros": (zero_affine, "singular affine"),
    "an affine with NaN": (lambda raw: with_header(raw, sform_code=1, srow_x=np.nan), "singular"),
    "a type that is none": (lambda raw: with_header(raw, datatype=77), "cannot be read"),
    "a pair's header": (lambda raw: with_header(raw, magic=b"ni1"), "pair .hdr and .img"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
@pytest.mark.parametrize("read", [read_image, read_labels])
def test_broken_files_are_named_with_the_reason(tmp_path, name, ending, read):
    change, reason = BROKEN[name]
    raw = change(nib.Nifti1Image(np.ones(SHAPE, np.int16), AFFINE).to_bytes())
    file = tmp_path / f"broken.{ending}"
    file.write_bytes(gzip.compress(raw) if ending == "nii.gz" else raw)
    with pytest.raises(UnusableVolume, match=f"broken.{ending} .*{reason}") as caught:
        read(file)
    assert caught.value.file == file


@pytest.mark.parametrize("dtype, word", [
    (np.complex64, "complex"), (np.complex128, "complex"),
    (np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]), "colour"),
    (np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1"), ("A", "u1")]), "colour"),
])  # fmt: skip
def test_voxels_of_several_numbers_are_refused_in_words(tmp_path, dtype, word):
    file = save(tmp_path / "a.nii.gz", np.zeros(SHAPE, dtype))
    for read in (read_grid, read_image, read_labels):
        with pytest.raises(UnusableVolume, match=f"holds {word}"):
            read(file)


def packed(size=(20, 18, 16)):
    return gzip.compress(nib.Nifti1Image(values(size), AFFINE).to_bytes(), mtime=0)


@pytest.mark.parametrize("place", [0, 1, 2, 12, 400, 0.3, 0.7, 0.999, -9, -8, -5, -4, -1])
@pytest.mark.parametrize("bit", [0, 5])
def test_a_flipped_bit_of_a_compressed_file_is_found(tmp_path, place, bit):
    raw = bytearray(packed())
    raw[int(place * len(raw)) if isinstance(place, float) else place] ^= 1 << bit
    (tmp_path / "a.nii.gz").write_bytes(raw)
    with pytest.raises(UnreadableImage, match=r"a.nii.gz cannot be read"):
        read_image(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("change", [
    lambda raw: raw[:-1], lambda raw: raw[:-8], lambda raw: raw[: len(raw) // 2],
    lambda raw: raw + b"garbage", lambda raw: raw + raw, lambda raw: raw + gzip.compress(b"more"),
])  # fmt: skip
def test_truncated_and_lengthened_compressed_files_are_refused(tmp_path, change):
    (tmp_path / "a.nii.gz").write_bytes(change(packed()))
    with pytest.raises(UnreadableImage, match=r"a.nii.gz cannot be read"):
        read_image(tmp_path / "a.nii.gz")


def test_members_that_make_one_volume_and_padding_are_no_fault(tmp_path):
    """Block compressors write several members, tapes pad with zeros."""
    raw = nib.Nifti1Image(values(), AFFINE).to_bytes()
    parts = b"".join(gzip.compress(raw[i : i + 100]) for i in range(0, len(raw), 100))
    for name, content in (
        ("members", parts),
        ("padded", gzip.compress(raw + bytes(600))),
        ("padded gzip", gzip.compress(raw) + bytes(512)),
    ):
        (tmp_path / f"{name}.nii.gz").write_bytes(content)
        found = read_image(tmp_path / f"{name}.nii.gz").values[..., 0]
        np.testing.assert_array_equal(found, values(), err_msg=name)


def test_a_volume_beyond_its_share_of_memory_is_named_before_it_is_read(tmp_path, monkeypatch):
    file = save(tmp_path / "a.nii.gz", values())
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(MemoryError, match=r"a.nii.gz with shape \(7, 6, 5\) would take 1.68 kB"):
        read_image(file)


def test_voxels_that_are_no_numbers_are_counted(tmp_path):
    broken = values().astype(np.float64)
    broken[0, 0, 0], broken[1, 1, 1], broken[2, 2, 2] = np.nan, -np.inf, 1e300
    with pytest.raises(UnusableVolume, match=r"a.nii holds 3 NaN or infinite voxels"):
        read_image(save(tmp_path / "a.nii", broken))


@pytest.mark.parametrize("stored", [0.9999999997, 1.0009, 0.9991, 1.0])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_label_values_near_a_whole_number_are_that_number(tmp_path, stored, dtype):
    found = read_labels(save(tmp_path / "l.nii.gz", np.full(SHAPE, stored, dtype))).values
    assert found.dtype == np.uint8 and (found == 1).all()


@pytest.mark.parametrize(("value", "reason"), [
    (1.5, "1.5, which is no whole number"), (0.998, "no whole number"),
    (np.nan, "nan"), (np.inf, "inf"), (-1, "-1, which is negative"),
    (65_536, "65536, which is above 65,535"), (1e20, "which is above"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["f8", "i4"])
def test_other_label_values_are_refused_by_value(tmp_path, value, reason, dtype):
    if value not in (-1, 65_536):
        dtype = "f8"
    array = np.zeros(SHAPE, dtype)
    array[3, 2, 1] = value
    with pytest.raises(UnusableVolume, match=f"l.nii.gz holds the label value .*{reason}"):
        read_labels(save(tmp_path / "l.nii.gz", array))


@pytest.mark.parametrize("dtype", ["u2", "i4", "i8", "f4", "f8"])
@pytest.mark.parametrize("largest", [255, 256, 300, 32_768, 65_535])
def test_label_values_up_to_65535_are_kept(tmp_path, dtype, largest):
    array = np.zeros(SHAPE, dtype)
    array[3, 2, 1] = largest
    found = read_labels(save(tmp_path / "l.nii.gz", array)).values
    assert found.dtype == (np.uint8 if largest == 255 else np.uint16)
    assert found[3, 2, 1] == found.max() == largest


def test_labels_drop_trailing_axes_of_length_one_and_take_no_other(tmp_path):
    array = np.arange(np.prod(SHAPE), dtype=np.uint8).reshape(SHAPE)
    for tail in ((1,), (1, 1)):
        file = save(tmp_path / "l.nii.gz", array.reshape(*SHAPE, *tail))
        np.testing.assert_array_equal(read_labels(file).values, array)
    with pytest.raises(UnusableVolume, match="l.nii.gz has 2 channels, and a label map has one"):
        read_labels(save(tmp_path / "l.nii.gz", np.stack([array, array], -1)))


def stored_otherwise(array, affine, order, flips):
    """The same voxels at the same places, in another order of axes and directions."""
    turn = np.array(list(zip(np.argsort(order), np.array(flips)[list(np.argsort(order))],
                             strict=True)))  # fmt: skip
    turned = nib.orientations.apply_orientation(array, turn)
    return turned, affine @ nib.orientations.inv_ornt_aff(turn, array.shape[:3])


@pytest.mark.parametrize("flips", list(product((1, -1), repeat=3)))
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_flipped_and_permuted_volumes_are_turned_onto_the_grid(tmp_path, order, flips):
    image = read_image(save(tmp_path / "i.nii.gz", values()))
    for array, read in ((np.uint8(values() > 100), read_labels), (values((*SHAPE, 2)), read_image)):
        other = read(save(tmp_path / "o.nii.gz", *stored_otherwise(array, AFFINE, order, flips)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = placed(other, image, check_affine=True)
        np.testing.assert_array_equal(found.values, array)
        assert found.grid is image.grid


def moved(by=(0, 0, 0), turn=0.0, scale=1.0, flip=False):
    affine = AFFINE.copy()
    affine[:3, 3] += by
    angle = np.deg2rad(turn)
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine = rotation @ affine
    affine[:3, :3] *= scale
    if flip:
        affine = affine @ nib.orientations.inv_ornt_aff([[0, -1], [1, 1], [2, 1]], SHAPE)
    return affine


@pytest.mark.parametrize(("affine", "words"), [
    (moved((3, 0, 4)), "lies up to 5 mm away"), (moved((0, 0.5, 0)), "lies up to 0.5 mm away"),
    (moved((300, 0, 0)), "lies up to 300 mm away"), (moved(turn=4), "mm away"),
    (moved((0.5, 0, 0), flip=True), "lies up to 0.5 mm away"),
])  # fmt: skip
def test_grids_that_lie_elsewhere_are_used_with_one_warning(tmp_path, affine, words):
    image = read_image(save(tmp_path / "i.nii.gz", values()))
    array = np.uint8(values() > 100)
    if np.linalg.det(affine) * np.linalg.det(AFFINE) < 0:
        array = array[::-1]
    label = read_labels(save(tmp_path / "l.nii.gz", array, affine))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            found = placed(label, image)
    assert len(caught) == 1
    assert f"l.nii.gz {words}" in str(caught[0].message) or words in str(caught[0].message)
    np.testing.assert_array_equal(found.values, np.uint8(values() > 100))
    with pytest.raises(UnusableVolume, match="l.nii.gz lies up to .*--check_affine"):
        placed(label, image, check_affine=True)


@pytest.mark.parametrize("check_affine", [False, True])
@pytest.mark.parametrize(("affine", "shape", "words"), [
    (AFFINE, (7, 6, 4), r"has shape \(7, 6, 4\), but .*i.nii.gz has \(7, 6, 5\)"),
    (moved(scale=2), SHAPE, "has voxels of"), (moved(scale=1.02), SHAPE, "has voxels of"),
    (np.eye(4), SHAPE, "has voxels of 1x1x1 mm"),
    (moved((5, 0, 0), flip=True), SHAPE, "has its axes in another order or direction"),
    (AFFINE[:, [1, 0, 2, 3]], SHAPE, "has shape .* with its axes in another order"),
])  # fmt: skip
def test_other_shapes_voxel_sizes_and_boxes_are_refused(
    tmp_path, affine, shape, words, check_affine
):
    image = read_image(save(tmp_path / "i.nii.gz", values()))
    label = read_labels(save(tmp_path / "l.nii.gz", np.zeros(shape, np.uint8), affine))
    with pytest.raises(UnusableVolume, match=f"l.nii.gz {words}"):
        placed(label, image, check_affine)


@pytest.mark.parametrize("of_image, of_label, warned", [(3, 0, 0), (1, 0, 0), (3, 2, 1), (0, 2, 0)])
def test_a_label_with_the_numbers_of_its_image_and_another_unit_is_used(
    tmp_path, of_image, of_label, warned
):
    """nib.Nifti1Image(label, image.affine) keeps the numbers and loses the unit."""
    image = read_image(save(tmp_path / "i.nii.gz", values(), xyzt_units=of_image))
    array = np.uint8(values() > 100)
    label = read_labels(save(tmp_path / "l.nii.gz", array, xyzt_units=of_label))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(placed(label, image).values, array)
    assert len(caught) == warned


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "NII.GZ"])
@pytest.mark.parametrize("shape", [SHAPE, (*SHAPE, 2), (*SHAPE, 1, 3)])
def test_a_label_map_has_the_geometry_of_its_source(tmp_path, ending, shape):
    image = nib.Nifti1Image(values(shape), AFFINE)
    image.set_qform(AFFINE, 1, strip_shears=True)
    image.header["xyzt_units"], image.header["cal_max"] = 3, 9
    source = tmp_path / f"a.{ending}"
    raw = bytearray(image.to_bytes())
    raw[112:120] = np.array([2, 1], "<f4").tobytes()  # slope and intercept
    source.write_bytes(gzip.compress(raw) if ending.lower().endswith("gz") else raw)
    labels = np.uint16(values() > 100) * 300
    write_labels(tmp_path / "out" / "a.nii.gz", labels, source)
    found = nib.load(tmp_path / "out" / "a.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(found.dataobj), labels)
    assert found.get_data_dtype() == np.uint16 and found.header["cal_max"] == 0
    before = nib.Nifti1Header(raw[:348])
    for entry in ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "quatern_b",
                  "quatern_c", "quatern_d", "qoffset_x", "xyzt_units"):  # fmt: skip
        assert found.header[entry].tobytes() == before[entry].tobytes(), entry
    assert read_grid(tmp_path / "out/a.nii.gz").spacing == read_grid(source).spacing
