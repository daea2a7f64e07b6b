"""Checks of arguments: names that a class does not accept, and values of another type or out of range."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TypeVar

from lightning_ft.errors import LightningFTError, UnknownArgumentError
from lightning_ft.types import Request

ClassT = TypeVar("ClassT", bound="CheckedArguments")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the closest known name, as a sentence that continues a message; an empty string if none is close.

    Args:
        name: Unknown name.
        known: Known names.

    Example:
        >>> did_you_mean("simgoid", ["hinge", "sigmoid"]), did_you_mean("x", ["hinge"])
        (" Did you mean 'sigmoid'?", '')
    """
    nearest = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def did_you_mean_path(path: str | Path) -> str:
    """Suggest the closest existing path, as :func:`did_you_mean` does; an empty string if none is close.

    Args:
        path: Path, of which any part may be misspelled; nothing is suggested if it exists.

    Example:
        >>> did_you_mean_path("Qwen/Qwen3-0.6B")  # in a folder that contains nothing of a similar name
        ''
    """
    found = Path()
    try:
        for part in Path(path).parts:
            if not (found / part).exists():
                near = difflib.get_close_matches(part, [other.name for other in found.iterdir()], 1)
                part = near[0] if near else part
            found /= part
        return f" Did you mean {str(found)!r}?" if found.exists() and found != Path(path) else ""
    except (OSError, ValueError):  # a folder that can't be listed, a file in place of a folder, a NUL character
        return ""


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
    hint = did_you_mean(name, parameters) or f" It accepts {', '.join(parameters)}."
    return UnknownArgumentError(f"{cls.__name__} has no argument {name!r}.{hint}")


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


class CheckedArguments:
    """Base of classes that name the closest argument for a misspelled one, before any constructor runs.

    Raises:
        UnknownArgumentError: For an argument that the class does not take.

    Example:
        >>> class Meter(CheckedArguments):
        ...     def __init__(self, *, every: int = 1) -> None:
        ...         self.every = every
        >>> list(inspect.signature(Meter).parameters)
        ['every']
        >>> Meter(everyy=2)
        Traceback (most recent call last):
        lightning_ft.errors.UnknownArgumentError: Meter has no argument 'everyy'. Did you mean 'every'?
    """

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # `inspect` would show __new__'s

    def __new__(cls: type[ClassT], *args: object, **options: object) -> ClassT:
        """Check argument names."""
        check_arguments(cls, options)
        return super().__new__(cls)


def check_integer(argument: str, value: object, minimum: int, error: type[LightningFTError]) -> None:
    """Check that an argument is an integer of at least `minimum`.

    Args:
        argument: Name of the argument, for the message.
        value: Value of the argument.
        minimum: Smallest allowed value.
        error: Exception class to raise.

    Raises:
        LightningFTError: An `error`, for another type or a smaller number.

    Example:
        >>> from lightning_ft.errors import ConfigError
        >>> check_integer("batch_size", "8", 1, ConfigError)
        Traceback (most recent call last):
        lightning_ft.errors.ConfigError: batch_size='8': expected an integer of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise error(f"{argument}={value!r}: expected an integer of at least {minimum}.")
    if value < minimum:
        raise error(f"{argument}={value}: expected at least {minimum}.")


def check_number(argument: str, value: object, error: type[LightningFTError]) -> None:
    """Check that an argument is a number other than NaN.

    Args:
        argument: Name of the argument, for the message.
        value: Value of the argument.
        error: Exception class to raise.

    Raises:
        LightningFTError: An `error`, for another type.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise error(f"{argument}={value!r}: expected a number, not a value of type {type(value).__name__}.")


def check_requests(requests: object, error: type[LightningFTError]) -> None:
    """Check that `requests` is a sequence of `Request` objects.

    Args:
        requests: Value of the argument.
        error: Exception class to raise.

    Raises:
        LightningFTError: An `error`, for anything else; the message says how to make requests of rows.
    """
    remedy = (
        "Request objects are the rows of PairDataModule.requests('test'), or are built with "
        "lightning_ft.types.Request(id=..., messages=(...), reference=...)."
    )
    if isinstance(requests, str) or not isinstance(requests, Sequence):
        raise error(f"requests={requests!r:.80}: expected a list of Request objects. {remedy}")
    for index, request in enumerate(requests):
        if not isinstance(request, Request):
            raise error(f"requests[{index}] is a value of type {type(request).__name__}, not a Request. {remedy}")
