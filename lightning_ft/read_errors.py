"""Errors that other libraries raise for files they can't read, and the line of each that is worth showing."""

from __future__ import annotations

from pickle import UnpicklingError

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

READ_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    EOFError,
    ImportError,
    UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers, PEFT and the readers of weight files raise for a folder that doesn't hold what it should."""


def first_line(error: BaseException) -> str:
    r"""The first line of an error's text (two lines if the first only announces the next), or its type if it has none.

    Example:
        >>> first_line(ValueError("field 'r':\n  expected int\n  ...")), first_line(EOFError())
        ("field 'r': expected int", 'EOFError')
    """
    lines = [line.strip() for line in str(error).strip().split("\n")]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) or type(error).__name__
