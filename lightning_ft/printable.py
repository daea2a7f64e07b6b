"""Text from rows and models as it may be put on a terminal."""

from __future__ import annotations

import re

_UNSAFE = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed: escape sequences begin with one
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # the direction of text
    "\u2028\u2029\ud800-\udfff"  # other line breaks; halves of surrogate pairs, which can't be encoded
)
_CHARACTER, _IN_LINE = re.compile(f"[{_UNSAFE}]"), re.compile(f"[{_UNSAFE}\n]")


def printable(text: str, *, one_line: bool = False) -> str:
    r"""A text with whatever would change the terminal, or the order of characters, written as an escape.

    Args:
        text: Any text.
        one_line: Escape line breaks too.

    Example:
        >>> print(printable("a \x1b[2J b\u202e"))
        a \x1b[2J b\u202e
    """
    return (_IN_LINE if one_line else _CHARACTER).sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match.group())
    return "\\n" if code == 10 else f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
