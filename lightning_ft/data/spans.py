"""Locates the answers in the text of a conversation.

Supervised is what the model has to write: from the end of its prompt through the token that ends its turn.
`lightning_ft.data.cores` finds the part of the text that depends on an answer, `lightning_ft.data.template_layout` the
text that the template writes around it. A span grows from its core to the left, up to the end of the generation prompt
(a template may write an empty ``<think>`` block that the prompt lacks), and to the right, through the token that ends
the turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_ft.data.cores import (
    AnswerLostError,
    Core,
    Render,
    core_by_difference,
    find_cores,
    reopened,
)
from lightning_ft.data.template_layout import (
    TemplateLayout,
    added_tokens,
    dropped_turns,
    end_of,
    is_special,
    keep,
    kwargs_key,
    mark,
    recall,
    shared_end,
    shared_start,
    whole_tokens,
)
from lightning_ft.data.templates import ChatTemplate
from lightning_ft.errors import TokenizerError
from lightning_ft.types import Message


@dataclass(frozen=True)
class AnswerSpan:
    """An answer in the text of its conversation.

    Args:
        start: Index of the first character that the model has to write.
        stop: Index after the last one, which belongs to the token that ends the turn if the template writes one.
        ended: Whether the template writes a token that ends the turn.
    """

    start: int
    stop: int
    ended: bool


@dataclass(frozen=True)
class RenderedAnswers:
    """The text of a conversation for training.

    Args:
        text: Text of the whole conversation.
        prompt: Text that generation of the last answer starts from.
        spans: Spans of the answers, in order.
        notes: Changes by the template that the user should know of.
    """

    text: str
    prompt: str
    spans: tuple[AnswerSpan, ...]
    notes: tuple[str, ...]


TRIMMED = "answer whose surrounding white space the chat template trims"
REASONING_LEFT_OUT = "answer before the last whose reasoning the chat template leaves out"
MOVED = "row whose prompt the chat template changes once it is answered; trained on with the prompt of generation"

REMEDIES = {
    TRIMMED: "The model learns them without it, so compare with references that are trimmed too, or pass a "
    "chat_template= that keeps it.",
    REASONING_LEFT_OUT: "Give each answer a row of its own, as its last turn, to train on its reasoning.",
    MOVED: "Nothing to do, unless the model is served with another prompt for the same turns.",
}
"""Advice for each note."""


def render_answers(
    template: ChatTemplate, messages: Sequence[Message], kwargs: Mapping[str, object] | None = None
) -> RenderedAnswers:
    """Render a conversation and find its answers.

    Args:
        template: The chat template.
        messages: Conversation with an assistant turn last.
        kwargs: Variables for the template in addition to the messages: `tools`, `enable_thinking`, ...

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
    return _Conversation(template, messages, kwargs or {}).rendered()


