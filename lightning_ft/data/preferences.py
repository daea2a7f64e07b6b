"""DataModule of preferences: pairs of completions, or completions with a label."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch

from lightning_ft.data.batches import PreferenceBatch
from lightning_ft.data.cache import content_hash
from lightning_ft.data.loader import EncodedRow, SplitRows
from lightning_ft.data.module import RowDataModule
from lightning_ft.data.preference_rows import PREFERENCES, Preference, split_shared
from lightning_ft.data.splits import SplitName


class PreferenceDataModule(RowDataModule):
    """Preferences from files, the hub or memory, checked and tokenized once, as `PreferenceBatch`es.

    Rows may be

    - ``{prompt, chosen, rejected}``, each a string or a list of messages;
    - ``{chosen, rejected}``, two whole conversations or two whole texts: the prompt is the turns, or the words, that
      both start with;
    - ``{prompt, completion, label}``, where `label` says whether the completion is desirable.

    Pairs may have a `margin`, the number by which the chosen completion is better; only `RewardModeling` uses it. Each
    row may have a `system`, an `id` and a `cluster`. A split holds pairs or labeled completions, never both. A prompt
    that is a string becomes a user turn: for texts that hold their own markup (``Human:``, ``Assistant:``) pass
    ``chat_template="text"``.

    Only the last turn of a completion is supervised. With ``on_overlong="truncate_prompt"`` the prompt of a row that is
    too long is cut in the same way for both completions; completions are never cut.

    Args:
        max_length: Maximum number of tokens per row: of the prompt with its longest completion.

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

    def make_collate(self) -> Callable[[Sequence[Preference]], Callable[[list[EncodedRow]], PreferenceBatch]]:
        """The function that makes a `PreferenceBatch` from any number of rows, none included, by the rows."""
        return _PreferenceCollate

    def row_batches(self, split: SplitName, batch_size: int) -> Iterable[PreferenceBatch]:
        """Yield all rows of a split once, in order, on every rank, for computations on each row before training.

        Args:
            split: Name of the split.
            batch_size: Number of rows per batch; the last batch may have fewer.

        Raises:
            ConfigError: If there is no such split.
            DataError: If its rows can't be used.
        """
        self._encode(split)
        rows, collate = SplitRows(self.splits.encoded[split]), self.collate(split)
        for start in range(0, len(rows), batch_size):
            yield cast(PreferenceBatch, collate(rows[range(start, min(start + batch_size, len(rows)))]))

    def encoded_key(self, split: SplitName) -> str:
        """Hash the tokens of a split in row order: equal keys mean equal tokens from :meth:`row_batches`.

        Raises:
            ConfigError: If there is no such split.
            DataError: If its rows can't be used.
        """
        self._encode(split)
        return content_hash(self.splits.encoded[split])


class _PreferenceCollate:
    """Makes a batch from encoded rows and from their labels and margins."""

    def __init__(self, rows: Sequence[Preference]) -> None:
        # Tensors rather than rows, since every worker gets a copy.
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
