"""Converts the texts of options of `lightning-ft compare` and `plan` to values."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_ft.errors import ComparisonError


def parse_duration(text: str) -> float:
    """Convert a duration such as ``90m`` to seconds.

    Args:
        text: Number with the unit ``s``, ``m`` or ``h``; seconds without a unit.

    Raises:
        ComparisonError: If `text` isn't a duration.

    Example:
        >>> parse_duration("90m"), parse_duration("1.5h"), parse_duration("20")
        (5400.0, 5400.0, 20.0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if found is None:
        raise ComparisonError(f"--budget {text!r}: expected a duration such as 90m, 2h or 600s.")
    return float(found[1]) * {"s": 1, "": 1, "m": 60, "h": 3600}[found[2]]


def split_names(value: str | Sequence[object]) -> list[str]:
    """Convert an option such as ``full,lora`` to names.

    Args:
        value: Its value, or a list of names.

    Example:
        >>> split_names("full, lora")
        ['full', 'lora']
    """
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else [str(part) for part in value]


def integers(name: str, value: str | Sequence[int]) -> list[int]:
    """Convert an option such as ``0,1,2`` to numbers.

    Args:
        name: Name of the option.
        value: Its value.

    Raises:
        ComparisonError: If `value` isn't a list of whole numbers.

    Example:
        >>> integers("seeds", "0, 1,2")
        [0, 1, 2]
    """
    try:
        return [int(part) for part in split_names(value)]
    except ValueError as error:
        raise ComparisonError(f"--{name} {value!r}: expected whole numbers such as 0,1,2.") from error
