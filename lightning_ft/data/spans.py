"""Where the answers are in the text of a conversation.

Supervised is what the model has to write: from the end of the prompt that it is given through the token that ends its
turn. No text is searched for an answer. The conversation is rendered again with the answers replaced by marks; what is
the same in both is the template's, and what differs is the answer's::

    <user>2+2?<end><assistant>four<end><eos>            as it is
    <user>2+2?<end><assistant>Zq0...0qZ<end><eos>       with a mark in the answer's place

From there a span grows to the left, to where the generation prompt ends (a template may write an empty ``<think>``
block that the prompt doesn't have), and to the right, through the token that ends this turn. Which that is shows a
short conversation that ends after its answer beside one that goes on: the end is what both write, not the header of the
next turn and not what closes the whole conversation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_ft.data.request import Message
from lightning_ft.data.templates import ChatTemplate
from lightning_ft.errors import TokenizerError

_OPENED = re.compile(r"<(\w+)>\s*$")
"""A tag that a generation prompt ends with: reasoning that the model is to continue."""


class AnswerLostError(TokenizerError):
    """A part of a conversation isn't in what the chat template made of it, or not as it was."""


@dataclass(frozen=True)
class AnswerSpan:
    """An answer in the text of its conversation.

    Args:
        start: First character that the model has to write.
        stop: The character after the last; that of the token that ends the turn, where the template writes one.
        ended: Whether the template writes one.
    """

    start: int
    stop: int
    ended: bool


@dataclass(frozen=True)
class RenderedAnswers:
    """A conversation as it is trained on.

    Args:
        text: All of it.
        prompt: What generation of the last answer starts from.
        spans: Each answer, in order.
        notes: What the template changed that the user should know of.
    """

    text: str
    prompt: str
    spans: tuple[AnswerSpan, ...]
    notes: tuple[str, ...]


class _Core(NamedTuple):
    """The part of a text that depends on an answer."""

    start: int
    stop: int


Render = Callable[[Sequence[Message]], str]

TRIMMED = "answer whose white space at the ends the chat template trims"
REASONING_LEFT_OUT = "answer before the last whose reasoning the chat template leaves out"
MOVED = "row whose prompt the chat template writes otherwise once it is answered; trained on as it is asked"

REMEDIES = {
    TRIMMED: "The model learns them without it, so compare with references that are trimmed too, or pass a "
    "chat_template= that keeps it.",
    REASONING_LEFT_OUT: "Give each answer a row of its own, as its last turn, to train on its reasoning.",
    MOVED: "Nothing to do, unless the same turns are asked otherwise where the model is served.",
}
"""What to do about a note."""


def render_answers(
    template: ChatTemplate, messages: Sequence[Message], kwargs: Mapping[str, Any] | None = None
) -> RenderedAnswers:
    """Render a conversation and find its answers.

    Args:
        template: The chat template.
        messages: The conversation, the assistant's turn last.
        kwargs: What the template is given besides: `tools`, `enable_thinking`, ...

    Raises:
        TokenizerError: If the template refuses the conversation.
        AnswerLostError: If it drops or changes a turn.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from lightning_ft.data.templates import chat_template
        >>> tokenizer = AutoTokenizer.from_pretrained("examples/tiny_base")
        >>> turns = [Message(role="user", content="2+2?"), Message(role="assistant", content="four")]
        >>> rendered = render_answers(chat_template(tokenizer), turns)
        >>> [rendered.text[span.start : span.stop] for span in rendered.spans]
        ['four<|end|>']
    """
    kwargs = kwargs or {}
    text = template.render(messages, kwargs)
    prompt = template.render(messages[:-1], kwargs, prompt=True)
    layout = _Layout.of(template, kwargs)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]

    def whole(turns: Sequence[Message]) -> str:
        return template.render(turns, kwargs)

    cores = _find(whole, messages, answers, text)
    notes: list[str] = []
    start = _start(template, kwargs, layout, messages, answers[-1], text, cores[-1], prompt)
    if (written := _reopened(messages[-1], text[start : cores[-1].stop], prompt)) is not None:
        text, cores = _continued(template, kwargs, messages, answers, prompt, written + text[cores[-1].stop :])
        cores[-1] = _Core(len(prompt), len(prompt) + len(written))
        start = len(prompt)
    elif lost := _lost(whole, messages, text):
        if _lost(lambda turns: template.render(turns, kwargs, prompt=True), messages[:-1], prompt):
            raise AnswerLostError(f"the chat template drops the {lost} turn")
        last = _Core(cores[-1].start - start + len(prompt), cores[-1].stop - start + len(prompt))
        text, cores = _continued(template, kwargs, messages, answers, prompt, text[start:])
        cores[-1] = last
        start = len(prompt)
        notes.append(MOVED)
    marked = template.marked(messages, kwargs) if not notes else []
    spans: list[AnswerSpan] = []
    for number, (i, core) in enumerate(zip(answers, cores, strict=True)):
        is_last = i == answers[-1]
        before = cores[number - 1].stop if number else 0
        first = start if is_last else _start(template, kwargs, layout, messages, i, text, core, None)
        ours = [begin for begin, end in marked if begin < core.stop and end > max(core.start - 1, before)]
        first = max(first, min(ours)) if ours and min(ours) <= core.start else first
        limit = len(text) if is_last else cores[number + 1].start
        span = _ended(template, kwargs, layout, messages, i, text, core, limit)
        spans.append(AnswerSpan(max(first, before), span.stop, span.ended))
        notes += _check(messages[i], text, _Core(min(first, core.start), span.stop), last=is_last)
    return RenderedAnswers(text, prompt, tuple(spans), tuple(notes))


