"""Metrics of an optimizer step, or of an evaluation: sums over its micro-batches on all ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ft.data.layout import TokenBatch
from lightning_ft.distributed import sum_over_ranks


@dataclass(frozen=True)
class Totals:
    """Token metrics of a step over all ranks.

    Args:
        loss: Mean negative log-likelihood per supervised token, nats.
        accuracy: Share of supervised tokens that were the most probable ones.
        targets: Number of supervised tokens.
        tokens: Number of tokens, padding excluded.
        positions: Number of token positions, padding included.
        seconds: Time since the previous step.
        tokens_seen: Number of tokens of this and all earlier steps.
    """

    loss: float
    accuracy: float
    targets: int
    tokens: int
    positions: int
    seconds: float
    tokens_seen: int

    @property
    def padding_fraction(self) -> float:
        """Share of positions that hold padding."""
        return 1.0 - self.tokens / max(1, self.positions)

    @property
    def tokens_per_second(self) -> float:
        """Tokens, padding excluded, per second over all ranks."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def with_mean_value(loss: Tensor, count: int) -> Tensor:
    """A summed loss whose value is the mean, ``[]``; its gradients are still those of the sum.

    A step's gradients are summed over batches of different sizes and divided once, by the whole step's count. Callbacks
    that read ``outputs["loss"]``, such as `LearningRateFinder`, expect the mean.

    Args:
        loss: Loss, summed, ``[]``.
        count: Number of tokens or examples that it is summed over.

    Example:
        >>> weight = torch.tensor(2.0, requires_grad=True)
        >>> loss = with_mean_value(weight * 10, 5)
        >>> loss.backward()
        >>> loss.item(), weight.grad.item()
        (4.0, 10.0)
    """
    return loss - loss.detach() + loss.detach() / max(1, count)


def mean_factor(count: float, *, micro_batches: int, ranks: int) -> float:
    """What the gradients of a step are multiplied by, so that a sum of losses becomes their mean.

    Args:
        count: Number of tokens or examples of the step over all ranks.
        micro_batches: What each loss was divided by: Lightning divides by `accumulate_grad_batches`, also in a short
            last accumulation window.
        ranks: Number of ranks, over which DDP averaged.
    """
    return micro_batches * ranks / max(1.0, count)


def to_host(values: Sequence[Tensor]) -> Tensor:
    """Copy scalars to the CPU, with one copy per device: each copy waits for the device.

    Args:
        values: Scalars, on any devices.

    Returns:
        ``float64 [n]``.

    Example:
        >>> to_host([torch.tensor(1), torch.tensor(2.5)])
        tensor([1.0000, 2.5000], dtype=torch.float64)
    """
    found = torch.zeros(len(values), dtype=torch.float64)
    for device in dict.fromkeys(value.device for value in values):
        indices = [i for i, value in enumerate(values) if value.device == device]
        dtype = torch.float32 if device.type == "mps" else torch.float64
        found[indices] = torch.stack([values[i].to(dtype) for i in indices]).cpu().double()
    return found


class TokenMetrics:
    """Sums token metrics over the micro-batches of a step.

    The loss stays on its device until `reduce`, so that nothing waits for a GPU within an accumulation window.
    """

    def __init__(self) -> None:
        self.tokens_seen = 0
        self._started: float | None = None
        self._clear()

    def _clear(self) -> None:
        self._losses: list[Tensor] = []
        self._correct: list[Tensor] = []
        self._targets = self._tokens = self._positions = 0

    def start(self) -> None:
        """Start from zero: drop an unfinished step and start the clock."""
        self._clear()
        self._started = time.perf_counter()

    def add(self, loss: Tensor, correct: Tensor, batch: TokenBatch) -> None:
        """Add a micro-batch.

        Args:
            loss: Summed loss of the micro-batch, ``[]``.
            correct: Whether each supervised token was the most probable one, ``bool [n]``.
            batch: The batch.
        """
        self._losses.append(loss.detach().double() if loss.device.type != "mps" else loss.detach())
        self._correct.append(correct.sum())
        self._targets += batch.num_targets
        self._tokens += batch.num_tokens
        self._positions += batch.input_ids.numel()

    def reduce(self, device: torch.device) -> Totals:
        """Sum over all ranks, and start the next step."""
        on_host = to_host([*self._losses, *self._correct])
        loss, correct = (part.sum() for part in (on_host[: len(self._losses)], on_host[len(self._losses) :]))
        counts = torch.tensor([self._targets, self._tokens, self._positions], dtype=torch.float64)
        sums = torch.cat([torch.stack([loss, correct]), counts])
        total, hits, targets, tokens, positions = sum_over_ranks(sums, device).tolist()
        now = time.perf_counter()
        seconds = 0.0 if self._started is None else now - self._started
        self._started = now
        self.tokens_seen += int(tokens)
        self._clear()
        count = max(1.0, targets)
        return Totals(total / count, hits / count, int(targets), int(tokens), int(positions), seconds, self.tokens_seen)


class MeanMetrics:
    """Means of values by name, over the micro-batches of a step on all ranks.

    Every rank must add the same names in the same order, with empty values where it has none.

    Example:
        >>> metrics = MeanMetrics()
        >>> metrics.add({"reward": torch.tensor([1.0, 2.0])})
        >>> metrics.add({"reward": torch.tensor([6.0])})
        >>> metrics.reduce(torch.device("cpu")), metrics.reduce(torch.device("cpu"))
        ({'reward': 3.0}, {})
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}
        self._counts: dict[str, float] = {}

    def add(self, values: Mapping[str, Tensor], counts: Mapping[str, float] | None = None) -> None:
        """Add values.

        Args:
            values: Values by name, ``[k]`` each, or with a count their sum, ``[]``.
            counts: Number of values of a sum, by name.
        """
        for name, value in values.items():
            total = value.detach().sum()
            self._sums.setdefault(name, []).append(total if total.device.type == "mps" else total.double())
            count = value.numel() if counts is None or name not in counts else counts[name]
            self._counts[name] = self._counts.get(name, 0.0) + float(count)

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Mean per name over all ranks, without names that no rank added a value to; then start the next step."""
        names, sizes = list(self._sums), [len(values) for values in self._sums.values()]
        on_host = to_host([value for values in self._sums.values() for value in values])
        sums = [part.sum() for part in on_host.split(sizes)] if names else []
        counts = [torch.tensor(count, dtype=torch.float64) for count in self._counts.values()]
        self._sums, self._counts = {}, {}
        if not names:
            return {}
        totals, numbers = sum_over_ranks(torch.stack([*sums, *counts]), device).chunk(2)
        sums_and_counts = zip(names, totals.tolist(), numbers.tolist(), strict=True)
        return {name: total / number for name, total, number in sums_and_counts if number}
