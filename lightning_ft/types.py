"""Messages of a conversation, and what one request to a model is, apart from how it is answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict


class _Optional(TypedDict, total=False):
    tool_calls: list[dict[str, Any]]
    reasoning_content: str
    name: str
    tool_call_id: str
    train: bool


class Message(_Optional):
    """One turn of a conversation.

    `role` is ``system``, ``user``, ``assistant`` or ``tool``. An assistant's turn may have `tool_calls`
    (``{"type": "function", "function": {"name": ..., "arguments": {...}}}``) and `reasoning_content`; one with ``train:
    False`` is context only. A tool's turn may have a `name` and a `tool_call_id`.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Request:
    """A request and the answer that would be right.

    Args:
        id: Names the request; unique within a set.
        messages: The conversation up to the answer, the last turn being the user's.
        reference: The right answer.
        cluster: What it belongs together with (a customer, a conversation), for intervals resampled by cluster.
        template_kwargs: What the chat template is given besides the messages: `tools`, `enable_thinking`, ...
        answer: The right answer as a turn, where it is more than its text: with reasoning or tool calls.
    """

    id: str
    messages: tuple[Message, ...]
    reference: str
    cluster: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    answer: Message | None = None
