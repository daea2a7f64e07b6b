"""Prompts for a Trainer, with whatever else the rewards want to know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.batches import RESERVED, PromptBatch
from lightning_ft.data.columns import Formats
from lightning_ft.data.encode import Encoded, encode_prompt
from lightning_ft.data.fields import CONVERSATIONS, FieldReader
from lightning_ft.data.formats import kwargs_key, turns_key
from lightning_ft.data.layout import Example
from lightning_ft.data.loader import Collate, EncodedRow
from lightning_ft.data.module import RowDataModule
from lightning_ft.data.row_types import RowType
from lightning_ft.data.split_report import SplitReport
from lightning_ft.data.splits import SplitName
from lightning_ft.data.templates import ChatTemplate
from lightning_ft.data.turns import RowError, check_order
from lightning_ft.errors import DataError
from lightning_ft.types import Message

FORMATS = Formats(
    required={name: (name,) for name in ("prompt", "messages", "conversations", "instruction", "input")},
    extra={"instruction": ("input", "history"), "prompt": ("history",), "input": ("history",)},
)
"""Formats of prompts, by the field that asks."""


@dataclass(frozen=True)
class Prompt:
    """A checked row.

    Args:
        messages: The turns up to the one that is to be answered, system turn (if any) first.
        text: Whether the row's prompt was a string, and there is no system turn.
        columns: What else stood in the row, by column.
        source: Where the row stands.
        row: Its line or number there.
        id: Names it; the row's `id` field, or ``source:row``.
        cluster: The row's `cluster` field, if any.
        answered: Whether an answer stood behind the prompt, which is left out.
        template_kwargs: What the chat template is given besides the messages: `tools`, `enable_thinking`, ...
    """

    messages: tuple[Message, ...]
    text: bool
    columns: Mapping[str, Any]
    source: str
    row: int
    id: str
    cluster: str | None = None
    answered: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows duplicates of each other."""
        return (*turns_key(self.messages), *kwargs_key(self.template_kwargs))

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """The prompt."""
        return self.messages

    @property
    def prompt(self) -> str | list[Message]:
        """The prompt as rewards get it."""
        return self.messages[-1]["content"] if self.text else list(self.messages)

    def with_prompt(self, messages: Sequence[Message]) -> Prompt:
        """The same row with another prompt."""
        return replace(self, messages=tuple(messages))


class PromptFormat(FieldReader[Prompt]):
    """Turns rows of one format into prompts.

    Args:
        name: One of :data:`FORMATS`.
        columns: The format's field names to those in the data, where they differ.

    Example:
        >>> row = PromptFormat("input").read({"input": "2+2?", "output": "4"}, "train", 1)
        >>> row.prompt, row.columns
        ('2+2?', {'output': '4'})
    """

    keeps_columns = True

    def __init__(self, name: str, columns: Mapping[str, str] | None = None) -> None:
        super().__init__(FORMATS, name, columns)
        used = {*FORMATS.required[name], *FORMATS.extra.get(name, ()), "system"}
        self._used = {self.column(field) for field in used}

    def _read(self, row: Mapping[str, Any], place: dict[str, Any]) -> Prompt:
        column = self.column(self.name)
        messages = self.with_system(row, self.read_prompt(row))
        answered = messages[-1:] != [] and messages[-1]["role"] == "assistant"
        if answered:
            if self.name not in CONVERSATIONS:
                fix = "A prompt ends with the turn of the user that is to be answered."
                raise RowError(column, "prompt ends with an answer", "", fix)
            messages = messages[:-1]
        try:
            check_order(messages, answered=False)
        except RowError as error:
            raise RowError(column, error.reason, error.detail, error.fix) from None
        return Prompt(
            messages=tuple(messages),
            text=isinstance(row[column], str) and len(messages) == 1,
            columns={str(name): value for name, value in row.items() if name not in self._used},
            answered=answered,
            template_kwargs=self.template_kwargs(row),
            **place,
        )


class Prompts(RowType[Prompt]):
    """Prompts that are answered by the model that learns."""

    name = "prompts"

    def reader(
        self, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None, *, answered: bool
    ) -> FieldReader[Prompt]:
        """See `RowType`."""
        return PromptFormat(FORMATS.detect(rows, columns), columns)

    def encode(self, tokenizer: PreTrainedTokenizerBase, row: Prompt, template: ChatTemplate) -> Encoded:
        """See `RowType`."""
        ids = torch.tensor(encode_prompt(tokenizer, row.messages, template, row.template_kwargs), dtype=torch.int64)
        return Encoded((Example(ids, torch.zeros(len(ids), dtype=torch.bool)),), prompt_matches=True)

    def check_encoded(self, encoded: Encoded) -> None:
        """See `RowType`."""
        if not len(encoded.example):
            raise RowError(None, "no token in the prompt", "", "Pass another chat_template=.")

    def complete(self, name: str, parts: list[list[Prompt]], report: SplitReport) -> list[list[Prompt]]:
        """Give all rows the same columns, and prompts of one type."""
        rows = [row for part in parts for row in part]
        counts = Counter(column for row in rows for column in row.columns)
        if taken := [column for column in RESERVED if column in counts]:
            raise DataError(
                f"{name}: the column {taken[0]!r} is named like an argument of reward functions "
                f"({', '.join(RESERVED)}). Rename or remove it."
            )
        for column, count in counts.items():
            if count < len(rows):
                report.notes[f"no {column!r} column, taken for None"] += len(rows) - count
        if answered := sum(row.answered for row in rows):
            report.notes["answer behind the last question, left out"] += answered
        nothing = dict.fromkeys(counts)
        text = all(row.text for row in rows)
        return [[replace(row, text=text, columns={**nothing, **row.columns}) for row in part] for part in parts]


PROMPTS = Prompts()
"""The kind of `PromptDataModule`."""


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

    row_type = PROMPTS

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
