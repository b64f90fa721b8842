"""NIfTI volumes: found by name, opened, checked and laid on one grid; images and labels alike.

  is_nifti, nifti_files, case_name   which files are volumes, and what a case is called
  read_grid      header -> Grid: shape, affine in mm
  read_image     file -> Volume, (X, Y, Z, C) float32, finite
  read_labels    file -> Volume, (X, Y, Z) integers: the one reader of labels
  placed         volume -> the grid of another one: the one rule of geometry
  write_labels   label map -> file with the geometry of another file

Where things lie follows nibabel's affine alone; pixdim may disagree with it. A file is read to its
end, so that the checksum of a .nii.gz counts.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from unetrpp.files import replacing
from unetrpp.memory import check_memory

__all__ = [
    "ENDINGS",
    "SAME_SPACING",
    "Grid",
    "UnreadableImage",
    "UnusableVolume",
    "Volume",
    "case_name",
    "is_nifti",
    "nifti_files",
    "placed",
    "read_grid",
    "read_image",
    "read_labels",
    "why_no_file",
    "write_labels",
]

# How names of volumes end, the longer one first.
ENDINGS = (".nii.gz", ".nii")
# A voxel size that differs by less, relatively, is the same: nothing is interpolated.
SAME_SPACING = 0.01
# A grid whose corners lie within this share of a voxel of the other grid's is the same grid:
# headers store affines in single precision and as quaternions, which round differently.
SAME_GRID_VOXELS = 0.1
# A turned grid whose corners lie within so many voxels of the other grid's covers the same box:
# writers differ by one voxel where they flip an axis.
SAME_BOX_VOXELS = 1.0
# A stored label value that lies so near to a whole number is that number.
WHOLE = 1e-3
LARGEST_LABEL = 65_535
# Millimetres of the header's spatial units (NIfTI codes); an unknown unit is taken for mm.
MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}
UNITS = {1: "metre", 2: "millimetre", 3: "micron"}
# Deflate shrinks by 1032 at most: a file that claims more is not complete.
LARGEST_COMPRESSION = 1032
CHUNK = 2**22

_warned: set[str] = set()


class UnusableVolume(ValueError):
    """A file that is no usable volume.

    Attributes:
        file: the file.
        reason: what was found, what was expected, what to do; the message begins with the file.
    """

    def __init__(self, file: Path, reason: str):
        super().__init__(file, reason)
        self.file, self.reason = Path(file), reason

    def __str__(self) -> str:
        return f"{self.file} {self.reason}"


class UnreadableImage(UnusableVolume):
    """A file that exists but is no complete NIfTI volume."""


@dataclass(frozen=True)
class Grid:
    """Where voxels lie.

    Args:
        shape: voxels along X, Y, Z.
        affine (4, 4): voxel index to position in mm, float64.
        unit: spatial unit of the header, a NIfTI code; 0 if unknown, then mm.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    unit: int = 2

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Size of a voxel along each axis, in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return x, y, z

    def turn_to(self, target: np.ndarray) -> np.ndarray:
        """Return the orientation, as nibabel has it, that brings the axes nearest to an affine's.

        Row i is (axis of the target that axis i becomes, 1 or -1 if it is flipped).
        """
        from nibabel.orientations import io_orientation

        return io_orientation(np.linalg.inv(target) @ self.affine).astype(int)

    def turned(self, turn: np.ndarray) -> Grid:
        """Return the grid of the same voxels with permuted and flipped axes."""
        from nibabel.orientations import inv_ornt_aff

        x, y, z = (self.shape[int(axis)] for axis in np.argsort(turn[:, 0]))
        affine = self.affine @ inv_ornt_aff(turn, self.shape)
        return replace(self, shape=(x, y, z), affine=affine)


@dataclass(frozen=True)
class Volume:
    """Voxels of a file on a grid.

    Args:
        file: where they came from.
        values: (X, Y, Z, C) of an image, (X, Y, Z) of labels.
        grid: where they lie.
    """

    file: Path
    values: np.ndarray
    grid: Grid

    def turned(self, turn: np.ndarray) -> Volume:
        """Return the same voxels with permuted and flipped axes."""
        from nibabel.orientations import apply_orientation

        values = apply_orientation(self.values, turn)
        return Volume(self.file, values, self.grid.turned(turn))


def is_nifti(path: Path) -> bool:
    """Whether a file's name is that of a NIfTI volume, in small or large letters."""
    return path.name.lower().endswith(ENDINGS)


def nifti_files(folder: Path) -> list[Path]:
    """Return the NIfTI files of a folder by name, without hidden ones."""
    files = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in files if is_nifti(path))


def case_name(file: Path) -> str:
    """Return the name of a NIfTI file without its ending."""
    for ending in ENDINGS:
        if file.name.lower().endswith(ending):
            return file.name[: -len(ending)]
    return file.name


