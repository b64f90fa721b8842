"""Weights of any origin -> a checkpoint that `unetrpp predict` takes.

`load_published` or `load_checkpoint` reads the network. What it must be fed with comes from a file
that says so, or from the data set that it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unetrpp.checkpoint import is_checkpoint, load_checkpoint, save_checkpoint
from unetrpp.files import read_json
from unetrpp.models import Network
from unetrpp.published import load_published

__all__ = ["run_convert"]


def run_convert(
    weights: Path,
    output: Path,
    *,
    preset: str | None = None,
    model_args: dict[str, Any] | None = None,
    preprocessing: Path | None = None,
    data: Path | None = None,
    spacing: list[float] | None = None,
    overwrite: bool = False,
) -> str:
    """Write a checkpoint folder for predict from weights of any origin.

    Args:
        weights: File or folder with weights: published, of other training code, or a checkpoint.
        output: New checkpoint folder.
        preset: The preset that the weights belong to; recognised if not given.
        model_args: Further arguments of the network, e.g. {"img_size": [64,128,128]}.
        preprocessing: JSON file with the entries of unetrpp.preprocessing.Preprocessing, or a
            config.json or plan.json of a run with them.
        data: Instead of that file: the data set that the network was trained on, a folder with
            dataset.json, imagesTr and labelsTr.
        spacing: With data: voxel size in mm to resample to (superior, posterior, left), [0,0,0]
            for none; the median of the data set if not given.
        overwrite: Replace a checkpoint in the output folder.

    Returns: what to run next.

    Raises:
        FileNotFoundError: a file is missing. FileExistsError: the output holds a checkpoint.
        ValueError: weights, preprocessing or data cannot be read or do not fit each other.
    """
    if preprocessing is not None and data is not None:
        raise ValueError("convert takes --preprocessing FILE or --data DIR, not both")
    if spacing is not None and data is None:
        raise ValueError("--spacing belongs to --data DIR; a file of preprocessing says its own")
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file; name a new folder")
    if output.is_dir() and any(output.iterdir()) and not (overwrite and is_checkpoint(output)):
        raise FileExistsError(
            f"{output} is not empty; name a new folder, or replace a checkpoint with --overwrite"
        )
    extra: Mapping[str, Any] = {}
    if preset is None and is_checkpoint(Path(weights)):
        network, config = load_checkpoint(weights, **(model_args or {}))
        extra = {key: value for key, value in config.items() if key != "model"}
    else:
        found = load_published(weights, preset, **(model_args or {}))
        assert isinstance(found, Network)  # it was built from a preset
        network = found
    if preprocessing is not None:
        extra = {**extra, "preprocessing": read_preprocessing(preprocessing, network)}
    elif data is not None:
        extra = {**extra, "preprocessing": _of_data(data, network, spacing)}
    save_checkpoint(output, network, extra)
    if "preprocessing" in extra:
        return f"predict with: unetrpp predict IMAGE.nii.gz -o OUT --checkpoint {output}"
    return (
        f"{output} holds the network alone; predict needs its preprocessing, too: convert it "
        f"again with --preprocessing FILE or --data DIR"
    )


def read_preprocessing(file: Path, network: Network) -> dict[str, Any]:
    """Return the preprocessing that a JSON file says, checked against a network.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON, an entry is missing, unknown or illegal, or it does not fit.
    """
    from unetrpp.preprocessing import Preprocessing

    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"--preprocessing {file} is no file; name a JSON file")
    try:
        content = read_json(file)
    except ValueError as error:
        raise ValueError(f"{file} is truncated or no JSON ({error})") from error
    for entry in ("plan", "preprocessing"):
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
    return Preprocessing.of_network(content, network, str(file)).to_dict()


def _of_data(folder: Path, network: Network, spacing: list[float] | None) -> dict[str, Any]:
    from unetrpp.dataset import find_cases, read_dataset_info
    from unetrpp.plan import propose
    from unetrpp.preprocessing_check import check_fit

    plan = propose(
        find_cases(folder),
        read_dataset_info(folder),
        on_gpu=False,
        model=network.name,
        patch_size=network.img_size,
        strides=network.strides,
        spacing=spacing,
    )
    check_fit(plan.preprocessing, network, str(folder))
    return plan.preprocessing.to_dict()
