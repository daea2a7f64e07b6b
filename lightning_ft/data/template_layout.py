"""Finds what a chat template writes around the turns of a conversation, by rendering a few short ones.

The main question is how it ends an answer. The end is what a conversation that stops after the answer has in common
with one that goes on: neither the header of the next turn nor what closes the whole conversation::

    <user>7<end><assistant>8<end><eos>                          closing:   <end><eos>
    <user>7<end><assistant>8<end><user>9<end><assistant>...     following: <end><user>
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_ft.data.templates import ChatTemplate
from lightning_ft.errors import TokenizerError
from lightning_ft.types import Message

_MOST_CACHED = 1000  # a limit, since each row may bring its own tools


def mark(number: int, field: int = 0, start: str = "905316") -> str:
    """A text to put into a turn, which templates leave unchanged, since digits have no case.

    Args:
        number: Index of the turn.
        field: Number of the field in the turn.
        start: Six digits that don't appear in the conversation.

    Example:
        >>> mark(0), mark(12, 1)
        ('905316000061', '905316101261')
    """
    return f"{start}{field}{number:03}61"


class TemplateLayout(NamedTuple):
    """Text that a template writes around plain turns.

    Args:
        end: Text after the last answer of a conversation, through the token that ends it; None if there is none.
        ends_all: Whether earlier answers end in the same way.
        gaps: Texts between a user turn and its answer, in a conversation of one question and of two, each with the
            number of its characters that are part of the prompt.
        around: All text around the turns of a conversation of two questions, and after the question of a prompt.
        prompt_end: Text after the question of a prompt.
    """

    end: str | None
    ends_all: bool
    gaps: tuple[tuple[str, int], ...]
    around: str
    prompt_end: str

    @classmethod
    def of(cls, template: ChatTemplate, kwargs: Mapping[str, object]) -> TemplateLayout:
        """The layout of a template, from rendering three short conversations once.

        Args:
            template: The chat template.
            kwargs: Variables in addition to the messages: `tools`, `enable_thinking`, ...
        """
        key = ("layout", kwargs_key(kwargs))
        layout: TemplateLayout | None = recall(template, key)
        if layout is None:
            layout = cls._render(template, kwargs)
            keep(template, key, layout)
        return layout

    @classmethod
    def _render(cls, template: ChatTemplate, kwargs: Mapping[str, object]) -> TemplateLayout:
        turns = [Message(role=("user", "assistant")[i % 2], content=mark(i)) for i in range(4)]
        for head in ([], [Message(role="system", content=mark(4))]):  # some templates require a system turn first
            one = _parts(template, [*head, *turns[:2]], kwargs)
            two = _parts(template, [*head, *turns], kwargs)
            prompt = _parts(template, [*head, *turns[:1]], kwargs, prompt=True)
            if one is not None or two is not None:
                break
        end, ends_all = end_of(template, None if one is None else one[-1], None if two is None else two[-3])
        between = [*([one[-2]] if one else []), *([two[-4], two[-2]] if two else [])]
        tail = None if prompt is None else prompt[-1]
        gaps = () if tail is None else tuple((gap, _prompt_part(template, gap, tail)) for gap in dict.fromkeys(between))
        return cls(end, ends_all, gaps, "\n".join([*(two or one or []), tail or ""]), tail or "")


def _parts(
    template: ChatTemplate, turns: Sequence[Message], kwargs: Mapping[str, object], *, prompt: bool = False
) -> list[str] | None:
    """Texts around the marks; None if the template refuses the conversation or changes a mark."""
    marks = [turn["content"] for turn in turns]
    try:
        parts = re.split("|".join(marks), template.render(turns, kwargs, prompt=prompt))
    except TokenizerError:
        return None
    return parts if len(parts) == len(marks) + 1 else None


def _prompt_part(template: ChatTemplate, gap: str, prompt_end: str) -> int:
    """Number of characters in the gap before an answer that are part of the prompt."""
    return whole_tokens(template, gap, len(shared_start([gap, prompt_end])))


def end_of(template: ChatTemplate, closing: str | None, following: str | None) -> tuple[str | None, bool]:
    """The text that ends a turn, and whether it also ends turns before the last.

    Args:
        template: The chat template, whose tokens count.
        closing: Text after a turn at the end of a conversation.
        following: Text after the turn in a conversation that goes on.
    """
    if closing is None:
        return None, False
    ends = [match.end() for match in added_tokens(template).finditer(closing)]
    both = [] if following is None else [end for end in ends if following.startswith(closing[:end])]
    if both:
        return closing[: both[-1]], True
    if not ends:
        return None, False
    if following is not None:
        return closing[: ends[-1]], False
    special = [end for end in ends if is_special(template, closing[:end])]
    return closing[: (special or ends)[0]], False


def is_special(template: ChatTemplate, end: str) -> bool:
    """Whether a text ends with a special token, at which generation stops; one that only closes a call isn't."""
    special = (str(token) for token in template.tokenizer.added_tokens_decoder.values() if token.special)
    return end.endswith((*template.tokenizer.all_special_tokens, *special))


