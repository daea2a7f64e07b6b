"""Finds the part of a rendered conversation that depends on each answer.

The text is never searched for an answer. The conversation is rendered again with marks in place of the answers: what
both texts share is the template's, and what differs is the answer's, its core::

    <user>2+2?<end><assistant>four<end><eos>            the conversation
    <user>2+2?<end><assistant>905316000161<end><eos>    with a mark in place of the answer
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lightning_ft.data.template_layout import mark, shared_end, shared_start
from lightning_ft.errors import TokenizerError
from lightning_ft.types import Message

_OPENED = re.compile(r"<(\w+)>\s*$")
"""A tag at the end of a generation prompt, which opens reasoning that the model continues."""


def reopened(message: Message, region: str, prompt: str, reasons: bool) -> str | None:
    """Text that should follow a prompt ending with ``<think>``, if the template writes something else; otherwise None.

    Args:
        message: The answer.
        region: Text that the template writes after the prompt.
        prompt: Text that generation starts from.
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
    """A part of a conversation is missing from the rendered text, or changed in it."""


class Core(NamedTuple):
    """The part of a text that depends on an answer.

    Args:
        start: Index of its first character.
        stop: Index after its last character.
        reasons: Whether the template writes the answer's `reasoning_content`.
    """

    start: int
    stop: int
    reasons: bool = True


def find_cores(render: Render, messages: Sequence[Message], answers: Sequence[int], text: str) -> list[Core]:
    """Find the core of each answer in the text of a conversation.

    Args:
        render: Function that renders messages.
        messages: The conversation.
        answers: Indices of the answers among the turns.
        text: Text of the conversation from `render`.

    Raises:
        AnswerLostError: If an answer is missing from the text, or appears in it more than once.
    """
    if not answers:
        return []
    cores = _by_marks(render, messages, answers, text)
    if cores is None:
        cores = [core_by_difference(render, messages, i, text) for i in answers]
        for i in answers:
            _refuse_repeated(render, messages, i, _unused(text))
    for i, core, following in zip(answers, cores, [*cores[1:], Core(len(text), len(text))], strict=True):
        if core.stop > following.start or (core.start == core.stop and _is_nonempty(messages[i])):
            rendered = text[core.start : core.stop][:60]
            raise AnswerLostError(
                f"the chat template drops or changes an answer: {_quoted(messages[i])} became {rendered!r}"
            )
    return cores


def core_by_difference(render: Render, messages: Sequence[Message], i: int, text: str) -> Core:
    """Find the core of one answer: the part of the text that two renderings with other answers don't share.

    Args:
        render: Function that renders messages.
        messages: The conversation.
        i: Index of the answer among the turns.
        text: Text of the conversation from `render`.
    """
    digits, around = _unused(text), ["12", "78"]  # they begin and end differently, so shared text is the template's
    others = [render([*messages[:i], _replaced(messages[i], i, digits, ends), *messages[i + 1 :]]) for ends in around]
    start = len(shared_start([text, *others]))
    stop = len(text) - len(shared_end([rendered[start:] for rendered in (text, *others)]))
    return Core(start, stop, mark(i, _REASONING, digits) in others[0])


def _by_marks(render: Render, messages: Sequence[Message], answers: Sequence[int], text: str) -> list[Core] | None:
    """All cores from a single further rendering; None if the template does more with an answer than write it."""
    turns, digits = list(messages), _unused(text)
    for i in answers:
        turns[i] = _replaced(turns[i], i, digits)
    marked = render(turns)
    matches: dict[int, list[tuple[str, int, int]]] = {i: [] for i in answers}  # field, start and stop, per turn
    for match in _marks(digits).finditer(marked):
        matches.setdefault(int(match.group(2)), []).append((match.group(1), match.start(), match.end()))
    if len(matches) > len(answers) or not all(_is_written_once(messages[i], matches[i]) for i in answers):
        return None
    edges = [0, *(edge for i in answers for edge in (matches[i][0][1], matches[i][-1][2])), len(marked)]
    gaps = [marked[edges[n] : edges[n + 1]] for n in range(0, len(edges), 2)]
    if edges != sorted(edges) or not text.startswith(gaps[0]) or not text.endswith(gaps[-1]):
        return None
    cores, start = [], len(gaps[0])
    for i, gap in zip(answers, gaps[1:], strict=True):
        stop = _stop_before(gap, text, start, messages[i], last=i == answers[-1])
        if stop is None:
            return None
        cores.append(Core(start, stop, any(field == str(_REASONING) for field, _, _ in matches[i])))
        start = stop + len(gap)
    return cores


