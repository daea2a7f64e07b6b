"""Values of rows: plain ones, such as JSON has, with text that a tokenizer can take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_ft.data.turns import RowError

DEEPEST = 100
"""Most levels of lists and objects in a row: code that renders or compares it goes down one call per level."""

_KEYS = (int, float)  # of an object in memory: those that can be sorted, and written as JSON
_MOST_BITS = 14_000  # of an integer; Python refuses to print one of more than 4,300 digits


class Refused:
    """Takes the place of a value that a file holds and no row may have, until the row's field is known.

    Args:
        reason: What is wrong, in the same words for all such values.
        detail: What was found.
        fix: What to do about it.
    """

    def __init__(self, reason: str, detail: str, fix: str) -> None:
        self.reason, self.detail, self.fix = reason, detail, fix


class _Found(Exception):
    """A refused value, on its way up to the row; each level adds its key."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.reason)
        self.refused = refused
        self.path: list[str] = []


def plain(row: Any, *, filled: bool = False) -> Any:
    """A row with plain values: NumPy's scalars and arrays as Python's, tuples as lists, mappings as dicts.

    What has no plain form (a date, bytes, a picture) is left as it is: it does no harm in a column that isn't used.

    Args:
        row: The row, whatever was found in its place.
        filled: Whether the source gives all nested objects the same keys, those that a row doesn't have with None.
            Such keys are removed; fields of the row itself stay.

    Raises:
        RowError: For half of a surrogate pair in a text or key, an integer of thousands of digits, nesting deeper
            than :data:`DEEPEST`, a field whose name is no string, an object whose keys are neither strings nor
            numbers, and every `Refused`.

    Example:
        >>> row = {"messages": ({"role": "user", "content": "2+2?", "name": None},), "system": None}
        >>> plain(row, filled=True)
        {'messages': [{'role': 'user', 'content': '2+2?'}], 'system': None}
    """
    try:
        if isinstance(row, Mapping):
            return {_name(key): _inside(_name(key), value, filled, 1) for key, value in row.items()}
        return _plain(row, filled, 0)
    except _Found as found:
        path = "".join(reversed(found.path)).removeprefix(".") or None
        refused = found.refused
        raise RowError(path, refused.reason, refused.detail, refused.fix) from None


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise _Found(Refused("a field's name is no string", repr(key)[:40], "Name every field by a string."))
    return _text(key)


def _plain(value: Any, filled: bool, depth: int) -> Any:
    if isinstance(value, str):
        return _text(value)
    if value is None or (isinstance(value, (bool, float)) and not isinstance(value, np.generic)):
        return value
    if depth > DEEPEST:
        raise _Found(Refused("nested too deep", f"over {DEEPEST} levels", "Store it as a text."))
    if isinstance(value, Mapping):
        if not (all(isinstance(key, str) for key in value) or all(isinstance(key, _KEYS) for key in value)):
            key = next(key for key in value if not isinstance(key, str))
            raise _Found(Refused("a key is no string", repr(key)[:40], "Use strings, as JSON does."))
        return {
            _text(key) if isinstance(key, str) else key: _inside(f".{key}", item, filled, depth + 1)
            for key, item in value.items()
            if not (filled and item is None)
        }
    if isinstance(value, (list, tuple)):
        return [_inside(f"[{i}]", item, filled, depth + 1) for i, item in enumerate(value)]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist(), filled, depth + 1) if value.dtype != object or value.ndim else value
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise _Found(too_many_digits(f"about {int(value.bit_length() * 0.30103):,}"))
    if isinstance(value, Refused):
        raise _Found(value)
    return value


def _inside(key: str, value: Any, filled: bool, depth: int) -> Any:
    try:
        return _plain(value, filled, depth)
    except _Found as found:
        found.path.append(key)
        raise


def _text(value: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            detail = f"{value[error.start]!r} at character {error.start + 1:,}"
            fix = "A character was cut in two where the text was made: write both halves, or remove them."
            raise _Found(Refused("half of a surrogate pair", detail, fix)) from None
    return value if type(value) is str else str.__str__(value)


def too_many_digits(digits: str) -> Refused:
    """An integer that can't be read or printed."""
    return Refused("an integer of too many digits", f"{digits} digits", "Write it as a string.")
