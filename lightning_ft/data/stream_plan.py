"""Which rows of a stream are in which batch: a function of the seed, the epoch and the number of the batch.

Every rank reads the stream to its end, and takes its share of each step: the step of number k has the rows from
``k * step`` on, where ``step = batch_size * ranks``, and the rank of number r has the r-th part of them. So all ranks
have the same number of batches whichever rows are left out, and two ranks with batches of 4 see what one rank with
batches of 8 sees. Rows are read here, in the process of the rank, and encoded by the loader's workers.

A stream is shuffled block by block, so that a block is all that is held, and all that has to be read again on a resume.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NoReturn, TypedDict

import numpy as np

from lightning_ft.data.raw_rows import RawRow
from lightning_ft.data.sampler import EpochPlan
from lightning_ft.data.stream_sources import State, StreamSource
from lightning_ft.distributed import rank_zero_info
from lightning_ft.errors import ConfigError, DataError

_KEPT_BOOKMARKS = 4


class Bookmark(TypedDict):
    """A row that a stream can be returned to without reading the rows before it.

    Args:
        epoch: The epoch.
        row: Number of rows of the epoch before it, over all sources.
        source: Index of its source.
        number: Number of rows of the source before it.
        state: State of the source.
    """

    epoch: int
    row: int
    source: int
    number: int
    state: State


class StreamReader:
    """Reads the sources of a stream one after the other.

    Args:
        sources: The sources.
        epoch: The epoch.
        bookmark: Row to begin with; None for the first one.
    """

    def __init__(self, sources: Sequence[StreamSource], epoch: int, bookmark: Bookmark | None = None) -> None:
        self._sources, self._epoch = sources, epoch
        self._source, self._number = (bookmark["source"], bookmark["number"]) if bookmark is not None else (0, 0)
        self.row = bookmark["row"] if bookmark is not None else 0
        self._rows = self._open(bookmark)

    def take(self, count: int) -> list[RawRow]:
        """The next rows; fewer than `count` at the end of the stream."""
        return list(islice(self._rows, count))

    def bookmark(self) -> Bookmark | None:
        """The next row, if the source can return to it."""
        state = self._sources[self._source].state() if self._number else None
        if state is None:
            return None
        return Bookmark(epoch=self._epoch, row=self.row, source=self._source, number=self._number, state=state)

    def _open(self, bookmark: Bookmark | None) -> Iterator[RawRow]:
        for index in range(self._source, len(self._sources)):
            state = None if bookmark is None or index != bookmark["source"] else bookmark["state"]
            self._source, self._number = index, 0 if state is None or bookmark is None else bookmark["number"]
            read = 0
            for raw in self._sources[index].open(self._epoch, state, self._number):
                self._number, self.row, read = self._number + 1, self.row + 1, read + 1
                yield raw
            if not read and state is None:
                raise DataError(f"{self._sources[index].name}: it contains no rows.")


class StreamPlan(EpochPlan):
    """Yields the source rows of each batch on this rank.

    Args:
        sources: Sources, which are read one after the other.
        batch_size: Number of source rows per batch on each rank.
        shuffle: Whether rows are shuffled, in another order in every epoch.
        buffer: Number of rows that are shuffled together.
        seed: Seed of the orders.
        rank: Index of this rank.
        world_size: Number of ranks.

    Raises:
        ConfigError: For a `batch_size` or `buffer` below 1.

    Example:
        >>> source = StreamSource(({"input": n} for n in range(5)), "train", "train")
        >>> options = {"shuffle": False, "buffer": 100, "seed": 0, "world_size": 2}
        >>> plan = StreamPlan([source], batch_size=2, rank=1, **options)
        >>> [[row.number for row in rows] for rows in plan]
        [[3, 4], []]
    """

    def __init__(
        self,
        sources: Sequence[StreamSource],
        *,
        batch_size: int,
        shuffle: bool,
        buffer: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        if buffer < 1:
            raise ConfigError(f"shuffle_buffer={buffer}: expected at least 1.")
        super().__init__(0, batch_size=batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)
        self.sources, self.buffer = sources, buffer
        self._bookmarks: deque[Bookmark] = deque()
        self._end: tuple[int, int] | None = None  # an epoch that was read to its end, and its number of batches

    @property
    def step(self) -> int:
        """Number of source rows per batch over all ranks."""
        return self.batch_size * self.num_replicas

    def __len__(self) -> NoReturn:
        raise TypeError("A stream has no length.")

    def is_over(self, epoch: int, batch: int) -> bool:
        """See `EpochPlan`."""
        return self._end is not None and self._end[0] == epoch and batch >= self._end[1]

    def __iter__(self) -> Iterator[list[RawRow]]:
        # Not a generator itself: the position is read now, before workers fetch batches ahead.
        return self._batches(*self.next_position())

    def _batches(self, epoch: int, first: int) -> Iterator[list[RawRow]]:
        pending: list[RawRow] = []
        batch = first
        for block in self._blocks(epoch, first * self.step):
            pending += block
            full = len(pending) // self.step * self.step
            for start in range(0, full, self.step):
                batch += 1
                yield self._share(pending[start : start + self.step])
            del pending[:full]
        if pending:
            batch += 1
            yield self._share(pending)
        self._end = (epoch, batch)

    def _share(self, rows: list[RawRow]) -> list[RawRow]:
        numbers = np.array_split(np.arange(len(rows)), self.num_replicas)[self.rank]
        return [rows[number] for number in numbers]

    def _blocks(self, epoch: int, skip: int) -> Iterator[list[RawRow]]:
        """Blocks of rows in the order of the epoch, without the first `skip` rows of that order."""
        start = skip - skip % self.buffer
        reader = self._reader_at(epoch, start)
        while True:
            if (bookmark := reader.bookmark()) is not None:
                self._bookmarks.append(bookmark)
            rows = reader.take(self.buffer)
            if not rows:
                return
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch, start // self.buffer]).permutation(len(rows))
                rows = [rows[number] for number in order]
            yield rows[max(0, skip - start) :]
            start += self.buffer

    def _reader_at(self, epoch: int, row: int) -> StreamReader:
        """A reader whose next row is the one of that number in an epoch."""
        usable = [mark for mark in self._bookmarks if mark["epoch"] == epoch and mark["row"] <= row]
        nearest = max(usable, key=lambda mark: mark["row"]) if usable else None
        self._bookmarks = deque([] if nearest is None else [nearest])
        reader = StreamReader(self.sources, epoch, nearest)
        skipped = row - reader.row
        if skipped:
            rank_zero_info(
                f"The run continues at row {row + 1:,} of the stream: {skipped:,} rows are read and skipped, since the "
                "source has no state to return to (a datasets.IterableDataset without .shuffle() has)."
            )
        while reader.row < row and reader.take(min(self.buffer, row - reader.row)):
            pass
        if row - reader.row >= self.step:  # its last step may be short
            raise DataError(
                f"The stream ends after {reader.row:,} rows, before the row {row + 1:,} at which the checkpoint "
                "continues: it isn't the stream that the checkpoint was written with."
            )
        return reader

    def bookmarks(self, batch: int) -> list[Bookmark]:
        """Bookmarks before a batch; older ones are forgotten."""
        past = [mark for mark in self._bookmarks if mark["row"] <= batch * self.step]
        while len(past) > _KEPT_BOOKMARKS:
            self._bookmarks.remove(past.pop(0))
        return past

    def load_bookmarks(self, bookmarks: Sequence[Bookmark]) -> None:
        """Use bookmarks of a checkpoint."""
        self._bookmarks = deque(bookmarks)
