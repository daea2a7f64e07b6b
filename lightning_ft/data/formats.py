"""Read input-output pairs, conversations and plain texts of any row format as messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from lightning_ft.data.columns import Formats
from lightning_ft.data.fields import FieldReader, Origin
from lightning_ft.data.keys import REFUSED_IN_PAIRS, Refusal, is_nonempty
from lightning_ft.data.tool_calls import parsed
from lightning_ft.data.turns import RowError, check_order, check_text
from lightning_ft.types import Message

MEASURED = ("prompt_context", "structured_output")
"""Optional fields that aren't trained on: token savings are measured with them, see `lightning_ft.types.Request`."""

FORMATS = Formats(
    required={
        "messages": ("messages",),
        "conversations": ("conversations",),
        "instruction": ("instruction", "output"),
        "input_output": ("input", "output"),
        "prompt_completion": ("prompt", "completion"),
        "text": ("text",),
    },
    extra={
        "messages": MEASURED,
        "conversations": MEASURED,
        "instruction": ("input", "history", *MEASURED),
        "input_output": ("history", *MEASURED),
        "prompt_completion": ("history", *MEASURED),
    },
)
"""Row formats of pairs, conversations and plain texts."""


@dataclass(frozen=True)
class Conversation:
    """A checked conversation or plain text.

    Args:
        messages: System turn (if any), then user and assistant in turn, the answer last where rows must have one. A
            plain text is a single assistant turn.
        source: File, hub name, or the name of an argument.
        row: Line or number of the row in the source.
        id: The row's `id` field, or ``source:row``.
        cluster: The row's `cluster` field, if any.
        template_kwargs: Variables of the chat template besides the messages: `tools`, `enable_thinking`, ...
        prompt_context: The row's `prompt_context` field, if any, see `lightning_ft.types.Request`.
        structured_output: The row's `structured_output` field, if any.
    """

    messages: tuple[Message, ...]
    source: str
    row: int
    id: str
    cluster: str | None = None
    template_kwargs: Mapping[str, object] = field(default_factory=dict)
    prompt_context: str | None = None
    structured_output: Mapping[str, object] | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for duplicate rows."""
        return (*turns_key(self.messages), *kwargs_key(self.template_kwargs))

    @property
    def is_text(self) -> bool:
        """Whether it is a plain text, all of which is supervised."""
        return len(self.messages) == 1 and self.messages[0]["role"] == "assistant"

    @property
    def prompt_messages(self) -> tuple[Message, ...]:
        """The messages before the answer."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    def with_prompt(self, messages: Sequence[Message]) -> Conversation:
        """The same row with another prompt."""
        return replace(self, messages=(*messages, *self.messages[len(self.prompt_messages) :]))


def turns_key(messages: Sequence[Message]) -> tuple[tuple[str, ...], ...]:
    """A hashable key of turns: role and content of each, and anything else in it as JSON."""
    return tuple(
        (message["role"], message["content"])
        if len(message) == 2
        else (message["role"], message["content"], _as_json({**message, "role": "", "content": ""}))
        for message in messages
    )


def kwargs_key(kwargs: Mapping[str, object]) -> tuple[str, ...]:
    """A hashable key of template variables; empty if there are none."""
    return (_as_json(kwargs),) if kwargs else ()


def _as_json(value: Mapping[str, object]) -> str:
    return json.dumps(value, default=str)  # in its order, which templates write


class RowFormat(FieldReader[Conversation]):
    """Reads rows of one format as conversations.

    Args:
        name: One of :data:`FORMATS`.
        columns: Field names of the format to those in the data, where they differ.
        answered: Whether rows must have an answer.

    Example:
        >>> pairs = RowFormat("input_output", {"input": "question"})
        >>> row = pairs.read({"question": "2+2?", "output": "4"}, "train", 1)
        >>> row.id, [message["content"] for message in row.messages]
        ('train:1', ['2+2?', '4'])
    """

    refused: ClassVar[Mapping[str, Refusal]] = REFUSED_IN_PAIRS

    def __init__(self, name: str, columns: Mapping[str, str] | None = None, *, answered: bool = True) -> None:
        super().__init__(FORMATS, name, columns)
        self.answered = answered

    def _read(self, row: Mapping[str, object], origin: Origin) -> Conversation:
        fields = self.formats.required[self.name]
        if self.name == "text":
            return Conversation((Message(role="assistant", content=self._whole(row)),), **origin)
        messages = self.read_prompt(row)
        if len(fields) > 1 and (self.answered or row.get(self.column(fields[1])) is not None):
            messages += self.side(row, fields[1], "assistant")
        messages = self.with_system(row, messages)
        check_order(messages, answered=self.answered)
        if self.answered and not any(m["role"] == "assistant" and m.get("train", True) for m in messages):
            raise RowError(None, "no answer is trained on", "all of them are excluded", "Leave the row out.")
        template_kwargs = self.template_kwargs(row)
        return Conversation(
            self.with_known_arguments(messages, template_kwargs),
            template_kwargs=template_kwargs,
            prompt_context=self.optional(row, "prompt_context"),
            structured_output=self._structured_output(row),
            **origin,
        )

    def _structured_output(self, row: Mapping[str, object]) -> Mapping[str, object] | None:
        column = self.column("structured_output")
        value = parsed(row.get(column))
        if value is None and "structured_output" in self.columns and column not in row:
            raise self.missing(row, "structured_output")
        if not isinstance(value, Mapping) and not is_nonempty(value):
            return None
        if not isinstance(value, Mapping):
            fix = "Expected an object, such as {'choices': ['yes', 'no']}, or JSON text of one."
            raise RowError(column, "wrong type", f"found {type(value).__name__}", fix)
        # Rows of one table share their columns, so a cell may have None for what another row sets.
        return {str(name): content for name, content in value.items() if content is not None} or None

    def _whole(self, row: Mapping[str, object]) -> str:
        value, column = self.value(row, "text"), self.column("text")
        for name in ("system", "tools", "chat_template_kwargs"):
            if is_nonempty(row.get(self.column(name))):
                fix = "A text is trained on without a chat template: write it into the text, or remove the column."
                raise RowError(self.column(name), f"{name!r} of a text isn't supported", "", fix)
        if not self.answered:
            raise RowError(column, "a text has no prompt", "", "Write rows to answer as 'input', or as 'messages'.")
        if not isinstance(value, str):
            raise RowError(column, "wrong type", f"found {type(value).__name__}", "Expected a string.")
        return check_text(value, column, "assistant")


def detect_format(
    rows: Sequence[Mapping[str, object]], columns: Mapping[str, str] | None, *, answered: bool = True
) -> str:
    """The row format of pairs; see `Formats.detect`.

    Raises:
        ConfigError: If no format has all fields of `columns`.

    Example:
        >>> detect_format([{"question": "2+2?", "output": "4"}], {"input": "question"})
        'input_output'
    """
    return FORMATS.detect(rows, columns, answered=answered)