def why_no_file(path: Path) -> str:
    """Say what is in the place of a file that cannot be opened."""
    if os.path.islink(path) and not os.path.exists(path):
        return (
            f"is a link to {os.readlink(path)}, which does not exist; fetch the file behind it "
            "(datalad get, git annex get), or copy the file itself"
        )
    if os.path.isdir(path):
        return "is a folder, and must be a file; move the volume out of it, or rename the folder"
    if os.path.exists(path):
        return "is a pipe or device, and must be a file; save the volume as one"
    return "does not exist"


def read_grid(file: str | Path) -> Grid:
    """Return the grid of a file from its header; no voxel is read.

    Raises:
        FileNotFoundError: no such file. UnreadableImage: no NIfTI file, or a shorter one than its
        header says. UnusableVolume: its header describes no volume.
    """
    with _opened(Path(file)) as (_, _, grid):
        return grid


def read_image(file: str | Path) -> Volume:
    """Read an image.

    Axes beyond the third are channels; those of length 1 are dropped, so (X, Y, Z, 1, C) of ITK is
    (X, Y, Z, C).

    Returns:
        values (X, Y, Z, C), float32.

    Raises:
        As `read_grid`. UnreadableImage: a damaged file. UnusableVolume: complex or colour voxels,
        voxels that are NaN or infinite. NotEnoughMemory: more than a volume may take.
    """
    file = Path(file)
    stored, grid = _read(file)
    if stored.ndim == 3:
        stored = stored[..., None]
    with np.errstate(over="ignore"):  # named as too large below
        values = stored.astype(np.float32, copy=False)
    wrong = ~np.isfinite(values)
    if wrong.any():
        count, too_large = int(wrong.sum()), np.isfinite(stored[wrong]).all()
        found = "voxels beyond 3.4e38, too large" if too_large else "NaN or infinite voxels"
        raise UnusableVolume(file, f"holds {count} {found}; repair it first")
    return Volume(file, values, grid)


def read_labels(file: str | Path) -> Volume:
    """Read a label map: the one reader of labels, for training, scoring and report.

    A value within 1e-3 of a whole number is that number: float storage and scale factors round.

    Returns:
        values (X, Y, Z), uint8, or uint16 where a value is above 255.

    Raises:
        As `read_image`. UnusableVolume: several channels; a value that is no whole number, negative
        or above 65,535.
    """
    file = Path(file)
    values, grid = _read(file)
    if values.ndim > 3:
        raise UnusableVolume(
            file,
            f"has {values.shape[3]} channels, and a label map has one: the number of its class in "
            "every voxel; save one such volume",
        )
    if not np.issubdtype(values.dtype, np.integer):
        whole = np.rint(values)
        with np.errstate(invalid="ignore"):  # inf - inf
            wrong = ~(np.abs(values - whole) <= WHOLE)
        _refuse_labels(file, values, wrong, "is no whole number")
        values = whole
    if values.size:
        _refuse_labels(file, values, values < 0, "is negative")
        _refuse_labels(file, values, values > LARGEST_LABEL, f"is above {LARGEST_LABEL:,}")
    small = values.max(initial=0) <= 255
    return Volume(file, values.astype(np.uint8 if small else np.uint16, copy=False), grid)


def _refuse_labels(file: Path, values: np.ndarray, wrong: np.ndarray, why: str) -> None:
    if wrong.any():
        raise UnusableVolume(
            file,
            f"holds the label value {values[wrong][0]:.10g}, which {why}; a label map holds "
            f"whole numbers only, 0 to {LARGEST_LABEL:,}: correct it, or save it as integers",
        )


