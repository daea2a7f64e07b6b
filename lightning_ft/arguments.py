"""Errors for keyword arguments that a class does not accept."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable

from lightning_ft.errors import UnknownArgumentError


def unknown_argument(cls: type, name: str) -> UnknownArgumentError:
    """Build the error for an argument that a class's constructor does not accept, with the closest accepted name.

    Args:
        cls: Class whose constructor was called.
        name: Name of the unknown argument.

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
    hint = f"Did you mean {nearest[0]!r}?" if nearest else f"It accepts {', '.join(parameters)}."
    return UnknownArgumentError(f"{cls.__name__} has no argument {name!r}. {hint}")


def check_arguments(cls: type, names: Iterable[str]) -> None:
    """Refuse keyword arguments that a class's constructor does not accept.

    Args:
        cls: Class whose constructor was called. If the constructor has ``**kwargs``, every name is accepted.
        names: Names of the keyword arguments.

    Raises:
        UnknownArgumentError: For the first unknown name; the message suggests the closest accepted one.
    """
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in names:
        if name not in parameters:
            raise unknown_argument(cls, name)
