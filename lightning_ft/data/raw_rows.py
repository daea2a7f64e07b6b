"""Rows as they were found, before anyone asks what their fields mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning_ft.data.problems import Problem
from lightning_ft.data.turns import RowError
from lightning_ft.data.values import plain


@dataclass(frozen=True)
class RawRow:
    """A row as it was found.

    Args:
        source: Where it comes from.
        number: The line it starts on in a JSONL or CSV file, else its number, from 1.
        value: What the row is; a mapping if all is well.
        problem: Why it couldn't be read.
    """

    source: str
    number: int
    value: Any
    problem: Problem | None = None


def bad_row(source: str, number: int, reason: str, detail: str, fix: str, field: str | None = None) -> RawRow:
    """A row that couldn't be read."""
    return RawRow(source, number, None, Problem(source, number, field, reason, detail, fix))


def numbered(rows: Iterable[Any], source: str) -> Iterator[RawRow]:
    """Rows with their numbers, from 1."""
    for number, row in enumerate(rows, start=1):
        yield RawRow(source, number, row)


def check_values(rows: Iterable[RawRow], *, filled: bool) -> Iterator[RawRow]:
    """The same rows with plain values; a row that holds a value nobody could use gets a problem that names its field.

    Args:
        rows: The rows.
        filled: Whether the source gives all nested objects the same keys, as Arrow does; see `plain`.

    Example:
        >>> (row,) = check_values(numbered([{"id": 10**5000}], "train"), filled=False)
        >>> row.problem.field, row.problem.reason
        ('id', 'an integer of too many digits')
    """
    for raw in rows:
        if raw.problem is None:
            try:
                value = plain(raw.value, filled=filled)
            except RowError as error:
                yield bad_row(raw.source, raw.number, error.reason, error.detail, error.fix, error.field)
                continue
            raw = RawRow(raw.source, raw.number, value)
        yield raw