class _Conversation:
    """A conversation and its rendered text.

    Args:
        template: The chat template.
        messages: Conversation with an assistant turn last.
        kwargs: Variables for the template in addition to the messages.
    """

    def __init__(self, template: ChatTemplate, messages: Sequence[Message], kwargs: Mapping[str, object]) -> None:
        self.template, self.messages, self.kwargs, self.key = template, messages, kwargs, kwargs_key(kwargs)
        self.answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        self.text = self.render(messages)
        self.prompt = self.render_prompt(messages[:-1])
        self.layout = TemplateLayout.of(template, kwargs)

    def render(self, messages: Sequence[Message]) -> str:
        """Render messages."""
        return self.template.render(messages, self.kwargs)

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """Render messages with the generation prompt at the end."""
        return self.template.render(messages, self.kwargs, prompt=True)

    def rendered(self) -> RenderedAnswers:
        """The text with the spans of the answers."""
        cores = find_cores(self.render, self.messages, self.answers, self.text)
        notes: list[str] = []
        start = self._start(self.answers[-1], cores[-1], self.prompt)
        region = self.text[start : cores[-1].stop]
        opened = reopened(self.messages[-1], region, self.prompt, cores[-1].reasons)
        if opened is not None:
            written = opened + self.text[cores[-1].stop :]
            last = Core(len(self.prompt), len(self.prompt) + len(opened))
            cores, start = self._continue_prompt(written, last), len(self.prompt)
        elif self._prompt_differs():
            self._refuse_dropped(self.render_prompt, self.messages[:-1], self.prompt)
            shift = len(self.prompt) - start
            last = cores[-1]._replace(start=cores[-1].start + shift, stop=cores[-1].stop + shift)
            cores, start = self._continue_prompt(self.text[start:], last), len(self.prompt)
            notes.append(MOVED)
        else:
            self._refuse_dropped(self.render, self.messages, self.text)
        unchanged = opened is None and not notes
        marked = self.template.marked(self.messages, self.kwargs) if unchanged else []
        spans: list[AnswerSpan] = []
        for number, (i, core) in enumerate(zip(self.answers, cores, strict=True)):
            before = cores[number - 1].stop if number else 0
            first = start if i == self.answers[-1] else self._start(i, core, floor=before)
            own = [begin for begin, end in marked if begin < core.stop and end > max(core.start - 1, before)]
            first = max(first, min(own)) if own and min(own) <= core.start else first
            span = self._ended(i, core, len(self.text) if i == self.answers[-1] else cores[number + 1].start)
            spans.append(AnswerSpan(max(first, before), span.stop, span.ended))
            region = self.text[min(first, core.start) : span.stop]
            notes += _check(self.messages[i], region, core.reasons, last=i == self.answers[-1])
        return RenderedAnswers(self.text, self.prompt, tuple(spans), tuple(notes))

    # ------------------------------------------------------------ the prompt of generation

    def _continue_prompt(self, written: str, last: Core) -> list[Core]:
        """Replace the text by that of generation: the prompt and the text written after it.

        Args:
            written: Text of the last answer, with its end.
            last: Core of the last answer in the new text.

        Returns:
            Cores of all answers.
        """

        def render(turns: Sequence[Message]) -> str:
            return self.render_prompt(turns[:-1]) + written

        self.text = self.prompt + written
        return [*find_cores(render, self.messages, self.answers[:-1], self.text), last]

    def _prompt_differs(self) -> bool:
        """Whether prompt and text differ before the end of the prompt's last turn."""
        if self.text.startswith(self.prompt):
            return False
        shared = len(shared_start([self.text, self.prompt]))
        tail = self._tail(self.render_prompt, len(self.messages) - 2, self.messages[:-1], self.prompt)
        return shared < len(self.prompt) - len(tail)

    def _tail(self, render: Render, i: int, messages: Sequence[Message], text: str) -> str:
        """Text after a turn that doesn't depend on its content; the whole text if the turn isn't in it."""
        if i < 0:
            return text
        others = []
        for around in ("12", "78"):
            other: Message = {**messages[i], "content": f"{around[0]}{mark(i)}{around[1]}"}
            try:
                others.append(render([*messages[:i], other, *messages[i + 1 :]]))
            except TokenizerError:
                return text
        return shared_end([text, *others])

    def _refuse_dropped(self, render: Render, messages: Sequence[Message], text: str) -> None:
        """Refuse a conversation if a turn that isn't an answer has no effect on a text."""
        dropped = dropped_turns(self.template, self.messages, self.kwargs)
        for i, message in enumerate(messages):
            content = message["content"].strip()
            if message["role"] == "assistant" or not content or (content in text and i not in dropped):
                continue
            try:
                changed: Message = {**message, "content": mark(i) + message["content"]}
                other = render([*messages[:i], changed, *messages[i + 1 :]])
            except TokenizerError:
                continue  # the template depends on the turn, so it isn't dropped
            if other == text:
                raise AnswerLostError(f"the chat template drops the {message['role']} turn")

    # ------------------------------------------------------------ from cores to spans

    def _start(self, i: int, core: Core, prompt: str | None = None, floor: int = 0) -> int:
        """Index in the text at which the prompt of an answer ends.

        Args:
            i: Index of the answer among the turns.
            core: Core of the answer.
            prompt: Prompt of the answer, if it was rendered already.
            floor: Index at which the core of the previous answer ends.
        """
        text = self.text
        if prompt is None:
            if (start := self._cached_start(i, core, floor)) is not None:
                return start
            try:
                prompt = self.render_prompt(self.messages[:i])
            except TokenizerError:
                return core.start
            self._learn_tail(i, prompt)
        if text.startswith(prompt) and len(prompt) <= core.stop:
            return len(prompt)
        # Prompt and text diverge, after the header of the turn or before it.
        after = len(text) - len(self._tail(self.render, i - 1, self.messages, text))
        if not 0 < after <= core.start:
            return core.start
        header = shared_start(
            [text[after : core.start], self._tail(self.render_prompt, i - 1, self.messages[:i], prompt)]
        )
        return min(whole_tokens(self.template, text, after + len(header)), core.start)

    def _cached_start(self, i: int, core: Core, floor: int) -> int | None:
        """As `_start`, from what the template wrote before: saves a rendering for each earlier answer."""
        role, before = self.messages[i - 1]["role"] if i else "", self.text[: core.start]
        if role == "user":
            for gap, prompt_part in self.layout.gaps:
                if before.endswith(gap):
                    return core.start - len(gap) + prompt_part
        tail = self.layout.prompt_end if role == "user" else recall(self.template, ("tail", role, self.key))
        tokens = [match.start() for match in added_tokens(self.template).finditer(tail or "")]
        # Plain words may come from any turn, and a system turn may change the prompt, as the last prompt shows.
        if not tokens or not self.prompt.endswith(tail[tokens[-1] :]):
            return None
        index = before.rfind(tail, floor)
        return index + len(tail) if index >= 0 else None

    def _learn_tail(self, i: int, prompt: str) -> None:
        """Cache how prompts end after a turn that isn't a user turn."""
        key = ("tail", self.messages[i - 1]["role"] if i else "", self.key)
        if i and recall(self.template, key) is None:
            tail = self._tail(self.render_prompt, i - 1, self.messages[:i], prompt)
            keep(self.template, key, tail if len(tail) < len(prompt) else "")

    def _ended(self, i: int, core: Core, limit: int) -> AnswerSpan:
        """The span from a core through the token that ends its turn; the next answer begins at `limit`."""
        text, end, last = self.text, self.layout.end, i == len(self.messages) - 1
        if end is not None and text.startswith(end, core.stop) and (last or self.layout.ends_all):
            return AnswerSpan(core.start, core.stop + len(end), True)
        if not self.messages[i].get("tool_calls"):
            return AnswerSpan(core.start, core.stop, False)
        # A turn of calls may close differently; the first such row shows how.
        key = ("closers", "" if last else self.messages[i + 1]["role"], self.key)
        closers: dict[str, bool] = recall(self.template, key) or {}
        for closer in sorted(closers, key=len, reverse=True):
            if text.startswith(closer, core.stop):
                return AnswerSpan(core.start, core.stop + len(closer), closers[closer])
        closer, ended, by_token = self._closer(i, text[core.stop : limit], last=last)
        if by_token:
            keep(self.template, key, {**closers, closer: ended})
        return AnswerSpan(core.start, core.stop + len(closer), ended)

    def _closer(self, i: int, following: str, *, last: bool) -> tuple[str, bool, bool]:
        """Find what closes a turn of calls, by comparing a conversation that ends after it with one that goes on.

        Args:
            i: Index of the turn.
            following: Text after its core.
            last: Whether it is the last turn of the text.

        Returns:
            The closing text, whether generation stops there, and whether it ends with an added token.
        """
        turns, end = self.messages[: i + 1], self.layout.end
        closing = self._after(turns, i)
        if last:
            following = self._after([*turns, *_answers_of_tools(turns[-1])], i)
        if end is not None and end in closing:
            closer: str | None = closing[: closing.index(end) + len(end)]
            both = last or following.startswith(str(closer))
        else:
            closer, both = end_of(self.template, closing, following or None)
            both = both or last
        if closer is None or not both:  # the text that closes the call still belongs to it
            return (closing if last else shared_start([closing, following])).rstrip(), False, False
        return closer, not last or is_special(self.template, closer), True

    def _after(self, turns: Sequence[Message], i: int) -> str:
        """Text after the core of one of the turns; empty if the template refuses them."""
        try:
            text = self.render(turns)
            return text[core_by_difference(self.render, turns, i, text).stop :]
        except TokenizerError:
            return ""


