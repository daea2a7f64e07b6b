"""Save a tokenizer in a checkpoint as plain values, so that a loaded model has the tokenizer it was trained with."""

from __future__ import annotations

import hashlib
import json
import tempfile
import zlib
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_ft.atomic_files import write_failure
from lightning_ft.data.templates import PLAIN_TEMPLATE
from lightning_ft.data.tokenizers import load_tokenizer
from lightning_ft.errors import FileWriteError, TokenizerError


class TokenizerState(TypedDict):
    """A tokenizer as plain values.

    Args:
        chat_template: Chat template of the tokenizer, or the plain one for a tokenizer without.
        vocabulary: Digest of its tokens; see :func:`vocabulary_digest`.
        files: Its files by name, each ``uint8 [n]``, compressed; empty if it can be loaded again by name.
    """

    chat_template: str
    vocabulary: str
    files: dict[str, Tensor]


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash a tokenizer's tokens, their ids and their special roles, without its chat template and padding.

    Args:
        tokenizer: Tokenizer to hash; it isn't changed.

    Returns:
        64 hexadecimal digits.
    """
    roles = {role: token for role, token in tokenizer.special_tokens_map.items() if role != "pad_token"}
    content = [sorted(tokenizer.get_vocab().items()), roles]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_state(tokenizer: PreTrainedTokenizerBase, *, whole: bool) -> TokenizerState:
    """Convert a tokenizer to values that `torch.load(weights_only=True)` can load.

    Args:
        tokenizer: The tokenizer.
        whole: Whether to include its files, compressed. Otherwise only the chat template is kept, since the rest can
            be loaded again by name.

    Returns:
        ``chat_template``, ``vocabulary`` (see :func:`vocabulary_digest`), and ``files``: a ``uint8 [n]`` tensor by
        file name.

    Raises:
        FileWriteError: If the temporary folder is full.
    """
    state: TokenizerState = {
        "chat_template": tokenizer.chat_template or PLAIN_TEMPLATE,
        "vocabulary": vocabulary_digest(tokenizer),
        "files": {},
    }
    if whole:
        try:
            state["files"] = _files(tokenizer)
        except Exception as error:  # of whatever type a tokenizer's library has for it
            if (reason := write_failure(error)) is None:
                raise
            raise FileWriteError(
                "The tokenizer, which is part of a checkpoint, can't be written to a temporary folder in "
                f"{tempfile.gettempdir()!r} ({reason}). Free some space, or set the environment variable TMPDIR to "
                "another folder."
            ) from error
    return state


def _files(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """The compressed files of a tokenizer by name, each ``uint8 [n]``."""
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            packed = bytearray(zlib.compress(file.read_bytes()))
            files[str(file.relative_to(folder))] = torch.frombuffer(packed, dtype=torch.uint8)
    return files


def tokenizer_from_state(state: TokenizerState, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Restore the tokenizer whose files a state contains, with its chat template; None if it contains no files.

    Args:
        state: Result of :func:`tokenizer_state`.
        trust_remote_code: Whether code among the files may run.

    Raises:
        TokenizerError: If it can't be loaded from them.
    """
    if not state["files"]:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name, packed in state["files"].items():
            file = Path(folder) / name
            if not file.resolve().is_relative_to(Path(folder).resolve()):
                raise TokenizerError(
                    f"The checkpoint's tokenizer has a file {name!r} outside its folder, so it isn't loaded."
                )
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(zlib.decompress(packed.numpy().tobytes()))
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    tokenizer.name_or_path = ""  # the folder no longer exists
    tokenizer.chat_template = state["chat_template"]
    return tokenizer


def differences(state: TokenizerState, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return how a tokenizer differs from a state: ``"vocabulary"``, ``"chat template"``, both or neither.

    Args:
        state: Result of :func:`tokenizer_state`.
        tokenizer: The tokenizer.
    """
    found = [] if state["vocabulary"] == vocabulary_digest(tokenizer) else ["vocabulary"]
    same = state["chat_template"] == (tokenizer.chat_template or PLAIN_TEMPLATE)
    return found if same else [*found, "chat template"]
