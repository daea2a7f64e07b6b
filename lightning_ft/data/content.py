"""Check the texts of a row for control tokens, and for characters that the tokenizer doesn't know or changes.

A control token within a message would end the turn, or start another one. Text that the tokenizer doesn't know or
changes can't be learned: the model would be trained to answer ``<unk>``.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.dates import DATED, today_remedy
from lightning_ft.data.spans import REMEDIES as SPAN_REMEDIES
from lightning_ft.data.template_layout import template_tokens
from lightning_ft.data.templates import ChatTemplate
from lightning_ft.data.turns import RowError
from lightning_ft.types import Message

CHANGED_PROMPT = "row with a prompt in which the tokenizer changes characters"
BOS_TWICE = "row that begins with BOS twice"
EOS_TWICE = "row with an answer that ends with EOS twice"
OWN_MARKUP = "row with a question that ends with a header of its own, such as 'Assistant:'"
QUESTION_CUT = "truncated row with an earlier answer that isn't supervised, since its whole question was cut"

REMEDIES = {
    **SPAN_REMEDIES,
    CHANGED_PROMPT: "It drops case, accents or rare characters: make sure that they don't matter for the answer, or "
    "use a model whose tokenizer keeps them.",
    BOS_TWICE: "The chat template writes it twice: pass a chat_template= that writes it once.",
    OWN_MARKUP: "The chat template writes its own markup around it, so it is trained on both: pass "
    "chat_template='text' for texts that are whole prompts.",
    QUESTION_CUT: "Raise max_length to train on it.",
    EOS_TWICE: "The chat template writes it twice: pass a chat_template= that writes it once.",
}
"""Remedies of notes that don't depend on the chat template."""

NOTES_WITH_REMEDY = (*REMEDIES, DATED)
"""Notes that have a remedy; see `remedy_for`."""

_HEADERS = ("Assistant:", "ASSISTANT:", "### Response:")
"""How texts with markup of their own end where the answer begins (HH-RLHF, Vicuna, Alpaca)."""

_NAMES = {"system": "system turn", "user": "question", "assistant": "answer", "tool": "tool's answer"}


def remedy_for(note: str, template: ChatTemplate) -> str | None:
    """Remedy of a note in a `SplitReport`; None if it needs none.

    Args:
        note: The note.
        template: Chat template of the rows.
    """
    return today_remedy(template) if note == DATED else REMEDIES.get(note)


