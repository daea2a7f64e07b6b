"""Which part of a rendered conversation depends on each answer.

No text is searched for an answer. The conversation is rendered again with marks in place of the answers; what is the
same in both is the template's, and what differs is the answer's, its core::

    <user>2+2?<end><assistant>four<end><eos>            as it is
    <user>2+2?<end><assistant>905316000161<end><eos>    with a mark in the answer's place
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lightning_ft.data.template_layout import mark, shared_end, shared_start
from lightning_ft.errors import TokenizerError
from lightning_ft.types import Message

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


Render = Callable[[Sequence[Message]], str]

_CONTENT, _REASONING, _ARGUMENTS = 0, 1, 2
_THOUGHT = re.compile(r"(\s*(?:<think>\s*)?)(\S.*?)(\s*</think>\s*)(\S.*?)(\s*)", re.DOTALL)
_PLAIN = frozenset({"role", "content", "train", "name"})


class AnswerLostError(TokenizerError):
    """A part of a conversation isn't in what the chat template made of it, or not as it was."""


class Core(NamedTuple):
    """The part of a text that depends on an answer.

    Args:
        start: First character.
        stop: The character after the last.
        reasons: Whether the template writes the answer's `reasoning_content`.
    """

    start: int
    stop: int
    reasons: bool = True


def find_cores(render: Render, messages: Sequence[Message], answers: Sequence[int], text: str) -> list[Core]:
    """The core of each answer in the text of a conversation.

    Args:
        render: Makes the text of messages.
        messages: The conversation.
        answers: Which of its turns are answers.
        text: What `render` makes of it.

    Raises:
        AnswerLostError: If an answer isn't in the text, or more than once.
    """
    if not answers:
        return []
    found = _by_marks(render, messages, answers, text)
    if found is None:
        found = [core_by_difference(render, messages, i, text) for i in answers]
        for i in answers:
            _refuse_repeated(render, messages, i, _unused(text))
    for i, core, following in zip(answers, found, [*found[1:], Core(len(text), len(text))], strict=True):
        if core.stop > following.start or (core.start == core.stop and _says_something(messages[i])):
            became = text[core.start : core.stop][:60]
            raise AnswerLostError(
                f"the chat template drops or changes an answer: {_quoted(messages[i])} became {became!r}"
            )
    return found


def core_by_difference(render: Render, messages: Sequence[Message], i: int, text: str) -> Core:
    """The core of one answer: what two renderings with other answers in its place don't share with the text.

    Args:
        render: Makes the text of messages.
        messages: The conversation.
        i: Which of its turns is the answer.
        text: What `render` makes of it.
    """
    digits, around = _unused(text), ["12", "78"]  # the two begin and end otherwise: what's shared is the template's
    others = [render([*messages[:i], _replaced(messages[i], i, digits, ends), *messages[i + 1 :]]) for ends in around]
    start = len(shared_start([text, *others]))
    stop = len(text) - len(shared_end([rendered[start:] for rendered in (text, *others)]))
    return Core(start, stop, mark(i, _REASONING, digits) in others[0])


def _by_marks(render: Render, messages: Sequence[Message], answers: Sequence[int], text: str) -> list[Core] | None:
    """All cores from one more rendering, or None where the template does more with an answer than to write it."""
    turns, digits = list(messages), _unused(text)
    for i in answers:
        turns[i] = _replaced(turns[i], i, digits)
    marked = render(turns)
    spots: dict[int, list[tuple[str, int, int]]] = {i: [] for i in answers}
    for match in _marks(digits).finditer(marked):
        spots.setdefault(int(match.group(2)), []).append((match.group(1), match.start(), match.end()))
    if len(spots) > len(answers) or not all(_once(messages[i], spots[i]) for i in answers):
        return None
    edges = [0, *(edge for i in answers for edge in (spots[i][0][1], spots[i][-1][2])), len(marked)]
    gaps = [marked[edges[n] : edges[n + 1]] for n in range(0, len(edges), 2)]
    if edges != sorted(edges) or not text.startswith(gaps[0]) or not text.endswith(gaps[-1]):
        return None
    cores, at = [], len(gaps[0])
    for i, gap in zip(answers, gaps[1:], strict=True):
        stop = _stop_before(gap, text, at, messages[i], last=i == answers[-1])
        if stop is None:
            return None
        cores.append(Core(at, stop, any(field == str(_REASONING) for field, _, _ in spots[i])))
        at = stop + len(gap)
    return cores


