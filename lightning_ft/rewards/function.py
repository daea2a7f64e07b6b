"""A Python function as a reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_ft.rewards.arguments import Arguments
from lightning_ft.rewards.batch import RewardBatch


class FunctionReward:
    """Calls a function with what it takes.

    Args:
        name: What it is called by.
        function: With TRL's signature, ``f(prompts, completions, completion_ids, **columns)``, or any part of it; async
            or not.

    Raises:
        RewardError: If it can't be called by name.

    Example:
        >>> reward = FunctionReward("short", lambda completions: [-len(c) for c in completions])
        >>> reward(RewardBatch(["2+2?"], ["four"], [[17]], {}))
        [-4]
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.arguments = Arguments(name, function.forward if isinstance(function, nn.Module) else function)

    def __call__(self, batch: RewardBatch, **log: Callable[..., None]) -> Any:
        """What the function returns: rewards, or an awaitable of them."""
        given = {
            "prompts": list(batch.prompts),  # lists of its own: a function may change what it gets
            "completions": batch.completions,
            "completion_ids": [list(ids) for ids in batch.completion_ids],
            **{name: list(values) for name, values in batch.columns.items()},
            "trainer_state": batch.state,
            **log,
        }
        return self.function(**self.arguments.chosen(given))
