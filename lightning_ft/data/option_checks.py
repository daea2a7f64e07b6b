"""Checks of the options of DataModules that need no rows."""

from __future__ import annotations

from typing import get_args

from lightning_ft.data.overlong import OnOverlong
from lightning_ft.data.rows import OnBadRow
from lightning_ft.errors import ConfigError


def check_choices(
    max_length: int, batch_size: int, on_overlong: str, on_bad_row: str, validation: object, cache_dir: object
) -> None:
    """Refuse values outside the range or the choices of an option; see `RowDataModule` for each.

    Raises:
        ConfigError: For the first such value.
    """
    for name, value, minimum in (("batch_size", batch_size, 1), ("max_length", max_length, 2)):
        if value < minimum:
            raise ConfigError(f"{name}={value}: expected at least {minimum}.")
    for name, choice, choices in (("on_overlong", on_overlong, OnOverlong), ("on_bad_row", on_bad_row, OnBadRow)):
        if choice not in get_args(choices):
            raise ConfigError(f"{name}={choice!r}: expected one of {', '.join(map(repr, get_args(choices)))}.")
    if cache_dir is True:
        raise ConfigError("cache_dir=True: expected a folder, None for the default one, or False for none.")
    if isinstance(validation, bool) or (isinstance(validation, (int, float)) and not 0 < validation < 1):
        raise ConfigError(f"validation={validation}: a share must lie between 0 and 1.")


def check_without_train(validation: object, mixing: object, streaming: bool | None) -> None:
    """Refuse options of training rows where there are none.

    Args:
        validation: Validation rows, or a share of the training rows.
        mixing: Weights of the training sources.
        streaming: Whether training rows are read while training.

    Raises:
        ConfigError: For a share, weights, or ``streaming=True``.

    Example:
        >>> check_without_train("held_out.jsonl", None, None)
    """
    options = {
        "validation": validation if isinstance(validation, (int, float)) else None,
        "mixing": mixing,
        "streaming": streaming or None,
    }
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name}={value!r} is about training rows, and there are none. Pass train= or remove it.")
