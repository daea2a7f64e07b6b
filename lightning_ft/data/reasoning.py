"""Reasoning that a generation prompt opens, where the template writes the answer without."""

from __future__ import annotations

import re

from lightning_ft.data.request import Message

_OPENED = re.compile(r"<(\w+)>\s*$")
"""A tag that a generation prompt ends with: reasoning that the model is to continue."""


def reopened(message: Message, region: str, prompt: str, reasons: bool) -> str | None:
    """What is to follow a prompt that ends with ``<think>``, where the template doesn't write it so; else None.

    Args:
        message: The answer.
        region: What the template has in place of it after the prompt.
        prompt: What generation starts from.
        reasons: Whether the template writes the answer's `reasoning_content`.
    """
    opened = _OPENED.search(prompt)
    if opened is None:
        return None
    close, content = f"</{opened.group(1)}>", message["content"]
    if reasoning := message.get("reasoning_content", "").strip():
        return None if reasons else f"{reasoning}\n{close}\n\n{content}"
    inside, closing, _ = content.partition(close)
    before, opening, thought = inside.partition(f"<{opened.group(1)}>")
    if not closing or not opening or before.strip():
        return None
    written, thought = region.lstrip(), thought.strip()
    if written.startswith(thought) and written[len(thought) :].lstrip().startswith(close):
        return None
    tail = opened.group(0)
    return content[len(tail) :] if content.startswith(tail) else content.partition(opening)[2].lstrip()
