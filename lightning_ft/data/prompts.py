"""Prompts for a Trainer, with the other columns of their rows for reward functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.batches import RESERVED, PromptBatch
from lightning_ft.data.columns import Formats
from lightning_ft.data.encode import Encoded, encode_prompt
from lightning_ft.data.fields import CONVERSATIONS, FieldReader, Origin
from lightning_ft.data.formats import kwargs_key, turns_key
from lightning_ft.data.layout import Example
from lightning_ft.data.loader import Collate, EncodedRow
from lightning_ft.data.module import RowDataModule
from lightning_ft.data.row_store import ChainedRows, MappedRows
from lightning_ft.data.row_types import RowType
from lightning_ft.data.split_report import SplitReport
from lightning_ft.data.splits import SplitName
from lightning_ft.data.templates import ChatTemplate
from lightning_ft.data.turns import RowError, check_order
from lightning_ft.errors import ConfigError, DataError
from lightning_ft.types import Message, Request

FORMATS = Formats(
    required={name: (name,) for name in ("prompt", "messages", "conversations", "instruction", "input")},
    extra={"instruction": ("input", "history"), "prompt": ("history",), "input": ("history",)},
)
"""Row formats of prompts, by the field of the prompt."""


@dataclass(frozen=True)
class Prompt:
    """A checked prompt.

    Args:
        messages: Turns up to the one to answer, system turn (if any) first.
        text: Whether the row's prompt was a string, without a system turn.
        columns: Other columns of the row.
        source: File, hub name, or the name of an argument.
        row: Line or number of the row in the source.
        id: The row's `id` field, or ``source:row``.
        cluster: The row's `cluster` field, if any.
        answered: Whether an answer followed the prompt; it is left out.
        template_kwargs: Variables of the chat template besides the messages: `tools`, `enable_thinking`, ...
    """

    messages: tuple[Message, ...]
    text: bool
    columns: Mapping[str, object]
    source: str
    row: int
    id: str
    cluster: str | None = None
    answered: bool = False
    template_kwargs: Mapping[str, object] = field(default_factory=dict)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for duplicate rows."""
        return (*turns_key(self.messages), *kwargs_key(self.template_kwargs))

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """The prompt."""
        return self.messages

    @property
    def prompt(self) -> str | list[Message]:
        """The prompt as reward functions get it."""
        return self.messages[-1]["content"] if self.text else list(self.messages)

    def with_prompt(self, messages: Sequence[Message]) -> Prompt:
        """The same row with another prompt."""
        return replace(self, messages=tuple(messages))


