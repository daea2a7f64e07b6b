"""Batches of encoded rows: exact over ranks, and resumable at any batch."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_ft.data.cache import EncodedRows
from lightning_ft.data.layout import Example
from lightning_ft.data.sampler import BatchPlan

EncodedRow: TypeAlias = tuple[int, tuple[Example, ...]]
"""The number of a row in its split, counted over all sources, and the examples that it is."""

Collate: TypeAlias = Callable[[list[EncodedRow]], Any]
"""Makes a batch of rows; a rank may have to make one of no rows."""


class SplitRows(torch.utils.data.Dataset[list[EncodedRow]]):
    """Gives rows of a split by their numbers, several at a time.

    Args:
        parts: Encoded rows of each source.
    """

    def __init__(self, parts: Sequence[EncodedRows]) -> None:
        self._parts = list(parts)
        self._starts = list(accumulate((part.num_rows for part in parts), initial=0))
        self._per_row = [part.per_row for part in parts]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, rows: Sequence[int]) -> list[EncodedRow]:
        return [(row, self._examples(row)) for row in rows]

    def _examples(self, row: int) -> tuple[Example, ...]:
        part = bisect_right(self._starts, row) - 1  # past empty parts, which start where the next one does
        first = (row - self._starts[part]) * self._per_row[part]
        return tuple(self._parts[part][first + i] for i in range(self._per_row[part]))


class TokenLoader(StatefulDataLoader[Any]):
    """Keeps its place where Lightning would lose it: between the end of `fit` and a checkpoint, and after a resume.

    At the end of `fit` a Trainer drops the iterator that knows the place. And a run that is resumed at the end of an
    epoch makes an iterator and drops it unused; the next one must begin where it would have. It has one iterator at a
    time: a new one ends the one before.
    """

    _last: Any = None
    _place: dict[str, Any] | None = None  # where a closed loader stood
    _resumed: tuple[dict[str, Any], int] | None = None  # a state, and how many batches were given before it

    def __iter__(self) -> Any:
        self._place = None
        if self._resumed is not None and self._last is not None:
            state, given = self._resumed
            self._resumed = None
            if self._last._num_yielded == given:
                self._stop_workers()
                super().load_state_dict(state)
        self._stop_workers()
        self._last = super().__iter__()
        if self._resumed is not None:
            self._resumed = (self._resumed[0], self._last._num_yielded)
        return self._last

    def state_dict(self) -> dict[str, Any]:
        """The place, also of a loader whose iterator is gone."""
        if self._iterator is None and self._last is not None:
            return self._last.state_dict()  # type: ignore[no-any-return]
        return self._place if self._place is not None else super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin the next iterator there."""
        self._stop_workers()
        self._last, self._place, self._resumed = None, None, (state_dict, 0)
        super().load_state_dict(state_dict)

    def close(self) -> None:
        """Stop the workers and remember the place."""
        if self._last is not None:
            self._place = self.state_dict()
            self._stop_workers()
            self._last = self._iterator = None

    def _stop_workers(self) -> None:
        """Left to the garbage collector, an iterator that wasn't used up waits five seconds for each of its workers."""
        iterators: list[Any] = [self._last, self._iterator]
        for iterator in iterators:
            if hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()


def token_loader(parts: Sequence[EncodedRows], plan: BatchPlan, collate: Collate, *, num_workers: int) -> TokenLoader:
    """A loader whose `state_dict` is its position.

    Args:
        parts: Encoded rows of each source.
        plan: Which of them stand in which batch.
        collate: Makes a batch of them.
        num_workers: Processes that do so.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 calls it; no user can help it
        return TokenLoader(
            SplitRows(parts),
            batch_size=None,
            sampler=plan,
            collate_fn=collate,
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(plan.seed),  # its own, to draw nothing from the global one
            pin_memory=torch.cuda.is_available(),
        )
