"""Data sets and volumes under one name, for scripts; `dataset` and `preprocessing` define them."""

from unetrpp.dataset import Case, DatasetInfo, find_cases, read_dataset_info, split_cases
from unetrpp.preprocessing import (
    Preprocessing,
    UnreadableImage,
    foreground_intensity,
    inference_transforms,
    load_case,
    volume_geometry,
)

__all__ = [
    "Case",
    "DatasetInfo",
    "Preprocessing",
    "UnreadableImage",
    "find_cases",
    "foreground_intensity",
    "inference_transforms",
    "load_case",
    "read_dataset_info",
    "split_cases",
    "volume_geometry",
]
