"""Which columns of a source may be what a row format calls by other names.

A column is chosen by its name, where that is one the field uses, else by what it holds. What is proposed exists and is
full in the rows that were looked at, so that `columns=` with it works.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ASKS = ("question", "query", "instruction", "prompt", "input", "problem", "request", "task", "user", "human")
_ANSWERS = ("answer", "response", "output", "completion", "target", "reply", "solution", "label", "assistant", "gpt")
_NAMES: Mapping[str, tuple[str, ...]] = {
    "asks": (*_ASKS, "source", "src", "text", "message", "sentence", "dialogue", "document", "article", "content"),
    "answers": (*_ANSWERS, "tgt", "summary", "highlights", "translation", "category", "intent", "class", "chosen"),
    "better": ("chosen", "preferred", "better", "winner", "accepted", "positive", "good"),
    "worse": ("rejected", "dispreferred", "worse", "loser", "negative", "bad"),
    "says whether it is good": ("label", "desirable", "liked", "rating", "feedback", "good", "correct", "ktotag"),
    "is a conversation": ("messages", "conversation", "conversations", "dialog", "dialogue", "chat", "turns"),
    "is a text": ("text", "content", "document", "body", "article", "passage"),
    "is added to the question": ("context", "passage", "paragraph", "evidence", "knowledge", "document"),
}
"""What a field does in its format, to the names that such columns have, the surest first."""

_WEAK = {"source", "src", "text", "message", "content", "sentence", "document", "article", "user", "human"}
"""Names that say little as a part of a longer one: `answer_text` answers."""

_CONTRARY = {"asks": ("answers", "better", "worse"), "answers": ("asks", "worse")}
_CONTRARY |= {"better": ("asks", "worse"), "worse": ("asks", "better"), "says whether it is good": ("asks",)}

_DOES = {
    **dict.fromkeys(("input", "prompt", "instruction"), "asks"),
    **dict.fromkeys(("output", "completion"), "answers"),
    **dict.fromkeys(("messages", "conversations"), "is a conversation"),
    "chosen": "better",
    "rejected": "worse",
    "label": "says whether it is good",
    "text": "is a text",
}
OF_TEXT = tuple(field for field in _DOES if field != "label")
"""Fields that hold text, or messages."""

_MISSPELT = 0.8  # similarity from which a name is a field's own, spelt otherwise


@dataclass(frozen=True)
class Proposal:
    """A format, and the columns that its fields may be.

    Args:
        format: Name of the format.
        columns: Its fields to columns of the source, None where none fits; fields that columns are named after too.
        own: How many fields, optional ones too, have a column of their name.
        guessed: Columns that were chosen by what they hold, and not by their names.
    """

    format: str
    columns: Mapping[str, str | None]
    own: int
    guessed: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every field has a column."""
        return None not in self.columns.values()

    def argument(self, given: Mapping[str, str]) -> str:
        """The `columns=` to pass, what was given already included.

        Example:
            >>> Proposal("input_output", {"input": "question", "output": None}, 0).argument({"cluster": "customer"})
            "columns={'cluster': 'customer', 'input': 'question', 'output': '<the column that answers>'}"
        """
        named = {f: c or f"<the column that {does(f)}>" for f, c in self.columns.items() if f != c}
        return f"columns={ ({k: v for k, v in given.items() if k not in self.columns} | named)!r}"


def does(field: str) -> str:
    """What a field does in its format, to be put after "the column that"."""
    role = _DOES.get(field, f"is {field!r}")
    return f"is {role}" if role in ("better", "worse") else role


def propose(
    needed: Mapping[str, Sequence[str]],
    extra: Mapping[str, Sequence[str]],
    found: Sequence[Column],
    columns: Mapping[str, str],
) -> Proposal:
    """The format that the columns of a source come closest to.

    Args:
        needed: Formats to the fields they need.
        extra: Formats to fields they may have.
        found: The columns of the source.
        columns: Fields to columns, as they were given.

    Example:
        >>> from lightning_ft.data.column_advice import look_at
        >>> found = look_at([{"question": "2+2?", "response": "4"}])
        >>> propose({"input_output": ("input", "output")}, {}, found, {}).columns
        {'input': 'question', 'output': 'response'}
    """
    proposals = [_assign(name, fields, extra.get(name, ()), found, columns) for name, fields in needed.items()]

    def fit(proposal: Proposal) -> tuple[bool, int, int, bool, int]:
        by_name = sum(c is not None for c in proposal.columns.values()) - len(proposal.guessed)
        asks = _DOES.get(needed[proposal.format][0]) == "asks"  # what to show where nothing fits
        return proposal.complete, by_name, proposal.own, asks, -len(extra.get(proposal.format, ()))

    return max(proposals, key=fit)  # the first of the best


