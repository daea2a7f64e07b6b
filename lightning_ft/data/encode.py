"""Encodes conversations as token ids, and marks the supervised ones.

Supervised are the assistant turns and the token that ends each: what the model has to write after its prompt.
`lightning_ft.data.spans` locates them in the text; this file locates them among the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.cores import AnswerLostError
from lightning_ft.data.layout import Example
from lightning_ft.data.spans import AnswerSpan, render_answers
from lightning_ft.data.template_layout import space_tokens
from lightning_ft.data.templates import ChatTemplate, chat_template
from lightning_ft.types import Message


@dataclass(frozen=True)
class Encoded:
    """An encoded row, and how its prompt compares with generation's.

    Args:
        examples: Tokens of the row: one example, or one per completion, prompt included.
        prompt_matches: Whether the tokens before the last answer equal those that generation starts from.
        notes: Changes by the chat template that the user should know of.
        mismatch: Differing parts of the row's prompt and of generation's, if the prompts differ.
    """

    examples: tuple[Example, ...]
    prompt_matches: bool
    notes: tuple[str, ...] = ()
    mismatch: tuple[str, str] | None = None

    @property
    def example(self) -> Example:
        """The first example, usually the only one."""
        return self.examples[0]

    @property
    def longest(self) -> Example:
        """The example with the most tokens."""
        return max(self.examples, key=len)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: ChatTemplate | None = None,
    kwargs: Mapping[str, object] | None = None,
) -> list[int]:
    """Token ids that generation of an answer starts from.

    Args:
        tokenizer: The tokenizer; one without a chat template gets the plain one.
        messages: Conversation with a user turn (or a tool turn) last.
        template: Chat template of the tokenizer, so that it need not be analyzed again.
        kwargs: Variables for the template in addition to the messages: `tools`, `enable_thinking`, ...

    Raises:
        TokenizerError: If the template refuses the conversation, or the tokenizer has no EOS token.
    """
    return tokens_of(tokenizer, (template or chat_template(tokenizer)).render(messages, kwargs, prompt=True))


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: ChatTemplate | None = None,
    kwargs: Mapping[str, object] | None = None,
) -> Example:
    """Encode a conversation with every assistant turn, and the token that ends it, supervised.

    If the template doesn't end the last answer with a token of its own, EOS is appended.

    Args:
        tokenizer: The tokenizer; one without a chat template gets the plain one. It needs no pad token.
        messages: Conversation with an assistant turn last.
        template: Chat template of the tokenizer, so that it need not be analyzed again.
        kwargs: Variables for the template in addition to the messages: `tools`, `enable_thinking`, ...

    Raises:
        TokenizerError: If the template refuses the conversation, or the tokenizer has no EOS token.
        AnswerLostError: If the template drops or changes a turn.
    """
    return encode(tokenizer, messages, template or chat_template(tokenizer), kwargs).example


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: ChatTemplate,
    kwargs: Mapping[str, object] | None = None,
    *,
    last_only: bool = False,
) -> Encoded:
    """Encode a conversation and compare its prompt with the one that generation starts from.

    Args:
        tokenizer: The tokenizer; one without a chat template gets the plain one.
        messages: Conversation with an assistant turn last. Turns with ``train: False`` aren't supervised.
        template: Chat template of the tokenizer.
        kwargs: Variables for the template in addition to the messages: `tools`, `enable_thinking`, ...
        last_only: Whether only the last answer is supervised.

    Raises:
        TokenizerError: If the template refuses the conversation.
        AnswerLostError: If the template drops or changes a turn.
    """
    rendered = render_answers(template, messages, kwargs)
    text, last = rendered.text, rendered.spans[-1]
    prompt = tokens_of(tokenizer, rendered.prompt)
    trained = [m.get("train", True) for m in messages if m["role"] == "assistant"]
    if last_only:
        trained[:-1] = [False] * (len(trained) - 1)
    starts = [span.start for span, train in zip(rendered.spans, trained, strict=True) if train]
    ids, ranges = _tokenize_with_spaces(template, text, rendered.spans, starts)
    starts_there = text.startswith(rendered.prompt) and last.start == len(rendered.prompt)
    if starts_there and (ids[: len(prompt)] != prompt or ranges[-1][0] != len(prompt)):
        # The tokenizer merged the end of the prompt with the start of the answer. Tokenized apart, as in generation:
        start = len(rendered.prompt)
        rest, ((_, stop),) = _tokenize(tokenizer, text[start:], [AnswerSpan(0, last.stop - start, last.ended)])
        earlier_end = ranges[-2][1] if len(ranges) > 1 else 0
        joined = prompt + rest
        if ids[:earlier_end] == prompt[:earlier_end] and tokenizer.decode(joined) == tokenizer.decode(ids):
            ids, ranges = joined, [*ranges[:-1], (len(prompt), len(prompt) + stop)]
    matches = ids[: len(prompt)] == prompt and ranges[-1][0] == len(prompt)
    if not last.ended:
        ids = [*ids[: ranges[-1][1]], int(tokenizer.eos_token_id)]  # type: ignore[arg-type]  # checked by chat_template
        ranges[-1] = (ranges[-1][0], len(ids))
    supervised = [False] * len(ids)
    for (start, stop), train in zip(ranges, trained, strict=True):
        if train:
            supervised[start:stop] = [True] * (stop - start)
    example = Example(torch.tensor(ids, dtype=torch.int64), torch.tensor(supervised, dtype=torch.bool))
    mismatch = None
    if not matches:
        pair = text[: last.start], rendered.prompt
        if pair[0] == pair[1]:  # only the tokens differ, as by the white space of an earlier answer
            pair = str(tokenizer.decode(ids[: ranges[-1][0]])), str(tokenizer.decode(prompt))
        mismatch = _difference(*pair)
    return Encoded((example,), matches, rendered.notes, mismatch)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Encode a plain text for continued pretraining: every token but the first is supervised, and EOS ends it.

    A BOS is added if the tokenizer adds one by itself; neither BOS nor EOS is written twice.

    Args:
        tokenizer: A tokenizer with an EOS token.
        text: The text, with any markup it has.

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
    """Token id that ends an answer in training, and so in generation; usually, but not always, the tokenizer's EOS.

    Raises:
        TokenizerError: If the template refuses the conversation, or the tokenizer has no EOS token.
    """
    turns = [Message(role="user", content="a"), Message(role="assistant", content="b")]
    example = encode_conversation(tokenizer, turns)
    return int(example.input_ids[example.supervised][-1])


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that already contains its special tokens."""
    return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def _tokenize_with_spaces(
    template: ChatTemplate, text: str, spans: Sequence[AnswerSpan], starts: Sequence[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """As `_tokenize`, but the white space that answers begin with is kept.

    Some header tokens strip the white space after them, as Phi-3's ``<|assistant|>`` does. After the prompt the model
    can write it nevertheless, so the text is tokenized in parts that begin there::

        <|user|>Why?<|end|><|assistant|> | ␣␣␣␣return 1<|end|><|user|>And?<|end|><|assistant|> | ␣␣No<|end|>

    Each part is tokenized after another token, since some tokenizers write a space before the first word of a text.

    Args:
        template: The chat template of the tokenizer.
        text: Text of the conversation.
        spans: Spans of the answers.
        starts: Starts of those that are supervised. The others are context, which generation strips too.
    """
    cuts = [start for start in starts if text[start : start + 1].isspace()]
    if cuts:
        stripping, other = space_tokens(template)
        cuts = [start for start in cuts if stripping and text[:start].rstrip().endswith(stripping)]
    if not cuts:
        return _tokenize(template.tokenizer, text, spans)
    ids: list[int] = []
    ranges: list[tuple[int, int]] = []
    for start, stop in pairwise([0, *cuts, len(text)]):
        before = other if start else ""
        shift, extra = len(before) - start, 1 if before else 0
        inside = [
            AnswerSpan(span.start + shift, span.stop + shift, span.ended)
            for span in spans[len(ranges) :]
            if span.start < stop or stop == len(text)
        ]
        part, found = _tokenize(template.tokenizer, before + text[start:stop], inside)
        ranges += [(len(ids) + first - extra, len(ids) + last - extra) for first, last in found]
        ids += part[extra:]
    return ids, ranges


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[AnswerSpan]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text, and the half-open range of tokens for each span of characters."""
    if not tokenizer.is_fast:
        return _tokenize_without_offsets(tokenizer, text, spans)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    ranges, token = [], 0
    for span in spans:  # spans are in order, so one pass over the tokens finds them all
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
    """As :func:`_tokenize`, without offsets: a span begins where the tokens of the text before it end."""
    ids = tokens_of(tokenizer, text)
    edges = [0, *(edge for span in spans for edge in (span.start, span.stop))]
    parts = [tokens_of(tokenizer, text[start:stop]) for start, stop in pairwise(edges)]
    parts.append(tokens_of(tokenizer, text[edges[-1] :]))
    if [token for part in parts for token in part] == ids:
        ends = list(accumulate(map(len, parts)))
        return ids, list(zip(ends[0:-1:2], ends[1::2], strict=True))
    ranges = []
    for span in spans:  # some tokens cross an edge, so the tokens before each edge are compared
        starts, stops = (tokens_of(tokenizer, text[:edge]) for edge in (span.start, span.stop))
        start, stop = _shared(ids, starts), _shared(ids, stops)
        ranges.append((start, stop if stop == len(stops) else stop + 1))  # a token that crosses the end is inside
    return ids, ranges


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that two sequences share at their start."""
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
