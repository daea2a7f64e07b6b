"""Assigns rows to the batches of each rank, exactly and from a seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler, SequentialSampler

from lightning_ft.errors import ConfigError

_MOST_ROWS = 10**9
"""Largest number of rows of a mixed epoch, whose order takes 8 bytes for each."""


def mixed_epoch(sizes: Sequence[int], weights: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Row numbers of one epoch over several sources.

    A source of weight w appears w times per epoch: all of its rows for each whole unit of w, and for the fraction a
    random sample of them, drawn again in each epoch. With weight 1 every row appears once.

    Args:
        sizes: Number of rows of each source; row numbers run through all sources.
        weights: Weight of each source.
        rng: Generator that draws the samples.

    Example:
        >>> mixed_epoch([2, 4], [2.0, 0.5], np.random.default_rng(0)).tolist()
        [0, 1, 0, 1, 4, 5]
    """
    parts, start = [], 0
    for size, weight in zip(sizes, weights, strict=True):
        whole = int(weight)
        parts += [np.arange(start, start + size)] * whole
        if extra := _times(size, weight) - size * whole:
            parts.append(np.sort(rng.choice(size, extra, replace=False)) + start)
        start += size
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _times(size: int, weight: float) -> int:
    """Number of rows that a source contributes to an epoch."""
    return size * int(weight) + round((weight - int(weight)) * size)


class EpochPlan(DistributedSampler[Any]):
    """Base of the plans: the epoch and the batch at which the next iterator begins.

    The epoch is the one set by `set_epoch`, as a Trainer and Fabric do, after a resume too: :meth:`start_at` sets where
    the next iterator begins, and a caller that counts epochs from 0 again is corrected from there on. In a loop that
    doesn't set it, an iterator that was used up is followed by one of the next epoch. It is a `DistributedSampler` so
    that a Trainer does not replace it.

    Args:
        length: Number of rows per epoch; 0 if it isn't known.
        batch_size: Number of rows per batch on each rank.
        shuffle: Whether each epoch has an order of its own.
        seed: Seed of the orders.
        rank: Index of this rank.
        world_size: Number of ranks.

    Raises:
        ConfigError: For a `batch_size` below 1.
    """

    def __init__(self, length: int, *, batch_size: int, shuffle: bool, seed: int, rank: int, world_size: int) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1.")
        dataset: Any = range(length)  # only its length is read
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.batch_size = batch_size
        self._start: tuple[int, int] | None = None  # epoch and batch at which the next iterator begins
        self._offset = 0  # epochs missing from the caller's count since a resume
        self._next: int | None = None  # epoch after one that was used up, until `set_epoch` says another

    def is_over(self, epoch: int, batch: int) -> bool:
        """Whether an epoch is known to have no batch of this index."""
        raise NotImplementedError

    def next_position(self) -> tuple[int, int]:
        """Epoch and batch at which the next iterator begins."""
        if self._start is not None:
            return self._start
        return (self.epoch + self._offset if self._next is None else self._next), 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iterator.

        Args:
            epoch: Number of the epoch, from 0.
        """
        super().set_epoch(epoch)
        self._next = None

    def start_at(self, epoch: int, batch: int) -> None:
        """Begin the next iterator in the middle of an epoch, or at its end, where it is empty.

        Args:
            epoch: Epoch whose order is used.
            batch: Number of batches of the epoch to skip.
        """
        self._start = (epoch, batch)

    def started(self) -> None:
        """Begin further iterators at the start of an epoch; a loader with workers makes two iterators for one pass."""
        if self._start is not None or self._next is not None:
            self._offset = self.next_position()[0] - self.epoch
        self._start = self._next = None

    def finished(self, epoch: int) -> None:
        """Go on to the next epoch, unless `set_epoch` is called before the next iterator.

        Args:
            epoch: Epoch of the iterator that was used up.
        """
        self._next = epoch + 1


class BatchPlan(EpochPlan):
    """Yields the row numbers of each batch on this rank.

    Batches are slices of the epoch's order across ranks: two ranks with batches of 4 see what one rank with batches of
    8 sees. The last step divides what is left, so no row is dropped or repeated; a rank may then get an empty batch.

    Args:
        sizes: Number of rows of each source.
        weights: Weight of each source, see :func:`mixed_epoch`.
        batch_size: Number of rows per batch on each rank.
        shuffle: Whether each epoch has an order of its own.
        seed: Seed of the orders.
        rank: Index of this rank.
        world_size: Number of ranks.

    Raises:
        ConfigError: For weights that don't fit the sources.

    Example:
        >>> plan = BatchPlan([5], [1.0], batch_size=2, shuffle=False, seed=0, rank=0, world_size=2)
        >>> list(plan)
        [[0, 1], [4]]
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        numbers = [w for w in weights if isinstance(w, Real) and not isinstance(w, bool) and 0 <= w < math.inf]
        if len(sizes) != len(weights) or not sizes or len(numbers) != len(weights) or not sum(weights):
            expected = f"expected one weight for each of {len(sizes)} sources, finite numbers, none below 0, one above"
            raise ConfigError(f"mixing={list(weights)}: {expected}.")
        rows = sum(size * float(weight) for size, weight in zip(sizes, weights, strict=True))
        if rows > _MOST_ROWS:
            raise ConfigError(
                f"mixing={list(weights)}: an epoch would have {rows:.3g} rows. A weight is how often the rows of a "
                "source appear per epoch, 1 for once."
            )
        super().__init__(
            sum(sizes), batch_size=batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size
        )
        self.sizes, self.weights = list(sizes), list(weights)
        if sum(sizes) and not len(self):
            raise ConfigError(f"mixing={list(weights)}: an epoch would have no row of sources with {list(sizes)} rows.")

    def is_over(self, epoch: int, batch: int) -> bool:
        """See `EpochPlan`."""
        return batch >= len(self)

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers of an epoch, for all ranks together."""
        rng = np.random.default_rng([self.seed, epoch])
        rows = mixed_epoch(self.sizes, self.weights, rng)
        return rng.permutation(rows) if self.shuffle else rows

    def __iter__(self) -> Iterator[list[int]]:
        # Not a generator itself: the position is read now, before workers fetch batches ahead.
        return self._batches(*self.next_position())

    def _batches(self, epoch: int, first: int) -> Iterator[list[int]]:
        batches = range(first, len(self))
        order = self.order(epoch) if batches else np.zeros(0, dtype=np.int64)
        for batch in batches:
            yield self.rows(order, batch)

    def rows(self, order: np.ndarray, batch: int) -> list[int]:
        """Row numbers of a batch of this rank.

        Args:
            order: Row numbers of the epoch, from :meth:`order`.
            batch: Index of the batch in the epoch.
        """
        step = self.batch_size * self.num_replicas
        rows = order[batch * step : (batch + 1) * step]
        return [int(row) for row in np.array_split(rows, self.num_replicas)[self.rank]]

    def __len__(self) -> int:
        rows = sum(_times(size, weight) for size, weight in zip(self.sizes, self.weights, strict=True))
        return -(-rows // (self.batch_size * self.num_replicas))


class FixedBatchPlan(BatchPlan, SequentialSampler):  # type: ignore[misc]
    """A plan whose batches are the same in every epoch, for ``Trainer(overfit_batches=...)``.

    It is a `SequentialSampler` so that the Trainer, which expects one there, does not replace it.
    """
