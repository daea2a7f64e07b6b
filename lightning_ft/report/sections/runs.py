"""Figures of several runs in one table."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_ft.report.blocks import Block, Table

_WIDE = 3


def runs_table(names: Sequence[str], rows: Sequence[tuple[str, ...]], caption: str = "") -> tuple[Block, ...]:
    """A column for each run; of more than a few a row for each, and what is the same in all of them as a sentence.

    Args:
        names: Of the runs; of a single one it is left out.
        rows: A label, and a cell for each run.
        caption: What the figures are.

    Example:
        >>> table, same = runs_table(["a", "b", "c", "d"], [("steps", "1", "2", "3", "4"), ("device", *["cpu"] * 4)])
        >>> table.head, table.rows[0], same
        (('run', 'steps'), ('a', '1'), 'The same in all runs: device: cpu.')
    """
    if len(names) == 1:
        return (Table(("", "measured"), tuple(rows), caption),)
    if len(names) <= _WIDE:
        return (Table(("", *names), tuple(rows), caption),)
    same = [row for row in rows if len(set(row[1:])) == 1]
    differing = [row for row in rows if row not in same]
    table = Table(
        ("run", *(row[0] for row in differing)),
        tuple((name, *(row[k] for row in differing)) for k, name in enumerate(names, start=1)),
        caption,
    )
    if not same:
        return (table,)
    return (table, "The same in all runs: " + "; ".join(f"{row[0]}: {row[1]}" for row in same) + ".")
