"""Completions in a JSONL file: one per line, appended step by step, and truncated when a run is resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from lightning_ft.errors import ConfigError
from lightning_ft.printable import json_text
from lightning_ft.rewards.batch import Prompt, Rewards
from lightning_ft.types import Message


class _Logged(TypedDict, total=False):
    extra: dict[str, object]


class SampleRow(_Logged):
    """A completion as JSON values; `extra` has what reward functions logged, if anything. NaN and infinity are None."""

    step: int
    prompt: str | list[Message]
    completion: str
    rewards: dict[str, float | None]
    reward: float | None
    advantage: float | None
    truncated: bool
    length: int


@dataclass(frozen=True, eq=False)
class RolloutSamples:
    """`c` completions of one step, each with its prompt, as they are written to files and loggers.

    Args:
        step: Number of optimizer steps taken before they were sampled.
        prompts: Prompt of each completion, `c` in total.
        completions: Text of each completion, `c` in total.
        rewards: Rewards of the completions.
        advantages: Advantage of each completion, `c` in total; the mean over its tokens if each token has its own.
        truncated: Whether each completion reached the limit of new tokens, `c` in total.
        lengths: Number of tokens of each completion, `c` in total.

    Raises:
        ConfigError: If these don't have one entry per completion.
    """

    step: int
    prompts: Sequence[Prompt]
    completions: list[str]
    rewards: Rewards
    advantages: list[float]
    truncated: list[bool]
    lengths: list[int]

    def __post_init__(self) -> None:
        for name in ("prompts", "rewards", "advantages", "truncated", "lengths"):
            if (count := len(getattr(self, name))) != len(self):
                raise ConfigError(f"A RolloutSamples of {len(self)} completions has {count} {name}.")

    def __len__(self) -> int:
        return len(self.completions)

    def rows(self, num_samples: int | None = None) -> list[SampleRow]:
        """Return completions as JSON values, evenly spaced so that many prompts are included.

        Args:
            num_samples: Largest number of completions; None for all.

        Returns:
            A row per completion with `step`, `prompt`, `completion`, `rewards` by function, `reward` (their weighted
            sum), `advantage`, `truncated`, `length` and, if functions logged any, `extra`. NaN and infinity are None.

        Example:
            >>> import torch
            >>> rewards = Rewards(("short",), torch.tensor([[1.0], [float("nan")]]), torch.tensor([1.0, float("nan")]))
            >>> samples = RolloutSamples(3, ["a", "a"], ["b", "cc"], rewards, [0.5, 0.0], [False, True], [1, 2])
            >>> samples.rows(1)[0]["rewards"], samples.rows()[1]["reward"]
            ({'short': 1.0}, None)
        """
        count = len(self) if num_samples is None else min(num_samples, len(self))
        return [self._row(i * len(self) // count) for i in range(count)]

    def _row(self, i: int) -> SampleRow:
        by_function = zip(self.rewards.names, self.rewards.per_function[i].tolist(), strict=True)
        row: SampleRow = {
            "step": self.step,
            "prompt": self.prompts[i],
            "completion": self.completions[i],
            "rewards": {name: _finite(value) for name, value in by_function},
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


def _json(value: object) -> object:
    """Convert a value that a function logged to a JSON value."""
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


def write_samples(samples: RolloutSamples, path: str | Path, *, num_samples: int | None = None) -> list[SampleRow]:
    """Append completions to a file.

    Args:
        samples: Completions of a step.
        path: Path of the file, which is created if it doesn't exist.
        num_samples: Largest number of completions to write; None for all.

    Returns:
        The rows written; see `RolloutSamples.rows`.

    Example:
        >>> import tempfile, torch
        >>> from lightning_ft.rewards.batch import Rewards
        >>> rewards = Rewards(("short",), torch.tensor([[1.0]]), torch.tensor([1.0]))
        >>> samples = RolloutSamples(3, ["2+2?"], ["4"], rewards, [0.0], [False], [2])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = write_samples(samples, f"{folder}/completions.jsonl")
        ...     rows == read_samples(f"{folder}/completions.jsonl")
        True
    """
    rows = samples.rows(num_samples)
    append_samples(rows, path)
    return rows


def append_samples(rows: Sequence[SampleRow], path: str | Path) -> None:
    """Append rows to a file: all of them, or none if writing fails.

    Args:
        rows: Rows of `RolloutSamples.rows`.
        path: Path of the file, which is created if it doesn't exist.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("ab") as file:
        size = file.tell()
        try:
            file.write("".join(map(_line, rows)).encode())
            file.flush()
        except OSError:  # an incomplete line would corrupt the one appended next
            os.truncate(path, size)
            raise


def read_samples(path: str | Path) -> list[SampleRow]:
    """Read the rows of a file, except for an incomplete last line, as killed runs leave.

    Raises:
        ConfigError: If another line isn't a row.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows: list[SampleRow] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row: SampleRow | None = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number < len(lines):
            raise ConfigError(
                f"{path}, line {number}, isn't a sample (a JSON object with an integer 'step'): choose another file "
                "for samples."
            )
    return rows


def drop_samples(path: str | Path, step: int) -> int:
    """Remove the rows of a step and of all later ones from a file, since a run resumed at that step writes them again.

    Args:
        path: Path of the file, which may not exist.
        step: First step to drop, in optimizer steps.

    Returns:
        Number of rows dropped.

    Raises:
        ConfigError: If the file contains something else than samples.
    """
    path = Path(path)
    if not path.is_file():
        return 0
    rows = read_samples(path)
    kept = [row for row in rows if row["step"] < step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
    os.replace(temporary, path)  # atomic: after a crash the file is either the old or the new one
    return len(rows) - len(kept)


def rename_existing(path: str | Path) -> Path | None:
    """Rename a file of an earlier run, so that a new run doesn't append to it.

    Args:
        path: Path of the file, which may not exist.

    Returns:
        Its new path, the first of ``completions.1.jsonl``, ``completions.2.jsonl``, ... that doesn't exist; None if
        there was nothing to rename.
    """
    path = Path(path)
    if not path.is_file() or not path.stat().st_size:
        return None
    number = 1
    while (free := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return path.rename(free)


def _line(row: SampleRow) -> str:
    return json_text(row) + "\n"
