"""What reward functions log while they judge: numbers, and columns beside their rewards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from lightning_ft.errors import RewardError


class RewardLog:
    """What one reward logs while it judges a batch.

    Args:
        name: Of the reward.
        count: Completions of the batch.

    Example:
        >>> log = RewardLog("judge", 2)
        >>> log.metric("seconds", 1.0), log.metric("seconds", 3.0), log.extra("verdict", ["yes", "no"])
        (None, None, None)
        >>> logged_metrics([log]), logged_columns([log])
        ({'seconds': 2.0}, {'verdict': ['yes', 'no']})
    """

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.metrics: dict[str, list[float]] = {}
        self.columns: dict[str, list[Any]] = {}

    def metric(self, name: str, value: Any) -> None:
        """Log a number; this is the `log_metric` of reward functions.

        Raises:
            RewardError: For anything but a finite number.
        """
        number = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
        if not isinstance(number, Real) or not math.isfinite(number):
            raise RewardError(f"log_metric({name!r}, {value!r:.80}): expected a finite number.")
        self.metrics.setdefault(name, []).append(float(number))

    def extra(self, column: str, values: Iterable[Any]) -> None:
        """Log a column, or the next part of one; this is the `log_extra` of reward functions."""
        self.columns.setdefault(column, []).extend(values)


def logged_metrics(logs: Sequence[RewardLog]) -> dict[str, float]:
    """The mean of what was logged under each name, over the calls of all rewards."""
    every: dict[str, list[float]] = {}
    for log in logs:
        for name, values in log.metrics.items():
            every.setdefault(name, []).extend(values)
    return {name: sum(values) / len(values) for name, values in every.items()}


def logged_columns(logs: Sequence[RewardLog]) -> dict[str, list[Any]]:
    """Columns of all rewards; where two have the same name, the later's gets its reward's name before it.

    Raises:
        RewardError: For a column that hasn't one value for each completion.
    """
    every: dict[str, list[Any]] = {}
    for log in logs:
        for column, values in log.columns.items():
            if len(values) != log.count:
                raise RewardError(
                    f"Reward {log.name!r} logged {len(values)} values in the column {column!r} for {log.count} "
                    "completions."
                )
            every[f"{log.name}/{column}" if column in every else column] = values
    return every
