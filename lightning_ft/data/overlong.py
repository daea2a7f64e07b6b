"""Encodes rows, and refuses or cuts those longer than `max_length`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, Literal

from transformers import PreTrainedTokenizerBase

from lightning_ft.data.content import QUESTION_CUT, ContentCheck
from lightning_ft.data.dates import DATED, renders_today
from lightning_ft.data.encode import AnswerLostError, Encoded
from lightning_ft.data.keys import is_nonempty
from lightning_ft.data.raw_rows import Problem
from lightning_ft.data.row_types import PAIRS, RowT, RowType
from lightning_ft.data.templates import ChatTemplate, chat_template
from lightning_ft.data.turns import RowError
from lightning_ft.errors import TokenizerError
from lightning_ft.types import Message

OnOverlong = Literal["error", "drop", "truncate_prompt"]


class RowEncoder(Generic[RowT]):
    """Encodes rows, or describes the problem of a row that can't be encoded.

    Args:
        tokenizer: The tokenizer.
        max_length: Maximum number of tokens per row; of several completions, the longest counts, with its prompt.
        on_overlong: ``"truncate_prompt"`` cuts prompts; otherwise an overlong row is a problem.
        row_type: Type of the rows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        on_overlong: OnOverlong,
        row_type: RowType[Any] = PAIRS,
    ) -> None:
        self.tokenizer, self.max_length, self.on_overlong, self.row_type = tokenizer, max_length, on_overlong, row_type
        self.template: ChatTemplate = chat_template(tokenizer)
        self._check = ContentCheck(self.template)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.tokenizer, self.max_length, self.on_overlong, self.row_type)

    def __call__(self, row: RowT) -> tuple[Encoded, RowT] | Problem:
        """Encode a row; return it with the row that was used (a copy if its prompt was cut), or the problem."""
        try:
            check_kwargs(row.template_kwargs, row.prompt_messages, self.template)
            markup, kwargs = self.row_type.is_markup(row), row.template_kwargs
            notes = [note for turns in self.row_type.texts(row) for note in self._check(turns, kwargs, markup=markup)]
            if renders_today(self.template, row.prompt_messages, kwargs):
                notes.append(DATED)
            fitted = self._fit(row)
            if isinstance(fitted, Problem):
                return fitted
            encoded, used = fitted
            self.row_type.check_encoded(encoded)
            if not markup:
                notes += [note for e in encoded.examples for note in self._check.doubled(e.input_ids.tolist())]
            return replace(encoded, notes=tuple(dict.fromkeys([*encoded.notes, *notes]))), used
        except AnswerLostError as error:
            fix = "The template must keep every turn unchanged: pass another chat_template=, or change the row."
            return Problem(row.source, row.row, None, "answer lost in the chat template", str(error), fix)
        except TokenizerError as error:
            fix = "Change the row's turns, or pass a chat_template= that accepts them."
            return Problem(row.source, row.row, None, "refused by the chat template", str(error), fix)
        except RowError as error:
            return Problem.of(error, row.source, row.row)

    def _fit(self, row: RowT) -> tuple[Encoded, RowT] | Problem:
        encoded = self._encode(row)
        if len(encoded.longest) <= self.max_length:
            return encoded, row
        if (problem := self._check_room(row)) is not None:
            return problem
        detail = f"{len(encoded.longest):,} tokens, max_length={self.max_length:,}"
        fix = "Raise max_length, or pass on_overlong='drop' or 'truncate_prompt'."
        if self.on_overlong == "truncate_prompt":
            if (cut := self._cut(row)) is not None:
                return cut
            fix = "Raise max_length: not even the end of the last question fits."
        return Problem(row.source, row.row, None, "overlong prompt", detail, fix)

    def _encode(self, row: RowT) -> Encoded:
        return self.row_type.encode(self.tokenizer, row, self.template)

    def _check_room(self, row: RowT) -> Problem | None:
        """The problem of a row that would be too long even without any user text."""
        if not row.prompt_messages:
            detail = f"{len(self._encode(row).longest):,} tokens, max_length={self.max_length:,}"
            fix = "Split it into shorter texts, raise max_length, or pass on_overlong='drop'."
            return Problem(row.source, row.row, None, "overlong text", detail, fix)
        try:
            shortest = self._encode(_with_user_text(row, {})).longest
        except TokenizerError:  # the template refuses turns without text, so how long the others are is unknown
            return None
        if len(shortest) < self.max_length:
            return None
        answer = int(shortest.supervised.sum())
        detail = f"{len(shortest):,} tokens without the user's text, {answer:,} of them supervised, "
        detail += f"max_length={self.max_length:,}"
        fix = "Raise max_length: answers, tool turns, system turns and the template's own tokens are never cut."
        reason = "overlong answer" if answer else "overlong turns before the question"
        others = [message for message in row.prompt_messages if message["role"] in ("system", "tool")]
        if others and answer < self.max_length:
            longest = max(others, key=lambda message: len(message["content"]))
            reason = f"overlong {longest['role']} turn"
        return Problem(row.source, row.row, None, reason, detail, fix)

    def _cut(self, row: RowT) -> tuple[Encoded, RowT] | None:
        """Cut user turns from their left, the earliest first, by as few characters as necessary.

        Each turn is cut by bisection over the number of characters to keep. The last user turn before the answer keeps
        at least one; None if that doesn't fit. An answer whose whole question was cut isn't supervised.
        """
        users = [i for i, message in enumerate(row.prompt_messages) if message["role"] == "user"]
        texts = {i: row.prompt_messages[i]["content"] for i in users}
        for i in users:
            text, best = texts[i], None
            low, high = (1 if i == users[-1] else 0), len(text)  # fewest and most characters to keep
            while low <= high:
                keep = (low + high) // 2
                texts[i] = text[len(text) - keep :]
                cut = _with_user_text(row, texts)
                encoded = self._encode(cut)
                if len(encoded.longest) <= self.max_length:
                    best, low = (encoded, cut), keep + 1
                else:
                    high = keep - 1
            if best is not None:
                kept = best[1].prompt_messages[users[-1]]["content"].strip()
                return self._without_answers_to_nothing(row, *best) if kept else None
            texts[i] = ""
        return None

    def _without_answers_to_nothing(self, row: RowT, encoded: Encoded, cut: RowT) -> tuple[Encoded, RowT]:
        """Leave answers unsupervised whose whole question was cut, or the model would learn to answer nothing.

        Both turns stay in the text, since templates require that questions and answers alternate.
        """
        turns: list[Message] = []
        before = after = ""  # text of the user turns since the last other turn
        for original, message in zip(row.prompt_messages, cut.prompt_messages, strict=True):
            if message["role"] == "user":
                if not turns or turns[-1]["role"] != "user":
                    before = after = ""
                before, after = before + original["content"].strip(), after + message["content"].strip()
            unanswerable = message["role"] == "assistant" and before and not after
            turns.append({**message, "train": False} if unanswerable else message)
        if turns == list(cut.prompt_messages):
            return encoded, cut
        fewer = cut.with_prompt(turns)
        found = self._encode(fewer)
        if int(found.example.supervised.sum()) == int(encoded.example.supervised.sum()):
            return encoded, cut
        return replace(found, notes=(*found.notes, QUESTION_CUT)), fewer


