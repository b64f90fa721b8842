"""What a stored preprocessing must hold: that of a checkpoint, of a run, or of a user's file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unetrpp.models import Network
    from unetrpp.preprocessing import Preprocessing

__all__ = ["check_fit", "check_preprocessing"]


def check_fit(values: Preprocessing, network: Network, source: str) -> None:
    """Call `check_preprocessing` with what a network says of itself."""
    args = network.config["args"]
    check_preprocessing(
        source,
        values,
        channels=args["in_channels"],
        classes=args["out_channels"],
        patch_size=None if network.takes_any_size else network.img_size,
    )


def check_preprocessing(
    source: str,
    values: Preprocessing,
    *,
    channels: int,
    classes: int,
    patch_size: Sequence[int] | None,
) -> None:
    """Refuse a preprocessing that is illegal or does not fit its network.

    Args:
        source: the file that says it.
        channels, classes: numbers of the network's inputs and outputs.
        patch_size: size of the network's input; None where it takes any size.

    Raises:
        ValueError: names source, entry, rule and value.
    """

    def rule(entry: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"{source}: {entry} must be {expected}; got {getattr(values, entry)!r}"
            )

    rule(
        "channels",
        _is_list(values.channels, str, channels),
        f"{channels} names, one for each input channel of the network",
    )
    rule(
        "normalization",
        _is_list(values.normalization, str, channels)
        and set(values.normalization) <= {"ct", "zscore"},
        f'"ct" or "zscore" for each of {channels} channels',
    )
    numbers = {"lower", "upper", "mean", "std"}
    rule(
        "intensity",
        isinstance(values.intensity, list)
        and len(values.intensity) == channels
        and all(
            (isinstance(each, dict) and set(each) == numbers and _are_numbers(each.values()))
            if kind == "ct"
            else each is None
            for each, kind in zip(values.intensity, values.normalization, strict=True)
        ),
        f'{sorted(numbers)} for each channel with "ct" and null for each with "zscore"',
    )
    rule(
        "spacing",
        values.spacing is None
        or (
            isinstance(values.spacing, list)
            and len(values.spacing) == 3
            and _are_numbers(values.spacing)
            and min(values.spacing) > 0
        ),
        "three positive numbers in mm, or null",
    )
    rule(
        "patch_size",
        _is_list(values.patch_size, int, 3)
        and min(values.patch_size) >= 1
        and (patch_size is None or values.patch_size == list(patch_size)),
        "three sizes in voxels"
        if patch_size is None
        else f"{list(patch_size)}, the input size of the network",
    )
    rule(
        "labels",
        isinstance(values.labels, dict)
        and _is_list(list(values.labels.values()), int, classes)
        and sorted(values.labels.values()) == list(range(classes)),
        f"the values 0 to {classes - 1} by name, one for each output of the network",
    )
    rule(
        "ignore",
        values.ignore is None or (_is_list([values.ignore], int, 1) and values.ignore >= classes),
        f"null, or the label value of voxels to leave out, {classes} or more",
    )


def _is_list(values: Any, kind: type, length: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == length
        and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
    )


def _are_numbers(values: Any) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
