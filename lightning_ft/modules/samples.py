"""Completions in a JSONL file: one a line, appended step by step, cut back where a run is resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_ft.errors import ConfigError
from lightning_ft.printable import json_text
from lightning_ft.rewards.batch import Rewards
from lightning_ft.types import Message


@dataclass(frozen=True, eq=False)
class RolloutRecord:
    """`c` completions of one step, each with its prompt.

    Args:
        step: Optimizer steps taken before them.
        prompts: Once for each completion, `c`.
        completions: Their texts, `c`.
        rewards: What each was worth.
        advantages: One for each, `c`; where tokens have advantages of their own, their mean.
        truncated: Whether each was stopped by the limit of tokens, `c`.
        lengths: Their tokens, `c`.

    Raises:
        ConfigError: If there isn't one of each for every completion.
    """

    step: int
    prompts: list[str] | list[list[Message]]
    completions: list[str]
    rewards: Rewards
    advantages: list[float]
    truncated: list[bool]
    lengths: list[int]

    def __post_init__(self) -> None:
        for name in ("prompts", "rewards", "advantages", "truncated", "lengths"):
            if (count := len(getattr(self, name))) != len(self):
                raise ConfigError(f"A RolloutRecord of {len(self)} completions has {count} {name}.")

    def __len__(self) -> int:
        return len(self.completions)

    def rows(self, num_samples: int | None = None) -> list[dict[str, Any]]:
        """Completions as JSON values, spread evenly over the record so that many prompts are seen.

        Args:
            num_samples: At most so many; None for all.

        Returns:
            For each `step`, `prompt`, `completion`, `rewards` by function, `reward` (their weighted sum), `advantage`,
            `truncated`, `length` and, where functions logged any, `extra`. What isn't a number is None.

        Example:
            >>> import torch
            >>> rewards = Rewards(("short",), torch.tensor([[1.0], [float("nan")]]), torch.tensor([1.0, float("nan")]))
            >>> record = RolloutRecord(3, ["a", "a"], ["b", "cc"], rewards, [0.5, 0.0], [False, True], [1, 2])
            >>> record.rows(1)[0]["rewards"], record.rows()[1]["reward"]
            ({'short': 1.0}, None)
        """
        count = len(self) if num_samples is None else min(num_samples, len(self))
        return [self._row(i * len(self) // count) for i in range(count)]

    def _row(self, i: int) -> dict[str, Any]:
        given = zip(self.rewards.names, self.rewards.per_function[i].tolist(), strict=True)
        row = {
            "step": self.step,
            "prompt": self.prompts[i],
            "completion": self.completions[i],
            "rewards": {name: _finite(value) for name, value in given},
            "reward": _finite(float(self.rewards.total[i])),
            "advantage": _finite(float(self.advantages[i])),
            "truncated": bool(self.truncated[i]),
            "length": int(self.lengths[i]),
        }
        if self.rewards.extra:
            row["extra"] = {column: _json(values[i]) for column, values in self.rewards.extra.items()}
        return row


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _json(value: Any) -> Any:
    """A value that a function logged, as JSON can hold it."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return _finite(value)
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    return str(value)


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
        >>> from lightning_ft.rewards.batch import Rewards
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
