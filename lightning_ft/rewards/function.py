"""A Python function as a reward."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
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
        """What the function returns: rewards, or an awaitable of them.

        Each completion has copies of its prompt, messages and columns that are the function's own, so that it may
        change what it gets: the completions of a prompt share one row, which other rewards and epochs read too.
        """
        per_completion: dict[str, list[Any]] = {
            "prompts": batch.prompts,
            "completions": batch.completions,
            "completion_ids": batch.completion_ids,
            **batch.columns,
        }
        chosen = self.arguments.chosen(per_completion)
        copies = {name: [deepcopy(value) for value in values] for name, values in chosen.items()}
        return self.function(**copies, **self.arguments.chosen({"trainer_state": batch.state, **log}))