# ---------------------------------------------------------------- cores


def _find(render: Render, messages: Sequence[Message], answers: Sequence[int], text: str) -> list[_Core]:
    """The core of each answer in the text that `render` makes of the messages."""
    if not answers:
        return []
    plain = all(set(messages[i]) <= {"role", "content", "train"} for i in answers)
    found = _by_marks(render, messages, answers, text) if plain else None
    if found is None:
        found = [_by_difference(render, messages, i, text) for i in answers]
    for i, core, following in zip(answers, found, [*found[1:], _Core(len(text), len(text))], strict=True):
        if core.stop > following.start or (core.start == core.stop and _says_something(messages[i])):
            became = text[core.start : core.stop][:60]
            raise AnswerLostError(
                f"the chat template drops or changes an answer: {_quoted(messages[i])} became {became!r}"
            )
    return found


def _by_marks(render: Render, messages: Sequence[Message], answers: Sequence[int], text: str) -> list[_Core] | None:
    """All cores from one more rendering, or None where the template does more with an answer than to write it."""
    marks = [f"Zq{i}q{'abcdefgh'[i % 8]}Qz" for i in answers]
    if any(mark in text for mark in marks):
        return None
    turns = list(messages)
    for i, mark in zip(answers, marks, strict=True):
        turns[i] = {**turns[i], "content": mark}
    gaps = re.split("|".join(marks), render(turns))
    if len(gaps) != len(marks) + 1 or not text.startswith(gaps[0]):
        return None
    cores, at = [], len(gaps[0])
    for i, gap in zip(answers, gaps[1:], strict=True):
        content = messages[i]["content"]
        forms = {content, content.strip(), content.lstrip(), content.rstrip(), without_reasoning(content)}
        end = len(text) if i == answers[-1] else None
        fit = [
            form
            for form in sorted(forms, key=len, reverse=True)
            if text.startswith(form + gap, at) and end in (None, at + len(form) + len(gap))
        ]
        if not fit:
            return None
        cores.append(_Core(at, at + len(fit[0])))
        at = cores[-1].stop + len(gap)
    return cores


def _by_difference(render: Render, messages: Sequence[Message], i: int, text: str) -> _Core:
    """The core of one answer: what two renderings with other answers in its place don't share with the text."""
    others = [render([*messages[:i], _replaced(messages[i], mark), *messages[i + 1 :]]) for mark in ("QaZ", "ZbQ")]
    start = len(shared_start([text, *others]))
    reversed_rests = [rendered[start:][::-1] for rendered in (text, *others)]
    return _Core(start, len(text) - len(shared_start(reversed_rests)))


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


def _replaced(message: Message, mark: str) -> Message:
    replaced: dict[str, Any] = dict(message)
    if message["content"]:
        replaced["content"] = mark
    if message.get("reasoning_content"):
        replaced["reasoning_content"] = mark
    if message.get("tool_calls"):  # not the names, which a template may write again before the tools' answers
        replaced["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": {mark: mark}}} for call in message["tool_calls"]
        ]
    return replaced  # type: ignore[return-value]


def without_reasoning(content: str) -> str:
    """What templates keep of an answer in the history: what follows its ``</think>``.

    Example:
        >>> without_reasoning("<think>two and two</think> 4"), without_reasoning("5")
        ('4', '5')
    """
    return content.rpartition("</think>")[2].lstrip() if "</think>" in content else content


# ---------------------------------------------------------------- from cores to spans


