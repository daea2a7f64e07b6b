"""Read the messages of a conversation, and check their order.

It reads OpenAI's messages (``role``, ``content``, ``tool_calls``), ShareGPT's (``from``, ``value``, with
``function_call`` and ``observation``), and the keys that TRL, axolotl, LLaMA-Factory and ms-swift add. A key that would
change what is trained is read, or refused by name (`lightning_ft.data.keys`); any other is reported once as ignored.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

from lightning_ft.data.keys import CALL_ROLES, READ_KEYS, REASONING, REFUSED_KEYS, ROLES, TRAINED, is_nonempty
from lightning_ft.data.tool_calls import ToolCallError, read_calls
from lightning_ft.types import Message

FILL = "Fill it in or remove the row."

_PARTS = {
    "thinking": "Write the reasoning as text, in the message's 'reasoning_content'.",
    "tool_use": "Write it as the message's tool_calls.",
    "tool_result": "Write it as a turn of its own, with the role 'tool'.",
}
_PARTS |= {"reasoning": _PARTS["thinking"], "tool_call": _PARTS["tool_use"], "refusal": "Write it as text."}
"""What to do about a content part, by its type."""

_CALL = "Expected {'type': 'function', 'function': {'name': ..., 'arguments': {...}}}, with the arguments as an object."

_WRITTEN_LIST = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")
_WRITTEN_ROLE = re.compile(r"""['"](?:role|from)['"]\s*:\s*['"](?:system|user|human|assistant|gpt|tool)['"]""")
"""The start of a list of messages that was written as text, and one of its roles."""


class RowError(Exception):
    """A bad row; has all parts of a `Problem` but the origin of the row."""

    def __init__(self, field: str | None, reason: str, detail: str, fix: str) -> None:
        super().__init__(reason)
        self.field, self.reason, self.detail, self.fix = field, reason, detail, fix


def check_text(value: str, field: str, role: str) -> str:
    """Refuse empty text, except in system and tool turns.

    Raises:
        RowError: If the text is empty or only whitespace.
    """
    if value.strip() or role in ("system", "tool"):
        return value
    side = "output" if role == "assistant" else "input"
    if value:
        raise RowError(field, f"whitespace-only {side}", repr(value[:20]), FILL)
    raise RowError(field, f"empty {side}", "", FILL)


def check_field(value: str, field: str, role: str) -> str:
    """Refuse what :func:`check_text` refuses, and a list of messages that was written as text, as a CSV file does.

    Args:
        value: Text of a whole field.
        field: Name of the field.
        role: Role of the turn that the text becomes.

    Raises:
        RowError: For them.
    """
    refuse_written_messages(value, field)
    return check_text(value, field, role)


def refuse_written_messages(value: str, field: str) -> None:
    """Refuse messages as JSON or as Python prints them: the model would learn brackets and keys.

    Raises:
        RowError: If the text is such a list.
    """
    if _WRITTEN_LIST.match(value) and _WRITTEN_ROLE.search(value) and value.rstrip().endswith("]"):
        fix = (
            "Read it into a list before (json.loads; ast.literal_eval if Python has printed it), or pass "
            "[{'role': ..., 'content': text}] to keep it as text."
        )
        raise RowError(field, "messages written as text", repr(value[:40]), fix)


def read_turns(value: Sequence[object], field: str, ignored: set[str] | None = None) -> list[Message]:
    """Messages from a list of ``{role, content}`` or ShareGPT's ``{from, value}``.

    Tool calls in turns of their own (``function_call``) are added to the assistant turn before them, if any.

    Args:
        value: The list.
        field: Name of the field in errors.
        ignored: Set to which keys that aren't read are added.

    Raises:
        RowError: If one of them isn't a message, or has a key that is refused.

    Example:
        >>> read_turns([{"from": "human", "value": "2+2?"}, {"role": "assistant", "content": "4"}], "conversations")
        [{'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}]
    """
    ignored = set() if ignored is None else ignored
    turns: list[Message] = []
    for i, turn in enumerate(value):
        message = _read_turn(turn, f"{field}[{i}]", ignored)
        calls = isinstance(turn, Mapping) and (turn.get("role") or turn.get("from")) in CALL_ROLES
        before = turns[-1] if turns else None
        if calls and before is not None and before["role"] == "assistant":
            if before.get("train", True) != message.get("train", True):
                fix = "Give the calls and the answer before them the same weight: they become one turn."
                raise RowError(f"{field}[{i}]", "contradicting marks", "in one turn", fix)
            before["tool_calls"] = [*before.get("tool_calls", []), *message["tool_calls"]]
        else:
            turns.append(message)
    return turns


def _read_turn(turn: object, field: str, ignored: set[str]) -> Message:
    if not isinstance(turn, Mapping):
        fix = "Each message needs a role and a content."
        if isinstance(turn, str):  # several labels, such as codes
            fix += " If it is a list of texts, join them to one text, in the file or with format=."
        raise RowError(field, "wrong type", f"found {type(turn).__name__}", fix)
    for key in REFUSED_KEYS.keys() & turn.keys():
        if REFUSED_KEYS[key].when(turn[key]):
            detail = repr(turn[key])[:40]
            raise RowError(f"{field}.{key}", f"{key!r} isn't supported", detail, REFUSED_KEYS[key].fix)
    role_name = _either(turn, "role", "from", field)
    role = ROLES.get(role_name) if isinstance(role_name, str) else None
    if role is None:
        near = difflib.get_close_matches(str(role_name).lower(), ROLES, n=1)
        fix = (
            f"Did you mean {near[0]!r}?" if near else "Expected system, user, assistant or tool (ShareGPT: human, gpt)."
        )
        raise RowError(f"{field}.role", "unknown role", repr(role_name)[:40], fix)
    key = "tool_calls"
    try:
        calls = read_calls(turn.get("tool_calls"))
        if role_name in CALL_ROLES:
            key = "content" if turn.get("content") is not None else "value"
            calls, content = [*calls, *read_calls(_either(turn, "content", "value", field))], ""
        elif calls and turn.get("content") is None and turn.get("value") is None:
            content = ""
        else:
            content = _text(_either(turn, "content", "value", field), f"{field}.content", ignored)
    except ToolCallError as error:
        detail = repr(error.value)[:60]
        raise RowError(f"{field}.{key}[{error.index}]", "not a tool call", detail, _CALL) from None
    if calls and role != "assistant":
        fix = "Only the assistant calls tools: give the turn that role, or remove the calls."
        raise RowError(f"{field}.tool_calls", "tool calls of a turn that isn't the assistant's", f"role {role!r}", fix)
    message = Message(role=role, content=content if calls else check_text(content, f"{field}.content", role))
    if calls:
        message["tool_calls"] = calls
    _read_reasoning(turn, field, message)
    _read_trained(turn, field, message)
    for key in ("name", "tool_call_id"):
        if turn.get(key) and role == "tool":
            message[key] = str(turn[key])  # type: ignore[literal-required]
        elif turn.get(key):
            ignored.add(key)
    ignored.update(
        str(key)
        for key, value in turn.items()
        if key not in READ_KEYS and key not in REFUSED_KEYS and is_nonempty(value)
    )
    return message


def _read_reasoning(turn: Mapping[str, object], field: str, message: Message) -> None:
    keys = [key for key in REASONING if is_nonempty(turn.get(key))]
    if not keys:
        return
    key, value = keys[0], turn[keys[0]]
    if not isinstance(value, str):
        raise RowError(f"{field}.{key}", "wrong type", f"found {type(value).__name__}", "Expected a string.")
    if message["role"] != "assistant":
        fix = "Only the assistant's turns have reasoning: remove the key."
        raise RowError(f"{field}.{key}", "reasoning of a turn that isn't the assistant's", f"{value[:20]!r}", fix)
    if any(turn[other] != value for other in keys):
        raise RowError(f"{field}.{key}", "two reasonings", ", ".join(keys), "Keep one of them.")
    message["reasoning_content"] = value


def _read_trained(turn: Mapping[str, object], origin: str, message: Message) -> None:
    marked = [key for key in TRAINED if turn.get(key) is not None]
    if not marked:
        return
    field = f"{origin}.{marked[0]}"
    if any(isinstance(turn[key], str) or turn[key] not in (0, 1) for key in marked):
        detail = ", ".join(f"{key}: {turn[key]!r}"[:40] for key in marked)
        fix = "Expected 0 or 1, false or true: a turn is trained on or it isn't."
        raise RowError(field, "weight that is neither 0 nor 1", detail, fix)
    if len({bool(turn[key]) for key in marked}) > 1:
        raise RowError(field, "contradicting marks", ", ".join(marked), "Keep one of them.")
    trained = bool(turn[marked[0]])
    if message["role"] != "assistant" and trained:
        fix = "Only answers are trained on: remove the key, or set it to false, in turns that aren't the assistant's."
        raise RowError(field, "a turn marked as trained that isn't the assistant's", f"role {message['role']!r}", fix)
    if message["role"] == "assistant" and not trained:
        message["train"] = False


def _text(content: object, field: str, ignored: set[str]) -> str:
    """The text of a message's content: a string, or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        fix = "Expected a string; write an object as JSON text."
        raise RowError(field, "wrong type", f"found {type(content).__name__}", fix)
    texts = []
    for i, part in enumerate(content):
        part_field, fields = f"{field}[{i}]", part if isinstance(part, Mapping) else {"text": part}
        part_type = fields.get("type") or next(
            (name for name in ("image", "video", "audio") if fields.get(name)), "text"
        )
        if part_type not in ("text", "input_text", "output_text"):
            fix = _PARTS.get(str(part_type), "Only text can be trained on: remove the part, or the row.")
            detail = ", ".join(map(str, fields))[:60]
            raise RowError(part_field, f"content part of type {part_type!r}"[:80], detail, fix)
        if not isinstance(fields.get("text"), str):
            fix = "Expected {'type': 'text', 'text': ...}; write an object as JSON text."
            raise RowError(part_field, "content part without a text", f"found {type(part).__name__}", fix)
        for key in TRAINED:
            if fields.get(key) is not None:
                fix = "Parts of a turn can't be masked: remove it, and mark whole turns with 'train'."
                raise RowError(f"{part_field}.{key}", f"{key!r} of a part isn't supported", repr(fields[key])[:40], fix)
        ignored.update(f"content.{k}" for k, v in fields.items() if k not in ("type", "text") and is_nonempty(v))
        texts.append(fields["text"])
    return "".join(texts)


def _either(turn: Mapping[str, object], name: str, other: str, field: str) -> object:
    """The value of a key with two names.

    Raises:
        RowError: If there is no value, or two that differ.
    """
    values = [turn[key] for key in (name, other) if turn.get(key) is not None]
    if len(values) == 2 and values[0] != values[1]:
        same_role = name == "role" and ROLES.get(str(values[0])) == ROLES.get(str(values[1]))
        if not same_role:
            detail = f"{values[0]!r} and {values[1]!r}"[:60]
            raise RowError(f"{field}.{name}", f"{name!r} and {other!r} differ", detail, "Keep one of them.")
    if values:
        return values[0]
    if name in turn or other in turn:
        raise RowError(f"{field}.{name}", "None", "", FILL)
    near = difflib.get_close_matches(name, [str(key) for key in turn], n=1, cutoff=0.5)
    fix = f"Rename {near[0]!r} to {name!r}." if near else f"Each message needs a {name}."
    raise RowError(f"{field}.{name}", "missing field", f"fields: {', '.join(map(str, turn))}", fix)


def check_order(messages: Sequence[Message], *, answered: bool) -> None:
    """Require an optional system turn, then user and assistant in turn, with tool turns after an assistant turn.

    Args:
        messages: The conversation.
        answered: Whether the last turn must be the assistant's.

    Raises:
        RowError: If the order is another.
    """
    roles = [message["role"] for message in messages]
    detail = f"roles: {', '.join(roles) or 'none'}"
    if answered and "assistant" not in roles:
        raise RowError(None, "no assistant turn", detail, "There is nothing to learn from it: add an answer.")
    fix = _order_fix(roles[1:] if roles[:1] == ["system"] else roles)
    if fix is not None:
        raise RowError(None, "wrong role order", detail, fix)
    if answered and roles[-1] != "assistant":
        raise RowError(None, "no answer to the last turn", detail, "Add the answer or remove the last turn.")


_NEXT_ROLES = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}


def _order_fix(roles: Sequence[str]) -> str | None:
    """How to fix the order of roles after the system turn; None if it is right."""
    if not roles:
        return "Add a turn of the user."
    if roles[0] == "assistant":
        return "Remove the turns before the user's first, or write what they say into a system turn."
    if roles[0] != "user":
        return "Expected a system turn at most at the start, then a turn of the user."
    for before, role in pairwise(roles):
        if role in _NEXT_ROLES.get(before, ()):
            continue
        if role == before:
            return f"Join the turns of the {role} that follow each other."
        if role == "system":
            return "Move the system turn to the start, or write what it says into a turn of the user."
        return "Expected user and assistant in turn, and tools between an assistant's turn and its next one."
    return None
