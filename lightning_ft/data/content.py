"""What the texts of a row may not hold: control tokens, and what the tokenizer can't keep.

A control token in a message is no text: it would end a turn in its middle, or begin another. What a tokenizer doesn't
know or changes can't be learned: the model would be taught to answer ``<unk>``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from functools import cached_property

from tokenizers import decoders

from lightning_ft.data.request import Message
from lightning_ft.data.spans import added_tokens, template_tokens
from lightning_ft.data.templates import ChatTemplate
from lightning_ft.data.turns import RowError

CHANGED_PROMPT = "row whose prompt the tokenizer changes characters of"

_NAMES = {"system": "system turn", "user": "question", "assistant": "answer", "tool": "tool's answer"}


class ContentCheck:
    """Refuses what a tokenizer and its chat template would make something else of than the text it is.

    Args:
        template: The chat template of the tokenizer.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template, self.tokenizer = template, template.tokenizer

    def __call__(self, messages: Sequence[Message], *, markup: bool = False) -> tuple[str, ...]:
        """Look at the texts of a row.

        Args:
            messages: Its turns.
            markup: Whether control tokens are what the user means, as in a plain text that holds its own markup.

        Returns:
            Notes of what does no harm.

        Raises:
            RowError: For a control token, for text that the tokenizer doesn't know, and for an answer that it changes.
        """
        notes: list[str] = []
        for number, message in enumerate(messages):
            for text in (message["content"], message.get("reasoning_content", "")):
                if not text:
                    continue
                if not markup:
                    self._check_control(text, message["role"], last=number == len(messages) - 1)
                if not self._keeps_everything and self._changed(text, message["role"]):
                    notes.append(CHANGED_PROMPT)
        return tuple(dict.fromkeys(notes))

    # ------------------------------------------------------------ control tokens

    @cached_property
    def _control(self) -> frozenset[str]:
        tokenizer = self.tokenizer
        own = {str(t) for t in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) if t}
        named = set(map(str, tokenizer.get_added_vocab()))
        found = template_tokens(self.template)
        # A pair of tags that an answer may well hold, such as <think> and </think>, controls nothing.
        tags = {
            t for t in found if t.startswith("<") and ({f"</{t[1:]}", f"<{t[2:]}"} & named) and not t.startswith("<|")
        }
        return frozenset((found - tags) | own)

    def _check_control(self, text: str, role: str, *, last: bool) -> None:
        for match in added_tokens(self.template, bos=True).finditer(text):
            token = match.group()
            if token not in self._control:
                continue
            at_end = (
                last and role == "assistant" and token == self.tokenizer.eos_token and not text[match.end() :].strip()
            )
            if self.template.is_markup_free and not at_end:
                continue
            fix = (
                "Remove it: the chat template writes it where it belongs. Texts with markup of their own go as 'text'."
            )
            raise RowError(
                None,
                f"control token in the {_NAMES.get(role, role)}",
                f"{token!r} at character {match.start() + 1:,}",
                fix,
            )

    # ------------------------------------------------------------ what the tokenizer keeps

    @cached_property
    def _keeps_everything(self) -> bool:
        """Whether any text comes back from its tokens: bytes, unchanged before."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return backend is not None and backend.normalizer is None and _is_of_bytes(backend.decoder)

    def _changed(self, text: str, role: str) -> bool:
        """Whether the tokenizer changes a text that isn't an answer.

        Raises:
            RowError: For unknown text, and for an answer that is changed.
        """
        tokenizer = self.tokenizer
        ids = [int(i) for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        where = _NAMES.get(role, role)
        unknown = tokenizer.unk_token_id
        if unknown is not None and unknown in ids and unknown not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            detail = f"{ids.count(unknown):,} x {tokenizer.unk_token}, such as {self._unknown(text)!r}"
            fix = "Write it in characters that the tokenizer knows, or use a model whose tokenizer knows them."
            raise RowError(None, f"text that the tokenizer doesn't know in the {where}", detail, fix)
        back = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        before, after = _bare(text), _bare(back)
        if before == after:
            return False
        if role != "assistant":
            return True
        first = next(
            (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
        )
        detail = f"{before[first : first + 10]!r} becomes {after[first : first + 10]!r}"
        fix = "The model could never answer so: write what the tokenizer makes of it, or use another model."
        raise RowError(None, f"characters that the tokenizer changes in the {where}", detail, fix)

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


def _is_of_bytes(decoder: object) -> bool:
    return isinstance(decoder, decoders.ByteLevel)


def _bare(text: str) -> str:
    """Without white space, composed: no tokenizer is blamed for what looks the same."""
    return "".join(unicodedata.normalize("NFC", text).split())
