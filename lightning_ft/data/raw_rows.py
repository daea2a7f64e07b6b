"""Rows as they were read, before their fields are interpreted, and the problems of bad rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lightning_ft.data.turns import RowError
from lightning_ft.data.values import plain
from lightning_ft.errors import DataError
from lightning_ft.printable import printable


@dataclass(frozen=True)
class RawRow:
    """A row as it was read.

    Args:
        source: File, hub name, or the name of an argument.
        number: Line on which the row starts in a JSONL or CSV file, else the number of the row, from 1.
        value: The row; a mapping, unless it is a bad row.
        problem: Why the row couldn't be read.
        filled: Whether the source gives all nested objects the same keys, as Arrow does, with None for those that a
            row doesn't have.
    """

    source: str
    number: int
    value: object
    problem: Problem | None = None
    filled: bool = False

    @property
    def fields(self) -> object:
        """The row as it is interpreted: without what the source filled in."""
        return plain(self.value, filled=True) if self.filled else self.value


def bad_row(source: str, number: int, reason: str, detail: str, fix: str, field: str | None = None) -> RawRow:
    """A row that couldn't be read."""
    return RawRow(source, number, None, Problem(source, number, field, reason, detail, fix))


def numbered(rows: Iterable[object], source: str) -> Iterator[RawRow]:
    """Rows with their numbers, from 1."""
    for number, row in enumerate(rows, start=1):
        yield RawRow(source, number, row)


def check_values(rows: Iterable[RawRow], *, filled: bool) -> Iterator[RawRow]:
    """The same rows with plain values; a row with a value that can't be used gets a problem that names its field.

    Args:
        rows: The rows.
        filled: Whether the source gives all nested objects the same keys; see `RawRow`.

    Example:
        >>> (row,) = check_values(numbered([{"id": 10**5000}], "train"), filled=False)
        >>> row.problem.field, row.problem.reason
        ('id', 'an integer of too many digits')
    """
    for raw in rows:
        if raw.problem is None:
            try:
                value = plain(raw.value)
            except RowError as error:
                yield bad_row(raw.source, raw.number, error.reason, error.detail, error.fix, error.field)
                continue
            raw = RawRow(raw.source, raw.number, value, filled=filled)
        yield raw


SHOWN = 20
"""Number of bad rows that an error lists."""


@dataclass(frozen=True)
class Problem:
    """A problem of one row.

    Args:
        source: File, hub name, or the name of an argument.
        row: Line of a JSONL or CSV file, else the number of the row, from 1; None for the whole source.
        field: Field with the problem; None for the whole row.
        reason: What is wrong, in the same words for all rows with this problem.
        detail: What was found.
        fix: What to do about it.

    Example:
        >>> print(Problem("a.jsonl", 7, "output", "empty output", "", "Fill it in or remove the row."))
        a.jsonl, row 7, 'output': empty output. Fill it in or remove the row.
    """

    source: str
    row: int | None
    field: str | None
    reason: str
    detail: str
    fix: str

    @classmethod
    def of(cls, error: RowError, source: str, row: int | None) -> Problem:
        """The problem that an error found in a row.

        Args:
            error: The error.
            source: Source of the row.
            row: Number of the row; None for the whole source.
        """
        return cls(source, row, error.field, error.reason, error.detail, error.fix)

    def __str__(self) -> str:
        origin = self.source
        origin += "" if self.row is None else f", row {self.row}"
        origin += "" if self.field is None else f", {self.field!r}"
        text = f"{origin}: {self.reason}" + (f" ({self.detail})" if self.detail else "") + f". {self.fix}"
        return printable(text, one_line=True)


def raise_problems(problems: Sequence[Problem], remedies: Iterable[str] = ("on_bad_row='skip'",)) -> None:
    """Raise one error that lists the first :data:`SHOWN` problems and counts all.

    Args:
        problems: The problems.
        remedies: The arguments that would leave such rows out.

    Raises:
        DataError: If there is any.
    """
    if not problems:
        return
    lines = [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  ... and {len(problems) - SHOWN:,} more")
    reasons = Counter(problem.reason for problem in problems).most_common()
    counts = printable(", ".join(f"{count:,} x {reason}" for reason, count in reasons), one_line=True)
    raise DataError(
        f"{len(problems):,} bad row{'s' if len(problems) > 1 else ''} ({counts}):\n" + "\n".join(lines) + "\n"
        f"Fix them, or pass {' and '.join(remedies)} to leave them out and count them."
    )
