"""Inputs and outputs of rewards: completions with their prompts and columns, and the rewards of each completion."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_ft.data.batches import RESERVED
from lightning_ft.errors import RewardError
from lightning_ft.losses.statistics import power_sums
from lightning_ft.rewards.logged import Logged
from lightning_ft.types import Message

Prompt = str | list[Message]
"""A prompt as it appears in its row."""


@dataclass(frozen=True)
class TrainerState:
    """Progress of training, with the field names of transformers' `TrainerState`.

    Args:
        global_step: Number of optimizer steps taken.
        epoch: Index of the current epoch.
        max_steps: Number of optimizer steps of the whole run; -1 if unknown.
    """

    global_step: int = 0
    epoch: float = 0.0
    max_steps: int = -1


@dataclass(frozen=True)
class RewardBatch:
    """`c` completions, each with its prompt and the columns of its row.

    Args:
        prompts: Prompt of each completion, `c` in total.
        texts: Text of each completion, `c` in total.
        completion_ids: Token ids of each completion, `c` lists.
        columns: Other columns of the rows by name, `c` values each.
        state: Progress of training.

    Raises:
        RewardError: If these don't have one entry per completion.

    Example:
        >>> batch = RewardBatch([[{"role": "user", "content": "2+2?"}]], ["4"], [[17]], {"answer": ["4"]})
        >>> batch.completions
        [[{'role': 'assistant', 'content': '4'}]]
        >>> [message["role"] for message in batch.conversations[0]]
        ['user', 'assistant']
    """

    prompts: list[Prompt]
    texts: list[str]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    state: TrainerState = field(default_factory=TrainerState)

    def __post_init__(self) -> None:
        others: dict[str, Sized] = {"prompts": self.prompts, "completion_ids": self.completion_ids, **self.columns}
        for name, values in others.items():
            if len(values) != len(self.texts):
                raise RewardError(
                    f"{len(self.texts)} completions with {len(values)} {name}: rewards need one per completion. Repeat "
                    "the values of a prompt for each of its completions."
                )

    def __len__(self) -> int:
        return len(self.texts)

    def row(self, index: int) -> RewardBatch:
        """Return a batch of one completion."""
        part = slice(index, index + 1)
        columns = {name: values[part] for name, values in self.columns.items()}
        return RewardBatch(self.prompts[part], self.texts[part], self.completion_ids[part], columns, self.state)

    @property
    def completions(self) -> list[Prompt]:
        """The completions in the type of their prompts: strings, or a conversation of one message."""
        return [
            text if isinstance(prompt, str) else [Message(role="assistant", content=text)]
            for prompt, text in zip(self.prompts, self.texts, strict=True)
        ]

    @property
    def conversations(self) -> list[list[Message]]:
        """New message lists of prompt and completion; a string prompt becomes a user message."""
        return [
            [
                *([Message(role="user", content=prompt)] if isinstance(prompt, str) else deepcopy(prompt)),
                Message(role="assistant", content=text),
            ]
            for prompt, text in zip(self.prompts, self.texts, strict=True)
        ]


def check_columns(columns: Iterable[str]) -> None:
    """Check that no column has the name of an argument of reward functions.

    Raises:
        RewardError: If a column has; the message names it.

    Example:
        >>> check_columns(["answer", "completions"])
        Traceback (most recent call last):
        lightning_ft.errors.RewardError: The column 'completions' is named like an argument of reward functions ...
    """
    if taken := [name for name in columns if name in RESERVED]:
        raise RewardError(
            f"The column {taken[0]!r} is named like an argument of reward functions ({', '.join(RESERVED)}): rename it "
            "in your data."
        )


@dataclass(frozen=True, eq=False)
class Rewards:
    """Rewards of `c` completions by `k` reward functions.

    Args:
        names: Name of each function, `k` in total.
        per_function: Rewards of each function, NaN where it returned None, ``float32 [c, k]``.
        total: Weighted sum of each completion's rewards, NaN where every function with a weight returned None,
            ``float32 [c]``.
        logged: Metrics that functions logged with `log_metric`: sum and number of the values by name.
        extra: Columns that functions logged with `log_extra`, `c` values each.
        nonfinite: Number of rewards that weren't finite and were treated as None.

    Example:
        >>> import torch
        >>> values = torch.tensor([[1.0], [0.0], [float("nan")]])
        >>> rewards = Rewards(("correct",), values, values[:, 0])
        >>> rewards.num_unrewarded, rewards.statistics()["rewards/correct"].tolist()
        (1, [2.0, 1.0, 1.0])
    """

    names: tuple[str, ...]
    per_function: Tensor
    total: Tensor
    logged: Logged = field(default_factory=dict)
    extra: dict[str, list[object]] = field(default_factory=dict)
    nonfinite: int = 0

    def __len__(self) -> int:
        return len(self.total)

    @property
    def num_unrewarded(self) -> int:
        """Number of completions for which every function with a weight returned None."""
        return int(self.total.isnan().sum())

    def statistics(self) -> dict[str, Tensor]:
        """Return count, sum and sum of squares of each function's rewards and of the totals, NaN excluded.

        Add them up over micro-batches and ranks, and pass the sums to `lightning_ft.losses.statistics.mean_and_std`.

        Returns:
            ``rewards/NAME`` for each function and ``reward`` for the totals, ``float64 [3]`` each.
        """
        columns = zip(self.names, self.per_function.unbind(1), strict=True)
        sums = {f"rewards/{name}": power_sums(values) for name, values in columns}
        return {**sums, "reward": power_sums(self.total)}