# ---------------------------------------------------------------- dropped turns


def dropped_turns(template: ChatTemplate, messages: Sequence[Message], kwargs: Mapping[str, object]) -> frozenset[int]:
    """Indices of the turns that a template drops from conversations of this shape; each shape is rendered once.

    Args:
        template: The chat template.
        messages: The conversation.
        kwargs: Variables for the template in addition to the messages.
    """
    shape = tuple((message["role"], "tool_calls" in message) for message in messages)
    key = ("dropped", shape, kwargs_key(kwargs))
    cached: frozenset[int] | None = recall(template, key)
    if cached is not None:
        return cached
    turns = [
        message if message.get("tool_calls") else {**message, "content": mark(i)} for i, message in enumerate(messages)
    ]
    try:
        text = template.render(turns, kwargs)  # type: ignore[arg-type]
    except TokenizerError:
        return frozenset()
    dropped = frozenset(i for i, m in enumerate(messages) if m["role"] != "assistant" and mark(i) not in text)
    keep(template, key, dropped)
    return dropped


# ---------------------------------------------------------------- added tokens


def added_tokens(template: ChatTemplate, *, bos: bool = False) -> re.Pattern[str]:
    """Pattern of the tokenizer's added and special tokens, except white space.

    Args:
        template: The chat template of the tokenizer.
        bos: Whether BOS is included; it ends no turn.
    """
    key = ("added", bos)
    if key not in template.cached:
        tokenizer = template.tokenizer
        names = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        if not bos and tokenizer.bos_token != tokenizer.eos_token:
            names.discard(str(tokenizer.bos_token))
        names = {name for name in names if name.strip()}
        ordered = sorted(names, key=len, reverse=True)
        template.cached[key] = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
    pattern: re.Pattern[str] = template.cached[key]
    return pattern


def space_tokens(template: ChatTemplate) -> tuple[tuple[str, ...], str]:
    """The tokenizer's added tokens that strip the white space after them, and one that doesn't, or ``""``.

    Args:
        template: The chat template of the tokenizer.
    """
    if "space" not in template.cached:
        tokens = list(template.tokenizer.added_tokens_decoder.values())
        stripping = tuple(str(token) for token in tokens if token.rstrip)
        others = (str(token) for token in tokens if token.special and not token.rstrip and not token.single_word)
        template.cached["space"] = stripping, next(others, "")
    found: tuple[tuple[str, ...], str] = template.cached["space"]
    return found


def template_tokens(template: ChatTemplate) -> frozenset[str]:
    """Added tokens that a template writes around plain messages."""
    around = TemplateLayout.of(template, {}).around
    return frozenset(match.group() for match in added_tokens(template, bos=True).finditer(around))


def whole_tokens(template: ChatTemplate, text: str, stop: int) -> int:
    """An index in a text, moved to the start of the added token that it would split."""
    for match in added_tokens(template).finditer(text):
        if match.start() < stop < match.end():
            return match.start()
        if match.start() >= stop:
            break
    return stop


# ---------------------------------------------------------------- shared texts, and cached results


def shared_start(texts: Sequence[str]) -> str:
    """The longest common start of texts.

    Example:
        >>> shared_start(["<|end|>", "<|eos|>"])
        '<|e'
    """
    shortest = min(texts, key=len)
    low, high = 0, len(shortest)
    while low < high:
        middle = (low + high + 1) // 2
        if all(text.startswith(shortest[:middle]) for text in texts):
            low = middle
        else:
            high = middle - 1
    return shortest[:low]


def shared_end(texts: Sequence[str]) -> str:
    """The longest common end of texts.

    Example:
        >>> shared_end(["[/INST]", "2+2?[/INST]"])
        '[/INST]'
    """
    return shared_start([text[::-1] for text in texts])[::-1]


def kwargs_key(kwargs: Mapping[str, object]) -> str:
    """Cache key of the variables that a template gets in addition to the messages."""
    return repr(sorted((name, repr(value)) for name, value in kwargs.items())) if kwargs else ""


def recall(template: ChatTemplate, key: tuple[object, ...]) -> Any:
    """The cached result of a key for a template; None if there is none."""
    return template.cached.get(key)


def keep(template: ChatTemplate, key: tuple[object, ...], value: object) -> None:
    """Cache a result for a template."""
    if len(template.cached) >= _MOST_CACHED:
        template.cached.clear()
    template.cached[key] = value
