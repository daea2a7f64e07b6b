"""Completions in a JSONL file: one a line, appended step by step, cut back where a run is resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_ft.errors import ConfigError
from lightning_ft.printable import json_text
from lightning_ft.rollout.record import RolloutRecord


def write_samples(record: RolloutRecord, path: str | Path, *, num_samples: int | None = None) -> list[dict[str, Any]]:
    """Append completions to a file, which is made where there is none.

    Args:
        record: The completions of a step.
        path: Of the file.
        num_samples: At most so many of them; None for all.

    Returns:
        The rows written, see `RolloutRecord.rows`.

    Example:
        >>> import tempfile, torch
        >>> from lightning_ft.rewards.result import Rewards
        >>> rewards = Rewards(("short",), torch.tensor([[1.0]]), torch.tensor([1.0]))
        >>> record = RolloutRecord(3, ["2+2?"], ["4"], rewards, [0.0], [False], [2])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = write_samples(record, f"{folder}/completions.jsonl")
        ...     rows == read_samples(f"{folder}/completions.jsonl")
        True
    """
    rows = record.rows(num_samples)
    append_samples(rows, path)
    return rows


def append_samples(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Append rows to a file, all of them or, where that fails, none.

    Args:
        rows: See `RolloutRecord.rows`.
        path: The file, which is created if it doesn't exist.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("ab") as file:
        size = file.tell()
        try:
            file.write("".join(map(_line, rows)).encode())
            file.flush()
        except OSError:  # half a line would spoil those that follow
            os.truncate(path, size)
            raise


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file.

    A last line that a run which was killed left unfinished isn't one.

    Raises:
        ConfigError: If another line isn't a row.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number < len(lines):
            raise ConfigError(f"{path}, line {number}, is no completion of a step: choose another file for samples.")
    return rows


def drop_samples(path: str | Path, step: int) -> int:
    """Take the rows of a step and of all later ones out of a file: a run that is resumed there writes them again.

    Args:
        path: Of the file; it may be missing.
        step: The first step to drop.

    Returns:
        How many rows were dropped.

    Raises:
        ConfigError: If the file holds something else than samples.
    """
    path = Path(path)
    if not path.is_file():
        return 0
    rows = read_samples(path)
    kept = [row for row in rows if row["step"] < step]
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("".join(map(_line, kept)), encoding="utf-8")
    os.replace(beside, path)  # whatever happens, one of both is whole
    return len(rows) - len(kept)


def set_aside(path: str | Path) -> Path | None:
    """Rename a file of an earlier run, so that a new one doesn't mix with it.

    Args:
        path: Of the file; it may be missing.

    Returns:
        Its new name, the first of ``completions.1.jsonl``, ``completions.2.jsonl``, ... that is free; None where there
        was nothing to rename.
    """
    path = Path(path)
    if not path.is_file() or not path.stat().st_size:
        return None
    number = 1
    while (free := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return path.rename(free)


def _line(row: dict[str, Any]) -> str:
    return json_text(row) + "\n"
