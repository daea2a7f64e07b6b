"""Load and encode the texts on which retention is measured: general texts, and answers of the task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from lightning_ft.arguments import did_you_mean_path
from lightning_ft.data.encode import encode
from lightning_ft.data.layout import Example
from lightning_ft.data.templates import chat_template
from lightning_ft.errors import RetentionError, TokenizerError
from lightning_ft.types import Message, Request

TaskRow = Request | tuple[Sequence[int], Sequence[int]]
"""A request with its reference answer, or the token ids of a prompt and its answer."""


def load_texts(texts: str | Path | Sequence[str] | None, *, max_texts: int | None = None) -> list[str]:
    """Load the general texts in their order.

    Args:
        texts: JSONL file whose rows have a ``text``, ``.txt`` file with a blank line between texts, or list of strings.
        max_texts: Number of texts to read from the start; None reads all.

    Raises:
        RetentionError: If there are no texts, the file can't be read, or a row has no text.

    Example:
        >>> load_texts(["It was a bright day.", "The cat slept.", "Rain fell."], max_texts=2)
        ['It was a bright day.', 'The cat slept.']
    """
    if texts is None:
        raise RetentionError(
            'Retention has no general texts to read. Pass texts=: a JSONL file whose rows have a "text", a .txt file '
            "with a blank line between texts, or a list of strings. About 64 texts of 256 tokens of the sort that the "
            "model should not forget (prose, news, reference works; not the training data) are enough."
        )
    if max_texts is not None and max_texts < 1:
        raise RetentionError(f"max_texts={max_texts}: expected at least 1.")
    loaded = _read(Path(texts)) if isinstance(texts, (str, Path)) else list(texts)
    for index, text in enumerate(loaded):
        if not isinstance(text, str):
            raise RetentionError(f"texts[{index}] is of type {type(text).__name__}: expected a list of strings.")
    if not loaded:
        raise RetentionError(f"There are no texts in {str(texts)!r}. Add at least one, since Retention reads them.")
    return loaded[:max_texts]


def _read(path: Path) -> list[str]:
    if path.suffix not in (".jsonl", ".txt"):
        raise RetentionError(
            f"texts={str(path)!r}: expected a .jsonl file, a .txt file, or a list of strings (even for a single text)."
        )
    if not path.exists():
        hint = did_you_mean_path(path)
        raise RetentionError(f"The general texts {str(path)!r} can't be read: there is no such file.{hint}")
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
        found = f"fields: {', '.join(map(str, row))}" if isinstance(row, dict) else f"found {type(row).__name__}"
        raise RetentionError(
            f'{path}, line {number}: no "text" with a string ({found}). General texts are rows of {{"text": ...}}, a '
            ".txt file with a blank line between texts, or a list of strings; they aren't the rows that are trained on."
        )
    return text


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_tokens: int
) -> tuple[list[Example], int]:
    """Encode general texts, with the special tokens that the tokenizer adds (BOS) and without a chat template.

    Args:
        tokenizer: Tokenizer of the model.
        texts: Texts to encode.
        max_tokens: Largest number of tokens per text; later ones are cut off.

    Returns:
        Example of each text, with all tokens supervised, and the number of texts that were cut.

    Raises:
        RetentionError: If a text has fewer than 2 tokens, so that nothing can be predicted in it.
    """
    if max_tokens < 2:
        raise RetentionError(f"max_tokens={max_tokens}: expected at least 2, since the first token isn't predicted.")
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    short = [index for index, tokens in enumerate(ids) if len(tokens) < 2]
    if short:
        raise RetentionError(
            f"{len(short):,} general texts have fewer than 2 tokens, so that nothing can be predicted in them (first: "
            f"text {short[0]}, {texts[short[0]]!r}). Leave them out, or join them with neighboring texts."
        )
    examples = [_example(tokens[:max_tokens], 0) for tokens in ids]
    return examples, sum(len(tokens) > max_tokens for tokens in ids)


def encode_task(tokenizer: PreTrainedTokenizerBase, rows: Sequence[TaskRow]) -> list[Example]:
    """Encode task rows with their answers supervised; requests are encoded as for training.

    Args:
        tokenizer: Tokenizer of the model.
        rows: Requests with their reference answers, or pairs of token ids.

    Raises:
        RetentionError: If the chat template refuses a row, or a prompt or answer is empty.
    """
    template = chat_template(tokenizer) if any(isinstance(row, Request) for row in rows) else None
    examples = []
    for index, row in enumerate(rows):
        if isinstance(row, Request):
            answer_turn = Message(role="assistant", content=row.reference) if row.answer is None else row.answer
            messages, kwargs = [*row.messages, answer_turn], row.template_kwargs
            assert template is not None  # some row is a request
            try:
                examples.append(encode(tokenizer, messages, template, kwargs, last_only=True).example)
            except TokenizerError as error:
                raise RetentionError(f"Task row {row.id!r}: {error}") from error
            continue
        prompt, answer = (list(part) for part in row)
        if not prompt or not answer:
            raise RetentionError(f"Task row {index} has no {'answer' if prompt else 'prompt'}: expected token ids.")
        examples.append(_example(prompt + answer, len(prompt)))
    return examples


def _example(ids: Sequence[int], start: int) -> Example:
    """Build an example whose tokens are supervised from `start` on."""
    return Example(torch.tensor(list(ids), dtype=torch.int64), torch.arange(len(ids)) >= start)
