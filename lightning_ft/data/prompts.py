"""Prompts for a Trainer, with whatever else the rewards want to know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_ft.data.batches import PromptBatch
from lightning_ft.data.loader import Collate, EncodedRow
from lightning_ft.data.module import RowDataModule
from lightning_ft.data.prompt_rows import PROMPTS, Prompt
from lightning_ft.data.splits import SplitName


class PromptDataModule(RowDataModule):
    """Prompts from files, the Hub or memory, checked and tokenized once, as `PromptBatch`es.

    What is asked stands in one field: `prompt`, `messages`, `conversations` (both asked up to the last turn of the
    user), `instruction` (with Alpaca's `input`) or `input`; the first of these that rows have. Each row may have a
    `system`. Every other column goes to the rewards as it is: `output` of rows ``{input, output}``, `id`, `cluster`,
    `answer`, `tests`, ... A row without a column that others have gives None there, which is counted.

    Rewards get prompts as they stood in the rows: strings, or lists of messages where any row of the split has messages
    or a system turn. Where the prompt is cut to `max_length`, they get the whole one.

    It takes the arguments of `RowDataModule`, `max_length` and `batch_size` being of prompts.

    Raises:
        ConfigError: For arguments that contradict each other.

    Example:
        >>> data = PromptDataModule([{"input": f"{n} + 1?", "output": n + 1} for n in range(10)], validation=0.2)
        >>> data.load_rows()
        >>> row = data.splits.rows["validation"][0][0]
        >>> row.prompt, row.columns
        ('6 + 1?', {'output': 7})
    """

    kind = PROMPTS

    def collate(self, split: SplitName) -> Collate:
        """Makes a `PromptBatch` of rows, also of none."""
        return _Batch([row for part in self.splits.rows[split] for row in part])


class _Batch:
    """Makes a batch of encoded prompts and the columns of their rows."""

    def __init__(self, rows: Sequence[Prompt]) -> None:
        self._rows = rows
        self._columns = tuple(rows[0].columns)  # those of every row

    def __call__(self, rows: Sequence[EncodedRow]) -> PromptBatch:
        found = [self._rows[number] for number, _ in rows]
        prompts: list[Any] = [row.prompt for row in found]
        return PromptBatch(
            prompts=prompts,
            input_ids=[example.input_ids for _, (example,) in rows],
            columns={name: [row.columns[name] for row in found] for name in self._columns},
        )
