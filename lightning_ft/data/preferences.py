"""Preferences for a Trainer: pairs of completions, or completions with a label."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from lightning_ft.data.batches import PreferenceBatch
from lightning_ft.data.cache import content_hash
from lightning_ft.data.loader import Collate, EncodedRow, SplitRows
from lightning_ft.data.module import RowDataModule
from lightning_ft.data.preference_rows import PREFERENCES, Preference, split_shared
from lightning_ft.data.splits import SplitName


class PreferenceDataModule(RowDataModule):
    """Preferences from files, the Hub or memory, checked and tokenized once, as `PreferenceBatch`es.

    Rows may be

    - ``{prompt, chosen, rejected}``, each a string or a list of messages;
    - ``{chosen, rejected}``, two whole conversations or two whole texts: the turns, or the words, that both start with
      are the prompt;
    - ``{prompt, completion, label}``, where `label` says whether the completion is a good one.

    Pairs may have a `margin`, a number that says by how much the chosen one is better. Each row may have a `system`, an
    `id` and a `cluster`. A split holds pairs or labelled completions, never both. A prompt that is a string is a turn
    of the user: for texts that hold their own markup (``Human:``, ``Assistant:``) pass ``chat_template="text"``.

    Only the last turn of a completion is supervised. The prompt of a row that is too long is cut for both completions
    alike; a completion never is.

    It takes the arguments of `RowDataModule`.

    Raises:
        ConfigError: For arguments that contradict each other.

    Example:
        >>> rows = [{"prompt": f"{n} + 1?", "chosen": str(n + 1), "rejected": str(n)} for n in range(10)]
        >>> data = PreferenceDataModule(rows, validation=0.2)
        >>> data.load_rows()
        >>> data.report["train"].kept, data.splits.rows["validation"][0][0].completions[0][0]["content"]
        (8, '7')
    """

    row_type = PREFERENCES

    def collate(self, split: SplitName) -> Collate:
        """Makes a `PreferenceBatch` of rows, also of none."""
        return _Batch([row for part in self.splits.rows[split] for row in part])

    def row_batches(self, split: SplitName, batch_size: int) -> Iterable[PreferenceBatch]:
        """All rows of a split once, in their order, whatever the rank: to compute something of each beforehand.

        Args:
            split: Which.
            batch_size: Rows of a batch; the last one's may be fewer.

        Raises:
            ConfigError: If there is no such split.
            DataError: If its rows can't be used.
        """
        self._encode(split)
        rows, collate = SplitRows(self.splits.encoded[split]), self.collate(split)
        for start in range(0, len(rows), batch_size):
            yield collate(rows[range(start, min(start + batch_size, len(rows)))])

    def encoded_key(self, split: SplitName) -> str:
        """A hash of the tokens of a split in the order of its rows: equal keys, equal :meth:`row_batches`' tokens.

        Raises:
            ConfigError: If there is no such split.
            DataError: If its rows can't be used.
        """
        self._encode(split)
        return content_hash(self.splits.encoded[split])


class _Batch:
    """Makes a batch of encoded rows and what else the rows say."""

    def __init__(self, rows: Sequence[Preference]) -> None:
        # Tensors, not rows: they are sent to every worker.
        self._labels = torch.tensor([row.labels for row in rows], dtype=torch.bool)  # [r, 1 or 2]
        margins = [row.margin for row in rows]
        self._margins = None if None in margins else torch.tensor(margins, dtype=torch.float32)  # [r]

    def __call__(self, rows: Sequence[EncodedRow]) -> PreferenceBatch:
        numbers = torch.tensor([number for number, _ in rows], dtype=torch.int64)  # [p]
        shared = [split_shared(examples) for _, examples in rows]
        return PreferenceBatch(
            prompts=[prompt for prompt, _ in shared],
            completions=[completions for _, completions in shared],
            labels=self._labels[numbers].flatten(),
            margins=None if self._margins is None else self._margins[numbers],
            rows=numbers,
        )
