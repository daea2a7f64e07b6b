"""What is read to see whether training made a model forget: general texts, and answers of the task, as tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.encode import encode
from lightning_ft.data.layout import Example
from lightning_ft.data.templates import chat_template
from lightning_ft.errors import RetentionError, TokenizerError
from lightning_ft.types import Message, Request

TaskRow = Request | tuple[Sequence[int], Sequence[int]]
"""A request with its right answer, or the token ids of a prompt and of an answer."""


def load_texts(texts: str | Path | Sequence[str] | None, *, max_texts: int | None = None) -> list[str]:
    """The general texts, in their order.

    Args:
        texts: A JSONL file whose rows have a ``text``, a ``.txt`` file with a blank line between texts, or a list.
        max_texts: Take the first so many; None for all.

    Raises:
        RetentionError: If there are none, the file can't be read, or a row has no text.

    Example:
        >>> load_texts(["It was a bright day.", "The cat slept.", "Rain fell."], max_texts=2)
        ['It was a bright day.', 'The cat slept.']
    """
    if texts is None:
        raise RetentionError(
            'Retention has no general texts to read: pass texts= a JSONL file whose rows have a "text", a .txt file '
            "with a blank line between texts, or a list of strings. About 64 texts of 256 tokens from what the model "
            "should not forget (prose, news, reference works; not the training data) are enough."
        )
    if max_texts is not None and max_texts < 1:
        raise RetentionError(f"max_texts={max_texts}: expected at least 1.")
    found = _read(Path(texts)) if isinstance(texts, (str, Path)) else list(texts)
    for place, text in enumerate(found):
        if not isinstance(text, str):
            raise RetentionError(f"texts[{place}] is of type {type(text).__name__}: expected a list of strings.")
    if not found:
        raise RetentionError(f"There are no texts in {str(texts)!r}: Retention needs at least one.")
    return found[:max_texts]


def _read(path: Path) -> list[str]:
    if path.suffix not in (".jsonl", ".txt"):
        raise RetentionError(
            f"texts={str(path)!r}: expected a .jsonl file, a .txt file, or a list of strings (a single text too)."
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RetentionError(f"The general texts {str(path)!r} can't be read as UTF-8 text: {error}") from error
    if path.suffix == ".txt":
        paragraphs = "\n".join(line.rstrip() for line in content.splitlines()).split("\n\n")
        return [paragraph.strip() for paragraph in paragraphs if paragraph.strip()]
    return [_text(path, number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]


def _text(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RetentionError(f'{path}, line {number}: not JSON ({error}). Expected {{"text": ...}}.') from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise RetentionError(f'{path}, line {number}: no "text" with a string in it.')
    return text


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_tokens: int
) -> tuple[list[Example], int]:
    """General texts as token ids, with whatever the tokenizer itself puts before them (BOS), without chat template.

    Args:
        tokenizer: The model's.
        texts: The texts.
        max_tokens: Tokens behind the first so many are left out.

    Returns:
        For each text its tokens, all of them supervised, and how many texts were cut.

    Raises:
        RetentionError: For texts of fewer than 2 tokens, in which nothing can be predicted.
    """
    if max_tokens < 2:
        raise RetentionError(f"max_tokens={max_tokens}: expected at least 2, since the first token isn't predicted.")
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    short = [place for place, tokens in enumerate(ids) if len(tokens) < 2]
    if short:
        raise RetentionError(
            f"{len(short):,} general texts have fewer than 2 tokens, so that nothing can be predicted in them (first: "
            f"text {short[0]}, {texts[short[0]]!r}). Leave them out, or join them to their neighbors."
        )
    examples = [_example(tokens[:max_tokens], 0) for tokens in ids]
    return examples, sum(len(tokens) > max_tokens for tokens in ids)


def encode_task(tokenizer: PreTrainedTokenizerBase, rows: Sequence[TaskRow]) -> list[Example]:
    """Task rows as token ids, their answers supervised; a request is encoded as it is for training.

    Args:
        tokenizer: The model's.
        rows: Requests with their right answers, or pairs of token ids.

    Raises:
        RetentionError: For a row that the chat template refuses, or whose prompt or answer is empty.
    """
    template = chat_template(tokenizer) if any(isinstance(row, Request) for row in rows) else None
    examples = []
    for place, row in enumerate(rows):
        if isinstance(row, Request):
            right = Message(role="assistant", content=row.reference) if row.answer is None else row.answer
            messages, kwargs = [*row.messages, right], row.template_kwargs
            assert template is not None  # there is a request
            try:
                examples.append(encode(tokenizer, messages, template, kwargs, last_only=True).example)
            except TokenizerError as error:
                raise RetentionError(f"Task row {row.id!r}: {error}") from error
            continue
        prompt, answer = (list(part) for part in row)
        if not prompt or not answer:
            raise RetentionError(f"Task row {place} has no {'answer' if prompt else 'prompt'}: expected token ids.")
        examples.append(_example(prompt + answer, len(prompt)))
    return examples


def _example(ids: Sequence[int], start: int) -> Example:
    """Tokens of which all from `start` on are supervised."""
    return Example(torch.tensor(list(ids), dtype=torch.int64), torch.arange(len(ids)) >= start)
