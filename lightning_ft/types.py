"""Messages of a conversation, and requests to a model."""

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

    `role` is ``system``, ``user``, ``assistant`` or ``tool``. An assistant turn may have `tool_calls`
    (``{"type": "function", "function": {"name": ..., "arguments": {...}}}``) and `reasoning_content`; with ``train:
    False`` its tokens are not supervised. A tool turn may have a `name` and a `tool_call_id`.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Request:
    """A request with its reference answer.

    Args:
        id: Identifier of the request, unique within a data set.
        messages: Conversation up to the answer; the last turn is a user's.
        reference: Text of the reference answer.
        cluster: Group of related requests (a customer, a conversation) that this one belongs to; bootstrap intervals
            are resampled by cluster.
        template_kwargs: Variables for the chat template in addition to the messages: `tools`, `enable_thinking`, ...
        answer: Reference answer as an assistant turn, if it has more than text, such as reasoning or tool calls.
        prompt_context: Text that only the prompted arm of token savings gets, at the end of its system prompt:
            retrieved passages, candidates, a schema.
        structured_output: Format of the answers to this request, where structured outputs are used:
            ``{"choices": [...]}``, ``{"json_schema": {...}}`` or ``{"regex": ...}``.
    """

    id: str
    messages: tuple[Message, ...]
    reference: str
    cluster: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    answer: Message | None = None
    prompt_context: str | None = None
    structured_output: Mapping[str, Any] | None = None
