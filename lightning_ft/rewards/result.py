"""What completions were found to be worth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_ft.functional.moments import power_sums


@dataclass(frozen=True, eq=False)
class Rewards:
    """Rewards of `c` completions by `k` functions.

    Args:
        names: Of the functions, `k`.
        per_function: What each gave, NaN where it gave None, ``float32 [c, k]``.
        total: Weighted sums, NaN where every function gave None, ``float32 [c]``.
        metrics: What functions logged with `log_metric`, each the mean of its calls.
        extra: What they logged with `log_extra`, `c` values a column.
        nonfinite: How many rewards weren't finite and were taken for None.

    Example:
        >>> import torch
        >>> given = torch.tensor([[1.0], [0.0], [float("nan")]])
        >>> rewards = Rewards(("correct",), given, given[:, 0])
        >>> rewards.unscored, rewards.figures()["rewards/correct"].tolist()
        (1, [2.0, 1.0, 1.0])
    """

    names: tuple[str, ...]
    per_function: Tensor
    total: Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    nonfinite: int = 0

    def __len__(self) -> int:
        return len(self.total)

    @property
    def unscored(self) -> int:
        """How many completions no function had a reward for."""
        return int(self.total.isnan().sum())

    def figures(self) -> dict[str, Tensor]:
        """Count, sum and sum of squares of each function's rewards and of the totals, NaN left out.

        Add them over micro-batches and ranks, then `lightning_ft.functional.moments.mean_and_std`.

        Returns:
            ``rewards/NAME`` for each function and ``reward`` for the totals, ``float64 [3]`` each.
        """
        columns = zip(self.names, self.per_function.unbind(1), strict=True)
        return {**{f"rewards/{name}": power_sums(given) for name, given in columns}, "reward": power_sums(self.total)}