def _is_written_once(message: Message, matches: list[tuple[str, int, int]]) -> bool:
    """Whether each field of a turn is written at most once; `matches` are its marks in the text."""
    fields = [int(field) for field, _, _ in matches]
    most = (1, 1, 2 * len(message.get("tool_calls", [])))
    return bool(fields) and all(fields.count(field) <= most[field] for field in set(fields))


def _stop_before(gap: str, text: str, start: int, message: Message, *, last: bool) -> int | None:
    """Index at which an answer ends that begins at `start` and is followed by `gap`; None if it isn't certain."""
    if set(message) <= _PLAIN and not _THOUGHT.fullmatch(message["content"]):
        content = message["content"]
        forms = {content, content.strip(), content.lstrip(), content.rstrip(), without_reasoning(content)}
        ends = [
            start + len(form) for form in sorted(forms, key=len, reverse=True) if text.startswith(form + gap, start)
        ]
        return next((end for end in ends if not last or end + len(gap) == len(text)), None)
    if last:
        stop = len(text) - len(gap)
        return stop if stop >= start else None
    stop = text.find(gap, start)
    return stop if stop >= 0 and text.find(gap, stop + 1) < 0 else None


def _refuse_repeated(render: Render, messages: Sequence[Message], i: int, digits: str) -> None:
    """Refuse an answer that is written twice around another turn, which its core would then include."""
    turns = [_replaced(message, n, digits) for n, message in enumerate(messages)]
    try:
        text = render(turns)
    except TokenizerError:
        return  # the template depends on the content of the turns
    numbers = [int(match.group(2)) for match in _marks(digits).finditer(text)]
    own = [n for n, number in enumerate(numbers) if number == i]
    if len(own) > 1 and set(numbers[own[0] : own[-1]]) != {i}:
        raise AnswerLostError(
            f"the chat template writes an answer more than once, and another turn between: {_quoted(messages[i])}"
        )


def _unused(text: str) -> str:
    """Six digits that don't appear in a text."""
    return next(digits for digits in map(str, range(905316, 10**6, 19)) if digits not in text)


def _marks(digits: str) -> re.Pattern[str]:
    return re.compile(digits + r"(\d)(\d{3,}?)61")


def _replaced(message: Message, i: int, digits: str, around: str = "") -> Message:
    """Copy a turn with marks in place of its texts.

    Args:
        message: The turn.
        i: Index of the turn.
        digits: Digits that marks begin with.
        around: Characters before and after each mark.
    """
    before, after = around[:1], around[1:]
    content, reasoning, argument = (f"{before}{mark(i, field, digits)}{after}" for field in (0, 1, 2))
    replaced: Message = {**message}
    if inline := _THOUGHT.fullmatch(message["content"]):  # templates depend on the tags
        opening, _, closing, _, end = inline.groups()
        replaced["content"] = opening + reasoning + closing + content + end
    elif message["content"]:
        replaced["content"] = content
    if message.get("reasoning_content"):
        replaced["reasoning_content"] = reasoning
    if message.get("tool_calls"):  # names stay: a template may repeat them before the tools' answers
        replaced["tool_calls"] = [
            {
                **call,
                "function": {
                    **call["function"],
                    "arguments": _marked_arguments(call["function"]["arguments"], argument),
                },
            }
            for call in message["tool_calls"]
        ]
    return replaced


def _marked_arguments(arguments: object, argument: str) -> dict[str, str | int]:
    """Arguments made of a mark, which end with a quotation mark if the original ones do."""
    values = list(arguments.values()) if isinstance(arguments, dict) else []
    return {argument: argument if not values or isinstance(values[-1], str) else int(argument)}


def without_reasoning(content: str) -> str:
    """The part of an answer that templates keep in the history: the text after its ``</think>``.

    Example:
        >>> without_reasoning("<think>two and two</think> 4"), without_reasoning("5")
        ('4', '5')
    """
    return content.rpartition("</think>")[2].lstrip() if "</think>" in content else content


def _is_nonempty(message: Message) -> bool:
    return bool(message["content"].strip() or any(call["function"]["arguments"] for call in _calls(message)))


def _calls(message: Message) -> list[dict[str, Any]]:
    return message.get("tool_calls") or []


def _quoted(message: Message) -> str:
    return repr((message["content"] or str(message.get("tool_calls")))[:40])
