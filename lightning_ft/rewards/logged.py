"""Metrics that reward functions log with `log_metric`: means over their calls on all ranks."""

from __future__ import annotations

from collections.abc import Collection

from lightning_ft.distributed import all_gather_objects
from lightning_ft.errors import RewardError

Logged = dict[str, tuple[float, int]]
"""Sum and number of the values that were logged under each name."""


def add_logged(first: Logged, second: Logged) -> Logged:
    """Sums and numbers of both.

    Example:
        >>> add_logged({"seen": (2.0, 1)}, {"seen": (4.0, 2), "alone": (1.0, 1)})
        {'seen': (6.0, 3), 'alone': (1.0, 1)}
    """
    both = dict(first)
    for name, (total, number) in second.items():
        before, count = both.get(name, (0.0, 0))
        both[name] = (before + total, count + number)
    return both


def means_over_ranks(logged: Logged, taken: Collection[str] = ()) -> dict[str, float]:
    """Mean of each metric over its calls on all ranks. Every rank must call it, also one that logged nothing.

    Args:
        logged: What this rank's reward functions logged.
        taken: Names of other metrics, which these may not replace.

    Raises:
        RewardError: On all ranks, if a metric has the name of one of `taken`.

    Example:
        >>> means_over_ranks({"seen": (6.0, 3)})
        {'seen': 2.0}
    """
    every: Logged = {}
    for of_rank in all_gather_objects(logged):
        every = add_logged(every, of_rank)
    if replaced := [name for name in every if name in taken]:
        raise RewardError(
            f"log_metric({replaced[0]!r}, ...) of a reward would replace the metric {replaced[0]!r} that the module "
            "logs. Choose another name."
        )
    return {name: total / number for name, (total, number) in every.items()}
