"""What a conversation asks, as keys that tell whether another one asks the same."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_ft.data.kinds import Row

_INSTRUCTIONS = ("system", "developer")


def question_keys(messages: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """A key of the conversation up to each turn of the user; the last one is the key of its question.

    Two questions are the same if the turns up to the last of the user have the same roles, texts and tool calls. White
    space at the ends of a text, and how much of it there is between words, makes no difference; nor do system turns,
    reasoning, ids of tool calls, and whether a turn is trained on. Letter case does.

    The key of a prefix is among the keys of every conversation that starts with it: a conversation that was exported
    turn by turn is found again.

    Args:
        messages: The turns; those after the last of the user play no part.

    Returns:
        16 bytes for each turn of the user, in their order.

    Example:
        >>> def user(text):
        ...     return {"role": "user", "content": text}
        >>> first = question_keys([{"role": "system", "content": "Be brief."}, user("Where is  it?")])
        >>> both = question_keys([user("Where is it? "), {"role": "assistant", "content": "Here."}, user("Sure?")])
        >>> first[-1] == both[0], len(both)
        (True, 2)
    """
    keys: list[bytes] = []
    key = b""
    for message in messages:
        if message["role"] in _INSTRUCTIONS:
            continue
        key = blake2b(key + _turn(message).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if message["role"] == "user":
            keys.append(key)
    return keys


def row_questions(row: Row) -> list[Hashable]:
    """The keys of a row's conversation; of a row that asks nothing, such as a plain text, the row's own key.

    Args:
        row: A checked row.
    """
    asked = question_keys(row.asked)
    return [*asked] if asked else [("asks nothing", row.key)]


def _turn(message: Mapping[str, Any]) -> str:
    """Role, text and tool calls of a turn, a line each: neither of the two texts has a line break of its own."""
    content, calls = message.get("content"), message.get("tool_calls")
    text = " ".join(content.split()) if isinstance(content, str) else _json(content)
    called = _json([call.get("function", call) for call in calls]) if calls else ""  # their ids differ by chance
    return f"{message['role']}\n{text}\n{called}"


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
