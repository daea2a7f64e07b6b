"""Which rows stand in which batch of which rank, exactly and from a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler

from lightning_ft.errors import ConfigError


def mixed_epoch(sizes: Sequence[int], weights: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Row numbers of one epoch over several sources.

    A source of weight w stands in an epoch w times: as often as w is whole, and for the rest a part of it that is drawn
    anew. With weight 1 every row stands there once.

    Args:
        sizes: Rows of each source; their numbers follow each other.
        weights: Weight of each source.
        rng: Draws the fractions.

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
    """How many rows of an epoch a source gives."""
    return size * int(weight) + round((weight - int(weight)) * size)


class BatchPlan(DistributedSampler[list[int]]):
    """Yields, for this rank, the row numbers of each batch.

    Batches are cut from the epoch's order across ranks: two ranks with batches of 4 see what one rank with batches of 8
    sees. The last step shares what is left, so nothing is dropped or repeated; a rank may get an empty batch then. It
    is a `DistributedSampler` so that a Trainer leaves it in place.

    Its iterators can be stopped and resumed at any batch. A Trainer that was stopped in the middle of an epoch (by
    `max_steps`, say) counts that epoch as run when it is resumed; the plan still goes on with the rest of it.

    Args:
        sizes: Rows of each source.
        weights: See :func:`mixed_epoch`.
        batch_size: Rows of a batch on one rank.
        shuffle: Draw an order for each epoch.
        seed: Of the orders.
        rank: This rank.
        world_size: How many there are.

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
        if len(sizes) != len(weights) or not sizes or any(w < 0 for w in weights) or not sum(weights):
            expected = f"expected one weight for each of {len(sizes)} sources, none below 0 and one above"
            raise ConfigError(f"mixing={list(weights)}: {expected}.")
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1.")
        every: Any = range(sum(sizes))  # it is only asked for its length
        super().__init__(every, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)
        self.sizes, self.weights, self.batch_size = list(sizes), list(weights), batch_size
        self._behind = 0  # by how many epochs the order is behind the Trainer's count
        self._resumed: int | None = None  # epoch of an order that is gone on with, before the Trainer named its own
        self._named = False  # whether the Trainer has

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers of an epoch, over all ranks."""
        rng = np.random.default_rng([self.seed, epoch])
        rows = mixed_epoch(self.sizes, self.weights, rng)
        return rng.permutation(rows) if self.shuffle else rows

    def __iter__(self) -> Iterator[list[int]]:
        return _Batches(self, self.epoch - self._behind)

    def __len__(self) -> int:
        rows = sum(_times(size, weight) for size, weight in zip(self.sizes, self.weights, strict=True))
        return -(-rows // (self.batch_size * self.num_replicas))

    def resume(self, epoch: int, batch: int) -> tuple[int, int]:
        """Go on where an iterator was stopped.

        Args:
            epoch: The epoch of its order.
            batch: How many batches of it were given.

        Returns:
            The epoch and batch to go on with.
        """
        if batch >= len(self):
            epoch, batch = epoch + 1, 0
        self._behind = self.epoch - epoch
        self._resumed = None if self._named else epoch
        return epoch, batch

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iterator, or the one just resumed, is of."""
        super().set_epoch(epoch)
        self._named = True
        if self._resumed is not None:
            self._behind, self._resumed = epoch - self._resumed, None


class _Batches(Iterator[list[int]]):
    """One epoch of a plan; its state is its place."""

    def __init__(self, plan: BatchPlan, epoch: int) -> None:
        self._plan, self._epoch, self._next = plan, epoch, 0
        self._order: np.ndarray | None = None

    def __next__(self) -> list[int]:
        if self._next >= len(self._plan):
            raise StopIteration
        if self._order is None:
            self._order = self._plan.order(self._epoch)
        ranks = self._plan.num_replicas
        step = self._plan.batch_size * ranks
        rows = self._order[self._next * step : (self._next + 1) * step]
        self._next += 1
        return [int(row) for row in np.array_split(rows, ranks)[self._plan.rank]]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._next = self._plan.resume(state["epoch"], state["next"])
        self._order = None