def _once(message: Message, spots: list[tuple[str, int, int]]) -> bool:
    """Whether the marks of a turn are where a template writes each of its fields once, if at all."""
    fields = [int(field) for field, _, _ in spots]
    most = (1, 1, 2 * len(message.get("tool_calls", [])))
    return bool(fields) and all(fields.count(field) <= most[field] for field in set(fields))


def _stop_before(gap: str, text: str, at: int, message: Message, *, last: bool) -> int | None:
    """Where an answer that begins at `at` ends, `gap` following; None where that isn't certain."""
    if set(message) <= _PLAIN and not _THOUGHT.fullmatch(message["content"]):
        content = message["content"]
        forms = {content, content.strip(), content.lstrip(), content.rstrip(), without_reasoning(content)}
        ends = [at + len(form) for form in sorted(forms, key=len, reverse=True) if text.startswith(form + gap, at)]
        return next((end for end in ends if not last or end + len(gap) == len(text)), None)
    if last:
        stop = len(text) - len(gap)
        return stop if stop >= at else None
    stop = text.find(gap, at)
    return stop if stop >= 0 and text.find(gap, stop + 1) < 0 else None


def _refuse_repeated(render: Render, messages: Sequence[Message], i: int, digits: str) -> None:
    """Refuse an answer that is written again before or after another turn, which then would be part of it."""
    turns = [_replaced(message, n, digits) for n, message in enumerate(messages)]
    try:
        text = render(turns)
    except TokenizerError:
        return  # it wants to see what the turns say
    numbers = [int(match.group(2)) for match in _marks(digits).finditer(text)]
    ours = [at for at, number in enumerate(numbers) if number == i]
    if len(ours) > 1 and set(numbers[ours[0] : ours[-1]]) != {i}:
        raise AnswerLostError(
            f"the chat template writes an answer more than once, and another turn between: {_quoted(messages[i])}"
        )


def _unused(text: str) -> str:
    """Six digits that aren't in a text."""
    return next(digits for digits in map(str, range(905316, 10**6, 19)) if digits not in text)


def _marks(digits: str) -> re.Pattern[str]:
    return re.compile(digits + r"(\d)(\d{3,}?)61")


def _replaced(message: Message, i: int, digits: str, around: str = "") -> Message:
    """A turn that says something else: marks.

    Args:
        message: The turn.
        i: Which one.
        digits: What marks begin with.
        around: The character before each mark, and that after it.
    """
    before, after = around[:1], around[1:]
    content, reasoning, argument = (f"{before}{mark(i, field, digits)}{after}" for field in (0, 1, 2))
    replaced: dict[str, Any] = dict(message)
    if inline := _THOUGHT.fullmatch(message["content"]):  # templates look at the tags
        opening, _, closing, _, end = inline.groups()
        replaced["content"] = opening + reasoning + closing + content + end
    elif message["content"]:
        replaced["content"] = content
    if message.get("reasoning_content"):
        replaced["reasoning_content"] = reasoning
    if message.get("tool_calls"):  # not the names, which a template may write again before the tools' answers
        replaced["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _alike(call["function"]["arguments"], argument)}}
            for call in message["tool_calls"]
        ]
    return replaced  # type: ignore[return-value]


def _alike(arguments: Any, argument: str) -> dict[str, Any]:
    """Other arguments, that end by quotation marks if those given do."""
    values = list(arguments.values()) if isinstance(arguments, dict) else []
    return {argument: argument if not values or isinstance(values[-1], str) else int(argument)}


def without_reasoning(content: str) -> str:
    """What templates keep of an answer in the history: what follows its ``</think>``.

    Example:
        >>> without_reasoning("<think>two and two</think> 4"), without_reasoning("5")
        ('4', '5')
    """
    return content.rpartition("</think>")[2].lstrip() if "</think>" in content else content


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or any(call["function"]["arguments"] for call in _calls(message)))


def _calls(message: Message) -> list[dict[str, Any]]:
    return message.get("tool_calls") or []


def _quoted(message: Message) -> str:
    return repr((message["content"] or str(message.get("tool_calls")))[:40])