class ContentCheck:
    """Refuses texts that the tokenizer and its chat template would turn into something else.

    Args:
        template: Chat template of the tokenizer.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template, self.tokenizer = template, template.tokenizer

    def __call__(
        self, messages: Sequence[Message], kwargs: Mapping[str, object] | None = None, *, markup: bool = False
    ) -> tuple[str, ...]:
        """Check the texts of a row.

        Args:
            messages: Turns of the row.
            kwargs: Variables of the chat template; the texts in its `tools` are checked too.
            markup: Whether control tokens are intended, as in a plain text with its own markup.

        Returns:
            Notes of harmless findings.

        Raises:
            RowError: For a control token, for text that the tokenizer doesn't know, and for an answer that it changes.
        """
        notes: list[str] = []
        marked_up = markup or self.template.is_markup_free
        for number, message in enumerate(messages):
            if message["role"] == "user" and not marked_up and message["content"].rstrip().endswith(_HEADERS):
                notes.append(OWN_MARKUP)
            name, is_answer = _NAMES.get(message["role"], message["role"]), message["role"] == "assistant"
            for text in _texts(message):
                if not markup:
                    self._check_control(text, name, first=number == 0, is_answer=is_answer)
                if not self._keeps(text) and self._changed(text, name, is_answer=is_answer, markup=markup):
                    notes.append(CHANGED_PROMPT)
        for text in _strings((kwargs or {}).get("tools")):
            self._check_control(text, "tools", first=False, is_answer=False)
        return tuple(dict.fromkeys(notes))

    def doubled(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Notes of BOS or EOS tokens that the chat template writes twice.

        Args:
            ids: Tokens of a conversation.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        notes = [BOS_TWICE] if bos is not None and list(ids[:2]) == [bos, bos] else []
        if eos != bos and any(token == eos and ids[i + 1] == eos for i, token in enumerate(ids[:-1])):
            notes.append(EOS_TWICE)
        return tuple(notes)

    # ------------------------------------------------------------ control tokens

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Pattern of the tokens with a meaning for the chat template or for generation."""
        tokenizer = self.tokenizer
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        written = template_tokens(self.template)
        # Paired tags that an answer may contain, such as <think> and </think>, aren't control tokens.
        opening = [token for token in written if token.startswith("<") and not token.startswith("<|")]
        tags = {t for t in opening if ({f"</{t[1:]}", f"<{t[2:]}"} - {t}) & added.keys()}
        special = {str(token) for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
        if tokenizer.pad_token and added.get(str(tokenizer.pad_token)) and len(str(tokenizer.pad_token)) > 1:
            special.add(str(tokenizer.pad_token))
        names = sorted(filter(str.strip, (written - tags) | special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _check_control(self, text: str, name: str, *, first: bool, is_answer: bool) -> None:
        for match in self._control.finditer(text):
            token = match.group()
            fix = (
                "Remove it: the chat template writes it where it belongs. For rows with markup of their own, pass "
                "chat_template='text'."
            )
            if self.template.is_markup_free:
                begins = first and token == self.tokenizer.bos_token and not text[: match.start()].strip()
                ends = is_answer and token == self.tokenizer.eos_token and not text[match.end() :].strip()
                if not begins and not ends:
                    continue
                written = "BOS is written before each row" if begins else "EOS is written after each answer"
                fix = f"Remove it: {written}."
            detail = f"{token!r} at character {match.start() + 1:,}"
            raise RowError(None, f"control token in the {name}", detail, fix)

    # ------------------------------------------------------------ what the tokenizer keeps

    @cached_property
    def _keeps_every_text(self) -> bool:
        return keeps_every_text(self.tokenizer)

    def _keeps(self, text: str) -> bool:
        """Whether a text is known to be decoded unchanged, without trying."""
        unknown = self.tokenizer.unk_token
        return self._keeps_every_text and not (unknown and str(unknown) in text) and "▁" not in text

    def _changed(self, text: str, name: str, *, is_answer: bool, markup: bool) -> bool:
        """Whether the tokenizer changes a text that isn't an answer.

        Raises:
            RowError: For text that it doesn't know, for its token of unknown text, and for an answer that it changes.
        """
        tokenizer = self.tokenizer
        ids = [int(i) for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        unknown = tokenizer.unk_token_id
        if unknown is not None and unknown in ids and unknown not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            token = str(tokenizer.unk_token)
            written = ids.count(unknown) == text.count(token)  # so all else is known: <|endoftext|> of SmolLM2
            if not written:
                detail = f"{ids.count(unknown):,} x {token}, such as {self._unknown(text)!r}"
                fix = "Write it in characters that the tokenizer knows, or use a model whose tokenizer knows them."
                raise RowError(None, f"text that the tokenizer doesn't know in the {name}", detail, fix)
            if not markup:
                detail = f"{token!r} at character {text.index(token) + 1:,}"
                fix = "Remove it: the tokenizer uses it for text that it doesn't know."
                raise RowError(None, f"control token in the {name}", detail, fix)
        decoded = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        before, after = _bare(text), _bare(decoded)
        if before == after:
            return False
        if not is_answer:
            return True
        pairs = enumerate(zip(before, after, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
        detail = f"{before[first : first + 10]!r} becomes {after[first : first + 10]!r}"
        fix = "The model can't generate it: write the text as the tokenizer decodes it, or use another model."
        raise RowError(None, f"characters that the tokenizer changes in the {name}", detail, fix)

    def _unknown(self, text: str) -> str:
        """The first part of a text that the tokenizer doesn't know."""
        if not self.tokenizer.is_fast:
            return text[:20]
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pairs: Mapping[str, Sequence] = encoding
        for token, (start, stop) in zip(pairs["input_ids"], pairs["offset_mapping"], strict=True):
            if token == self.tokenizer.unk_token_id:
                return text[start:stop][:20]
        return text[:20]


def _texts(message: Message) -> Iterable[str]:
    """The texts of a message: its content, its reasoning, and its tool calls."""
    yield message["content"]
    yield message.get("reasoning_content", "")
    for call in message.get("tool_calls", ()):
        yield json.dumps(call["function"], ensure_ascii=False)


def _strings(value: object) -> Iterator[str]:
    """All strings inside a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.items():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _bare(text: str) -> str:
    """The text without white space and in composed form, since such changes are allowed.

    WordPiece decoders write "do not" as "don't", and join other short forms.
    """
    return "".join(unicodedata.normalize("NFC", text).split()).replace("donot", "don't")


_SPLITTERS = ("Split", "Digits", "Punctuation", "Metaspace", "ByteLevel")


def keeps_every_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer is known to keep every text, apart from white space, Unicode composition and literal ``▁``.

    Byte-level BPE with all bytes does, and so do BPE and Unigram with byte fallback. False means unknown.

    Args:
        tokenizer: The tokenizer.

    Example:
        >>> from transformers import AutoTokenizer
        >>> keeps_every_text(AutoTokenizer.from_pretrained("examples/tiny_base"))
        True
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    core = json.loads(backend.to_str())
    model, decoders = core["model"], {part["type"] for part in _parts(core["decoder"])}
    splitters = list(_parts(core["pre_tokenizer"]))
    if not all(_only_composes(part) for part in _parts(core["normalizer"])):
        return False
    if not all(part["type"] in _SPLITTERS and part.get("behavior") != "Removed" for part in splitters):
        return False
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if "ByteLevel" in decoders:
        is_bpe, splits_bytes = model["type"] == "BPE", any(part["type"] == "ByteLevel" for part in splitters)
        return is_bpe and splits_bytes and all(byte in vocabulary for byte in pre_tokenizers.ByteLevel.alphabet())
    falls_back = bool(model.get("byte_fallback")) and "ByteFallback" in decoders
    return falls_back and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))


def _parts(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A component of a tokenizer, or the components of a sequence."""
    if part is None:
        return
    inner = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders")
    if part["type"] != "Sequence":
        yield part
    else:
        for component in inner or []:
            yield from _parts(component)


def _only_composes(normalizer: dict[str, Any]) -> bool:
    """Whether a normalizer changes nothing but white space and Unicode composition."""
    if normalizer["type"] == "Replace":
        return (normalizer["pattern"], normalizer["content"]) == ({"String": " "}, "▁")
    return normalizer["type"] in ("NFC", "Strip", "Prepend")
