"""Completions as a table: for loggers, as Markdown, and on the screen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_ft.data.request import Message
from lightning_ft.printable import printable
from lightning_ft.report.markdown import markdown_table

CELL = 600
"""Characters of a text that Markdown and the screen show; files and tables of loggers hold all of it."""


def samples_columns(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Rows of `RolloutRecord.rows` as a flat table.

    Args:
        rows: Of one step, at least one.

    Returns:
        The names of the columns, and a cell of each for every row: texts, numbers or None.

    Example:
        >>> row = {"step": 3, "prompt": "2+2?", "completion": "4", "rewards": {"correct": 1.0}, "reward": 1.0}
        >>> row |= {"advantage": 0.5, "truncated": False, "length": 2}
        >>> samples_columns([row])[0]
        ['step', 'prompt', 'completion', 'rewards/correct', 'reward', 'advantage', 'truncated', 'length']
    """
    data = [_cells(row) for row in rows]
    return list(data[0]), [list(cells.values()) for cells in data]


def samples_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of one step as a Markdown table."""
    columns, data = samples_columns(rows)
    cells = [[_short(cell) for cell in row] for row in data]
    return "\n".join(markdown_table(columns, cells)) + "\n"


def samples_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Rows of one step as a table on the screen."""
    columns, data = samples_columns(rows)
    table = Table(title=f"Completions of step {rows[0]['step']:,}", title_justify="left", show_lines=True)
    for column in columns[1:]:
        table.add_column(Text(printable(column, one_line=True)), overflow="fold")
    for row in data:
        table.add_row(*(Text(printable(_short(cell))) for cell in row[1:]))  # Text: brackets in it are no markup
    return table


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": row["step"],
        "prompt": _text(row["prompt"]),
        "completion": row["completion"],
        **{f"rewards/{name}": value for name, value in row["rewards"].items()},
        **{name: row[name] for name in ("reward", "advantage", "truncated", "length")},
        **{f"extra/{name}": str(value) for name, value in row.get("extra", {}).items()},
    }


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {_said(message)}" for message in prompt)


def _said(message: Message) -> str:
    calls = message.get("tool_calls")
    return message["content"] + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _short(cell: Any) -> str:
    text = f"{cell:.4g}" if isinstance(cell, float) else ("" if cell is None else str(cell))
    return text if len(text) <= CELL else f"{text[:CELL]}... (and {len(text) - CELL:,} characters more)"
