"""Encodes rows in one process or in several: the same results, in the same order."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch.utils.data import DataLoader

from lightning_ft.data.encode import Encoded
from lightning_ft.data.overlong import RowEncoder
from lightning_ft.data.raw_rows import Problem
from lightning_ft.data.row_types import RowT, unchanged

Outcome: TypeAlias = Problem | tuple[Encoded, bool]
"""A row's problem; or its tokens, and whether its prompt was cut."""

_CHUNK = 100  # rows that a process encodes at a time


def outcomes(rows: Sequence[RowT], encoder: RowEncoder[RowT], num_workers: int = 0) -> Iterator[Outcome]:
    """Encode rows, in their order.

    Args:
        rows: Rows to encode.
        encoder: Encodes a row; it is pickled for processes that aren't forked.
        num_workers: Number of processes that encode; below two, or for a few rows, this one does.
    """
    chunks = [range(start, min(start + _CHUNK, len(rows))) for start in range(0, len(rows), _CHUNK)]
    if min(num_workers, len(chunks)) < 2:
        yield from (_outcome(encoder, row) for row in rows)
        return
    loader = DataLoader(
        _Chunks(rows, encoder),
        batch_size=None,
        sampler=chunks,
        num_workers=min(num_workers, len(chunks)),
        collate_fn=unchanged,
        generator=torch.Generator(),  # the global one stays where it is
    )
    for chunk in loader:
        yield from pickle.loads(chunk)


def _outcome(encoder: RowEncoder[RowT], row: RowT) -> Outcome:
    result = encoder(row)
    return result if isinstance(result, Problem) else (result[0], result[1] is not row)


class _Chunks(torch.utils.data.Dataset[bytes]):
    """Encoded rows of a range, pickled: as tensors, each of them would be a file that processes share."""

    def __init__(self, rows: Sequence[RowT], encoder: RowEncoder[RowT]) -> None:
        self._rows, self._encoder = rows, encoder

    def __getitem__(self, numbers: range) -> bytes:
        return pickle.dumps([_outcome(self._encoder, self._rows[number]) for number in numbers])
