"""Convert the values of rows to plain ones, as in JSON, with text that can be tokenized."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lightning_ft.data.turns import RowError

MAX_DEPTH = 100
"""Maximum levels of lists and objects in a row: code that renders or compares rows makes one call per level."""

_NUMBER_KEYS = (int, float)  # keys of an object in memory that can be sorted, and written as JSON
_MAX_BITS = 14_000  # of an integer; Python refuses to print more than 4,300 digits


class Refused:
    """Replaces a value that no row may have, until the field in which it was found is known.

    Args:
        reason: What is wrong, in the same words for all such values.
        detail: What was found.
        fix: What to do about it.
    """

    def __init__(self, reason: str, detail: str, fix: str) -> None:
        self.reason, self.detail, self.fix = reason, detail, fix


class _RefusedValueError(Exception):
    """Raised for a refused value; each level on the way up to the row adds its key."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.reason)
        self.refused = refused
        self.path: list[str] = []


def plain(row: object, *, filled: bool = False) -> object:
    """A row with plain values: NumPy scalars and arrays become Python's, tuples lists, and mappings dicts.

    Values without a plain form (dates, bytes, images) are kept: in a column that isn't used they do no harm.

    Args:
        row: The row; any value, since it may be a bad row.
        filled: Whether the source gives all nested objects the same keys, with None for those that a row doesn't have.
            Such keys are removed. Fields of the row itself are kept.

    Raises:
        RowError: For half of a surrogate pair in a text or key, an integer of thousands of digits, nesting deeper
            than :data:`MAX_DEPTH`, a field whose name isn't a string, an object whose keys are neither all strings nor
            all numbers, and every `Refused`.

    Example:
        >>> row = {"messages": ({"role": "user", "content": "2+2?", "name": None},), "system": None}
        >>> plain(row, filled=True)
        {'messages': [{'role': 'user', 'content': '2+2?'}], 'system': None}
    """
    try:
        if isinstance(row, Mapping):
            return {_name(key): _inside(_name(key), value, filled, 1) for key, value in row.items()}
        return _plain(row, filled, 0)
    except _RefusedValueError as error:
        path = "".join(reversed(error.path)).removeprefix(".") or None
        refused = error.refused
        raise RowError(path, refused.reason, refused.detail, refused.fix) from None


def _name(key: object) -> str:
    if not isinstance(key, str):
        raise _RefusedValueError(
            Refused("a field's name isn't a string", repr(key)[:40], "Name every field by a string.")
        )
    return _text(key)


def _plain(value: object, filled: bool, depth: int) -> object:
    if isinstance(value, str):
        return _text(value)
    if value is None or (isinstance(value, (bool, float)) and not isinstance(value, np.generic)):
        return value
    if depth > MAX_DEPTH:
        raise _RefusedValueError(Refused("nested too deep", f"over {MAX_DEPTH} levels", "Store it as text."))
    if isinstance(value, Mapping):
        if not (all(isinstance(key, str) for key in value) or all(isinstance(key, _NUMBER_KEYS) for key in value)):
            key = next(key for key in value if not isinstance(key, str))
            raise _RefusedValueError(Refused("a key isn't a string", repr(key)[:40], "Use strings, as JSON does."))
        return {
            _text(key) if isinstance(key, str) else key: _inside(f".{key}", item, filled, depth + 1)
            for key, item in value.items()
            if not (filled and item is None)
        }
    if isinstance(value, (list, tuple)):
        return [_inside(f"[{i}]", item, filled, depth + 1) for i, item in enumerate(value)]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist(), filled, depth + 1) if value.dtype != object or value.ndim else value
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise _RefusedValueError(too_many_digits(f"about {int(value.bit_length() * 0.30103):,}"))
    if isinstance(value, Refused):
        raise _RefusedValueError(value)
    return value


def _inside(key: str, value: object, filled: bool, depth: int) -> object:
    try:
        return _plain(value, filled, depth)
    except _RefusedValueError as error:
        error.path.append(key)
        raise


def _text(value: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            detail = f"{value[error.start]!r} at character {error.start + 1:,}"
            fix = "A character was cut in two where the text was written: write both halves, or remove this one."
            raise _RefusedValueError(Refused("half of a surrogate pair", detail, fix)) from None
    return value if type(value) is str else str.__str__(value)


def too_many_digits(digits: str) -> Refused:
    """An integer with too many digits to be read or printed."""
    return Refused("an integer of too many digits", f"{digits} digits", "Write it as a string.")
