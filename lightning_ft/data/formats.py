"""Conversations: input-output pairs of any row format, as turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_ft.data.columns import Formats
from lightning_ft.data.fields import FieldReader
from lightning_ft.data.request import Message
from lightning_ft.data.turns import check_order

FORMATS = Formats(
    needed={
        "messages": ("messages",),
        "conversations": ("conversations",),
        "instruction": ("instruction", "output"),
        "input_output": ("input", "output"),
        "prompt_completion": ("prompt", "completion"),
    },
    extra={"instruction": ("input",)},
)
"""Formats of pairs and conversations."""


@dataclass(frozen=True)
class Conversation:
    """A checked row.

    Args:
        messages: System turn (if any), then user and assistant in turn; where rows must have an answer, it is the last.
        source: Where the row stands.
        row: Its line or number there.
        id: Names it; the row's `id` field, or ``source:row``.
        cluster: The row's `cluster` field, if any.
    """

    messages: tuple[Message, ...]
    source: str
    row: int
    id: str
    cluster: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows duplicates of each other."""
        return turns_key(self.messages)

    @property
    def together(self) -> tuple[Any, ...]:
        """Rows that have this in common are held out together."""
        return self.key

    @property
    def asked(self) -> tuple[Message, ...]:
        """The conversation up to the turn that is to be answered."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    def asking(self, messages: Sequence[Message]) -> Conversation:
        """The same row with other turns before the answer."""
        return replace(self, messages=(*messages, *self.messages[len(self.asked) :]))


def turns_key(messages: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    """Turns as something that can be looked up."""
    return tuple((message["role"], message["content"]) for message in messages)


class RowFormat(FieldReader[Conversation]):
    """Turns rows of one format into conversations.

    Args:
        name: One of :data:`FORMATS`.
        columns: The format's field names to those in the data, where they differ.
        answered: Whether rows must have an answer; prompts alone needn't.

    Example:
        >>> pairs = RowFormat("input_output", {"input": "question"})
        >>> row = pairs.read({"question": "2+2?", "output": "4"}, "train", 1)
        >>> row.id, [message["content"] for message in row.messages]
        ('train:1', ['2+2?', '4'])
    """

    def __init__(self, name: str, columns: Mapping[str, str] | None = None, *, answered: bool = True) -> None:
        super().__init__(FORMATS, name, columns)
        self.answered = answered

    def _read(self, row: Mapping[str, Any], place: dict[str, Any]) -> Conversation:
        fields = self.formats.needed[self.name]
        messages = self.asked(row)
        if len(fields) > 1 and (self.answered or row.get(self.column(fields[1])) is not None):
            messages += self.side(row, fields[1], "assistant")
        messages = self.with_system(row, messages)
        check_order(messages, answered=self.answered)
        return Conversation(tuple(messages), **place)


def detect_format(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None, *, answered: bool = True
) -> str:
    """The format of pairs that rows have; see `Formats.detect`.

    Raises:
        ConfigError: For a field that no format has, or fields of no one format.

    Example:
        >>> detect_format([{"question": "2+2?", "output": "4"}], {"input": "question"})
        'input_output'
    """
    return FORMATS.detect(rows, columns, answered=answered)