def check_kwargs(kwargs: Mapping[str, object], prompt: Sequence[Message], template: ChatTemplate) -> None:
    """Refuse variables of a row that the chat template doesn't read.

    Args:
        kwargs: Variables of the row: `tools`, `enable_thinking`, ...
        prompt: Turns of the row before the answer.
        template: The chat template.

    Raises:
        RowError: With the name of the variable.
    """
    for name, value in kwargs.items():
        if name not in template.reads and (is_nonempty(value) or value is False):
            nearest = difflib.get_close_matches(name, template.reads, n=1)
            fix = f"Did you mean {nearest[0]!r}?" if nearest else "Remove it, or pass a chat_template= that reads it."
            raise RowError(name, f"the chat template doesn't read {name!r}", repr(value)[:40], fix)
    if kwargs.get("tools") and prompt:
        without = {name: value for name, value in kwargs.items() if name != "tools"}
        if template.render(prompt, kwargs, prompt=True) == template.render(prompt, without, prompt=True):
            fix = "Describe them in the system turn, or pass a chat_template= that writes tools."
            raise RowError("tools", "the chat template leaves the tools out", "", fix)


def _with_user_text(row: RowT, texts: dict[int, str]) -> RowT:
    """A copy of the row with other texts in the user turns before the answer; turns without a text become empty."""
    return row.with_prompt(
        [
            {**message, "content": texts.get(i, "")} if message["role"] == "user" else message
            for i, message in enumerate(row.prompt_messages)
        ]
    )
