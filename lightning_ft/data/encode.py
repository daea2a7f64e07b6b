"""Conversations to token ids and which of them are supervised.

Supervised are the assistant's turns and the token that ends each. They are found by the chat template's own generation
markers (TRL's training templates add them to the templates it knows), else by what two renderings have in common; the
text is never searched for the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.layout import Example
from lightning_ft.data.request import Message
from lightning_ft.data.templates import ChatTemplate, chat_template, render_conversation, render_prompt
from lightning_ft.errors import TokenizerError


class AnswerLostError(TokenizerError):
    """An answer isn't in what the chat template made of its conversation, or not as it was."""


@dataclass(frozen=True)
class Encoded:
    """An encoded row, and how it compares with generation.

    Args:
        examples: The tokens: one example, or one for each of its completions, prompt included.
        prompt_matches: Whether the tokens before the last answer are those that generation starts from.
    """

    examples: tuple[Example, ...]
    prompt_matches: bool

    @property
    def example(self) -> Example:
        """The first, mostly the only one."""
        return self.examples[0]

    @property
    def longest(self) -> Example:
        """The one with most tokens."""
        return max(self.examples, key=len)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: ChatTemplate | None = None
) -> list[int]:
    """The ids that `generate` gets to answer a conversation.

    Args:
        tokenizer: With a chat template, or without one for the plain one.
        messages: The conversation, the user's turn last.
        template: What `chat_template` said of the tokenizer, to ask only once.

    Raises:
        TokenizerError: If the template refuses the conversation, or the tokenizer has no EOS token.
    """
    return _tokens(tokenizer, render_prompt(tokenizer, messages, template or chat_template(tokenizer)))


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: ChatTemplate | None = None
) -> Example:
    """Encode a conversation, every assistant turn and the token that ends it supervised.

    Where the template ends the last answer by no token of its own, EOS is appended.

    Args:
        tokenizer: With a chat template, or without one for the plain one. It needs no pad token.
        messages: The conversation, the assistant's turn last.
        template: What `chat_template` said of the tokenizer, to ask only once.

    Raises:
        TokenizerError: If the template refuses the conversation, or the tokenizer has no EOS token.
        AnswerLostError: If the template drops or changes an answer.
    """
    return encode(tokenizer, messages, template or chat_template(tokenizer)).example


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: ChatTemplate,
    *,
    last_only: bool = False,
) -> Encoded:
    """As :func:`encode_conversation`, and says whether generation starts from the same tokens.

    Args:
        tokenizer: With a chat template, or without one for the plain one.
        messages: The conversation, the assistant's turn last.
        template: What `chat_template` said of the tokenizer.
        last_only: Supervise the last answer only.

    Raises:
        TokenizerError: If the template refuses the conversation.
        AnswerLostError: If the template drops or changes an answer.
    """
    text, spans = render_conversation(tokenizer, messages, template)
    _check_answers(messages, text, spans)
    prompt_text = render_prompt(tokenizer, messages[:-1], template)
    prompt = _tokens(tokenizer, prompt_text)
    same_text = text.startswith(prompt_text) and spans[-1][0] == len(prompt_text)

    ids, places = _tokenise(tokenizer, text, spans)
    matches = same_text and places[-1][0] == len(prompt) and ids[: len(prompt)] == prompt
    if same_text and not matches:
        # The tokenizer merged the prompt's end with the answer's start. Tokenised apart they are what generation sees.
        start = len(prompt_text)
        rest, last = _tokenise(tokenizer, text[start:], [(0, spans[-1][1] - start)])
        earlier_end = places[-2][1] if len(places) > 1 else 0
        whole = prompt + rest
        if ids[:earlier_end] == prompt[:earlier_end] and tokenizer.decode(whole) == tokenizer.decode(ids):
            ids, matches = whole, True
            places = [*places[:-1], (len(prompt) + last[0][0], len(prompt) + last[0][1])]

    ids, supervised = _through_end_tokens(tokenizer, ids, places[-1:] if last_only else places)
    example = Example(torch.tensor(ids, dtype=torch.int64), torch.tensor(supervised, dtype=torch.bool))
    return Encoded((example,), matches)


def answer_end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer in training, and so in generation; mostly, but not always, the tokenizer's EOS.

    Raises:
        TokenizerError: As :func:`encode_conversation`.
    """
    turns = [Message(role="user", content="a"), Message(role="assistant", content="b")]
    example = encode_conversation(tokenizer, turns)
    return int(example.input_ids[example.supervised][-1])


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text, and the places of spans of its characters among them."""
    if not tokenizer.is_fast:  # no offsets: tokenise piece by piece
        ids, places, done = [], [], 0
        for start, stop in spans:
            ids += _tokens(tokenizer, text[done:start])
            answer = _tokens(tokenizer, text[start:stop])
            places.append((len(ids), len(ids) + len(answer)))
            ids, done = ids + answer, stop
        return ids + _tokens(tokenizer, text[done:]), places
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    places, token = [], 0
    for start, stop in spans:  # in order, so one walk over the tokens finds them all
        while token < len(ids) and offsets[token][1] <= start:
            token += 1
        first = token
        while token < len(ids) and offsets[token][0] < stop:
            token += 1
        places.append((first, token))
    return [int(i) for i in ids], places


def _check_answers(messages: Sequence[Message], text: str, spans: Sequence[tuple[int, int]]) -> None:
    """Each answer must stand in its span; templates may trim the white space around it."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if len(spans) != len(answers):
        raise AnswerLostError(f"the chat template drops or adds answers: {len(answers)} went in, {len(spans)} came out")
    for (start, stop), answer in zip(spans, answers, strict=True):
        if answer.strip() not in text[start:stop]:
            became = text[start:stop][:60]
            raise AnswerLostError(f"the chat template drops or changes an answer: {answer[:40]!r} became {became!r}")


def _through_end_tokens(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], places: Sequence[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """Which tokens are supervised: each answer through the token that ends it; EOS is added where the last has none."""
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    start, stop = places[-1]
    end = _end(tokenizer, ids, start, stop, special - {tokenizer.bos_token_id} | {tokenizer.eos_token_id})
    if end is None:
        ids = [*ids[:stop], tokenizer.eos_token_id]
        end = stop + 1
    supervised = [False] * len(ids)
    supervised[start:end] = [True] * (end - start)
    ends = {ids[end - 1], tokenizer.eos_token_id}  # an earlier turn ends as the last does, not by the next one's header
    for start, stop in places[:-1]:
        end = _end(tokenizer, ids, start, stop, ends) or stop
        supervised[start:end] = [True] * (end - start)
    return ids, supervised


def _end(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, stop: int, ends: set[int | None]
) -> int | None:
    """The place behind the token that ends a turn: the last one of the span, or the one right behind it.

    What a template writes behind that token (a line break) is no part of the answer. None if there is no such token.
    """
    for i in range(min(stop, len(ids) - 1), start - 1, -1):
        if ids[i] in ends:
            behind = str(tokenizer.decode(list(ids[i + 1 : stop])))
            return i + 1 if not behind.strip() else None
    return None
