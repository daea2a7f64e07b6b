"""All rewards of a run, called together: functions, async functions and reward models."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightning_ft.distributed import warn
from lightning_ft.errors import RewardError
from lightning_ft.losses.advantages import combine_rewards
from lightning_ft.rewards.batch import Prompt, RewardBatch, Rewards, TrainerState, check_columns
from lightning_ft.rewards.function import BackgroundLoop, FunctionReward, OnNonFinite, as_rewards, quoted
from lightning_ft.rewards.logged import Logged, add_logged
from lightning_ft.rewards.model import ConversationScorer, ModelReward
from lightning_ft.rewards.resolve import NamedReward, RewardLike, resolve_rewards


class RewardLog:
    """Metrics and columns that one reward logs for a batch.

    Args:
        name: Name of the reward.
        count: Number of completions in the batch.

    Example:
        >>> log = RewardLog("judge", 2)
        >>> log.metric("seconds", 1.0), log.metric("seconds", 3.0), log.extra("verdict", ["yes", "no"])
        (None, None, None)
        >>> logged_metrics([log]), logged_columns([log])
        ({'seconds': (4.0, 2)}, {'verdict': ['yes', 'no']})
    """

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.metrics: Logged = {}
        self.columns: dict[str, list[object]] = {}

    def metric(self, name: str, value: object) -> None:
        """Log a number; reward functions get this as `log_metric`.

        Raises:
            RewardError: If the value isn't a finite number.
        """
        number = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
        if not isinstance(number, Real) or not math.isfinite(number):
            raise RewardError(f"log_metric({name!r}, {value!r:.80}): expected a finite number.")
        self.metrics = add_logged(self.metrics, {name: (float(number), 1)})

    def extra(self, column: str, values: Iterable[object]) -> None:
        """Log the values of a column, or more of them; reward functions get this as `log_extra`."""
        self.columns.setdefault(column, []).extend(values)


def logged_metrics(logs: Sequence[RewardLog]) -> Logged:
    """Return sum and number of the values of each logged metric, over the calls of all rewards."""
    every: Logged = {}
    for log in logs:
        every = add_logged(every, log.metrics)
    return every


def logged_columns(logs: Sequence[RewardLog]) -> dict[str, list[object]]:
    """Return the columns of all rewards. If two rewards log the same name, the later one's is prefixed with its reward.

    Raises:
        RewardError: If a column doesn't have one value per completion.
    """
    columns: dict[str, list[object]] = {}
    for log in logs:
        for column, values in log.columns.items():
            if len(values) != log.count:
                raise RewardError(
                    f"Reward {log.name!r} logged {len(values)} values in the column {column!r} for {log.count} "
                    "completions; expected one per completion."
                )
            columns[f"{log.name}/{column}" if column in columns else column] = values
    return columns


class RewardFunctions:
    """Computes the rewards of completions with functions and reward models.

    Functions have TRL's signature, ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``: one
    value per completion, None where the function doesn't apply. A function without ``**kwargs`` gets only the arguments
    that its signature names. Besides the rows' columns there are `trainer_state`, ``log_metric(name, value)`` and
    ``log_extra(column, values)``. Completions are strings for string prompts, and
    ``[{"role": "assistant", "content": text}]`` for messages.

    Functions are called in order; async ones run concurrently. Reward models are loaded with the first batch or by
    `to`, are frozen, and are not part of checkpoints.

    Args:
        rewards: A reward or a list of rewards, each of them one of

            - a function, async or not, or a callable object;
            - a `RewardModeling` module, or another object with ``score_conversations(conversations) -> Tensor [n]``;
            - a sequence-classification model of transformers or PEFT that was loaded from a folder or hub name with a
              tokenizer;
            - a string, taken as the first of these that fits: a function in a file (``path/to/file.py:function``), a
              checkpoint of `RewardModeling` (``*.ckpt``), a folder with a reward model, an import path
              (``package.module.function``), a reward model on the hub (``owner/name``);
            - a dict with ``function`` (or ``class_path``), and ``init_args`` if it has to be called to create the
              reward function; or with ``model``, and ``tokenizer``, ``batch_size``, ``dtype``, ``revision``,
              ``trust_remote_code``; and with ``weight`` and ``name``.
        weights: Weight of each reward in the sum, instead of those in dicts; 1 by default. A reward of weight 0 is only
            logged.
        taken: Names that other rewards are logged under; a reward with such a name gets a number appended.
        on_nonfinite: What to do with a reward that isn't finite: ``error`` raises, ``skip`` counts it and treats it as
            None.

    Raises:
        RewardError: For an object that isn't a reward, or a string that names none; the message says what was tried.
        ConfigError: For weights or names that don't match the rewards.

    Example:
        >>> def correct(completions, answer):
        ...     return [float(c == a) for c, a in zip(completions, answer)]
        >>> rewards = RewardFunctions([correct, {"function": "trl.rewards.think_format_reward", "weight": 0.5}])
        >>> rewards.names, rewards.weights
        (('correct', 'think_format_reward'), tensor([1.0000, 0.5000]))
        >>> reward_functions = RewardFunctions(correct)
        >>> reward_functions.compute(["2+2?", "2+2?"], ["4", "5"], [[17], [18]], {"answer": ["4", "4"]}).total
        tensor([1., 0.])
    """

    def __init__(
        self,
        rewards: RewardLike | Sequence[RewardLike],
        weights: Sequence[float] | None = None,
        taken: Sequence[str] = (),
        on_nonfinite: OnNonFinite = "error",
    ) -> None:
        self._init_args = (rewards, weights, taken, on_nonfinite)
        self._rewards = resolve_rewards(rewards, weights, taken)
        self._on_nonfinite = on_nonfinite
        self._loop = BackgroundLoop()
        self._warned = False

    def __reduce__(self) -> tuple[object, ...]:
        # Without loaded models and the thread, which the arguments suffice to create again.
        return type(self), self._init_args

    @property
    def names(self) -> tuple[str, ...]:
        """Unique names that the rewards are logged under."""
        return tuple(reward.name for reward in self._rewards)

    @property
    def weights(self) -> Tensor:
        """Weights of the rewards, ``float32 [k]``."""
        return torch.tensor([reward.weight for reward in self._rewards], dtype=torch.float32)

    def check_columns(self, columns: Iterable[str], rows: str = "rows") -> None:
        """Check, before anything is generated, that the rows have the columns that functions need.

        Args:
            columns: Names of the columns of the rows, the prompt excluded.
            rows: Name of the rows, for the error.

        Raises:
            RewardError: If a function needs another column, or a column has the name of an argument.
        """
        columns = list(columns)
        check_columns(columns)
        for reward in self._rewards:
            if isinstance(reward.reward, FunctionReward):
                reward.reward.arguments.check_columns(columns, rows)

    def models(self) -> list[tuple[str, ConversationScorer]]:
        """Return the name and the model of each reward model, loading those that aren't loaded yet."""
        return [
            (reward.name, reward.reward.load()) for reward in self._rewards if isinstance(reward.reward, ModelReward)
        ]

    def to(self, device: torch.device | str) -> RewardFunctions:
        """Load the reward models, if they aren't loaded yet, and move them to a device."""
        for reward in self._rewards:
            if isinstance(reward.reward, ModelReward):
                reward.reward.to(device)
        return self

    @torch.no_grad()
    def compute(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, list[Any]] | None = None,
        state: TrainerState | None = None,
    ) -> Rewards:
        """Compute the rewards of completions.

        A function that fails on the batch is called again with one completion at a time, to find the one that it fails
        on; what it logs then is dropped.

        Args:
            prompts: Prompt of each completion, `c` in total.
            completions: Text of each completion, `c` in total.
            completion_ids: Token ids of each completion, `c` lists.
            columns: Other columns of the rows by name, `c` values each.
            state: Progress of training.

        Returns:
            Rewards of each function and their weighted sums, on the CPU.

        Raises:
            RewardError: If a reward fails, or returns something else than a finite number or None per completion; the
                message names the reward and the completion.
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
            if isinstance(reward.reward, ModelReward):
                reward.reward.load()  # outside `_call`, so that a failure isn't retried per completion
        logs = [RewardLog(reward.name, len(batch)) for reward in self._rewards]
        results = self._call(self._rewards, batch, logs) if len(batch) else [[] for _ in self._rewards]
        values, nonfinite = [], 0
        for reward, returned in zip(self._rewards, results, strict=True):
            if isinstance(returned, BaseException):
                raise self._failure(reward, batch, returned) from returned
            numbers, num_nonfinite = as_rewards(reward.name, returned, batch.texts, nonfinite=self._on_nonfinite)
            values.append(numbers)
            nonfinite += num_nonfinite
        per_function = torch.stack(values, dim=1)  # [c, k]
        total = combine_rewards(per_function, self.weights)  # [c]
        rewards = Rewards(self.names, per_function, total, logged_metrics(logs), logged_columns(logs), nonfinite)
        self._warn_unrewarded(rewards, batch)
        return rewards

    def _call(self, rewards: Sequence[NamedReward], batch: RewardBatch, logs: Sequence[RewardLog]) -> list[object]:
        """Return what each reward returned, or the exception that it raised."""
        results: list[object] = []
        for reward, log in zip(rewards, logs, strict=True):
            try:
                results.append(reward(batch, log_metric=log.metric, log_extra=log.extra))
            except (Exception, SystemExit) as error:  # whatever a function raises, or a completion's code that it runs
                results.append(error)
        pending = {i: result for i, result in enumerate(results) if inspect.isawaitable(result)}
        if pending:
            for i, result in zip(pending, self._loop.gather(list(pending.values())), strict=True):
                results[i] = result
        return results

    def _failure(self, reward: NamedReward, batch: RewardBatch, error: BaseException) -> RewardError:
        """Return an error that names the completion that a reward fails on, found by calling it with one at a time."""
        cause = f"{type(error).__name__}: {error}"
        completion_type = "strings" if isinstance(batch.prompts[0], str) else "messages"
        for i in range(len(batch)):
            result = self._call([reward], batch.row(i), [RewardLog(reward.name, 1)])[0]
            if isinstance(result, BaseException):
                return RewardError(
                    f"Reward {reward.name!r} failed on {quoted(i, batch.texts[i])} with {cause} (completions are "
                    f"{completion_type}, like their prompts)."
                )
        return RewardError(
            f"Reward {reward.name!r} failed on a batch of {len(batch)} completions, though on none of them alone, with "
            f"{cause}. The first one is {quoted(0, batch.texts[0])}."
        )

    def _warn_unrewarded(self, rewards: Rewards, batch: RewardBatch) -> None:
        counted = [reward.name for reward in self._rewards if reward.weight]
        if rewards.num_unrewarded and counted and not self._warned:
            self._warned = True
            first = int(rewards.total.isnan().nonzero()[0])
            warn(
                f"No reward applied to {rewards.num_unrewarded} of {len(batch)} completions, the first being "
                f"{quoted(first, batch.texts[first])}: all of {', '.join(counted)} returned None. Such completions "
                "get an advantage of 0. This warning is shown once.",
                stacklevel=3,
            )
