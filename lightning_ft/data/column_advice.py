"""Propose `columns=` for a source whose columns have other names than the fields of a row format.

A column is chosen by its name if that is common for the field, else by its contents. Proposed columns exist and are
filled in the inspected rows, so that `columns=` works as proposed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

_PROMPTS = ("question", "query", "instruction", "prompt", "input", "problem", "request", "task", "user", "human")
_ANSWERS = (
    "answer",
    "response",
    "output",
    "completion",
    "target",
    "reply",
    "solution",
    "label",
    "assistant",
    "gpt",
)
_NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt": (
        *_PROMPTS,
        "source",
        "src",
        "text",
        "message",
        "sentence",
        "dialogue",
        "document",
        "article",
        "content",
    ),
    "answer": (*_ANSWERS, "tgt", "summary", "highlights", "translation", "category", "intent", "class", "chosen"),
    "chosen": ("chosen", "preferred", "better", "winner", "accepted", "positive", "good"),
    "rejected": ("rejected", "dispreferred", "worse", "loser", "negative", "bad"),
    "label": ("label", "desirable", "liked", "rating", "feedback", "good", "correct", "ktotag", "thumbsup"),
    "conversation": ("messages", "conversation", "conversations", "dialog", "dialogue", "chat", "turns"),
    "text": ("text", "content", "document", "body", "article", "passage"),
    "context": ("context", "passage", "paragraph", "evidence", "knowledge", "document"),
}
"""Role of a field in its format, to common names of such columns, the most specific first."""

_WEAK = {"source", "src", "text", "message", "content", "sentence", "document", "article", "user", "human"}
"""Names that mean little as a part of a longer one: `answer_text` holds an answer."""

_EXCLUSIVE = {"prompt": ("answer", "chosen", "rejected"), "answer": ("prompt", "rejected")}
_EXCLUSIVE |= {"chosen": ("prompt", "rejected"), "rejected": ("prompt", "chosen"), "label": ("prompt",)}
"""Roles whose names a column of another role can't have."""

_ROLES = {
    **dict.fromkeys(("input", "prompt", "instruction"), "prompt"),
    **dict.fromkeys(("output", "completion"), "answer"),
    **dict.fromkeys(("messages", "conversations"), "conversation"),
    **{field: field for field in ("chosen", "rejected", "label", "text")},
}
TEXT_FIELDS = tuple(field for field in _ROLES if field != "label")
"""Fields that hold text, or messages."""

_MISSPELLED = 0.8  # similarity from which a name is taken for a misspelled field


