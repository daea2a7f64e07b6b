"""Tokenizers from a hub name or a local folder."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_ft.arguments import did_you_mean_path, searched_here
from lightning_ft.errors import TokenizerError
from lightning_ft.read_errors import READ_ERRORS, first_line

_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken")
"""Beginnings of the names of files that a tokenizer is loaded from."""


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        name: Hub name or local folder.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code from the repository may run.

    Raises:
        TokenizerError: If there is none, or it can't be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except READ_ERRORS as error:
        if (missing := missing_folder(name)) is not None:
            raise TokenizerError(missing) from error
        if Path(name).is_dir() and not any(file.name.startswith(_FILES) for file in Path(name).iterdir()):
            raise TokenizerError(
                f"The folder {name!r} contains no tokenizer. Pass tokenizer= with the name or folder of the model that "
                f"it was trained from, or save that tokenizer in it: tokenizer.save_pretrained({name!r})."
            ) from error
        raise TokenizerError(
            f"No tokenizer could be loaded from {name!r}: {_no_folder(name)}{first_line(error)}"
            f"{did_you_mean_path(name)} Pass tokenizer= if the tokenizer is stored apart from the model."
        ) from error


def missing_folder(name: str) -> str | None:
    """Say that a folder doesn't exist, for a name that can only be one; None for what may be a hub name.

    Args:
        name: Hub name or path.

    Example:
        >>> missing_folder("Qwen/Qwen3-0.6B") is None, missing_folder("/no/such/model")
        (True, "The model '/no/such/model' could not be loaded: there is no such folder.")
    """
    path = Path(name)
    if path.exists() or (len(path.parts) <= 2 and not path.is_absolute() and not name.startswith(".")):
        return None
    return f"The model {name!r} could not be loaded: there is no such folder.{did_you_mean_path(name)}"


def _no_folder(name: str) -> str:
    """Say where a folder was looked for, for a name that may be one or one of the hub."""
    return "" if Path(name).exists() else searched_here()


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Token id for padding, which no token attends to: the tokenizer's pad token, or its EOS where it has none."""
    return int(tokenizer.eos_token_id or 0) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
