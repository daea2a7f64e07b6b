"""Loader of a stream: counts what becomes of its rows, and is resumable at any batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch

from lightning_ft.data.layout import Example
from lightning_ft.data.loader import Collate, TokenLoader, name_origins
from lightning_ft.data.stream_plan import StreamPlan
from lightning_ft.data.stream_rows import RowStream, StreamBatch

_NAMED = 256  # last batches whose rows can be named


class StreamLoader(TokenLoader):
    """Data loader of a stream. Its position is the epoch and the batch, as that of any `TokenLoader`.

    Bookmarks only shorten the way back: without one, the rows before the position are read and skipped.
    """

    stream: RowStream[Any]
    trained: Callable[[], int | None]
    """Number of batches of the epoch that were trained on, if a Trainer knows it: it fetches one batch ahead."""
    _origins: deque[tuple[int, int, list[tuple[str, int]]]]

    @property
    def stream_plan(self) -> StreamPlan:
        """Which rows are in which batch."""
        return cast(StreamPlan, self.sampler)

    def __iter__(self) -> Any:
        self.stream.begin()
        self._origins = deque(maxlen=_NAMED)
        return super().__iter__()

    def _counted(self, iterator: Iterator[object]) -> Iterator[object]:
        for number, (batch, result) in enumerate(cast("Iterator[tuple[object, StreamBatch]]", iterator)):
            self.stream.count(result)
            if iterator is self._iterator_now:
                self._origins.append((self._epoch, self._yielded, result.origins))
                self._set(_yielded=self._yielded + 1)
                if number:  # a Trainer fetches one batch ahead, so the first one is dropped with an unused iterator
                    self._set(_loaded=None)
                self.stream_plan.bookmarks(self._done())  # forgets older ones, of batches fetched ahead none
            yield batch
        if iterator is self._iterator_now:
            self._loaded = None
            self.plan.finished(self._epoch)
        self.stream.tell(self.stream_plan.rank, self.stream_plan.num_replicas)

    def state_dict(self) -> dict[str, Any]:
        """The position, and bookmarks before it."""
        position: dict[str, Any] = super().state_dict()
        marks = self.stream_plan.bookmarks(position["batch"])
        return {**position, "bookmarks": [mark for mark in marks if mark["epoch"] == position["epoch"]]}

    def _done(self) -> int:
        trained = self.trained()
        return self._yielded if trained is None else min(self._yielded, trained)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin the next iterator at a position from `state_dict`."""
        super().load_state_dict(state_dict)
        self.stream_plan.load_bookmarks(state_dict.get("bookmarks", []))

    def row_names(self, epoch: int, batch: int) -> str:
        """Name the rows in a batch of this rank, by source; empty for one that was yielded long ago."""
        found = [origins for e, b, origins in self._origins if (e, b) == (epoch, batch)]
        return name_origins(found[-1]) if found else ""


class _StreamCollate:
    """Makes a batch of rows with an ordinary collate function, which is made for these rows.

    The first row of the stream is among the rows, though not in the batch, so that a batch without rows knows the
    columns.
    """

    def __init__(self, make: Callable[[Sequence[Any]], Collate], first: object) -> None:
        self._make, self._first = make, first

    def __call__(self, item: tuple[list[tuple[Any, tuple[Example, ...]]], StreamBatch]) -> tuple[object, StreamBatch]:
        rows, result = item
        collate = self._make([self._first, *(row for row, _ in rows)])
        return collate([(number, examples) for number, (_, examples) in enumerate(rows, start=1)]), result


def stream_loader(
    stream: RowStream[Any],
    plan: StreamPlan,
    make_collate: Callable[[Sequence[Any]], Collate],
    *,
    num_workers: int,
    trained: Callable[[], int | None] = lambda: None,
) -> StreamLoader:
    """Create a loader of a stream whose `state_dict` is its position.

    Args:
        stream: The stream, started.
        plan: Source rows of each batch.
        make_collate: Returns a function that makes a batch of given rows; pickled for workers that aren't forked.
        num_workers: Number of processes that check and encode rows and make batches.
        trained: Number of batches of the epoch that were trained on, if known.
    """
    loader = StreamLoader(
        cast(Any, stream.rows),
        batch_size=None,
        sampler=plan,
        collate_fn=cast(Any, _StreamCollate(make_collate, stream.first)),
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(plan.seed),  # a generator of its own leaves the global one untouched
        pin_memory=torch.cuda.is_available(),
    )
    loader.stream, loader.trained = stream, trained
    return loader


__all__ = ["StreamLoader", "stream_loader"]
