"""Wrong usage in a sentence: YAML files with options, and what jsonargparse refuses.

check_config_file  refuses a YAML file that holds no options, by file and entry
wrong_usage        jsonargparse's error -> one sentence with option, rule and value
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from unetrpp.files import read_yaml
from unetrpp.options import RULES, refusal

__all__ = ["WrongUsage", "check_config_file", "wrong_usage"]

EXAMPLE = "a file of options looks like 'steps: 2000', one a line (--print_config prints one)"


class WrongUsage(ValueError):
    """The command line or a file of options says what the command does not take."""

    exit_code = 2


def check_config_file(file: str, options: Collection[str]) -> None:
    """Refuse a file of options that is none.

    Args:
        file: what was given with --config.
        options: names that the command takes.

    Raises:
        WrongUsage: no such file, no text, no YAML, no mapping, or an unknown option.
    """
    path = Path(file).expanduser()
    if not file or not path.is_file():
        what = "is a folder" if path.is_dir() and file else "does not exist"
        raise WrongUsage(f"--config {file!r} {what}; name a YAML file with options: {EXAMPLE}")
    try:
        content = read_yaml(path)
    except OSError as error:
        raise WrongUsage(f"{file}: {error.strerror}; check its permissions") from error
    except ValueError as error:
        raise WrongUsage(f"{error}; {EXAMPLE}") from error
    if not isinstance(content, dict):
        kind = "empty" if content is None else f"a {type(content).__name__}, not options by name"
        raise WrongUsage(f"{file} is {kind}; {EXAMPLE}")
    for name in content:
        if name not in options:
            raise WrongUsage(f"{file}: {_unknown(str(name), options)}")


def wrong_usage(
    error: Exception, types: Mapping[str, Any], positions: Collection[str] = ()
) -> WrongUsage:
    """Return jsonargparse's error as one sentence.

    Args:
        error: what it raised.
        types: type by name of the options that the command takes.
        positions: those of them that have their place instead of a name.
    """
    text = str(error).strip()
    if key := re.match(r'Parser key "(\w+)"', text):
        name, flat = key[1], re.sub(r"\s+", " ", text)
        found = re.search(r".*(?:Given|Got) value: (.*)$", flat)
        value = found[1] if found else ""
        option = name if name in positions else f"--{name}"
        if name in RULES:
            return WrongUsage(refusal(option, RULES[name], value))
        return WrongUsage(f"{option} must be {_kind(types.get(name))}, got {value!r}")
    if unknown := re.match(r"unrecognized arguments: (.*)", text, re.S | re.I):
        given = unknown[1].split()
        if given[0].startswith("-"):
            return WrongUsage(_unknown(given[0].partition("=")[0], types))
        return WrongUsage(
            f"{unknown[1]!r} belongs to no option; a list is one word, as in "
            "--patch_size [48,64,48], and a switch takes true or false"
        )
    if option := re.match(r"Option '(.*)' is not accepted", text):
        return WrongUsage(_unknown(option[1], types))
    if argument := re.match(r"argument (\S+): expected", text):
        return WrongUsage(f"{argument[1]} needs a value, and none was given")
    return WrongUsage(re.sub(r"\s+", " ", text))


def _unknown(name: str, options: Collection[str]) -> str:
    bare = name.lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(bare, list(options), 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(options))}"
    return f"there is no option {name!r}; {hint}"


def _kind(of: Any) -> str:
    """What values of a type look like, to be read after "must be"."""
    words = [word for part in (get_args(of) or (of,)) for word in _words(part)]
    if get_origin(of) is Literal:
        words = list(get_args(of))
    return "one of " + ", ".join(words) if len(words) > 1 else (words or ["another value"])[0]


def _words(of: Any) -> list[str]:
    if get_origin(of) is Literal:
        return list(get_args(of))
    return {bool: ["true", "false"], str: ["a word"], Path: ["a path"]}.get(of, [])