@dataclass(frozen=True)
class Proposal:
    """A row format, and the columns that may hold its fields.

    Args:
        format: Name of the format.
        columns: Fields of the format to columns of the source; None where no column fits.
        num_exact: Number of fields, optional ones included, that have a column of the same name.
        guessed: Columns that were chosen by their contents and not by their names.
    """

    format: str
    columns: Mapping[str, str | None]
    num_exact: int
    guessed: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every field has a column."""
        return None not in self.columns.values()

    def argument(self, columns: Mapping[str, str]) -> str:
        """The `columns=` to pass, in which `columns` that were already passed are included.

        Example:
            >>> Proposal("input_output", {"input": "question", "output": None}, 0).argument({"cluster": "customer"})
            "columns={'cluster': 'customer', 'input': 'question', 'output': '<column with the answer>'}"
        """
        named = {f: c or f"<column with the {describe(f)}>" for f, c in self.columns.items() if f != c}
        return f"columns={ ({k: v for k, v in columns.items() if k not in self.columns} | named)!r}"


def role_of(field: str) -> str:
    """The role of a field in its format, such as ``prompt`` or ``answer``."""
    return _ROLES.get(field, field)


def describe(field: str) -> str:
    """The content of a field, in words that follow "the"."""
    role = role_of(field)
    return f"{role} answer" if role in ("chosen", "rejected") else role


def propose(
    required: Mapping[str, Sequence[str]],
    extra: Mapping[str, Sequence[str]],
    present: Sequence[Column],
    columns: Mapping[str, str],
) -> Proposal:
    """The row format that fits the columns of a source best.

    Args:
        required: Formats to their required fields.
        extra: Formats to their optional fields.
        present: Columns of the source.
        columns: Field names of the format to those in the data, as the user passed them.

    Example:
        >>> from lightning_ft.data.column_advice import inspect_columns
        >>> present = inspect_columns([{"question": "2+2?", "response": "4"}])
        >>> propose({"input_output": ("input", "output")}, {}, present, {}).columns
        {'input': 'question', 'output': 'response'}
    """
    proposals = [_assign(name, fields, extra.get(name, ()), present, columns) for name, fields in required.items()]

    def fit(proposal: Proposal) -> tuple[bool, int, int, bool, int]:
        by_name = sum(c is not None for c in proposal.columns.values()) - len(proposal.guessed)
        has_prompt = _ROLES.get(required[proposal.format][0]) == "prompt"  # shown where nothing fits
        return proposal.complete, by_name, proposal.num_exact, has_prompt, -len(extra.get(proposal.format, ()))

    return max(proposals, key=fit)  # the first of the best


def named_for(field: str, present: Sequence[Column], taken: Collection[str | None]) -> Column | None:
    """A column whose name suggests a field, whatever its contents."""
    known = _NAMES.get(_ROLES.get(field, ""), ())
    named = [
        c for c in present if c.name not in taken and not c.is_identifier and "".join(tokens(c.name)) in (field, *known)
    ]
    return named[0] if named else None


def _assign(
    name: str, fields: Sequence[str], extra: Sequence[str], present: Sequence[Column], columns: Mapping[str, str]
) -> Proposal:
    """Assign a column to each field of a format: by the field's own name, by other names, or by contents."""
    assigned: dict[str, str | None] = dict.fromkeys(fields)
    names = {column.name for column in present}
    for field in fields:
        name_in_data = columns.get(field, field)
        suits = any(column.name == name_in_data and _suits(column, field) for column in present)
        assigned[field] = name_in_data if suits else None
    num_exact = sum(column is not None for column in assigned.values()) + sum(columns.get(f, f) in names for f in extra)

    def spare() -> list[Column]:
        taken = {*assigned.values(), *columns.values(), *(f for f in extra if f not in columns)}
        return [column for column in present if column.name not in taken]

    for field in fields:
        if assigned[field] is None:
            ranks = {c.name: rank for c in spare() if (rank := _rank(c, field, names)) is not None}
            assigned[field] = min(ranks, key=lambda c: ranks[c]) if ranks else None
    if "input" in extra and assigned.get("instruction") and columns.get("input", "input") not in names:
        context = [c.name for c in spare() if c.content_type == "text" and c.name.lower() in _NAMES["context"]]
        assigned |= {"input": context[0]} if context else {}
    guessed = []
    for field in fields:
        if assigned[field] is None and (guess := _by_content(field, spare())):
            assigned[field] = guess
            guessed.append(guess)
    if None in assigned.values():  # guesses are of use only if every field has a column
        assigned = {field: None if column in guessed else column for field, column in assigned.items()}
        guessed = []
    return Proposal(name, assigned, num_exact, tuple(guessed))


def _suits(column: Column, field: str) -> bool:
    """Whether a column has the type of content that a field may have."""
    if not column.is_filled:
        return False
    role = _ROLES.get(field)
    if role == "conversation":
        return column.content_type == "messages"
    if role == "label":
        return column.is_binary
    return column.content_type == "text" or (column.content_type == "messages" and role != "text")


def _rank(column: Column, field: str, names: set[str]) -> float | None:
    """Rank of a column for a field by its name, 0 for the best; None if the name doesn't fit."""
    if not _suits(column, field):
        return None
    role, words = _ROLES.get(field, ""), tokens(column.name)
    known = _NAMES.get(role, ())
    whole = "".join(words)
    if difflib.SequenceMatcher(None, field, whole).ratio() >= _MISSPELLED:
        return 0
    singular = whole.removesuffix("s")
    for name in (whole, singular):
        if name in known:
            paired = name not in ("source", "src") or not names.isdisjoint(("target", "tgt", "targets"))
            return 1 + known.index(name) if paired else None
    if column.is_identifier:
        return None
    exclusive = {name for other in _EXCLUSIVE.get(role, ()) for name in _NAMES[other] if name not in _WEAK}
    if not exclusive.isdisjoint(set(words) - set(known)):
        return None  # prompt_response, rejected_answer
    strong = [word for word in words if word in known and word not in _WEAK]
    weak = [word for word in words if word in known and word in _WEAK]
    return 100 + known.index(strong[-1]) if strong else 200 + known.index(weak[-1]) if weak else None


