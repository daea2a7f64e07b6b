"""What one request to a model is, apart from how it is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict


class Message(TypedDict):
    """One turn of a conversation; `role` is ``system``, ``user`` or ``assistant``."""

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
    """

    id: str
    messages: tuple[Message, ...]
    reference: str
    cluster: str | None = None
