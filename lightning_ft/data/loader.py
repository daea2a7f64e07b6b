"""Loader of encoded rows: exact over ranks, and resumable at any batch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeAlias, cast

import torch
from torch.utils.data import DataLoader

from lightning_ft.data.cache import EncodedRows
from lightning_ft.data.layout import Example
from lightning_ft.data.row_store import ChainedRows
from lightning_ft.data.row_types import RowT
from lightning_ft.data.sampler import BatchPlan
from lightning_ft.data.splits import SplitName, Splits

EncodedRow: TypeAlias = tuple[int, tuple[Example, ...]]
"""A row's number in its split, counted over all sources, and its examples."""

Collate: TypeAlias = Callable[[list[EncodedRow]], object]
"""Makes a batch from rows; on some ranks it may get no rows."""


class SplitRows(torch.utils.data.Dataset[list[EncodedRow]]):
    """Encoded rows of a split by number, several at a time.

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
        part = bisect_right(self._starts, row) - 1  # skips empty parts, which start where the next part does
        first = (row - self._starts[part]) * self._per_row[part]
        return tuple(self._parts[part][first + i] for i in range(self._per_row[part]))


class TokenLoader(DataLoader[list[EncodedRow]]):
    """Data loader that records its position and can resume from it.

    Batches depend only on their rows, so the epoch and the batch are the whole state. A Trainer's checkpoint counts the
    batches that were trained on, which may be fewer than those yielded. There is one iterator at a time: a new one ends
    the previous one.
    """

    _iterator_now: Any = None
    _epoch = 0
    _yielded = 0
    _loaded: tuple[int, int] | None = None  # a loaded position from which no batch was yielded yet

    @property
    def plan(self) -> BatchPlan:
        """Which rows are in which batch."""
        return cast(BatchPlan, self.sampler)

    def __iter__(self) -> Any:
        self.close()
        if self._loaded is not None:  # a Trainer that resumes at an epoch's end drops its first iterator unused
            self.plan.start_at(*self._loaded)
        self._epoch, self._yielded = self.plan.next_position()
        self._iterator_now = super().__iter__()
        self.plan.started()
        return self._counted(self._iterator_now)

    def _counted(self, iterator: Iterator[object]) -> Iterator[object]:
        for batch in iterator:
            if iterator is self._iterator_now:
                self._set(_yielded=self._yielded + 1, _loaded=None)
            yield batch
        if iterator is self._iterator_now:
            self.plan.finished(self._epoch)

    def _set(self, **attributes: object) -> None:
        """Set attributes that change with every batch: Lightning would record each change of a DataLoader, forever."""
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def state_dict(self) -> dict[str, int]:
        """The position: the epoch and the number of its batches that were yielded."""
        if self._iterator_now is None and not self._yielded:
            epoch, batch = self.plan.next_position()
        else:
            epoch, batch = self._epoch, self._done()
        return {"epoch": epoch + 1, "batch": 0} if self.plan.is_over(epoch, batch) else {"epoch": epoch, "batch": batch}

    def _done(self) -> int:
        """Number of batches of the epoch that a saved position counts as done."""
        return self._yielded

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next iterator at a position from `state_dict`."""
        self.close()
        self._yielded = 0
        epoch, batch = state_dict["epoch"], state_dict["batch"]
        self._loaded = None if self.plan.is_over(epoch, batch) else (epoch, batch)
        self.plan.start_at(epoch, batch)

    def close(self) -> None:
        """Stop the workers; the position is kept."""
        iterator, self._iterator_now = self._iterator_now, None
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


def token_loader(parts: Sequence[EncodedRows], plan: BatchPlan, collate: Collate, *, num_workers: int) -> TokenLoader:
    """Create a loader whose `state_dict` is its position.

    Args:
        parts: Encoded rows of each source.
        plan: Row numbers of each batch.
        collate: Function that makes a batch from rows.
        num_workers: Number of processes that make batches.
    """
    return TokenLoader(
        SplitRows(parts),
        batch_size=None,
        sampler=plan,
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(plan.seed),  # a generator of its own leaves the global one untouched
        pin_memory=torch.cuda.is_available(),
    )


_SHOWN = 20


def name_origins(origins: Sequence[tuple[str, int]]) -> str:
    """Name rows by source, for messages.

    Args:
        origins: Source and number of each row.

    Example:
        >>> name_origins([("train", 3), ("train", 4), ("a.jsonl", 1)])
        'rows 3, 4 of train; rows 1 of a.jsonl'
    """
    sources: dict[str, list[str]] = {}
    for source, number in origins[:_SHOWN]:
        sources.setdefault(source, []).append(f"{number:,}")
    named = "; ".join(f"rows {', '.join(numbers)} of {source}" for source, numbers in sources.items())
    return named + (f" and {len(origins) - _SHOWN} more" if len(origins) > _SHOWN else "")


def name_rows(loader: TokenLoader, splits: Splits[RowT], split: SplitName, epoch: int, batch: int) -> str:
    """Name the rows in a batch of this rank, by source, for messages.

    Args:
        loader: Loader that yielded the batch.
        splits: Rows of all splits.
        split: Name of the loader's split.
        epoch: Epoch of the loader's order.
        batch: Index of the batch in the epoch.

    Example:
        >>> from lightning_ft import PairDataModule
        >>> from transformers import AutoTokenizer
        >>> rows = [{"input": f"{n} + 1?", "output": str(n + 1)} for n in range(5)]
        >>> tokenizer = AutoTokenizer.from_pretrained("examples/tiny_base")
        >>> data = PairDataModule(rows, tokenizer=tokenizer, shuffle=False, batch_size=2, cache_dir=False)
        >>> data.setup("fit")
        >>> name_rows(data.train_dataloader(), data.splits, "train", epoch=0, batch=1)
        'rows 3, 4 of train'
    """
    rows = loader.plan.rows(loader.plan.order(epoch), batch)
    origins = ChainedRows(splits.rows.get(split, []))
    return name_origins([(origins[number].source, origins[number].row) for number in rows])
