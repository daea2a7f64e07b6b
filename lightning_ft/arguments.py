"""Errors for keyword arguments that a class does not take."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable

from lightning_ft.errors import UnknownArgumentError


def unknown_argument(cls: type, name: str) -> UnknownArgumentError:
    """The error for an argument that the constructor of a class does not take, with the nearest name.

    Args:
        cls: The class.
        name: Name of the argument.

    Example:
        >>> from lightning_ft import PairDataModule
        >>> print(unknown_argument(PairDataModule, "max_lenght"))
        PairDataModule has no argument 'max_lenght'. Did you mean 'max_length'?
    """
    parameters = [
        parameter.name
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    nearest = difflib.get_close_matches(name, parameters, 1)
    hint = f"Did you mean {nearest[0]!r}?" if nearest else f"It takes {', '.join(parameters)}."
    return UnknownArgumentError(f"{cls.__name__} has no argument {name!r}. {hint}")


def check_arguments(cls: type, names: Iterable[str]) -> None:
    """Refuse keyword arguments that the constructor of a class does not take.

    Args:
        cls: The class. One whose constructor has a ``**kwargs`` of its own takes anything.
        names: Names of the keyword arguments.

    Raises:
        UnknownArgumentError: With the nearest name.
    """
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in names:
        if name not in parameters:
            raise unknown_argument(cls, name)
