"""Where `predict` writes: which places are refused, and which label maps are there already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unetrpp.volumes import UnusableVolume, read_grid, read_labels

__all__ = ["check_folder", "check_kind", "is_done"]

# Names of images that are not written; a folder of such a name is meant by nobody.
OTHER_IMAGES = (
    ".mha",
    ".mhd",
    ".nrrd",
    ".nhdr",
    ".hdr",
    ".img",
    ".mgz",
    ".dcm",
    ".npy",
    ".npz",
    ".png",
)


def check_folder(output: Path | str, inputs: Sequence[Path]) -> None:
    """Refuse to write among the inputs, where the next run would take label maps for images."""
    for folder in inputs:
        if folder.is_dir() and Path(output).exists() and folder.samefile(output):
            raise ValueError(
                f"run_predict: output {output} is the folder of the inputs, which are never "
                "overwritten or mixed with label maps; name another folder"
            )


def check_kind(output: Path, is_file: bool) -> None:
    if is_file and output.is_dir():
        raise ValueError(f"output {output} has the name of a file, but is a folder; rename it")
    if not is_file and output.name.lower().endswith(OTHER_IMAGES):
        raise ValueError(
            f"output {output} must end in .nii or .nii.gz, the files that are written, or be the "
            "name of a folder"
        )
    if not is_file and output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a folder, or a file NAME.nii.gz")


def is_done(target: Path, source: Path) -> bool:
    """Whether a whole label map of that volume is there.

    Raises:
        ValueError: there is one of another shape, which may be of another volume.
    """
    if not target.exists():
        return False
    try:
        shape = read_labels(target).values.shape
    except UnusableVolume:
        return False
    expected = read_grid(source).shape
    if shape != expected:
        raise ValueError(
            f"{target} exists with shape {shape}, and the volume has {expected}; --overwrite "
            "replaces it"
        )
    return True
