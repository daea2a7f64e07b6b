"""What a policy wrote in one step, and what that was worth: to be looked at, not to be trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lightning_ft.data.request import Message
from lightning_ft.errors import ConfigError
from lightning_ft.rewards.result import Rewards


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
