"""Sums over the micro-batches of an optimizer step, or of an evaluation, on all ranks."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ft.data.layout import TokenBatch


@dataclass(frozen=True)
class Totals:
    """What a window held, over all ranks.

    Args:
        loss: Mean negative log-likelihood of a supervised token, nats.
        accuracy: Share of supervised tokens that were the most probable.
        targets: Supervised tokens.
        tokens: All tokens, padding excluded.
        places: All places, padding included.
        seconds: Since the last window ended.
        tokens_seen: Tokens of this and all earlier windows.
    """

    loss: float
    accuracy: float
    targets: int
    tokens: int
    places: int
    seconds: float
    tokens_seen: int

    @property
    def padding_fraction(self) -> float:
        """Share of places that hold no token."""
        return 1.0 - self.tokens / max(1, self.places)

    @property
    def tokens_per_second(self) -> float:
        """Tokens, padding excluded, per second over all ranks."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class TokenWindow:
    """Adds up micro-batches until it is reduced.

    The loss stays on its device until then, so that nothing waits for a GPU within a window.
    """

    def __init__(self) -> None:
        self.tokens_seen = 0
        self._started: float | None = None
        self._clear()

    def _clear(self) -> None:
        self._losses: list[Tensor] = []
        self._correct: list[Tensor] = []
        self._targets = self._tokens = self._places = 0

    def start(self) -> None:
        """Begin anew: drop an unfinished window and start the clock."""
        self._clear()
        self._started = time.perf_counter()

    def add(self, loss: Tensor, correct: Tensor, batch: TokenBatch) -> None:
        """Add a micro-batch.

        Args:
            loss: Its summed loss, ``[]``.
            correct: Whether each target was the most probable token, ``bool [n]``.
            batch: The batch.
        """
        self._losses.append(loss.detach().double() if loss.device.type != "mps" else loss.detach())
        self._correct.append(correct.sum())
        self._targets += batch.num_targets
        self._tokens += batch.num_tokens
        self._places += batch.input_ids.numel()

    def reduce(self, device: torch.device) -> Totals:
        """Sum over all ranks, and start the next window."""
        zero = torch.zeros((), dtype=torch.float64)
        loss = sum((value.cpu() for value in self._losses), zero)
        correct = sum((value.cpu() for value in self._correct), zero)
        sums = torch.stack([loss, correct.double(), *(zero + n for n in (self._targets, self._tokens, self._places))])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sums = sums.to(device)
            torch.distributed.all_reduce(sums)
        total, hits, targets, tokens, places = sums.tolist()
        now = time.perf_counter()
        seconds = 0.0 if self._started is None else now - self._started
        self._started = now
        self.tokens_seen += int(tokens)
        self._clear()
        count = max(1.0, targets)
        return Totals(total / count, hits / count, int(targets), int(tokens), int(places), seconds, self.tokens_seen)
