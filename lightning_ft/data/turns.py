"""The turns of a conversation: what a list of messages must look like, and what each key of a message means.

Read are OpenAI's messages (``role``, ``content``, ``tool_calls``), ShareGPT's (``from``, ``value``, with
``function_call`` and ``observation``), and the keys that TRL, axolotl and LLaMA-Factory add. A key that would change
what is trained is honored or refused by name; any other is reported once as ignored.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lightning_ft.data.request import Message

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Roles as they are written (by OpenAI, ShareGPT, LLaMA-Factory, Open Assistant, ...) to what they mean."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that the reasoning before an answer has in data."""

_TRAINED = ("train", "training", "weight")
"""Names of whether a turn is trained on; `weight` is 0 or 1."""

_READ = ("role", "from", "content", "value", "tool_calls", "name", "tool_call_id", *REASONING, *_TRAINED)

MEDIA = ("image", "images", "audio", "audios", "video", "videos", "media")
"""Columns and keys of what isn't text."""

_REFUSED = {
    **dict.fromkeys(MEDIA, "Only text can be trained on: remove it, or the row."),
    "function_call": "Write it as tool_calls: [{'type': 'function', 'function': {'name': ..., 'arguments': {...}}}].",
    "train_detail": "Parts of a turn can't be masked: split the turn, or remove the key.",
    "prefix": "An answer that is to be continued can't be trained on: write the whole answer.",
    "refusal": "Write the refusal as the content.",
    "loss_mask": "Pass 'train': true or false with each message.",
    "mask": "Pass 'train': true or false with each message.",
    "masked": "Pass 'train': true or false with each message.",
}
"""Keys of a message that would change what is trained, and aren't honored."""

FILL = "Fill it in or remove the row."


class RowError(Exception):
    """A row isn't what it should be; carries what a `Problem` needs besides its origin."""

    def __init__(self, field: str | None, reason: str, detail: str, fix: str) -> None:
        super().__init__(reason)
        self.field, self.reason, self.detail, self.fix = field, reason, detail, fix


def check_text(value: str, field: str, role: str) -> str:
    """Refuse a turn that says nothing; a system turn and a tool's may.

    Raises:
        RowError: If the text is empty or only whitespace.
    """
    if value.strip() or role in ("system", "tool"):
        return value
    side = "output" if role == "assistant" else "input"
    if value:
        raise RowError(field, f"whitespace-only {side}", repr(value[:20]), FILL)
    raise RowError(field, f"empty {side}", "", FILL)


