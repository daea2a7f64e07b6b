"""What a chat template writes around the turns of a conversation, found by rendering a few short ones.

Above all, how it ends an answer. A conversation that ends with the answer next to one that goes on shows it: the end is
what both write, not the header of the next turn and not what closes the whole conversation::

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

_MOST_CACHED = 1000  # rows may each bring tools of their own


def mark(number: int, field: int = 0, start: str = "905316") -> str:
    """A text to put into a turn, which no template writes in another way: digits have no case.

    Args:
        number: Which turn it is put into.
        field: Which field of the turn.
        start: Six digits that the conversation hasn't.

    Example:
        >>> mark(0), mark(12, 1)
        ('905316000061', '905316101261')
    """
    return f"{start}{field}{number:03}61"


class TemplateLayout(NamedTuple):
    """What a template writes around plain turns.

    Args:
        end: After the last answer of a conversation, through the token that ends it; None where there is none.
        ends_all: Whether earlier answers end by the same.
        gaps: What it writes between a user's turn and its answer, in a conversation of one question and of two, each
            with how many of its characters the prompt ends with.
        around: All that is written in a conversation of two questions, and after the question of a prompt.
        asked: What it writes after the question of a prompt.
    """

    end: str | None
    ends_all: bool
    gaps: tuple[tuple[str, int], ...]
    around: str
    asked: str

    @classmethod
    def of(cls, template: ChatTemplate, kwargs: Mapping[str, Any]) -> TemplateLayout:
        """Found by rendering three short conversations, once.

        Args:
            template: The chat template.
            kwargs: What it is given besides: `tools`, `enable_thinking`, ...
        """
        key = ("layout", kwargs_key(kwargs))
        found: TemplateLayout | None = recall(template, key)
        if found is None:
            found = cls._found(template, kwargs)
            keep(template, key, found)
        return found

    @classmethod
    def _found(cls, template: ChatTemplate, kwargs: Mapping[str, Any]) -> TemplateLayout:
        turns = [Message(role=("user", "assistant")[i % 2], content=mark(i)) for i in range(4)]
        for head in ([], [Message(role="system", content=mark(4))]):  # some templates want a system turn first
            one = _parts(template, [*head, *turns[:2]], kwargs)
            two = _parts(template, [*head, *turns], kwargs)
            prompt = _parts(template, [*head, *turns[:1]], kwargs, prompt=True)
            if one is not None or two is not None:
                break
        end, ends_all = end_of(template, None if one is None else one[-1], None if two is None else two[-3])
        between = [*([one[-2]] if one else []), *([two[-4], two[-2]] if two else [])]
        asked = None if prompt is None else prompt[-1]
        gaps = () if asked is None else tuple((gap, _asked_in(template, gap, asked)) for gap in dict.fromkeys(between))
        return cls(end, ends_all, gaps, "\n".join([*(two or one or []), asked or ""]), asked or "")


def _parts(
    template: ChatTemplate, turns: Sequence[Message], kwargs: Mapping[str, Any], *, prompt: bool = False
) -> list[str] | None:
    """What a template writes around marks; None where it refuses the conversation or writes one of them otherwise."""
    marks = [turn["content"] for turn in turns]
    try:
        parts = re.split("|".join(marks), template.render(turns, kwargs, prompt=prompt))
    except TokenizerError:
        return None
    return parts if len(parts) == len(marks) + 1 else None


def _asked_in(template: ChatTemplate, gap: str, asked: str) -> int:
    """How many characters of what precedes an answer the prompt has too."""
    return whole_tokens(template, gap, len(shared_start([gap, asked])))


def end_of(template: ChatTemplate, closing: str | None, following: str | None) -> tuple[str | None, bool]:
    """The text that ends a turn, and whether it does so also where the conversation goes on.

    Args:
        template: Whose tokens count.
        closing: What is written after a turn with which the conversation ends.
        following: What is written after it where it goes on.
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


# ---------------------------------------------------------------- what the template leaves out


def dropped_turns(template: ChatTemplate, messages: Sequence[Message], kwargs: Mapping[str, Any]) -> frozenset[int]:
    """Which turns before the answers a template leaves out of conversations of this shape; rendered once a shape.

    Args:
        template: The chat template.
        messages: The conversation.
        kwargs: What the template is given besides.
    """
    shape = tuple((message["role"], "tool_calls" in message) for message in messages)
    key = ("dropped", shape, kwargs_key(kwargs))
    known: frozenset[int] | None = recall(template, key)
    if known is not None:
        return known
    turns = [
        message if message.get("tool_calls") else {**message, "content": mark(i)} for i, message in enumerate(messages)
    ]
    try:
        text = template.render(turns, kwargs)  # type: ignore[arg-type]
    except TokenizerError:
        return frozenset()
    lost = frozenset(i for i, m in enumerate(messages) if m["role"] != "assistant" and mark(i) not in text)
    keep(template, key, lost)
    return lost


# ---------------------------------------------------------------- tokens by name


def added_tokens(template: ChatTemplate, *, bos: bool = False) -> re.Pattern[str]:
    """Finds the tokens that a tokenizer has by name, but for white space.

    Args:
        template: The chat template of the tokenizer.
        bos: Whether BOS is among them; it ends no turn.
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
    found: re.Pattern[str] = template.cached[key]
    return found


def template_tokens(template: ChatTemplate) -> frozenset[str]:
    """The tokens by name that a template writes around plain messages."""
    around = TemplateLayout.of(template, {}).around
    return frozenset(match.group() for match in added_tokens(template, bos=True).finditer(around))


def whole_tokens(template: ChatTemplate, text: str, stop: int) -> int:
    """A position in a text, or the start of the token by name that it would cut through."""
    for match in added_tokens(template).finditer(text):
        if match.start() < stop < match.end():
            return match.start()
        if match.start() >= stop:
            break
    return stop


# ---------------------------------------------------------------- texts, and what was found already


def shared_start(texts: Sequence[str]) -> str:
    """What all texts start with.

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
    """What all texts end with.

    Example:
        >>> shared_end(["[/INST]", "2+2?[/INST]"])
        '[/INST]'
    """
    return shared_start([text[::-1] for text in texts])[::-1]


def kwargs_key(kwargs: Mapping[str, Any]) -> str:
    """A key for what a template is given besides the messages."""
    return repr(sorted((name, repr(value)) for name, value in kwargs.items())) if kwargs else ""


def recall(template: ChatTemplate, key: tuple[Any, ...]) -> Any:
    """What was kept of a template under a key; None if nothing was."""
    return template.cached.get(key)


def keep(template: ChatTemplate, key: tuple[Any, ...], found: Any) -> None:
    """Keep what was found out about a template."""
    if len(template.cached) >= _MOST_CACHED:
        template.cached.clear()
    template.cached[key] = found
