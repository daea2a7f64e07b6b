"""The prompt of two whole conversations or texts that go on differently."""

from __future__ import annotations

from lightning_ft.data.request import Message


def shared_turns(left: list[Message], right: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """The turns two conversations start with, and what is left of each.

    Example:
        >>> asked = Message(role="user", content="2+2?")
        >>> answers = [Message(role="assistant", content=content) for content in ("4", "5")]
        >>> prompt, chosen, rejected = shared_turns([asked, answers[0]], [asked, answers[1]])
        >>> prompt == [asked], chosen == answers[:1], rejected == answers[1:]
        (True, True, True)
    """
    shared = _common(left, right)
    return left[:shared], left[shared:], right[shared:]


def shared_text(left: str, right: str) -> tuple[str, str, str]:
    """The text two texts start with, and what is left of each, the space between included.

    No word is torn apart: a model reads a word otherwise than its beginning.

    Example:
        >>> shared_text("2+2? It is four.", "2+2? It is fourteen.")
        ('2+2? It is', ' four.', ' fourteen.')
    """
    shared = _common(left, right)
    while shared and (_tears(left, shared) or _tears(right, shared)):
        shared -= 1
    if left[:shared].endswith(" "):
        shared -= 1
    return left[:shared], left[shared:], right[shared:]


def _common(left: str | list[Message], right: str | list[Message]) -> int:
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _tears(text: str, place: int) -> bool:
    """Whether a word goes on there."""
    return place < len(text) and text[place - 1].isalnum() and text[place].isalnum()
