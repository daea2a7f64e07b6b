"""Find the rows with the largest token id and with the most tokens, which a model may not support.

They are found in the memory-mapped columns of encoded rows: 100 million tokens take 0.2 seconds on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ft.data.cache import EncodedRows
from lightning_ft.data.row_types import RowT
from lightning_ft.data.splits import Splits


@dataclass(frozen=True)
class Extreme:
    """An extreme value and the row that has it.

    Args:
        value: Token id, or number of tokens.
        split: Name of the split.
        source: Source of the row.
        row: Line or number of the row in the source.
    """

    value: int
    split: str
    source: str
    row: int

    @property
    def origin(self) -> str:
        """The origin of the row, for messages.

        Example:
            >>> Extreme(3072, "train", "calls.jsonl", 41).origin
            'train (calls.jsonl, row 41)'
        """
        return f"{self.split} ({self.source}, row {self.row:,})"


def largest_token(splits: Splits[RowT]) -> Extreme | None:
    """The largest token id of all encoded splits; None if nothing is encoded.

    Example:
        >>> from lightning_ft import PairDataModule
        >>> from lightning_ft.data.cache import default_folder
        >>> largest_token(PairDataModule([{"input": "a", "output": "b"}]).splits) is None
        True
    """
    return _largest(splits, _largest_token_of)


def longest_row(splits: Splits[RowT]) -> Extreme | None:
    """The longest sequence of all encoded splits, a prompt with its completion; None if nothing is encoded."""
    return _largest(splits, _longest_of)


def rows_with(parts: Sequence[EncodedRows], tokens: Iterable[int], *, supervised: bool = False) -> dict[int, int]:
    """Number of rows that contain each of some tokens.

    Args:
        parts: The encoded sources of a split.
        tokens: Token ids.
        supervised: Whether only supervised tokens count.

    Returns:
        The count of each token that is in any row.
    """
    counts = dict.fromkeys(sorted(set(tokens)), 0)
    is_counted = np.zeros(max(counts, default=0) + 2, dtype=bool)  # by id; the last one is for all larger ids
    is_counted[list(counts)] = True
    for part in parts:
        rows, first = part.column("row").to_numpy(), 0
        for chunk, marks in zip(part.column("input_ids").chunks, part.column("supervised").chunks, strict=True):
            ids = chunk.flatten().to_numpy(zero_copy_only=False)
            found = is_counted[np.minimum(ids, len(is_counted) - 1)]
            if supervised:
                found = found & marks.flatten().to_numpy(zero_copy_only=False)
            hits = found.nonzero()[0]
            owners = rows[first + np.searchsorted(_ends(chunk), hits, side="right")]
            pairs = np.unique(np.stack([owners, ids[hits]]), axis=1)  # each token once per row
            for token, count in zip(*np.unique(pairs[1], return_counts=True), strict=True):
                counts[int(token)] += int(count)
            first += len(chunk)
    return {token: count for token, count in counts.items() if count}


def _largest(splits: Splits[RowT], find: Callable[[EncodedRows], tuple[int, int] | None]) -> Extreme | None:
    best: Extreme | None = None
    for name, parts in splits.encoded.items():
        for number, part in enumerate(parts):
            largest = find(part)
            if largest is not None and (best is None or largest[0] > best.value):
                row = splits.rows[name][number][largest[1] // part.per_row]
                best = Extreme(largest[0], name, row.source, row.row)
    return best


def _largest_token_of(part: EncodedRows) -> tuple[int, int] | None:
    """The largest token id, and the index of the first example that contains it."""
    best, first = None, 0
    for chunk in part.column("input_ids").chunks:
        values = chunk.flatten()
        highest = pc.max(values).as_py()
        if highest is not None and (best is None or highest > best[0]):
            position = pc.index(values, pa.scalar(highest, values.type)).as_py()
            best = (int(highest), first + int(np.searchsorted(_ends(chunk), position, side="right")))
        first += len(chunk)
    return best


def _longest_of(part: EncodedRows) -> tuple[int, int] | None:
    """The largest number of tokens, and the index of the first example that has it."""
    lengths = part.lengths
    return None if not lengths else (max(lengths), int(np.argmax(lengths)))


def _ends(chunk: pa.Array) -> np.ndarray:
    """End of each list of a column in the concatenated values."""
    return np.cumsum(pc.list_value_length(chunk).to_numpy(zero_copy_only=False))
