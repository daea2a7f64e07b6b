"""Fields of rows: what the fields of a row of one format contain."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

from lightning_ft.data.columns import Formats
from lightning_ft.data.keys import REFUSED_COLUMNS, Refusal, says_something
from lightning_ft.data.tool_calls import NotACallError, parsed, read_tools
from lightning_ft.data.turns import FILL, RowError, check_text, read_turns
from lightning_ft.types import Message

CONVERSATIONS = ("messages", "conversations")
"""Fields that hold a list of messages, and never a string."""

_ASK_TOO = ("instruction", "prompt", "question", "query", "context")
"""Columns that are part of the question, next to the one that is read as it."""

_OWN_VARIABLES = ("messages", "add_generation_prompt")  # of a chat template: they are set for each rendering

Row_co = TypeVar("Row_co", covariant=True)


class FieldReader(ABC, Generic[Row_co]):
    """Reads rows of one format; a subclass says what becomes of them.

    Args:
        formats: The formats there are.
        name: Which of them the rows have.
        columns: The format's field names to those in the data, where they differ.
    """

    refused: ClassVar[Mapping[str, Refusal]] = REFUSED_COLUMNS
    """Columns that would change what is trained and aren't read."""

    passes_on: ClassVar[bool] = False
    """Whether columns that the format doesn't know are kept."""

    def __init__(self, formats: Formats, name: str, columns: Mapping[str, str] | None = None) -> None:
        self.formats, self.name = formats, name
        self.columns = dict(columns or {})
        self.defaults: dict[str, Any] = {}
        """What the chat template is given where a row says nothing else."""
        self.ignored: set[str] = set()
        """Columns, and keys of messages (``messages.id``), that were found and mean nothing here."""

    def read(self, row: Any, source: str, number: int) -> Row_co:
        """Check a row.

        Args:
            row: What stands there.
            source: Where.
            number: Its line or number there.

        Raises:
            RowError: If it isn't a row of this format.
        """
        if not isinstance(row, Mapping):
            fix = "Each row must be an object with named fields."
            raise RowError(None, "not an object", f"found {type(row).__name__}", fix)
        used = {self.column(field) for field in self.formats.fields(self.name)}
        for column in [column for column in row if column in self.refused and column not in used]:
            if self.refused[column].when(row[column]):
                found, fix = type(row[column]).__name__, self.refused[column].fix
                raise RowError(column, f"column {column!r} can't be honored", f"found {found}", fix)
        if not self.passes_on:
            self.ignored.update(
                str(column)
                for column, value in row.items()
                if column not in used and (column not in self.refused or says_something(value))
            )
        given, cluster = _name(row.get(self.column("id"))), _name(row.get(self.column("cluster")))
        place = {
            "source": source,
            "row": number,
            "id": f"{source}:{number}" if given is None else given,
            "cluster": cluster,
        }
        return self._read(row, place)

    @abstractmethod
    def _read(self, row: Mapping[str, Any], place: dict[str, Any]) -> Row_co:
        """The checked row; `place` holds its `source`, `row`, `id` and `cluster`."""

    def column(self, field: str) -> str:
        """What the data calls a field."""
        return self.columns.get(field, field)

    def asked(self, row: Mapping[str, Any]) -> list[Message]:
        """What the format's first field asks, after the ``history``, Alpaca's ``input`` appended."""
        first = self.formats.required[self.name][0]
        if not self.passes_on:
            self._check_all_asked(row, first)
        messages = self.side(row, first, None if first in CONVERSATIONS else "user")
        if first == "instruction" and (extra := self.optional(row, "input")) and messages:
            messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']}\n\n{extra}"}
        return [*self._history(row), *messages] if "history" in self.formats.fields(self.name) else messages

    def _check_all_asked(self, row: Mapping[str, Any], field: str) -> None:
        """Refuse a column that asks too, next to the one that is read, unless `columns` chose that one.

        A column that holds the question is no such column: it is the same, or a template filled with it.

        Raises:
            RowError: With the `columns=` that reads it, or how to leave it out.
        """
        asks, used = self.column(field), {self.column(field) for field in self.formats.fields(self.name)}
        asked = row.get(asks)
        if field in CONVERSATIONS or field in self.columns or not isinstance(asked, str):
            return
        for column in _ASK_TOO:
            other = row.get(column)
            if column in used or not isinstance(other, str) or not other.strip() or asked.strip() in other:
                continue
            first, second = (column, asks) if column in ("prompt", "instruction") else (asks, column)
            if field == "instruction" and says_something(row.get(self.column("input"))):
                fix = "Join the two, or remove the column."
            else:
                others = zip(("output",), self.formats.required[self.name][1:2], strict=True)
                named = {"instruction": first, "input": second}
                named |= {to: self.column(of) for to, of in others if of == "completion" or self.column(of) != of}
                fix = f"Pass columns={named!r} to ask with both, or remove the column."
            self.ignored.discard(column)
            raise RowError(column, f"column {column!r} asks too", repr(other[:40]), fix)

    def _history(self, row: Mapping[str, Any]) -> list[Message]:
        """Earlier turns, from a list of pairs of question and answer."""
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

    def with_system(self, row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
        """The messages with the row's system turn before them.

        Raises:
            RowError: If they have another system turn of their own.
        """
        system = self.optional(row, "system")
        if not system or not messages:
            return messages
        if messages[0]["role"] != "system":
            return [Message(role="system", content=system), *messages]
        if messages[0]["content"].strip() not in ("", system.strip()):
            fix = "Keep one of the two: join them, or empty the column."
            raise RowError(self.column("system"), "a second system turn", f"{system[:40]!r}", fix)
        return [Message(role="system", content=system), *messages[1:]]

    def optional(self, row: Mapping[str, Any], field: str) -> str | None:
        """The text of a field that may be missing, None where it says nothing.

        Raises:
            RowError: If it isn't a text, or `columns` named it and it is missing.
        """
        column = self.column(field)
        value = row.get(column)
        if value is None and field in self.columns and column not in row:
            raise self.missing(row, field)
        if isinstance(value, list) and value and all(isinstance(part, Mapping) and "text" in part for part in value):
            value = "".join(str(part["text"]) for part in value)  # [{"text": ...}], as some APIs have it
        if value is not None and not isinstance(value, str):
            raise RowError(column, "wrong type", f"found {type(value).__name__}", "Expected a string.")
        return value if value and value.strip() else None

    def template_kwargs(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the row gives the chat template besides messages: `tools`, and `chat_template_kwargs`.

        Raises:
            RowError: If they aren't what they should be.
        """
        column = self.column("chat_template_kwargs")
        kwargs = parsed(row.get(column)) or {}
        if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
            fix = "Expected an object, such as {'enable_thinking': false}."
            found = "names that are no strings" if isinstance(kwargs, Mapping) else type(kwargs).__name__
            raise RowError(column, "wrong type", f"found {found}", fix)
        if own := [name for name in _OWN_VARIABLES if name in kwargs]:
            fix = "Remove it: it is set where the template is rendered."
            raise RowError(f"{column}.{own[0]}", f"{own[0]!r} can't be honored", repr(kwargs[own[0]])[:40], fix)
        given = {name: value for name, value in kwargs.items() if value is not None}
        column = self.column("tools")
        try:
            tools = read_tools(row.get(column))
            given |= {"tools": read_tools(given["tools"])} if "tools" in given else {}
        except NotACallError as error:
            fix = "Expected a list of JSON schemas, or JSON text of one."
            raise RowError(f"{column}[{error.index}]", "not a tool", repr(error.found)[:60], fix) from None
        if tools and given.get("tools", tools) != tools:
            raise RowError(column, "other tools than those in chat_template_kwargs", "", "Keep one of the two.")
        return {**self.defaults, **given, **({"tools": tools} if tools else {})}

    def value(self, row: Mapping[str, Any], field: str) -> Any:
        """What stands in a field that must be there.

        Raises:
            RowError: If it is missing or None.
        """
        column = self.column(field)
        if column not in row:
            raise self.missing(row, field)
        if row[column] is None:
            raise RowError(column, "None", "", FILL)
        return row[column]

    def side(self, row: Mapping[str, Any], field: str, role: str | None) -> list[Message]:
        """One side of a row, a string or a list of messages; with `role` None, a list only.

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
            return [Message(role=role, content=check_text(value, column, role))]
        expected = "a list of messages" if role is None else "a string or a list of messages"
        raise RowError(column, "wrong type", f"found {type(value).__name__}", f"Expected {expected}.")

    def missing(self, row: Mapping[str, Any], field: str) -> RowError:
        """What to say of a field that isn't there."""
        return self.formats.missing(row, self.name, field, self.columns)


def _name(value: Any) -> str | None:
    """An id or cluster as text; None for nothing, which a table's empty cell is read as NaN or as no text."""
    missing = value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()
    return None if missing else str(value)