def placed(volume: Volume, target: Volume, check_affine: bool = False) -> Volume:
    """Lay a volume on the grid of another: labels on their image, channels on the first one.

    Axes that are permuted or flipped against the target's, over the same box, are turned. Axes as
    the target's with another origin, or slightly turned, are left, with one warning a file that
    says how many mm the grids lie apart.

    Args:
        volume: the one to lay.
        target: the one whose grid counts.
        check_affine: refuse what would give the warning.

    Raises:
        UnusableVolume: another shape, voxel size or box.
    """
    file, goal = volume.file, target.grid
    grid = _in_unit_of(volume.grid, goal)
    turn = grid.turn_to(goal.affine)
    turned = grid.turned(turn)
    if turned.shape != goal.shape:
        raise UnusableVolume(
            file,
            f"has shape {grid.shape}{_of_turned(turn)}, but {target.file} has {goal.shape}; they "
            "must share one voxel grid: resample one onto the other",
        )
    if not np.allclose(turned.spacing, goal.spacing, rtol=SAME_SPACING, atol=0):
        raise UnusableVolume(
            file,
            f"has voxels of {_sizes(turned)}, but {target.file} has {_sizes(goal)}; they must "
            "share one voxel grid: correct its header, or resample one onto the other",
        )
    apart = _corners_apart(turned, goal)
    voxels = apart / min(goal.spacing)
    is_turned = not np.array_equal(turn, [[0, 1], [1, 1], [2, 1]])
    where = f"lies up to {apart:.3g} mm away from {target.file}"
    if is_turned and voxels > SAME_BOX_VOXELS:
        raise UnusableVolume(
            file,
            f"has its axes in another order or direction, and even turned it {where} (affines "
            "differ); correct its header, or resample one onto the other",
        )
    if voxels > SAME_GRID_VOXELS:
        if check_affine:
            raise UnusableVolume(
                file,
                f"{where} (affines differ); correct its header, resample one onto the other, or "
                "leave --check_affine out",
            )
        # Sloppy headers are common; the voxel grid is what annotators drew on.
        _warn_once(
            f"{file} {where} (affines differ); it is used voxel by voxel, and --check_affine would "
            "refuse it"
        )
    elif grid is not volume.grid and volume.grid.unit:
        unit, other = UNITS[volume.grid.unit], UNITS.get(goal.unit, "millimetre")
        _warn_once(f"{file} has {unit} as its unit, but {target.file} {other}, which is used")
    values = volume.turned(turn).values if is_turned else volume.values
    return Volume(file, values, goal)


def write_labels(target: Path, labels: np.ndarray, source: Path) -> None:
    """Write labels (X, Y, Z) with the geometry of the file source, whole or not at all.

    Affine (both forms and their codes), units and version of NIfTI are those of the source.
    """
    import nibabel

    with _opened(Path(source)) as (original, _, grid):
        header = original.header.copy()
        affine, kind = original.affine, type(original)
    if labels.shape != grid.shape:
        raise RuntimeError(f"label map {labels.shape} does not fit {source} of shape {grid.shape}")
    header.set_data_dtype(labels.dtype)
    header.set_data_shape(labels.shape)
    header.set_slope_inter(1, 0)
    # What the original says about its intensities and its fourth axis does not hold here.
    header["pixdim"][4:] = 1
    header["cal_min"], header["cal_max"] = 0, 0
    header["descrip"] = b"label map"
    header.set_intent("none")
    # With a header whose affine is this one, nibabel leaves qform, sform and codes untouched.
    image = kind(labels, affine, header)

    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target, shared=True) as partial:
        nibabel.save(image, partial)


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=3)


def _of_turned(turn: np.ndarray) -> str:
    moved = turn[:, 0].tolist() != [0, 1, 2]
    return " with its axes in another order" if moved else ""


def _sizes(grid: Grid) -> str:
    return "x".join(f"{size:.4g}" for size in grid.spacing) + " mm"


def _corners_apart(grid: Grid, other: Grid) -> float:
    """The largest distance of two corners, in mm."""
    last = np.array(grid.shape) - 1
    corners = np.array([(*(last * corner), 1) for corner in np.ndindex(2, 2, 2)], float).T
    apart = (grid.affine - other.affine) @ corners
    return float(np.linalg.norm(apart[:3], axis=0).max())


def _in_unit_of(grid: Grid, other: Grid) -> Grid:
    """The grid in the other's unit, where only then their voxels have one size.

    Labels of a volume in micron are often saved with the same numbers and no unit, or with mm.
    """
    own, others = (MILLIMETRES.get(each.unit, 1.0) for each in (grid, other))
    scale = others / own
    rescaled = replace(grid, affine=np.diag([scale] * 3 + [1.0]) @ grid.affine)
    sizes = sorted(rescaled.spacing), sorted(other.spacing)
    fits = scale != 1 and np.allclose(*sizes, rtol=SAME_SPACING, atol=0)
    return rescaled if fits else grid


