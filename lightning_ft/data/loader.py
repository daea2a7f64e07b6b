"""Batches of encoded rows: exact over ranks, and resumable at any batch."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_ft.data.cache import EncodedRows
from lightning_ft.data.layout import Example, TokenBatch, collate_examples
from lightning_ft.data.sampler import BatchPlan


class _Batches(torch.utils.data.Dataset[list[Example]]):
    """Gives the examples of a batch for the row numbers of a `BatchPlan`."""

    def __init__(self, parts: Sequence[EncodedRows]) -> None:
        self._parts = list(parts)
        self._starts = list(accumulate((len(part) for part in parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, rows: list[int]) -> list[Example]:
        return [self._example(row) for row in rows]

    def _example(self, row: int) -> Example:
        part = bisect_right(self._starts, row) - 1  # past empty parts, which start where the next one does
        return self._parts[part][row - self._starts[part]]


class _LayOut:
    """Lays a batch out; a rank without rows gets one token that isn't supervised, so that it takes part in the step."""

    def __init__(self, packing: bool, pad_token_id: int) -> None:
        self._packing, self._pad_token_id = packing, pad_token_id

    def __call__(self, examples: list[Example]) -> TokenBatch:
        nothing = Example(torch.tensor([self._pad_token_id]), torch.tensor([False]))
        return collate_examples(examples or [nothing], packing=self._packing, pad_token_id=self._pad_token_id)


class TokenLoader(StatefulDataLoader[TokenBatch]):
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


def token_loader(
    parts: Sequence[EncodedRows], plan: BatchPlan, *, packing: bool, pad_token_id: int, num_workers: int
) -> TokenLoader:
    """A loader whose `state_dict` is its position.

    Args:
        parts: Encoded rows of each source.
        plan: Which of them stand in which batch.
        packing: See `collate_examples`.
        pad_token_id: Stands where no token is; never attended to, never supervised.
        num_workers: Processes that lay batches out.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 calls it; no user can help it
        return TokenLoader(
            _Batches(parts),
            batch_size=None,
            sampler=plan,
            collate_fn=_LayOut(packing, pad_token_id),
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(plan.seed),  # its own, to draw nothing from the global one
            pin_memory=torch.cuda.is_available(),
        )
