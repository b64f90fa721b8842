"""Which values the options of all commands take: one table for command line, YAML and Python.

RULES     option name -> Rule; an option of one name follows one rule in every command
checked   values by option name -> the same as plain Python values, or an error that says the rule
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args

__all__ = ["RULES", "Rule", "checked", "choice", "read_path", "refusal"]


@dataclass(frozen=True)
class Rule:
    """What an option takes.

    Args:
        words: the rule, to be read after "must be".
        read: turns a value into a plain Python value; raises ValueError or TypeError where the
            value breaks the rule.
        remedy: what to do instead.
    """

    words: str
    read: Callable[[Any], Any]
    remedy: str


def checked(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as plain Python values: NumPy's numbers, tuples and text paths included.

    Args:
        prefix: what stands before an option's name in a message: "--", or "run_predict: ".
        values: by option name. One without a rule stays as it is.

    Raises:
        ValueError: a value breaks the rule of its option; the message says both, and a remedy.
    """
    plain = dict(values)
    for name, rule in RULES.items():
        if name not in plain:
            continue
        try:
            plain[name] = rule.read(plain[name])
        except (TypeError, ValueError, OverflowError):
            raise ValueError(refusal(prefix + name, rule, plain[name])) from None
    return plain


def refusal(name: str, rule: Rule, value: Any) -> str:
    """Return the sentence that refuses a value of an option."""
    return f"{name} must be {rule.words}, got {value!r}; {rule.remedy}"


def choice(allowed: Any, remedy: str = "take one of these") -> Rule:
    """Return the rule of an option that takes one of the words of a Literal."""
    words = get_args(allowed)

    def read(value: Any) -> str:
        if value not in words:
            raise ValueError
        return str(value)

    return Rule(f"one of {', '.join(words)}", read, remedy)


def read_path(value: Any) -> Path:
    """Return a path with "~" expanded; raises ValueError for an empty one."""
    text = os.fsdecode(value)
    if not text or "\0" in text:
        raise ValueError
    try:
        return Path(text).expanduser()
    except RuntimeError:  # "~name" where there is no such user
        return Path(text)


def _whole(low: int, high: float = math.inf) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError
        number = int(value)
        if not low <= number <= high:
            raise ValueError
        return number

    return read


def _real(low: float, high: float = math.inf, *, ends: str = "[)") -> Callable[[Any], float]:
    """A number in an interval, whose ends belong to it as brackets or parentheses say."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError
        number = float(value)
        below = number < low if ends[0] == "[" else number <= low
        above = number > high if ends[1] == "]" else number >= high
        if below or above or not math.isfinite(number):
            raise ValueError
        return number

    return read


def _listed(length: int, read_entry: Callable[[Any], Any]) -> Callable[[Any], list]:
    def read(value: Any) -> list:
        if isinstance(value, (str, bytes, Mapping)) or len(value) != length:
            raise ValueError
        return [read_entry(entry) for entry in value]

    return read


def _spacing(value: Any) -> list[float]:
    sizes = _listed(3, _real(0))(value)
    if any(sizes) and not all(sizes):
        raise ValueError
    return sizes


# Arguments of a network that the data or an option of their own decide.
_DECIDED = ("name", "preset", "in_channels", "out_channels", "img_size", "strides")


def _arguments(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError
    if any(name in value for name in _DECIDED):
        raise ValueError
    return dict(value)


_AXES = "(superior, posterior, left)"
_LEFT_OUT = "leave it out for the recipe's"
# No machine has as many devices or cores, and no memory as many patches.
_MANY = 1024
_PATH = Rule("the path of a file or folder", read_path, "give a path that is not empty")

RULES = {
    "data": _PATH,
    "output": _PATH,
    "resume": _PATH,
    "checkpoint": _PATH,
    "predictions": _PATH,
    "labels": _PATH,
    "names": _PATH,
    "run": _PATH,
    "evaluation": _PATH,
    "steps": Rule("a whole number of at least 1", _whole(1), _LEFT_OUT),
    "minutes": Rule("a number of minutes above 0", _real(0, ends="()"), _LEFT_OUT),
    "patch_size": Rule(
        f"three whole numbers of at least 1 {_AXES}, such as [48,64,48]",
        _listed(3, _whole(1)),
        "leave it out, and it is proposed from the data",
    ),
    "strides": Rule(
        f"four steps of three whole numbers of at least 1 {_AXES}, such as "
        "[[2,2,2],[2,2,2],[2,2,2],[2,2,2]]",
        _listed(4, _listed(3, _whole(1))),
        "leave it out, and it is proposed from the data",
    ),
    "spacing": Rule(
        f"three sizes above 0 in mm {_AXES}, such as [1,1,1], or [0,0,0] for no resampling",
        _spacing,
        "leave it out for the median of the data",
    ),
    "model_args": Rule(
        'arguments of the network by name, such as {"dims": [16,32,64,128]}, without '
        f"{', '.join(_DECIDED)}",
        _arguments,
        "the data say the channels and labels, --patch_size, --strides and --preset the rest",
    ),
    "batch_size": Rule(f"a whole number from 1 to {_MANY}", _whole(1, _MANY), "2 is usual"),
    "betas": Rule(
        "two numbers of at least 0 and below 1", _listed(2, _real(0, 1)), "[0.9,0.999] is usual"
    ),
    "warm_up": Rule("a whole number of at least 0", _whole(0), _LEFT_OUT),
    "learning_rate": Rule("a number above 0", _real(0, ends="()"), _LEFT_OUT),
    "weight_decay": Rule("a number of at least 0", _real(0), _LEFT_OUT),
    "foreground": Rule("a share from 0 to 1", _real(0, 1, ends="[]"), "0.33 is usual"),
    "ema": Rule("at least 0 and below 1", _real(0, 1), "0.99 is usual, and 0 averages nothing"),
    "folds": Rule("a whole number of at least 2", _whole(2), "5 is usual"),
    "fold": Rule("a whole number from 0 to folds - 1", _whole(0), "0 is the first fold"),
    "validate_every": Rule(
        "a whole number of at least 1", _whole(1), "leave it out for a tenth of the run"
    ),
    "save_minutes": Rule(
        "a number of minutes of at least 0", _real(0), "5 is usual, and 0 saves after each step"
    ),
    "seed": Rule("a whole number from 0 to 2^63 - 1", _whole(0, 2**63 - 1), "1 is usual"),
    "devices": Rule(
        f"a whole number from 1 to {_MANY}", _whole(1, _MANY), "1 trains in one process"
    ),
    "workers": Rule(
        f"a whole number from 0 to {_MANY}",
        _whole(0, _MANY),
        "leave it out, or give 0 for no processes",
    ),
    "cache": Rule("a whole number of at least 0", _whole(0), "leave it out to keep all cases"),
    "overlap": Rule("at least 0 and below 1", _real(0, 1), "0.5 is usual"),
}
