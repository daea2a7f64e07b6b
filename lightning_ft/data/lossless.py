"""Tokenizers that keep every text: what they make tokens of comes back from the tokens, whatever it is.

Known from how a tokenizer is built, so that the texts of rows needn't be decoded again to find out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

_SPLITTERS = ("Split", "Digits", "Punctuation", "Metaspace", "ByteLevel")


def keeps_every_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer is known to keep every text but for white space, Unicode composition and literal ``▁``.

    So are byte-level BPE that has all bytes, and BPE or Unigram that falls back to bytes. False says nothing.

    Args:
        tokenizer: Any tokenizer.

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
        is_bpe, of_bytes = model["type"] == "BPE", any(part["type"] == "ByteLevel" for part in splitters)
        return is_bpe and of_bytes and all(byte in vocabulary for byte in pre_tokenizers.ByteLevel.alphabet())
    falls_back = bool(model.get("byte_fallback")) and "ByteFallback" in decoders
    return falls_back and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))


def _parts(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A part of a tokenizer, or the parts of a sequence of them."""
    if part is None:
        return
    inner = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders")
    if part["type"] != "Sequence":
        yield part
    else:
        for one in inner or []:
            yield from _parts(one)


def _only_composes(normalizer: dict[str, Any]) -> bool:
    """Whether a normalizer changes nothing but white space and Unicode composition."""
    if normalizer["type"] == "Replace":
        return (normalizer["pattern"], normalizer["content"]) == ({"String": " "}, "▁")
    return normalizer["type"] in ("NFC", "Strip", "Prepend")
