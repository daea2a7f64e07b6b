"""Read the fields of rows of one format."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypedDict, TypeVar, cast

from lightning_ft.data.columns import Formats
from lightning_ft.data.keys import REFUSED_COLUMNS, Refusal, is_nonempty
from lightning_ft.data.tool_calls import ToolCallError, known_arguments, parsed, read_tools
from lightning_ft.data.turns import FILL, RowError, check_field, check_text, read_turns, refuse_written_messages
from lightning_ft.types import Message

CONVERSATIONS = ("messages", "conversations")
"""Fields that contain a list of messages, never a string."""

_PROMPT_COLUMNS = ("instruction", "prompt", "question", "query", "context")
"""Columns that belong to the prompt, next to the one that is read."""

_OWN_VARIABLES = ("messages", "add_generation_prompt")  # variables that are set whenever the template is rendered

Row_co = TypeVar("Row_co", covariant=True)


class Origin(TypedDict):
    """Fields of a checked row that say where it comes from."""

    source: str
    row: int
    id: str
    cluster: str | None


class FieldReader(ABC, Generic[Row_co]):
    """Reads rows of one format; subclasses make the checked rows.

    Args:
        formats: The known formats.
        name: Format of the rows.
        columns: Field names of the format to those in the data, where they differ.
    """

    refused: ClassVar[Mapping[str, Refusal]] = REFUSED_COLUMNS
    """Columns that would change what is trained, but aren't read."""

    keeps_columns: ClassVar[bool] = False
    """Whether columns that the format doesn't know are kept."""

    def __init__(self, formats: Formats, name: str, columns: Mapping[str, str] | None = None) -> None:
        self.formats, self.name = formats, name
        self.columns = dict(columns or {})
        self.defaults: dict[str, object] = {}
        """Variables of the chat template for rows that don't set them."""
        self.ignored: set[str] = set()
        """Columns, and keys of messages (``messages.id``), that were found and aren't read."""

    def read(self, row: object, source: str, number: int) -> Row_co:
        """Read and check a row.

        Args:
            row: The row.
            source: File, hub name, or the name of an argument.
            number: Line or number of the row in the source.

        Raises:
            RowError: If it isn't a row of this format.
        """
        if not isinstance(row, Mapping):
            fix = "Each row must be an object with named fields."
            raise RowError(None, "not an object", f"found {type(row).__name__}", fix)
        used = {self.column(field) for field in self.formats.fields(self.name)}
        for column in [column for column in row if column in self.refused and column not in used]:
            if self.refused[column].when(row[column]):
                detail, fix = f"found {type(row[column]).__name__}", self.refused[column].fix
                raise RowError(column, f"column {column!r} isn't supported", detail, fix)
        if not self.keeps_columns:
            self.ignored.update(
                str(column)
                for column, value in row.items()
                if column not in used and (column not in self.refused or is_nonempty(value))
            )
        row_id, cluster = _name(row.get(self.column("id"))), _name(row.get(self.column("cluster")))
        origin: Origin = {
            "source": source,
            "row": number,
            "id": f"{source}:{number}" if row_id is None else row_id,
            "cluster": cluster,
        }
        return self._read(row, origin)

    @abstractmethod
    def _read(self, row: Mapping[str, object], origin: Origin) -> Row_co:
        """The checked row, with `source`, `row`, `id` and `cluster` from `origin`."""

    def column(self, field: str) -> str:
        """Name of a field in the data."""
        return self.columns.get(field, field)

    def read_prompt(self, row: Mapping[str, object]) -> list[Message]:
        """The prompt: the ``history``, and the format's first field with Alpaca's ``input`` appended."""
        first = self.formats.required[self.name][0]
        if not self.keeps_columns:
            self._check_whole_prompt(row, first)
        messages = self.side(row, first, None if first in CONVERSATIONS else "user")
        if first == "instruction" and (extra := self.optional(row, "input")) and messages:
            messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{extra}"}
        return [*self._history(row), *messages] if "history" in self.formats.fields(self.name) else messages

    def _check_whole_prompt(self, row: Mapping[str, object], field: str) -> None:
        """Refuse a column that may be part of the prompt but isn't read, unless `columns` names the one to read.

        A column that contains the prompt is allowed: it is a copy, or a template filled with it.

        Raises:
            RowError: With the `columns=` that reads the column, or how to leave it out.
        """
        read, used = self.column(field), {self.column(field) for field in self.formats.fields(self.name)}
        prompt = row.get(read)
        if field in CONVERSATIONS or field in self.columns or not isinstance(prompt, str):
            return
        for column in _PROMPT_COLUMNS:
            other = row.get(column)
            if column in used or not isinstance(other, str) or not other.strip() or prompt.strip() in other:
                continue
            first, second = (column, read) if column in ("prompt", "instruction") else (read, column)
            if field == "instruction" and is_nonempty(row.get(self.column("input"))):
                fix = "Join the two, or remove the column."
            else:
                others = zip(("output",), self.formats.required[self.name][1:2], strict=True)
                named = {"instruction": first, "input": second}
                named |= {to: self.column(of) for to, of in others if of == "completion" or self.column(of) != of}
                fix = f"Pass columns={named!r} to read both, or remove the column."
            self.ignored.discard(column)
            raise RowError(column, f"column {column!r} may be part of the prompt", repr(other[:40]), fix)

    def _history(self, row: Mapping[str, object]) -> list[Message]:
        """Earlier turns, from a list of question-answer pairs."""
        column = self.column("history")
        value = parsed(row.get(column)) or []
        turns: list[Message] = []
        for i, pair in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                fix = "Expected a list of pairs of question and answer."
                raise RowError(f"{column}[{i}]", "not a pair of texts", repr(pair)[:40], fix)
            for role, text in zip(("user", "assistant"), pair, strict=True):
                turns.append(Message(role=role, content=check_text(text, f"{column}[{i}]", role)))
        return turns

    def with_system(self, row: Mapping[str, object], messages: list[Message]) -> list[Message]:
        """The messages, preceded by the row's system turn.

        Raises:
            RowError: If they start with a different system turn.
        """
        system = self.optional(row, "system")
        if not system or not messages:
            return messages
        if messages[0]["role"] != "system":
            return [Message(role="system", content=system), *messages]
        if messages[0]["content"].strip() not in ("", system.strip()):
            fix = "Keep one of the two: join them, or clear the column."
            raise RowError(self.column("system"), "a second system turn", f"{system[:40]!r}", fix)
        return [Message(role="system", content=system), *messages[1:]]

    def optional(self, row: Mapping[str, object], field: str) -> str | None:
        """The text of an optional field; None if it is missing or empty.

        Raises:
            RowError: If it isn't text, or is missing although `columns` names it.
        """
        column = self.column(field)
        value = row.get(column)
        if value is None and field in self.columns and column not in row:
            raise self.missing(row, field)
        if isinstance(value, list) and value and all(isinstance(part, Mapping) and "text" in part for part in value):
            value = "".join(str(part["text"]) for part in value)  # [{"text": ...}], as in some APIs
        if value is not None and not isinstance(value, str):
            raise RowError(column, "wrong type", f"found {type(value).__name__}", "Expected a string.")
        return value if value and value.strip() else None

    def template_kwargs(self, row: Mapping[str, object]) -> dict[str, object]:
        """The row's variables of the chat template: `tools` and `chat_template_kwargs`.

        Raises:
            RowError: If they have the wrong type or contradict each other.
        """
        column = self.column("chat_template_kwargs")
        kwargs = parsed(row.get(column)) or {}
        if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
            fix = "Expected an object, such as {'enable_thinking': false}."
            detail = "names that aren't strings" if isinstance(kwargs, Mapping) else type(kwargs).__name__
            raise RowError(column, "wrong type", f"found {detail}", fix)
        if own := [name for name in _OWN_VARIABLES if name in kwargs]:
            fix = "Remove it: it is set whenever the template is rendered."
            raise RowError(f"{column}.{own[0]}", f"{own[0]!r} isn't supported", repr(kwargs[own[0]])[:40], fix)
        variables = {name: value for name, value in kwargs.items() if value is not None}
        column = self.column("tools")
        try:
            tools = read_tools(row.get(column))
            variables |= {"tools": read_tools(variables["tools"])} if "tools" in variables else {}
        except ToolCallError as error:
            fix = "Expected a list of JSON schemas, or JSON text of one."
            raise RowError(f"{column}[{error.index}]", "not a tool", repr(error.value)[:60], fix) from None
        if tools and variables.get("tools", tools) != tools:
            raise RowError(column, "other tools than those in chat_template_kwargs", "", "Keep one of the two.")
        return {**self.defaults, **variables, **({"tools": tools} if tools else {})}

    def with_known_arguments(self, messages: Sequence[Message], kwargs: Mapping[str, Any]) -> tuple[Message, ...]:
        """The messages, in whose tool calls no argument is None that the row's tools don't know; see `known_arguments`.

        Args:
            messages: Messages.
            kwargs: The row's variables of the chat template.
        """
        if not kwargs.get("tools") or not any("tool_calls" in message for message in messages):
            return tuple(messages)
        result: list[Message] = []
        for message in messages:
            if "tool_calls" in message:
                calls, left_out = known_arguments(message["tool_calls"], kwargs["tools"])
                self.ignored.update(f"tool_calls.arguments.{name} (None, and not in the tool)" for name in left_out)
                message = cast("Message", {**message, "tool_calls": calls})
            result.append(message)
        return tuple(result)

    def value(self, row: Mapping[str, object], field: str) -> Any:
        """The value of a required field.

        Raises:
            RowError: If it is missing or None.
        """
        column = self.column(field)
        if column not in row:
            raise self.missing(row, field)
        if row[column] is None:
            raise RowError(column, "None", "", FILL)
        return row[column]

    def side(self, row: Mapping[str, object], field: str, role: str | None) -> list[Message]:
        """The messages of one side of a row, a string or a list; with `role` None, a list only.

        Raises:
            RowError: If it is neither.
        """
        value, column = self.value(row, field), self.column(field)
        value = [value] if isinstance(value, Mapping) else value  # a single message
        if isinstance(value, list):
            keys: set[str] = set()
            turns = read_turns(value, column, keys)
            self.ignored.update(f"{column}.{key}" for key in keys)
            return turns
        if isinstance(value, str) and role is not None:
            return [Message(role=role, content=check_field(value, column, role))]
        if isinstance(value, str):
            refuse_written_messages(value, column)
        expected = "a list of messages" if role is None else "a string or a list of messages"
        raise RowError(column, "wrong type", f"found {type(value).__name__}", f"Expected {expected}.")

    def missing(self, row: Mapping[str, object], field: str) -> RowError:
        """The error for a missing field."""
        return self.formats.missing(row, self.name, field, self.columns)


def _name(value: object) -> str | None:
    """An id or cluster as text; None for the empty cell of a table, which is read as NaN or blank text.

    A whole number is written as one even if it was read as 1.0: with an empty cell in a column, frames make all of its
    numbers floats.
    """
    missing = value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()
    if missing:
        return None
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)