class _Layout(NamedTuple):
    """What a template writes around a plain answer.

    Args:
        end: After the last answer of a conversation, through the token that ends it; None where there is none.
        ends_all: Whether earlier answers end by the same.
        gaps: Between a user's turn and its answer, in a conversation of one question and of two.
        asked: What follows the user's turn in a prompt.
        around: All that is written in a conversation of two questions.
    """

    end: str | None
    ends_all: bool
    gaps: tuple[str, ...]
    asked: str | None
    around: str

    @classmethod
    def of(cls, template: ChatTemplate, kwargs: Mapping[str, Any]) -> _Layout:
        """Found by rendering three short conversations, once."""
        key = ("layout", repr(sorted((name, repr(value)) for name, value in kwargs.items())))
        if key not in template.cached:
            template.cached[key] = cls._found(template, kwargs)
        found: _Layout = template.cached[key]
        return found

    @classmethod
    def _found(cls, template: ChatTemplate, kwargs: Mapping[str, Any]) -> _Layout:
        marks = "Zq0aQz", "Zq1bQz", "Zq2cQz", "Zq3dQz"
        turns = [Message(role=("user", "assistant")[i % 2], content=mark) for i, mark in enumerate(marks)]
        one = _parts(template, turns[:2], kwargs, marks[:2])
        two = _parts(template, turns, kwargs, marks)
        prompt = _parts(template, turns[:1], kwargs, marks[:1], prompt=True)
        closing, following = None if one is None else one[2], None if two is None else two[2]
        end, ends_all = _end_of(template, closing, following)
        gaps = dict.fromkeys([*(one[1:2] if one else []), *((two[1], two[3]) if two else [])])
        return cls(end, ends_all, tuple(gaps), None if prompt is None else prompt[1], "\n".join(two or one or []))


def _parts(
    template: ChatTemplate,
    turns: Sequence[Message],
    kwargs: Mapping[str, Any],
    marks: Sequence[str],
    *,
    prompt: bool = False,
) -> list[str] | None:
    """What a template writes around marks; None where it refuses the conversation or writes one of them otherwise."""
    try:
        parts = re.split("|".join(marks), template.render(turns, kwargs, prompt=prompt))
    except TokenizerError:
        return None
    return parts if len(parts) == len(marks) + 1 else None


def _end_of(template: ChatTemplate, closing: str | None, following: str | None) -> tuple[str | None, bool]:
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
    return closing[: ends[0] if following is None else ends[-1]], False


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
    layout = _Layout.of(template, {})
    texts = [*layout.gaps, layout.asked or "", layout.around]
    return frozenset(match.group() for text in texts for match in added_tokens(template, bos=True).finditer(text))


def _start(
    template: ChatTemplate,
    kwargs: Mapping[str, Any],
    layout: _Layout,
    messages: Sequence[Message],
    i: int,
    text: str,
    core: _Core,
    prompt: str | None,
) -> int:
    """Where the prompt of an answer ends in the text.

    Args:
        template: The chat template.
        kwargs: What it is given besides.
        layout: What it writes around plain answers.
        messages: The conversation.
        i: Which of its turns.
        text: The conversation's.
        core: The answer's.
        prompt: What generation starts from, if it was rendered already.
    """
    if prompt is None:
        for gap in layout.gaps:  # spares a rendering for each earlier turn
            if layout.asked is not None and text[: core.start].endswith(gap) and gap.startswith(layout.asked):
                return core.start - len(gap) + len(layout.asked)
        try:
            prompt = template.render(messages[:i], kwargs, prompt=True)
        except TokenizerError:
            return core.start
    if text.startswith(prompt) and len(prompt) <= core.stop:
        return len(prompt)
    shared = _whole_tokens(template, text, len(shared_start([text, prompt])))
    before = messages[i - 1]["content"].strip() if i else ""
    written = text.rfind(before, 0, core.start)
    if written >= 0 and written + len(before) <= shared <= core.start:
        return shared  # the prompt goes on otherwise than the text, after the header
    for gap in layout.gaps:
        if layout.asked is not None and text[: core.start].endswith(gap) and gap.startswith(layout.asked):
            return core.start - len(gap) + len(layout.asked)
    return core.start


def _whole_tokens(template: ChatTemplate, text: str, stop: int) -> int:
    """A place in a text, or the start of the token by name that it would cut through."""
    for match in added_tokens(template).finditer(text):
        if match.start() < stop < match.end():
            return match.start()
    return stop