def named_for(field: str, found: Sequence[Column], taken: Collection[str | None]) -> Column | None:
    """A column that is named for a field, whatever it holds."""
    known = _NAMES.get(_DOES.get(field, ""), ())
    named = [
        c for c in found if c.name not in taken and not c.identifies and "".join(tokens(c.name)) in (field, *known)
    ]
    return named[0] if named else None


def _assign(
    name: str, fields: Sequence[str], extra: Sequence[str], found: Sequence[Column], columns: Mapping[str, str]
) -> Proposal:
    """Give each field of a format a column: one of its own name, else by other names, else by what columns hold."""
    assigned: dict[str, str | None] = dict.fromkeys(fields)
    names = {column.name for column in found}
    for field in fields:
        name_of = columns.get(field, field)
        suits = any(column.name == name_of and _suits(column, field) for column in found)
        assigned[field] = name_of if suits else None
    own = sum(column is not None for column in assigned.values()) + sum(columns.get(f, f) in names for f in extra)

    def spare() -> list[Column]:
        taken = {*assigned.values(), *columns.values(), *(f for f in extra if f not in columns)}
        return [column for column in found if column.name not in taken]

    for field in fields:
        if assigned[field] is None:
            ranks = {c.name: rank for c in spare() if (rank := _rank(c, field, names)) is not None}
            assigned[field] = min(ranks, key=lambda c: ranks[c]) if ranks else None
    if "input" in extra and assigned.get("instruction") and columns.get("input", "input") not in names:
        added = [c.name for c in spare() if c.holds == "text" and c.name.lower() in _NAMES["is added to the question"]]
        assigned |= {"input": added[0]} if added else {}
    guessed = []
    for field in fields:
        if assigned[field] is None and (guess := _by_contents(field, spare())):
            assigned[field] = guess
            guessed.append(guess)
    if None in assigned.values():  # a guess is worth something only as a part of a whole
        assigned = {field: None if column in guessed else column for field, column in assigned.items()}
        guessed = []
    return Proposal(name, assigned, own, tuple(guessed))


def _suits(column: Column, field: str) -> bool:
    """Whether a column holds what a field may hold."""
    if not column.complete:
        return False
    role = _DOES.get(field)
    if role == "is a conversation":
        return column.holds == "messages"
    if role == "says whether it is good":
        return column.binary
    return column.holds == "text" or (column.holds == "messages" and role != "is a text")


def _rank(column: Column, field: str, names: set[str]) -> float | None:
    """How surely a column is a field by its name, 0 the surest; None if it isn't."""
    if not _suits(column, field):
        return None
    role, words = _DOES.get(field, ""), tokens(column.name)
    known = _NAMES.get(role, ())
    whole = "".join(words)
    if difflib.SequenceMatcher(None, field, whole).ratio() >= _MISSPELT:
        return 0
    singular = whole.removesuffix("s")
    for name in (whole, singular):
        if name in known:
            paired = name not in ("source", "src") or not names.isdisjoint(("target", "tgt", "targets"))
            return 1 + known.index(name) if paired else None
    if column.identifies:
        return None
    contrary = {name for other in _CONTRARY.get(role, ()) for name in _NAMES[other] if name not in _WEAK}
    if not contrary.isdisjoint(set(words) - set(known)):
        return None  # prompt_response, rejected_answer
    strong = [word for word in words if word in known and word not in _WEAK]
    weak = [word for word in words if word in known and word in _WEAK]
    return 100 + known.index(strong[-1]) if strong else 200 + known.index(weak[-1]) if weak else None


def _by_contents(field: str, spare: Sequence[Column]) -> str | None:
    """The column that asks or answers by what columns hold: the longest, most varied text asks, the rest answers."""
    role = _DOES.get(field)
    texts = [c for c in spare if c.complete and c.holds == "text" and not c.identifies and not _is_worse(c)]
    if role == "is a conversation":
        return next((column.name for column in spare if _suits(column, field)), None)
    if role == "asks" and texts:
        return max(texts, key=lambda column: column.different * column.length).name
    if role == "answers":
        repeated = [column for column in texts if column.different < 1]
        choice = texts if len(texts) == 1 else repeated
        return choice[0].name if len(choice) == 1 else None
    return None


def _is_worse(column: Column) -> bool:
    return not {"rejected", "dispreferred", "worse"}.isdisjoint(tokens(column.name))


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