def _by_content(field: str, spare: Sequence[Column]) -> str | None:
    """The column of a field by its content.

    The longest, most varied text is the prompt, the other text the answer, and the only yes or no the label.
    """
    role = _ROLES.get(field)
    texts = [c for c in spare if c.is_filled and c.content_type == "text" and not c.is_identifier and not _is_worse(c)]
    if role == "conversation":
        return next((column.name for column in spare if _suits(column, field)), None)
    if role == "prompt" and texts:
        return max(texts, key=lambda column: column.distinct_share * column.mean_length).name
    if role == "answer":
        repeated = [column for column in texts if column.distinct_share < 1]
        choice = texts if len(texts) == 1 else repeated
        return choice[0].name if len(choice) == 1 else None
    if role == "label":
        binary = [column for column in spare if _suits(column, field)]
        return binary[0].name if len(binary) == 1 else None
    return None


def _is_worse(column: Column) -> bool:
    return not {"rejected", "dispreferred", "worse"}.isdisjoint(tokens(column.name))


_MAX_EMPTY = 0.1  # share of rows that may leave a column empty; they are reported as bad rows later
_ID_WORDS = {
    "id",
    "ids",
    "uuid",
    "guid",
    "idx",
    "index",
    "no",
    "nr",
    "num",
    "number",
    "key",
    "hash",
    "url",
    "uri",
    "link",
}
_ID_WORDS |= {
    "date",
    "time",
    "timestamp",
    "created",
    "updated",
    "lang",
    "language",
    "split",
    "path",
    "file",
    "filename",
}
_YES_OR_NO = ("true", "false", "0", "1", "0.0", "1.0")
_NOT_WORDS = re.compile(r"[\W\d_]*|[0-9a-fA-F-]{8,}|(?=\S*\d)\S+")  # numbers, dates, hashes; codes such as T-1002


@dataclass(frozen=True)
class Column:
    """A column of a source.

    Args:
        name: Name of the column.
        content_type: ``text``, ``messages``, ``mixed types``, ``nothing``, or the name of a Python type.
        is_filled: Whether (nearly) every row has a nonempty value in it.
        is_identifier: Whether it names or dates rows.
        is_binary: Whether each of its values means yes or no.
        distinct_share: Number of distinct texts, divided by the number of texts.
        mean_length: Mean number of characters of its texts.
    """

    name: str
    content_type: str
    is_filled: bool
    is_identifier: bool
    is_binary: bool
    distinct_share: float
    mean_length: float

    @property
    def label(self) -> str:
        """The column as errors list it."""
        return f"{self.name!r} ({self.content_type})"


def tokens(name: str) -> list[str]:
    """The words of a column name, in lower case.

    Example:
        >>> tokens("customer_message"), tokens("GoldAnswer")
        (['customer', 'message'], ['gold', 'answer'])
    """
    return [word.lower() for word in re.findall(r"[A-Z]*[a-z]+|[A-Z]+|\d+|[^\W\d_A-Za-z]+", name)]


def inspect_columns(rows: Sequence[Mapping[str, object]]) -> list[Column]:
    """The columns of some rows, in their order."""
    names = dict.fromkeys(key for row in rows for key in row)
    return [_column(name, [row.get(name) for row in rows]) for name in names]


def _column(name: str, values: Sequence[object]) -> Column:
    full = [value for value in values if not _is_empty(value)]
    types = {_content_type(value) for value in full}
    content_type = types.pop() if len(types) == 1 else "mixed types" if types else "nothing"
    texts = [value for value in full if isinstance(value, str)]
    is_named_identifier = bool(_ID_WORDS & set(tokens(name)))
    has_no_words = content_type == "text" and all(_NOT_WORDS.fullmatch(text.strip()) for text in texts)
    return Column(
        name=name,
        content_type=content_type,
        is_filled=bool(full) and len(full) >= len(values) * (1 - _MAX_EMPTY),
        is_identifier=is_named_identifier or has_no_words,
        is_binary=bool(full) and all(str(value).strip().lower() in _YES_OR_NO for value in full),
        distinct_share=len(set(texts)) / max(1, len(texts)),
        mean_length=sum(map(len, texts)) / max(1, len(texts)),
    )


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


def _content_type(value: object) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and all(_is_message(item) for item in value):
        return "messages"
    return type(value).__name__


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and _has(value, ("role", "from")) and _has(value, ("content", "value"))


def _has(message: Container[object], keys: Iterable[str]) -> bool:
    return any(key in message for key in keys)
