"""The turns of a conversation: what a list of messages must look like."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ft.data.request import Message

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
"""Roles as they are written (ShareGPT's too) to what they mean."""

FILL = "Fill it in or remove the row."


class RowError(Exception):
    """A row isn't what it should be; carries what a `Problem` needs beside its place."""

    def __init__(self, field: str | None, reason: str, detail: str, fix: str) -> None:
        super().__init__(reason)
        self.field, self.reason, self.detail, self.fix = field, reason, detail, fix


def check_text(value: str, field: str, role: str) -> str:
    """Refuse a turn that says nothing; a system turn may.

    Raises:
        RowError: If the text is empty or only whitespace.
    """
    if value.strip() or role == "system":
        return value
    side = "output" if role == "assistant" else "input"
    if value:
        raise RowError(field, f"whitespace-only {side}", repr(value[:20]), FILL)
    raise RowError(field, f"empty {side}", "", FILL)


def read_turns(value: Sequence[Any], field: str) -> list[Message]:
    """Messages of a list of ``{role, content}`` or ShareGPT's ``{from, value}``.

    Raises:
        RowError: If one of them isn't a message.

    Example:
        >>> read_turns([{"from": "human", "value": "2+2?"}, {"role": "assistant", "content": "4"}], "conversations")
        [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    messages = []
    for i, turn in enumerate(value):
        place = f"{field}[{i}]"
        if not isinstance(turn, Mapping):
            fix = "Each message needs a role and a content."
            raise RowError(place, "wrong type", f"found {type(turn).__name__}", fix)
        written = _either(turn, "role", "from", place)
        role = _ROLES.get(written) if isinstance(written, str) else None
        if role is None:
            near = difflib.get_close_matches(str(written).lower(), _ROLES, n=1)
            fix = f"Did you mean {near[0]!r}?" if near else "Expected system, user or assistant (ShareGPT: human, gpt)."
            raise RowError(f"{place}.role", "unknown role", repr(written), fix)
        content = _either(turn, "content", "value", place)
        if not isinstance(content, str):
            raise RowError(f"{place}.content", "wrong type", f"found {type(content).__name__}", "Expected a string.")
        messages.append(Message(role=role, content=check_text(content, f"{place}.content", role)))
    return messages


def _either(turn: Mapping[str, Any], name: str, other: str, place: str) -> Any:
    for key in (name, other):
        if turn.get(key) is not None:
            return turn[key]
    if name in turn or other in turn:
        raise RowError(f"{place}.{name}", "None", "", FILL)
    near = difflib.get_close_matches(name, [str(key) for key in turn], n=1, cutoff=0.5)
    fix = f"Rename {near[0]!r} to {name!r}." if near else f"Each message needs a {name}."
    raise RowError(f"{place}.{name}", "missing field", f"fields: {', '.join(map(str, turn))}", fix)


def check_order(messages: Sequence[Message], *, answered: bool) -> None:
    """Require a system turn at most at the start, then user and assistant in turn.

    Args:
        messages: The conversation.
        answered: Whether the last turn must be the assistant's.

    Raises:
        RowError: If it is otherwise.
    """
    roles = [message["role"] for message in messages]
    found = f"roles: {', '.join(roles) or 'none'}"
    if answered and "assistant" not in roles:
        raise RowError(None, "no assistant turn", found, "There is nothing to learn from it: add an answer.")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        fix = "Expected a system turn at most at the start, then user and assistant in turn."
        raise RowError(None, "wrong role order", found, fix)
    if answered and turns[-1] != "assistant":
        raise RowError(None, "no answer to the last turn", found, "Add the answer or remove the last turn.")