def _ended(
    template: ChatTemplate,
    kwargs: Mapping[str, Any],
    layout: _Layout,
    messages: Sequence[Message],
    i: int,
    text: str,
    core: _Core,
    limit: int,
) -> AnswerSpan:
    """The core through the token that ends its turn, before the next answer begins at `limit`."""
    last = i == len(messages) - 1
    if layout.end is not None and text.startswith(layout.end, core.stop) and (last or layout.ends_all):
        return AnswerSpan(core.start, core.stop + len(layout.end), True)
    if not messages[i].get("tool_calls"):
        return AnswerSpan(core.start, core.stop, False)
    # A turn of calls may close otherwise: compare with the conversation that ends after it.
    turns = messages[: i + 1]
    whole = template.render(turns, kwargs)
    closing = whole[_by_difference(lambda given: template.render(given, kwargs), turns, i, whole).stop :]
    following = text[core.stop : limit]
    if layout.end is not None and layout.end in closing:
        end: str | None = closing[: closing.index(layout.end) + len(layout.end)]
        both = last or following.startswith(str(end))
    else:
        end, both = _end_of(template, closing, None if last else following)
        both = both or last
    if end is None or not both:  # what closes the call belongs to it all the same
        end, both = closing if last else shared_start([closing, following]), False
        return AnswerSpan(core.start, core.stop + len(end.rstrip()), False)
    return AnswerSpan(core.start, core.stop + len(end), not last or _is_special(template, end))


def _is_special(template: ChatTemplate, end: str) -> bool:
    """Whether a text ends with a special token, at which generation stops; one that only closes a call isn't."""
    special = (str(token) for token in template.tokenizer.added_tokens_decoder.values() if token.special)
    return end.endswith((*template.tokenizer.all_special_tokens, *special))


# ---------------------------------------------------------------- what a template may not do


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _quoted(message: Message) -> str:
    return repr((message["content"] or str(message.get("tool_calls")))[:40])


def _lost(render: Render, messages: Sequence[Message], text: str) -> str | None:
    """The role of a turn before the answers that isn't in a text; None if all are."""
    for i, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] == "assistant" or not content or content in text:
            continue
        try:
            other = render([*messages[:i], {**message, "content": "Zq0aQz"}, *messages[i + 1 :]])
        except TokenizerError:
            continue  # it is looked at, so it isn't dropped
        if other == text:
            return message["role"]
    return None


def _check(message: Message, text: str, core: _Core, *, last: bool) -> list[str]:
    """Refuse an answer that isn't in its span, or not as it was; what the template changed that does no harm."""
    region, content, notes = text[core.start : core.stop], message["content"], []
    reasoning = message.get("reasoning_content", "")
    kept = without_reasoning(content).strip()
    left_out = bool(reasoning.strip()) and reasoning.strip() not in region
    if content.strip() not in region:
        if kept == content.strip() or not kept or kept not in region:
            raise AnswerLostError(
                f"the chat template drops or changes an answer: {content[:40]!r} became {region[:60]!r}"
            )
        thought = content.partition("</think>")[0].rpartition("<think>")[2].strip()
        left_out = left_out or thought not in region
    elif content not in region:
        notes.append(TRIMMED)
    if left_out and last:
        field = "reasoning_content" if reasoning else "the reasoning in <think>"
        raise AnswerLostError(f"the chat template leaves out {field} of the last answer")
    if left_out:
        notes.append(REASONING_LEFT_OUT)
    for call in message.get("tool_calls", []):
        if call["function"]["name"] not in region:
            raise AnswerLostError(f"the chat template leaves out the tool call {call['function']['name']!r}")
    return notes


# ---------------------------------------------------------------- reasoning that the prompt opens


def _reopened(message: Message, region: str, prompt: str) -> str | None:
    """What is to follow a prompt that ends with ``<think>``, where the template doesn't write it so; else None.

    Args:
        message: The answer.
        region: What the template has in place of it after the prompt.
        prompt: What generation starts from.
    """
    opened = _OPENED.search(prompt)
    if opened is None:
        return None
    close, content = f"</{opened.group(1)}>", message["content"]
    if reasoning := message.get("reasoning_content", "").strip():
        return None if region.lstrip().startswith(reasoning) else f"{reasoning}\n{close}\n\n{content}"
    inside, _, _ = content.partition(close)
    before, opening, thought = inside.partition(f"<{opened.group(1)}>")
    if close not in content or not opening or before.strip() or region.lstrip().startswith(thought.strip()):
        return None
    tail = opened.group(0)
    return content[len(tail) :] if content.startswith(tail) else content.partition(opening)[2].lstrip()


def _continued(
    template: ChatTemplate,
    kwargs: Mapping[str, Any],
    messages: Sequence[Message],
    answers: Sequence[int],
    prompt: str,
    written: str,
) -> tuple[str, list[_Core]]:
    """The conversation as generation makes it: a prompt and what is written after it.

    Args:
        template: The chat template.
        kwargs: What it is given besides.
        messages: The conversation.
        answers: Which of its turns are answers.
        prompt: What generation starts from.
        written: The last answer, with what ends it.

    Returns:
        The text, and the core of each answer, that of the last being all that is written.
    """

    def render(turns: Sequence[Message]) -> str:
        return template.render(turns[:-1], kwargs, prompt=True) + written

    whole = prompt + written
    return whole, [*_find(render, messages, answers[:-1], whole), _Core(len(prompt), len(whole))]
