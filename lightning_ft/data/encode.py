"""Conversations to token ids and which of them are supervised.

Supervised are the assistant's turns and the token that ends each: what the model has to write after the prompt that it
is given. `lightning_ft.data.spans` finds them in the text, here they are found among the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.cores import AnswerLostError
from lightning_ft.data.layout import Example
from lightning_ft.data.spans import AnswerSpan, render_answers
from lightning_ft.data.templates import ChatTemplate, chat_template
from lightning_ft.types import Message


@dataclass(frozen=True)
class Encoded:
    """An encoded row, and how it compares with generation.

    Args:
        examples: The tokens: one example, or one for each of its completions, prompt included.
        prompt_matches: Whether the tokens before the last answer are those that generation starts from.
        notes: What the chat template changed that the user should know of.
        mismatch: Where prompts differ, what the row has and what generation starts from.
    """

    examples: tuple[Example, ...]
    prompt_matches: bool
    notes: tuple[str, ...] = ()
    mismatch: tuple[str, str] | None = None

    @property
    def example(self) -> Example:
        """The first, mostly the only one."""
        return self.examples[0]

    @property
    def longest(self) -> Example:
        """The one with most tokens."""
        return max(self.examples, key=len)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: ChatTemplate | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids that `generate` gets to answer a conversation.

    Args:
        tokenizer: With a chat template, or without one for the plain one.
        messages: The conversation, the user's turn (or a tool's) last.
        template: The tokenizer's template, to look at it only once.
        kwargs: What the template is given besides: `tools`, `enable_thinking`, ...

    Raises:
        TokenizerError: If the template refuses the conversation, or the tokenizer has no EOS token.
    """
    return tokens_of(tokenizer, (template or chat_template(tokenizer)).render(messages, kwargs, prompt=True))


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: ChatTemplate | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Example:
    """Encode a conversation, every assistant turn and the token that ends it supervised.

    Where the template ends the last answer by no token of its own, EOS is appended.

    Args:
        tokenizer: With a chat template, or without one for the plain one. It needs no pad token.
        messages: The conversation, the assistant's turn last.
        template: The tokenizer's template, to look at it only once.
        kwargs: What the template is given besides: `tools`, `enable_thinking`, ...

    Raises:
        TokenizerError: If the template refuses the conversation, or the tokenizer has no EOS token.
        AnswerLostError: If the template drops or changes a turn.
    """
    return encode(tokenizer, messages, template or chat_template(tokenizer), kwargs).example


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: ChatTemplate,
    kwargs: Mapping[str, Any] | None = None,
    *,
    last_only: bool = False,
) -> Encoded:
    """As :func:`encode_conversation`, and says whether generation starts from the same tokens.

    Args:
        tokenizer: With a chat template, or without one for the plain one.
        messages: The conversation, the assistant's turn last. Turns with ``train: False`` aren't supervised.
        template: The tokenizer's template.
        kwargs: What the template is given besides: `tools`, `enable_thinking`, ...
        last_only: Supervise the last answer only.

    Raises:
        TokenizerError: If the template refuses the conversation.
        AnswerLostError: If the template drops or changes a turn.
    """
    rendered = render_answers(template, messages, kwargs)
    text, last = rendered.text, rendered.spans[-1]
    prompt = tokens_of(tokenizer, rendered.prompt)
    ids, ranges = _tokenize(tokenizer, text, rendered.spans)
    starts_there = text.startswith(rendered.prompt) and last.start == len(rendered.prompt)
    if starts_there and (ids[: len(prompt)] != prompt or ranges[-1][0] != len(prompt)):
        # The tokenizer merged the prompt's end with the answer's start. Tokenized apart they are what generation sees.
        start = len(rendered.prompt)
        rest, ((_, stop),) = _tokenize(tokenizer, text[start:], [AnswerSpan(0, last.stop - start, last.ended)])
        earlier_end = ranges[-2][1] if len(ranges) > 1 else 0
        whole = prompt + rest
        if ids[:earlier_end] == prompt[:earlier_end] and tokenizer.decode(whole) == tokenizer.decode(ids):
            ids, ranges = whole, [*ranges[:-1], (len(prompt), len(prompt) + stop)]
    matches = ids[: len(prompt)] == prompt and ranges[-1][0] == len(prompt)
    if not last.ended:
        ids = [*ids[: ranges[-1][1]], int(tokenizer.eos_token_id)]  # type: ignore[arg-type]  # checked by chat_template
        ranges[-1] = (ranges[-1][0], len(ids))
    wanted = [m.get("train", True) for m in messages if m["role"] == "assistant"]
    supervised = [False] * len(ids)
    for number, (start, stop) in enumerate(ranges):
        if wanted[number] and (not last_only or number == len(ranges) - 1):
            supervised[start:stop] = [True] * (stop - start)
    example = Example(torch.tensor(ids, dtype=torch.int64), torch.tensor(supervised, dtype=torch.bool))
    mismatch = None if matches else _difference(text[: last.start], rendered.prompt)
    return Encoded((example,), matches, rendered.notes, mismatch)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Encode a plain text for continued pretraining: every token supervised that has one before it, EOS at the end.

    A BOS is added where the tokenizer adds one by itself; neither BOS nor EOS is written twice.

    Args:
        tokenizer: It needs an EOS token.
        text: The text, with whatever markup it has.

    Example:
        >>> from transformers import AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained("examples/tiny_base")
        >>> encoded = encode_text(tokenizer, "a lamp")
        >>> tokenizer.decode(encoded.example.input_ids), encoded.example.supervised.tolist()[:2]
        ('a lamp<|end|>', [False, True])
    """
    ids = [int(token) for token in tokenizer(text, verbose=False)["input_ids"]]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    while ids[-2:] == [eos, eos]:
        ids = ids[:-1]
    ids = ids if ids[-1:] == [eos] else [*ids, int(eos)]
    supervised = torch.ones(len(ids), dtype=torch.bool)
    supervised[0] = False
    return Encoded((Example(torch.tensor(ids, dtype=torch.int64), supervised),), prompt_matches=True)


def answer_end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer in training, and so in generation; mostly, but not always, the tokenizer's EOS.

    Raises:
        TokenizerError: As :func:`encode_conversation`.
    """
    turns = [Message(role="user", content="a"), Message(role="assistant", content="b")]
    example = encode_conversation(tokenizer, turns)
    return int(example.input_ids[example.supervised][-1])


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that already holds whatever special tokens it is to have."""
    return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[AnswerSpan]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text, and first position and position after the last of each span of its characters."""
    if not tokenizer.is_fast:
        return _tokenize_without_offsets(tokenizer, text, spans)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    ranges, token = [], 0
    for span in spans:  # in order, so one walk over the tokens finds them all
        while token < len(ids) and offsets[token][1] <= span.start:
            token += 1
        first = token
        while token < len(ids) and offsets[token][0] < span.stop:
            token += 1
        ranges.append((first, token))
    return [int(i) for i in ids], ranges


