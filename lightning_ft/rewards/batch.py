"""What a reward judges: completions of prompts, and what else is known about each."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_ft.data.batches import RESERVED
from lightning_ft.errors import RewardError
from lightning_ft.losses.statistics import power_sums
from lightning_ft.types import Message

Prompt = str | list[Message]
"""A prompt as it stood in its row."""


@dataclass(frozen=True)
class TrainerState:
    """How far training has come, under the names of transformers' `TrainerState`.

    Args:
        global_step: Optimizer steps taken.
        epoch: The current epoch.
        max_steps: Optimizer steps of the whole run, -1 if that isn't known.
    """

    global_step: int = 0
    epoch: float = 0.0
    max_steps: int = -1


@dataclass(frozen=True)
class RewardBatch:
    """`c` completions, each with its prompt and its row's columns.

    Args:
        prompts: Once for each completion, `c`.
        texts: The completions, `c`.
        completion_ids: Their tokens, `c`.
        columns: Other columns of the rows by name, `c` values each.
        state: How far training has come.

    Raises:
        RewardError: If there isn't one of each for every completion.

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
        others: dict[str, list[Any]] = {"prompts": self.prompts, "completion_ids": self.completion_ids, **self.columns}
        for name, values in others.items():
            if len(values) != len(self.texts):
                raise RewardError(
                    f"{len(self.texts)} completions with {len(values)} {name}: rewards need one for each completion, "
                    "those of a prompt repeated for all of its completions."
                )

    def __len__(self) -> int:
        return len(self.texts)

    def row(self, index: int) -> RewardBatch:
        """One completion by itself."""
        part = slice(index, index + 1)
        columns = {name: values[part] for name, values in self.columns.items()}
        return RewardBatch(self.prompts[part], self.texts[part], self.completion_ids[part], columns, self.state)

    @property
    def completions(self) -> list[str] | list[list[Message]]:
        """The completions in the type of their prompts: strings, or a conversation of one message."""
        answers: list[Any] = [
            text if isinstance(prompt, str) else [Message(role="assistant", content=text)]
            for prompt, text in zip(self.prompts, self.texts, strict=True)
        ]
        return answers

    @property
    def conversations(self) -> list[list[Message]]:
        """Prompts and completions together, in copies for whoever asks; a string prompt is one user turn."""
        return [
            [
                *([Message(role="user", content=prompt)] if isinstance(prompt, str) else deepcopy(prompt)),
                Message(role="assistant", content=text),
            ]
            for prompt, text in zip(self.prompts, self.texts, strict=True)
        ]


def check_columns(columns: Iterable[str]) -> None:
    """Refuse columns that would be taken for arguments.

    Raises:
        RewardError: With their names.

    Example:
        >>> check_columns(["answer", "completions"])
        Traceback (most recent call last):
        lightning_ft.errors.RewardError: The column 'completions' is named like an argument of reward functions ...
    """
    if taken := [name for name in columns if name in RESERVED]:
        raise RewardError(
            f"The column {taken[0]!r} is named like an argument of reward functions ({', '.join(RESERVED)}): rename it "
            "in the rows."
        )


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
        >>> rewards.unscored, rewards.statistics()["rewards/correct"].tolist()
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

    def statistics(self) -> dict[str, Tensor]:
        """Count, sum and sum of squares of each function's rewards and of the totals, NaN left out.

        Add them over micro-batches and ranks, then `lightning_ft.losses.statistics.mean_and_std`.

        Returns:
            ``rewards/NAME`` for each function and ``reward`` for the totals, ``float64 [3]`` each.
        """
        columns = zip(self.names, self.per_function.unbind(1), strict=True)
        return {**{f"rewards/{name}": power_sums(given) for name, given in columns}, "reward": power_sums(self.total)}