class _Gzip(gzip.GzipFile):
    """Gzip that fills a large buffer in chunks, where the standard one would copy it whole."""

    def readinto(self, buffer: Any) -> int:
        view, done = memoryview(buffer).cast("B"), 0
        while chunk := self.read(min(CHUNK, len(view) - done)):
            view[done : done + len(chunk)] = chunk
            done += len(chunk)
        return done


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, io.BufferedIOBase, Grid]]:
    """Yield (nibabel image, stream, grid); every error of the file is an `UnusableVolume`."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} {why_no_file(file)}")
    try:
        with open(file, "rb") as plain:
            is_compressed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            # By content: files are compressed, or not, under either name.
            stream: io.BufferedIOBase = _Gzip(fileobj=plain) if is_compressed else plain
            image = _kind(file, stream).from_stream(stream)
            grid = _grid(file, image)
            _check_size(file, image, is_compressed)
            yield image, stream, grid
    except (UnusableVolume, MemoryError):
        raise
    except Exception as error:  # nibabel, gzip and zlib each have their own for a broken file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnreadableImage(
            file,
            f"cannot be read as a NIfTI volume (truncated or damaged?): {reason}; copy it again "
            "from where it came from",
        ) from error


def _kind(file: Path, stream: io.BufferedIOBase) -> Any:
    """The class of images that reads the stream, by its first bytes."""
    import nibabel

    start = stream.read(nibabel.Nifti2Header.sizeof_hdr)
    stream.seek(0)
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        if kind.header_class.may_contain_header(start):
            header = kind.header_class(start[: kind.header_class.sizeof_hdr], check=False)
            if header["magic"].item()[:2] != b"n+":
                raise UnreadableImage(
                    file,
                    "cannot be read: it is the header of a pair .hdr and .img; save the pair as "
                    "one .nii.gz file, with nibabel for example",
                )
            return kind
    raise UnreadableImage(
        file,
        f"cannot be read: it is no NIfTI file, it begins with the bytes {start[:4]!r}; "
        "convert it to .nii.gz, with SimpleITK or dcm2niix for example",
    )


def _grid(file: Path, image: Any) -> Grid:
    """The grid of an image, checked."""
    shape = image.shape
    if len(shape) < 3:
        raise UnusableVolume(
            file,
            f"has {len(shape)} axes, shape {shape}, and a volume has three; save a single slice as "
            "(X, Y, 1)",
        )
    if min(shape) < 1:
        raise UnusableVolume(
            file,
            f"has shape {shape}: an axis of length {min(shape)} is empty; export it "
            "anew from where it came from",
        )
    if sum(length > 1 for length in shape[3:]) > 1:
        raise UnusableVolume(
            file,
            f"has shape {shape}; a volume has three axes and at most one more, for its channels; "
            "save one volume for each time or direction",
        )
    dtype = image.get_data_dtype()
    if dtype.fields:
        raise UnusableVolume(
            file, "holds colour voxels (RGB); save its intensities as one number a voxel"
        )
    if dtype.kind == "c":
        raise UnusableVolume(
            file, f"holds complex voxels ({dtype}); save magnitude or phase, one number a voxel"
        )
    unit = int(image.header["xyzt_units"]) & 7
    unit = unit if unit in UNITS else 0
    affine = np.diag([MILLIMETRES.get(unit, 1.0)] * 3 + [1.0]) @ np.asarray(image.affine, float)
    axes = affine[:3, :3]
    # Against the volume of a voxel, which may be tiny: 0.5 um are 5e-4 mm.
    voxel = np.prod(np.linalg.norm(axes, axis=0))
    if not np.isfinite(affine).all() or not abs(np.linalg.det(axes)) > 1e-6 * voxel:
        raise UnusableVolume(
            file,
            "has a singular affine, so its axes have no direction; correct sform or qform of its "
            "header",
        )
    return Grid(shape[:3], affine, unit)


def _check_size(file: Path, image: Any, is_compressed: bool) -> None:
    """Compare what the header claims with the bytes of the file and with the memory."""
    claimed, there = _stored_bytes(image), file.stat().st_size
    # The standard's limit of deflate holds from a kilobyte on.
    most = LARGEST_COMPRESSION * (there + 1024) if is_compressed else there
    if image.dataobj.offset + claimed > most:
        raise UnreadableImage(
            file,
            f"cannot be read: its header says shape {image.shape} of {image.get_data_dtype()}, "
            f"{claimed:,} bytes from byte {image.dataobj.offset:,} on, but the file of {there:,} "
            "bytes cannot hold them; it is truncated or its header is damaged: copy it again from "
            "where it came from",
        )


def _stored_bytes(image: Any) -> int:
    return math.prod(image.shape) * image.get_data_dtype().itemsize


def _read(file: Path) -> tuple[np.ndarray, Grid]:
    """Voxels (X, Y, Z) or (X, Y, Z, C) as stored, scaled as the header says; to the file's end."""
    with _opened(file) as (image, stream, grid):
        claimed = _stored_bytes(image)
        needed = claimed + 4 * math.prod(image.shape)
        check_memory(needed, f"{file} with shape {image.shape}", "crop or resample it")
        values = np.asanyarray(image.dataobj)
        # The checksum of a member follows its last byte, and what follows the volume is no part.
        stream.seek(image.dataobj.offset + claimed)
        while rest := stream.read(CHUNK):
            if rest.strip(b"\0"):
                raise UnreadableImage(
                    file,
                    f"cannot be read: bytes follow the {claimed:,} that its header says from byte "
                    f"{image.dataobj.offset:,} on; it is two files, or its header is damaged: "
                    "copy it again from where it came from",
                )
    dropped = tuple(axis for axis in range(3, values.ndim) if values.shape[axis] == 1)
    return values.squeeze(dropped), grid