def read_turns(value: Sequence[Any], field: str, ignored: set[str] | None = None) -> list[Message]:
    """Messages of a list of ``{role, content}`` or ShareGPT's ``{from, value}``.

    Args:
        value: The list.
        field: Its name, for errors.
        ignored: Collects keys that mean nothing here.

    Raises:
        RowError: If one of them isn't a message, or says something that can't be honored.

    Example:
        >>> read_turns([{"from": "human", "value": "2+2?"}, {"role": "assistant", "content": "4"}], "conversations")
        [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    return [_read_turn(turn, f"{field}[{i}]", set() if ignored is None else ignored) for i, turn in enumerate(value)]


def _read_turn(turn: Any, place: str, ignored: set[str]) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(place, "wrong type", f"found {type(turn).__name__}", "Each message needs a role and a content.")
    for key, fix in _REFUSED.items():
        if turn.get(key):
            raise RowError(f"{place}.{key}", f"{key!r} can't be honored", repr(turn[key])[:40], fix)
    written = _either(turn, "role", "from", place)
    role = _ROLES.get(written) if isinstance(written, str) else None
    if role is None:
        near = difflib.get_close_matches(str(written).lower(), _ROLES, n=1)
        fix = (
            f"Did you mean {near[0]!r}?" if near else "Expected system, user, assistant or tool (ShareGPT: human, gpt)."
        )
        raise RowError(f"{place}.role", "unknown role", repr(written), fix)
    calls = _tool_calls(turn.get("tool_calls"), f"{place}.tool_calls")
    if written == "function_call":
        calls, content = _tool_calls(parsed(_either(turn, "content", "value", place)), f"{place}.value"), ""
    elif calls and turn.get("content", turn.get("value")) is None:
        content = ""
    else:
        content = _text(_either(turn, "content", "value", place), f"{place}.content")
    if calls and role != "assistant":
        raise RowError(f"{place}.tool_calls", "tool calls of a turn that isn't the assistant's", f"role {role!r}", FILL)
    message = Message(role=role, content=content if calls else check_text(content, f"{place}.content", role))
    if calls:
        message["tool_calls"] = calls
    _read_optional(turn, place, message)
    ignored.update(str(key) for key, value in turn.items() if key not in _READ and key not in _REFUSED and value)
    return message


def _read_optional(turn: Mapping[str, Any], place: str, message: Message) -> None:
    reasoning = next((key for key in REASONING if turn.get(key)), None)
    if reasoning is not None:
        if message["role"] != "assistant" or not isinstance(turn[reasoning], str):
            detail = f"role {message['role']!r}, found {type(turn[reasoning]).__name__}"
            raise RowError(f"{place}.{reasoning}", "reasoning that isn't a text of the assistant", detail, FILL)
        if turn[reasoning].strip():
            message["reasoning_content"] = turn[reasoning]
    for key in ("name", "tool_call_id"):
        if turn.get(key) and message["role"] == "tool":
            message[key] = str(turn[key])  # type: ignore[literal-required]
    marked = [key for key in _TRAINED if turn.get(key) is not None]
    if any(turn[key] not in (0, 1) for key in marked):
        detail = ", ".join(f"{key}: {turn[key]!r}" for key in marked)
        fix = "Expected 0 or 1, false or true: a turn is trained on or it isn't."
        raise RowError(f"{place}.{marked[0]}", "weight that is neither 0 nor 1", detail, fix)
    if len({bool(turn[key]) for key in marked}) > 1:
        raise RowError(f"{place}.{marked[0]}", "contradicting marks", ", ".join(marked), "Keep one of them.")
    if message["role"] == "assistant" and marked and not turn[marked[0]]:
        message["train"] = False


def _text(content: Any, place: str) -> str:
    """The text of a content: a string, or a list of parts that are all text."""
    if isinstance(content, list):
        texts = []
        for i, part in enumerate(content):
            kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
            text = part.get("text") if isinstance(part, Mapping) else part
            if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
                fix = "Only text can be trained on: remove the part, or the row."
                raise RowError(f"{place}[{i}]", f"content part of type {kind!r}", type(part).__name__, fix)
            texts.append(text)
        return "".join(texts)
    if not isinstance(content, str):
        raise RowError(place, "wrong type", f"found {type(content).__name__}", "Expected a string.")
    return content


def parsed(value: Any) -> Any:
    """JSON text as what it says; anything else as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Tool calls as templates want them, arguments as an object.

    Raises:
        RowError: If one of them isn't a call.
    """
    calls = parsed(calls)
    if not calls:
        return []
    calls = [calls] if isinstance(calls, Mapping) else calls
    found = []
    for i, call in enumerate(calls if isinstance(calls, list) else [None]):
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        name = inner.get("name") if isinstance(inner, Mapping) else None
        arguments = parsed(inner.get("arguments", inner.get("parameters", {}))) if isinstance(inner, Mapping) else None
        arguments = {} if arguments is None or arguments == "" else arguments
        if not isinstance(name, str) or not name or not isinstance(arguments, Mapping):
            fix = "Expected {'type': 'function', 'function': {'name': ..., 'arguments': {...}}}."
            raise RowError(f"{place}[{i}]", "not a tool call", repr(call)[:60], fix)
        kept = {key: call[key] for key in ("id", "type") if isinstance(call.get(key), str)}
        found.append({"type": "function", **kept, "function": {"name": name, "arguments": dict(arguments)}})
    return found


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
    """Require a system turn at most at the start, then user and assistant in turn, tools after the calls of them.

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
    turns = list(messages[1:] if roles[:1] == ["system"] else messages)
    follows = bool(turns) and turns[0]["role"] == "user"
    for before, message in pairwise(turns):
        after = {"user": ("assistant",), "tool": ("tool", "assistant"), "assistant": ("user",)}.get(before["role"], ())
        if before.get("tool_calls"):
            after = ("tool",)
        follows = follows and message["role"] in after
    if not follows:
        fix = (
            "Expected a system turn at most at the start, then user and assistant in turn; tools answer after an "
            "assistant's tool_calls."
        )
        raise RowError(None, "wrong role order", found, fix)
    if answered and roles[-1] != "assistant":
        raise RowError(None, "no answer to the last turn", found, "Add the answer or remove the last turn.")
