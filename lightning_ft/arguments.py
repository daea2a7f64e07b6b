"""Checks the names of keyword arguments before a constructor runs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping

from lightning_ft.errors import UnknownArgumentError


def check_arguments(cls: type, names: Iterable[str], renamed: Mapping[str, str] | None = None) -> None:
    """Refuse keyword arguments that the constructor of a class does not take.

    Args:
        cls: The class. One whose constructor has a ``**kwargs`` of its own takes anything.
        names: Names of the keyword arguments.
        renamed: Earlier names of arguments, which the constructor still takes, to the present ones.

    Raises:
        UnknownArgumentError: With the nearest name.

    Example:
        >>> from lightning_ft import PairDataModule
        >>> check_arguments(PairDataModule, ["shufle"])
        Traceback (most recent call last):
        lightning_ft.errors.UnknownArgumentError: PairDataModule has no argument 'shufle'. Did you mean 'shuffle'?
    """
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in names:
        if name in parameters or (renamed or {}).get(name) in parameters:
            continue
        nearest = difflib.get_close_matches(name, list(parameters), 1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else f" It takes {', '.join(parameters)}."
        raise UnknownArgumentError(f"{cls.__name__} has no argument {name!r}.{hint}")
