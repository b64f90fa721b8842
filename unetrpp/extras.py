"""Packages of an extra that are not installed: the error says which one, and how to get it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from unetrpp import _is_of_an_extra, _remedy

__all__ = ["names_extra"]

P = ParamSpec("P")
R = TypeVar("R")


def names_extra(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function name the extra that brings a package which it does not find.

    Raises:
        ModuleNotFoundError: with the function, the package and the command that installs it.
    """

    @functools.wraps(function)
    def named(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            return function(*arguments, **options)
        except ModuleNotFoundError as error:
            if not _is_of_an_extra(error):
                raise
            said = _remedy(error, function.__name__)
            raise ModuleNotFoundError(said, name=error.name) from error

    return named
