"""The rows that a model may have no room for: the one with the largest token id, the longest one, and where they are.

Read from the memory-mapped columns of encoded rows: a hundred million tokens took a fifth of a second on one core.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_ft.data.cache import EncodedRows
from lightning_ft.data.splits import Splits


@dataclass(frozen=True)
class Extreme:
    """A number and the row that has it.

    Args:
        value: A token id, or a number of tokens.
        split: Name of the split.
        source: The row's source.
        row: Its line or number there.
    """

    value: int
    split: str
    source: str
    row: int

    @property
    def where(self) -> str:
        """The row, for messages.

        Example:
            >>> Extreme(3072, "train", "calls.jsonl", 41).where
            'train (calls.jsonl, row 41)'
        """
        return f"{self.split} ({self.source}, row {self.row:,})"


def largest_token(splits: Splits[Any]) -> Extreme | None:
    """The largest token id of all encoded splits; None if nothing is encoded.

    Example:
        >>> from lightning_ft import PairDataModule
        >>> from lightning_ft.data.cache import default_folder
        >>> largest_token(PairDataModule([{"input": "a", "output": "b"}]).splits) is None
        True
    """
    return _largest(splits, _largest_token_of)


def longest_row(splits: Splits[Any]) -> Extreme | None:
    """The longest sequence of all encoded splits, a prompt with its completion; None if nothing is encoded."""
    return _largest(splits, _longest_of)


def rows_with(parts: Sequence[EncodedRows], tokens: Iterable[int]) -> dict[int, int]:
    """How many rows hold each of some tokens.

    Args:
        parts: The encoded sources of a split.
        tokens: Token ids.

    Returns:
        The count of each token that any row holds.
    """
    counts = dict.fromkeys(sorted(set(tokens)), 0)
    is_wanted = np.zeros(max(counts, default=0) + 2, dtype=bool)  # by id; the last stands for all larger ones
    is_wanted[list(counts)] = True
    for part in parts:
        rows, first = part.column("row").to_numpy(), 0
        for chunk in part.column("input_ids").chunks:
            ids = chunk.flatten().to_numpy(zero_copy_only=False)
            hits = is_wanted[np.minimum(ids, len(is_wanted) - 1)].nonzero()[0]
            owners = rows[first + np.searchsorted(_ends(chunk), hits, side="right")]
            pairs = np.unique(np.stack([owners, ids[hits]]), axis=1)  # a token once for each row
            for token, count in zip(*np.unique(pairs[1], return_counts=True), strict=True):
                counts[int(token)] += int(count)
            first += len(chunk)
    return {token: count for token, count in counts.items() if count}


def _largest(splits: Splits[Any], of: Any) -> Extreme | None:
    best: Extreme | None = None
    for name, parts in splits.encoded.items():
        for number, part in enumerate(parts):
            found = of(part)
            if found is not None and (best is None or found[0] > best.value):
                row = splits.rows[name][number][found[1] // part.per_row]
                best = Extreme(found[0], name, row.source, row.row)
    return best


def _largest_token_of(part: EncodedRows) -> tuple[int, int] | None:
    """The largest token and the number of the example that holds it first."""
    best, first = None, 0
    for chunk in part.column("input_ids").chunks:
        values = chunk.flatten()
        highest = pc.max(values).as_py()
        if highest is not None and (best is None or highest > best[0]):
            at = pc.index(values, pa.scalar(highest, values.type)).as_py()
            best = (int(highest), first + int(np.searchsorted(_ends(chunk), at, side="right")))
        first += len(chunk)
    return best


def _longest_of(part: EncodedRows) -> tuple[int, int] | None:
    lengths = part.lengths
    return None if not lengths else (max(lengths), int(np.argmax(lengths)))


def _ends(chunk: pa.Array) -> np.ndarray:
    """Where each list of a column ends in the values of all."""
    return np.cumsum(pc.list_value_length(chunk).to_numpy(zero_copy_only=False))
