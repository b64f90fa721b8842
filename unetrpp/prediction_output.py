"""Where `predict` writes: which places are refused, and which label maps are there already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unetrpp.dataset import open_nifti

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
        labels = open_nifti(target)
        np.asanyarray(labels.dataobj)
    except Exception:  # nibabel, gzip and zlib each have their own for a broken file
        return False
    shape = open_nifti(source).shape[:3]
    if labels.shape[:3] != shape:
        raise ValueError(
            f"{target} exists with shape {labels.shape}, and the volume has {shape}; --overwrite "
            "replaces it"
        )
    return True
