"""Row formats: what a row's fields mean, as one conversation."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ft.data.request import Message
from lightning_ft.data.turns import FILL, RowError, check_order, check_text, read_turns
from lightning_ft.errors import ConfigError

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "input_output": ("input", "output"),
    "prompt_completion": ("prompt", "completion"),
}
"""Format to the fields it needs, the answer last, in the order they are looked for."""

_OPTIONAL = {"id", "cluster", "system"}
_KNOWN = {*_OPTIONAL, *(field for fields in FORMATS.values() for field in fields)}


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
    def key(self) -> tuple[tuple[str, str], ...]:
        """What makes two rows duplicates of each other."""
        return tuple((message["role"], message["content"]) for message in self.messages)

    @property
    def asked(self) -> tuple[Message, ...]:
        """The conversation up to the turn that is to be answered."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages


class RowFormat:
    """Turns rows of one format into conversations.

    Args:
        name: A key of :data:`FORMATS`.
        columns: The format's field names to those in the data, where they differ.
        answered: Whether rows must have an answer; prompts alone needn't.

    Example:
        >>> pairs = RowFormat("input_output", {"input": "question"})
        >>> row = pairs.conversation({"question": "2+2?", "output": "4"}, "train", 1)
        >>> row.id, [message["content"] for message in row.messages]
        ('train:1', ['2+2?', '4'])
    """

    def __init__(self, name: str, columns: Mapping[str, str] | None = None, *, answered: bool = True) -> None:
        self.name = name
        self.columns = dict(columns or {})
        self.answered = answered

    def conversation(self, row: Any, source: str, number: int) -> Conversation:
        """Check a row and turn it into a conversation.

        Raises:
            RowError: If it isn't one.
        """
        if not isinstance(row, Mapping):
            fix = "Each row must be an object with named fields."
            raise RowError(None, "not an object", f"found {type(row).__name__}", fix)
        messages = self._messages(row)
        check_order(messages, answered=self.answered)
        given, cluster = row.get(self._column("id")), row.get(self._column("cluster"))
        return Conversation(
            messages=tuple(messages),
            source=source,
            row=number,
            id=f"{source}:{number}" if given is None else str(given),
            cluster=None if cluster is None else str(cluster),
        )

    def _column(self, field: str) -> str:
        return self.columns.get(field, field)

    def _messages(self, row: Mapping[str, Any]) -> list[Message]:
        fields = FORMATS[self.name]
        if len(fields) == 1:
            messages = self._side(row, fields[0], None)
        else:
            asked, answer = fields
            messages = self._side(row, asked, "user")
            if self.name == "instruction" and (extra := self._optional(row, "input")):
                messages[-1] = Message(role=messages[-1]["role"], content=f"{messages[-1]['content']}\n\n{extra}")
            if self.answered or row.get(self._column(answer)) is not None:
                messages += self._side(row, answer, "assistant")
        if (system := self._optional(row, "system")) and messages[:1] and messages[0]["role"] != "system":
            messages.insert(0, Message(role="system", content=system))
        return messages

    def _optional(self, row: Mapping[str, Any], field: str) -> str | None:
        column = self._column(field)
        value = row.get(column)
        if value is None and field in self.columns and column not in row:
            raise self._missing(row, field)
        if value is not None and not isinstance(value, str):
            raise RowError(column, "wrong type", f"found {type(value).__name__}", "Expected a string.")
        return value if value and value.strip() else None

    def _side(self, row: Mapping[str, Any], field: str, role: str | None) -> list[Message]:
        """One side of a pair, a string or a list of messages; with `role` None, a list only."""
        column = self._column(field)
        if column not in row:
            raise self._missing(row, field)
        value = row[column]
        if value is None:
            raise RowError(column, "None", "", FILL)
        if isinstance(value, list):
            return read_turns(value, column)
        if isinstance(value, str) and role is not None:
            return [Message(role=role, content=check_text(value, column, role))]
        expected = "a list of messages" if role is None else "a string or a list of messages"
        raise RowError(column, "wrong type", f"found {type(value).__name__}", f"Expected {expected}.")

    def _missing(self, row: Mapping[str, Any], field: str) -> RowError:
        column = self._column(field)
        used = {self._column(known) for known in (*FORMATS[self.name], *_OPTIONAL)}
        spare = [str(key) for key in row if key not in used]
        near = difflib.get_close_matches(column, spare, n=1, cutoff=0.5)
        fix = f"Rename {near[0]!r}, or pass" if near else "Add it, or pass"
        fix += f" columns={{{field!r}: {near[0]!r}}}." if near else f" columns={{{field!r}: ...}}."
        return RowError(column, "missing field", f"fields: {', '.join(map(str, row)) or 'none'}", fix)


def detect_format(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None, *, answered: bool = True
) -> str:
    """The format most rows have the fields of; where no row has them all, the one they come closest to.

    Args:
        rows: The first rows of a source.
        columns: The format's field names to those in the data; naming a field excludes formats that don't have it.
        answered: Whether rows must have an answer.

    Raises:
        ConfigError: For a field that no format has, or fields of no one format.

    Example:
        >>> detect_format([{"question": "2+2?", "output": "4"}], {"input": "question"})
        'input_output'
    """
    candidates = _candidates(columns)
    votes: Counter[str] = Counter()
    for row in rows:
        for name, fields in candidates.items():
            if all(field in row for field in fields):
                votes[name] += 1
                break
        else:
            votes.update(name for name, fields in candidates.items() if not answered and fields[0] in row)
    if votes:
        return max(candidates, key=lambda name: votes[name])

    def closeness(name: str) -> float:
        found = {str(key) for row in rows[:1] for key in row}
        best = [
            max((difflib.SequenceMatcher(None, f, key).ratio() for key in found), default=0.0) for f in candidates[name]
        ]
        return sum(best) / len(best)

    return max(candidates, key=closeness)


def _candidates(columns: Mapping[str, str] | None) -> dict[str, list[str]]:
    """Formats that `columns` leaves possible, with the fields they need as the data names them."""
    columns = columns or {}
    for field in columns:
        if field not in _KNOWN:
            near = difflib.get_close_matches(field, _KNOWN, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"columns: no format has a field {field!r}.{hint} Known: {', '.join(sorted(_KNOWN))}.")
    named = set(columns) - _OPTIONAL
    possible = {
        name: [columns.get(field, field) for field in fields]
        for name, fields in FORMATS.items()
        if named <= {*fields, *(["input"] if name == "instruction" else [])}
    }
    if not possible:
        raise ConfigError(f"columns: no one format has the fields {', '.join(sorted(named))}.")
    return possible