class PromptFormat(FieldReader[Prompt]):
    """Reads rows of one format as prompts.

    Args:
        name: One of :data:`FORMATS`.
        columns: Field names of the format to those in the data, where they differ.

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

    def _read(self, row: Mapping[str, object], origin: Origin) -> Prompt:
        column = self.column(self.name)
        messages = self.with_system(row, self.read_prompt(row))
        answered = messages[-1:] != [] and messages[-1]["role"] == "assistant"
        if answered:
            if self.name not in CONVERSATIONS:
                fix = "A prompt ends with the user turn to answer."
                raise RowError(column, "prompt ends with an answer", "", fix)
            messages = messages[:-1]
        try:
            check_order(messages, answered=False)
        except RowError as error:
            raise RowError(column, error.reason, error.detail, error.fix) from None
        template_kwargs = self.template_kwargs(row)
        return Prompt(
            messages=self.with_known_arguments(messages, template_kwargs),
            text=isinstance(row[column], str) and len(messages) == 1,
            columns={str(name): value for name, value in row.items() if name not in self._used},
            answered=answered,
            template_kwargs=template_kwargs,
            **origin,
        )


class Prompts(RowType[Prompt]):
    """Prompts that the trained model answers."""

    name = "prompts"

    def reader(
        self, rows: Sequence[Mapping[str, object]], columns: Mapping[str, str] | None, *, answered: bool
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

    def complete(self, name: str, parts: list[Sequence[Prompt]], report: SplitReport) -> list[Sequence[Prompt]]:
        """Give all rows the same columns, and all prompts the same type."""
        rows = ChainedRows(parts)
        counts = _columns(name, rows)
        for column, count in counts.items():
            if count < len(rows):
                report.notes[f"no {column!r} column, treated as None"] += len(rows) - count
        if answered := sum(row.answered for row in rows):
            report.notes["answer after the last question, left out"] += answered
        complete = partial(_as_first, tuple(counts), all(row.text for row in rows))
        return [MappedRows(part, complete) for part in parts]

    def follow(self, name: str, first: Sequence[Prompt]) -> Callable[[Prompt], Prompt]:
        """Give each row the columns of the first rows, and its prompt their type."""
        return partial(_as_first, tuple(_columns(name, first)), all(row.text for row in first))


def _columns(name: str, rows: Sequence[Prompt]) -> Counter[str]:
    """Columns of the rows, with the number of rows that have each."""
    counts = Counter(column for row in rows for column in row.columns)
    if taken := [column for column in RESERVED if column in counts]:
        raise DataError(
            f"{name}: the column {taken[0]!r} is named like an argument of reward functions "
            f"({', '.join(RESERVED)}). Rename or remove it."
        )
    return counts


def _as_first(columns: Sequence[str], text: bool, row: Prompt) -> Prompt:
    if text and not row.text:
        fix = "Reward functions get prompts of one type: give one of the first rows a list of messages, too."
        raise RowError("prompt", "messages in a stream whose first prompts are texts", "", fix)
    if other := next((column for column in row.columns if column not in columns), None):
        fix = "Give one of the first rows the column, too; it may be None."
        raise RowError(other, f"column {other!r} isn't in the first rows of the stream", "", fix)
    return replace(row, text=text, columns={**dict.fromkeys(columns), **row.columns})


PROMPTS = Prompts()
"""Row type of `PromptDataModule`."""


class PromptDataModule(RowDataModule):
    """Prompts from files, the Hub or memory, checked and tokenized once, as `PromptBatch`es.

    The prompt is one field: `prompt`, `messages`, `conversations` (both up to the last user turn), `instruction` (with
    Alpaca's `input`) or `input`; the first of these that the rows have. Each row may have a `system`. Every other
    column is passed to the reward functions as it is in the data, without the keys that Arrow adds to nested objects
    with None: `output` of rows ``{input, output}``, `id`, `cluster`, `answer`, `tests`, ... A row without a column that
    others have gets None for it, which is counted.

    Reward functions get the prompts of the rows: strings, or lists of messages where any row of the split has messages
    or a system turn. Where the prompt is truncated to `max_length`, they get the whole prompt.

    Args:
        max_length: Maximum number of tokens per prompt.
        batch_size: Number of prompts per batch on each rank.

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

    def requests(self, split: SplitName) -> list[Request]:
        """The rows of a split as requests, whose references are in the column `output`.

        Raises:
            ConfigError: If there is no such split, or a row has no `output`.
        """
        rows = self.splits.kept_rows(split)
        missing = next((row for row in rows if not isinstance(row.columns.get("output"), str)), None)
        if missing is not None:
            raise ConfigError(
                f"{split} rows can't be requests: {missing.source}, row {missing.row}, has no 'output' to compare "
                "answers with. Add it, or pass questions with their answers as requests=."
            )
        return [
            Request(
                name,
                row.messages,
                str(row.columns["output"]),
                None if row.columns.get("cluster") is None else str(row.columns["cluster"]),
                row.template_kwargs,
                None,
                cast("str | None", row.columns.get("prompt_context")),
                cast("Mapping[str, object] | None", row.columns.get("structured_output")),
            )
            for name, row in zip(self.splits.unique_ids(rows), rows, strict=True)
        ]

    def make_collate(self) -> Callable[[Sequence[Prompt]], Collate]:
        """The function that makes a `PromptBatch` of rows, of which there may be none, by the rows."""
        return _Batch


class _Batch:
    """Makes a batch from encoded prompts and the columns of their rows."""

    def __init__(self, rows: Sequence[Prompt]) -> None:
        self._rows = rows
        self._columns = tuple(rows[0].columns)  # the same for every row

    def __call__(self, rows: Sequence[EncodedRow]) -> PromptBatch:
        sources = [self._rows[number] for number, _ in rows]
        prompts: list[Any] = [row.prompt for row in sources]
        return PromptBatch(
            prompts=prompts,
            input_ids=[example.input_ids for _, (example,) in rows],
            columns={name: [row.columns[name] for row in sources] for name in self._columns},
            template_kwargs=[row.template_kwargs for row in sources],
        )