def _answers_of_tools(message: Message) -> list[Message]:
    """Turns that could follow a turn of calls."""
    call = message["tool_calls"][0]
    tool = Message(role="tool", content=mark(0), name=call["function"]["name"], tool_call_id=str(call.get("id", "")))
    return [tool, Message(role="assistant", content=mark(1))]


_TAG = re.compile(r"(</?think>)")


def _thought_is_left_out(content: str, region: str) -> bool | None:
    """Whether reasoning in tags is missing from an answer's text; None if other text is, or if there is no other.

    The parts between the tags have to follow each other in the text. They are looked for from the last one: an answer
    often repeats the end of its reasoning, and then counts once.

    Args:
        content: Content of the answer.
        region: Rendered text of the answer.
    """
    parts, tags = _TAG.split(content)[::2], _TAG.findall(content)
    written, found, left_out = _TAG.sub("", region), False, False
    for n in reversed(range(len(parts))):
        part, before, after = parts[n].strip(), tags[max(n - 1, 0) : n], tags[n:]
        # Text that opens a block by a second <think> is inside it too; without </think> there is no block.
        is_thought = after[:1] == ["</think>"] or (before == ["<think>"] and "</think>" in after)
        index = written.rfind(part)
        if index < 0 and not is_thought:
            return None
        left_out = left_out or index < 0
        found = found or (bool(part) and not is_thought)
        written = written[:index] if index >= 0 else written
    return left_out if found else None


def _check(message: Message, region: str, reasons: bool, *, last: bool) -> list[str]:
    """Refuse an answer that is missing from its span or changed in it.

    Args:
        message: The answer.
        region: Rendered text of the answer.
        reasons: Whether the template writes its `reasoning_content`.
        last: Whether it is the last turn.

    Returns:
        Notes on harmless changes.
    """
    content, notes = message["content"], []
    reasoning = message.get("reasoning_content", "")
    left_out = bool(reasoning.strip()) and not (reasons and reasoning.strip() in region)
    if content.strip() not in region:
        changed = _thought_is_left_out(content, region)
        if changed is None:
            raise AnswerLostError(
                f"the chat template drops or changes an answer: {content[:40]!r} became {region[:60]!r}"
            )
        left_out = left_out or changed
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