def _tokenize_without_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[AnswerSpan]
) -> tuple[list[int], list[tuple[int, int]]]:
    """As :func:`_tokenize`: a span begins where the tokens of what precedes it end."""
    ids = tokens_of(tokenizer, text)
    edges = [0, *(edge for span in spans for edge in (span.start, span.stop))]
    pieces = [tokens_of(tokenizer, text[start:stop]) for start, stop in pairwise(edges)]
    pieces.append(tokens_of(tokenizer, text[edges[-1] :]))
    if [token for piece in pieces for token in piece] == ids:
        at = list(accumulate(map(len, pieces)))
        return ids, list(zip(at[0:-1:2], at[1::2], strict=True))
    ranges = []
    for span in spans:  # tokens go across edges, so those before each edge have to be compared
        starts, stops = (tokens_of(tokenizer, text[:edge]) for edge in (span.start, span.stop))
        start, stop = _shared(ids, starts), _shared(ids, stops)
        ranges.append((start, stop if stop == len(stops) else stop + 1))  # one that begins before the edge is inside
    return ids, ranges


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences start with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _difference(row: str, prompt: str) -> tuple[str, str]:
    """The ends of two texts, from a little before the first character that differs."""
    pairs = zip(row, prompt, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(row), len(prompt)))
    start = max(0, first - 20)
    return row[start : first + 40], prompt[start : first + 40]


__all__ = [
    "AnswerLostError",
    "Encoded",
    "answer_end_token",
    "encode",
    "encode_conversation",
    "encode_prompt",
    "encode_text",
    "tokens_of",
]
