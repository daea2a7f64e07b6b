"""What is wrong with rows, and how it is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_ft.errors import DataError
from lightning_ft.printable import printable

SHOWN = 20
"""How many bad rows an error lists."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one row.

    Args:
        source: File, hub name, or the name of an argument.
        row: Line of the file where rows are lines, else number of the row, from 1; None for the whole source.
        field: The field that is wrong, or None for the whole row.
        reason: What is wrong, in words that are the same for all rows with this problem.
        detail: What was found there.
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

    def __str__(self) -> str:
        where = self.source
        where += "" if self.row is None else f", row {self.row}"
        where += "" if self.field is None else f", {self.field!r}"
        text = f"{where}: {self.reason}" + (f" ({self.detail})" if self.detail else "") + f". {self.fix}"
        return printable(text, one_line=True)


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise one error that lists the first :data:`SHOWN` problems and counts all.

    Raises:
        DataError: If there are any.
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
        "Mend them, or pass on_bad_row='skip' to leave them out (they are counted)."
    )
