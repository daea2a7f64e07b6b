"""Everything that judges completions, called together: functions, async functions and reward models."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightning_ft.distributed import warn
from lightning_ft.errors import RewardError
from lightning_ft.losses.advantages import combine_rewards
from lightning_ft.rewards.batch import RewardBatch, Rewards, TrainerState, check_columns
from lightning_ft.rewards.function import BackgroundLoop, FunctionReward, OnNonFinite, as_rewards, quoted
from lightning_ft.rewards.model import ModelReward
from lightning_ft.rewards.resolve import NamedReward, RewardLike, resolve_rewards
from lightning_ft.types import Message


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


class RewardFunctions:
    """Judges completions with whatever rewards a user has.

    Functions have TRL's signature, ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``: one
    value for each completion, None where the function doesn't apply. A function without ``**kwargs`` gets what it names
    and no more. Besides the rows' columns there are `trainer_state`, ``log_metric(name, value)`` and
    ``log_extra(column, values)``. Completions are strings for string prompts, and
    ``[{"role": "assistant", "content": text}]`` for messages.

    Functions are called in their order; async ones are waited for together. Reward models are loaded with the first
    batch or by `to`, are frozen, and are no part of checkpoints.

    Args:
        rewards: One or a list of

            - functions, async or not, and objects that can be called;
            - `RewardModeling` modules, and other objects with ``score_conversations(conversations) -> Tensor [n]``;
            - sequence-classification models of transformers or PEFT, loaded from where their tokenizer is too;
            - strings, taken for the first of these that they can be: a function in a file
              (``path/to/file.py:function``), a checkpoint of `RewardModeling` (``*.ckpt``), a folder with a reward
              model, an import path (``package.module.function``), a reward model on the hub (``owner/name``);
            - dicts with ``function`` (or ``class_path``), and ``init_args`` where that first has to make the function;
              or with ``model``, and ``tokenizer``, ``batch_size``, ``dtype``, ``revision``, ``trust_remote_code``; and
              with ``weight`` and ``name``.
        weights: One for each, in place of those in dicts; 1 by default. With 0 a reward is logged only.
        taken: Names that other rewards are logged under; a reward of such a name gets a number behind it.
        on_nonfinite: What to do with a reward that isn't finite: ``error`` refuses it, ``skip`` counts it and takes it
            for None.

    Raises:
        RewardError: For what isn't a reward, or can't be found; says what was tried.
        ConfigError: For weights or names that don't fit.

    Example:
        >>> def correct(completions, answer):
        ...     return [float(c == a) for c, a in zip(completions, answer)]
        >>> rewards = RewardFunctions([correct, {"function": "trl.rewards.think_format_reward", "weight": 0.5}])
        >>> rewards.names, rewards.weights
        (('correct', 'think_format_reward'), tensor([1.0000, 0.5000]))
        >>> alone = RewardFunctions(correct)
        >>> alone.score(["2+2?", "2+2?"], ["4", "5"], [[17], [18]], {"answer": ["4", "4"]}).total
        tensor([1., 0.])
    """

    def __init__(
        self,
        rewards: RewardLike | Sequence[RewardLike],
        weights: Sequence[float] | None = None,
        taken: Sequence[str] = (),
        on_nonfinite: OnNonFinite = "error",
    ) -> None:
        self._given = (rewards, weights, taken, on_nonfinite)
        self._rewards = resolve_rewards(rewards, weights, taken)
        self._on_nonfinite = on_nonfinite
        self._loop = BackgroundLoop()
        self._warned = False

    def __reduce__(self) -> Any:  # loaded models and the thread stay behind: what was given says it all
        return type(self), self._given

    @property
    def names(self) -> tuple[str, ...]:
        """What the rewards are logged under, each another."""
        return tuple(reward.name for reward in self._rewards)

    @property
    def weights(self) -> Tensor:
        """Their weights, ``float32 [k]``."""
        return torch.tensor([reward.weight for reward in self._rewards], dtype=torch.float32)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Check, before anything is generated, that the rows have the columns that functions need.

        Args:
            columns: Names of the rows' columns besides the prompt.

        Raises:
            RewardError: If a function needs another, or one is named like an argument.
        """
        columns = list(columns)
        check_columns(columns)
        for reward in self._rewards:
            if isinstance(reward.judge, FunctionReward):
                reward.judge.arguments.check_columns(columns)

    def models(self) -> list[tuple[str, Any]]:
        """Names of the reward models, and what scores conversations there; loads those that aren't loaded yet."""
        return [(reward.name, reward.judge.load()) for reward in self._rewards if isinstance(reward.judge, ModelReward)]

    def to(self, device: torch.device | str) -> RewardFunctions:
        """Load the reward models, where they aren't yet, and move them."""
        for reward in self._rewards:
            if isinstance(reward.judge, ModelReward):
                reward.judge.to(device)
        return self

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[str] | Sequence[list[Message]],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]] | None = None,
        state: TrainerState | None = None,
    ) -> Rewards:
        """Judge completions.

        A function that fails on the batch is called once more with each completion by itself, until it is known which
        one it fails on; what it logs then is dropped.

        Args:
            prompts: The prompt of each completion, `c`: those of a prompt repeated for all of its completions.
            completions: Their texts, `c`.
            completion_ids: Their tokens, `c`.
            columns: The rows' other columns, `c` values each.
            state: How far training has come.

        Returns:
            Rewards of each function and their weighted sums, on the CPU.

        Raises:
            RewardError: If a reward fails, or gives anything but one finite number or None for each completion; names
                it, and the completion.
        """
        batch = RewardBatch(
            list(prompts),
            list(completions),
            [list(ids) for ids in completion_ids],
            dict(columns or {}),
            state if state is not None else TrainerState(),
        )
        self.check_columns(batch.columns)
        for reward in self._rewards:
            if isinstance(reward.judge, ModelReward):
                reward.judge.load()  # here, where it fails only once
        logs = [RewardLog(reward.name, len(batch)) for reward in self._rewards]
        given = self._judged(self._rewards, batch, logs) if len(batch) else [[] for _ in self._rewards]
        values, nonfinite = [], 0
        for reward, returned in zip(self._rewards, given, strict=True):
            if isinstance(returned, BaseException):
                raise self._failed(reward, batch, returned) from returned
            numbers, wrong = as_rewards(reward.name, returned, batch.texts, nonfinite=self._on_nonfinite)
            values.append(numbers)
            nonfinite += wrong
        per_function = torch.stack(values, dim=1)  # [c, k]
        total = combine_rewards(per_function, self.weights)  # [c]
        rewards = Rewards(self.names, per_function, total, logged_metrics(logs), logged_columns(logs), nonfinite)
        self._warn_unscored(rewards, batch)
        return rewards

    def _judged(self, rewards: Sequence[NamedReward], batch: RewardBatch, logs: Sequence[RewardLog]) -> list[Any]:
        """What each reward returned, or the exception that it raised."""
        given: list[Any] = []
        for reward, log in zip(rewards, logs, strict=True):
            try:
                given.append(reward(batch, log_metric=log.metric, log_extra=log.extra))
            except Exception as error:  # whatever a reward does, it must be told which one did it
                given.append(error)
        waiting = [i for i, returned in enumerate(given) if inspect.isawaitable(returned)]
        if waiting:
            for i, result in zip(waiting, self._loop.gather([given[i] for i in waiting]), strict=True):
                given[i] = result
        return given

    def _failed(self, reward: NamedReward, batch: RewardBatch, error: BaseException) -> RewardError:
        said = f"{type(error).__name__}: {error}"
        kind = "strings" if isinstance(batch.prompts[0], str) else "messages"
        for i in range(len(batch)):
            alone = self._judged([reward], batch.row(i), [RewardLog(reward.name, 1)])[0]
            if isinstance(alone, BaseException):
                return RewardError(
                    f"Reward {reward.name!r} failed on {quoted(i, batch.texts[i])} with {said} (completions are "
                    f"{kind}, as their prompts are)."
                )
        return RewardError(
            f"Reward {reward.name!r} failed on {len(batch)} completions, though on none of them alone, the first being "
            f"{quoted(0, batch.texts[0])}, with {said}."
        )

    def _warn_unscored(self, rewards: Rewards, batch: RewardBatch) -> None:
        if rewards.unscored and not self._warned:
            self._warned = True
            first = int(rewards.total.isnan().nonzero()[0])
            warn(
                f"No reward applied to {rewards.unscored} of {len(batch)} completions, the first being "
                f"{quoted(first, batch.texts[first])}: all of {', '.join(self.names)} gave None. Such completions are "
                "trained on with no advantage; this is told once.",
                stacklevel=3,
            )
