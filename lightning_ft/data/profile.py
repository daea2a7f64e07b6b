"""What the columns of a source hold, as far as its first rows tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MOST_EMPTY = 0.1  # share of rows that may leave a column empty; each of them is told as a bad row later
_MARKS = {"id", "ids", "uuid", "guid", "idx", "index", "no", "nr", "num", "number", "key", "hash", "url", "uri", "link"}
_MARKS |= {"date", "time", "timestamp", "created", "updated", "lang", "language", "split", "path", "file", "filename"}
_YES_OR_NO = ("true", "false", "0", "1", "0.0", "1.0")
_NO_WORDS = re.compile(r"[\W\d_]*|[0-9a-fA-F-]{8,}|(?=\S*\d)\S+")  # numbers, dates, hashes; codes such as T-1002


@dataclass(frozen=True)
class Column:
    """A column of a source.

    Args:
        name: Its name.
        holds: ``text``, ``messages``, ``mixed types``, ``nothing``, or the name of a Python type.
        complete: Whether (nearly) every row has a value in it that isn't empty.
        identifies: Whether it names or dates rows rather than say something.
        binary: Whether all of its values say yes or no.
        different: Share of its values that are different.
        length: Mean characters of its texts.
    """

    name: str
    holds: str
    complete: bool
    identifies: bool
    binary: bool
    different: float
    length: float

    @property
    def shown(self) -> str:
        """The column as errors list it."""
        return f"{self.name!r} ({self.holds})"


def tokens(name: str) -> list[str]:
    """The words of a name, in lower case.

    Example:
        >>> tokens("customer_message"), tokens("GoldAnswer")
        (['customer', 'message'], ['gold', 'answer'])
    """
    return [word.lower() for word in re.findall(r"[A-Z]*[a-z]+|[A-Z]+|\d+|[^\W\d_A-Za-z]+", name)]


def look_at(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns of rows, in their order."""
    names = dict.fromkeys(key for row in rows for key in row)
    return [_column(name, [row.get(name) for row in rows]) for name in names]


def _column(name: str, values: list[Any]) -> Column:
    full = [value for value in values if not _is_empty(value)]
    kinds = {_kind(value) for value in full}
    holds = kinds.pop() if len(kinds) == 1 else "mixed types" if kinds else "nothing"
    texts = [value for value in full if isinstance(value, str)]
    marked = bool(_MARKS & set(tokens(name)))
    return Column(
        name=name,
        holds=holds,
        complete=bool(full) and len(full) >= len(values) * (1 - _MOST_EMPTY),
        identifies=marked or (holds == "text" and all(_NO_WORDS.fullmatch(text.strip()) for text in texts)),
        binary=bool(full) and all(str(value).strip().lower() in _YES_OR_NO for value in full),
        different=len(set(texts)) / max(1, len(texts)),
        length=sum(map(len, texts)) / max(1, len(texts)),
    )


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and all(_is_message(item) for item in value):
        return "messages"
    return type(value).__name__


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and _has(value, ("role", "from")) and _has(value, ("content", "value"))


def _has(message: Mapping[Any, Any], keys: Iterable[str]) -> bool:
    return any(key in message for key in keys)
