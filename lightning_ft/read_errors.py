"""Errors that other libraries raise for files that they can't read, and how to quote them in one line."""

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
"""Exceptions that transformers, PEFT and readers of weight files raise for a folder with missing or invalid files."""


def first_line(error: BaseException) -> str:
    r"""First line of an error's message, joined with the second if it ends with a colon; the error's type if empty.

    Example:
        >>> first_line(ValueError("field 'r':\n  expected int\n  ...")), first_line(EOFError())
        ("field 'r': expected int", 'EOFError')
    """
    lines = [line.strip() for line in str(error).strip().split("\n")]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) or type(error).__name__
