"""Escapes text from rows and models, so that it can be shown safely on a terminal, a web page or a plot.

Text is escaped where it leaves the package: in errors (`lightning_ft.errors`), warnings and logs
(`lightning_ft.distributed`), and the console output, HTML, Markdown and plots of `lightning_ft.report`. Files that
programs read are written with :func:`json_text`, which uses the escapes of JSON.
"""

from __future__ import annotations

import hashlib
import json
import re

_UNSAFE = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters except tab and line feed: escape sequences begin with one
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that change the direction of text
    "\u2028\u2029\ud800-\udfff"  # other line breaks; lone surrogates, which can't be encoded
    "\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b\u2060-\u2065\u206a-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff"  # this line and the one before: invisible characters
)
# The zero-width joiner and non-joiner are visible through their neighbors: they join emoji and letters of many scripts.
# They are escaped next to ASCII only.
_JOINER = "(?<![^\x00-\x7f\u200b-\u200d])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f\u200b-\u200d])"
_CHARACTER, _IN_LINE = re.compile(f"[{_UNSAFE}]|{_JOINER}"), re.compile(f"[{_UNSAFE}\n]|{_JOINER}")


def printable(text: str, *, one_line: bool = False) -> str:
    r"""Escape characters that control a terminal, reorder text, or are invisible.

    Args:
        text: Any text.
        one_line: Whether to escape line breaks too.

    Example:
        >>> print(printable("a \x1b[2J b\u202e c\u200b"))
        a \x1b[2J b\u202e c\u200b
    """
    return (_IN_LINE if one_line else _CHARACTER).sub(_escaped, text)


def json_text(value: object, *, indent: int | None = None) -> str:
    r"""Serialize a value to JSON that is safe to print on a terminal and keeps every script readable.

    Args:
        value: Value of JSON types, without NaN and infinities.
        indent: Number of spaces per level, as in `json.dumps`; None for a single line.

    Raises:
        ValueError: If `value` contains NaN or an infinity.
        TypeError: If `value` contains another type.

    Example:
        >>> print(json_text({"a": "caf\u00e9 \x9b31m\U000e0041"}))
        {"a": "café \u009b31m\udb40\udc41"}
    """
    return _CHARACTER.sub(_json_escaped, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code == 10:
        return "\\n"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escaped(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x10000:
        return f"\\u{code:04x}"
    return f"\\u{0xD800 + ((code - 0x10000) >> 10):04x}\\u{0xDC00 + ((code - 0x10000) & 0x3FF):04x}"


def content_hash(value: object) -> str:
    """Hash a value of JSON types; returns 16 hexadecimal digits.

    Example:
        >>> content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
        True
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
