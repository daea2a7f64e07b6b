"""Index of the training rows and their questions, to find overlap with other splits and requests."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from lightning_ft.data.row_types import Row, row_digest
from lightning_ft.data.split_report import SplitReport
from lightning_ft.types import Request

_INSTRUCTIONS = ("system", "developer")


def question_keys(messages: Sequence[Mapping[str, object]]) -> list[bytes]:
    """Keys of a conversation, one for its prefix up to each user turn; the last one is the key of its question.

    Two questions are the same if the turns up to the last user turn have the same roles, texts and tool calls. Leading
    and trailing white space and its amount between words make no difference, nor do system turns, reasoning, ids of
    tool calls, and whether a turn is trained on. Letter case does.

    The key of a prefix is among the keys of every conversation that starts with it, so that a conversation exported
    turn by turn is recognized.

    Args:
        messages: The turns; those after the last user turn are ignored.

    Returns:
        16 bytes per user turn, in their order.

    Example:
        >>> def user(text):
        ...     return {"role": "user", "content": text}
        >>> first = question_keys([{"role": "system", "content": "Be brief."}, user("Where is  it?")])
        >>> both = question_keys([user("Where is it? "), {"role": "assistant", "content": "Here."}, user("Sure?")])
        >>> first[-1] == both[0], len(both)
        (True, 2)
    """
    keys: list[bytes] = []
    key = b""
    for message in messages:
        if message["role"] in _INSTRUCTIONS:
            continue
        key = blake2b(key + _turn(message).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if message["role"] == "user":
            keys.append(key)
    return keys


def row_questions(row: Row) -> list[Hashable]:
    """The keys of a row's conversation; for a row without a question, such as a plain text, the row's own.

    Args:
        row: A checked row.
    """
    keys = question_keys(row.prompt_messages)
    return [*keys] if keys else [("no question", row_digest(row))]


def _turn(message: Mapping[str, Any]) -> str:
    """Role, text and tool calls of a turn, one per line: the texts have no line breaks."""
    content, calls = message.get("content"), message.get("tool_calls")
    text = " ".join(content.split()) if isinstance(content, str) else _json(content)
    called = _json([call.get("function", call) for call in calls]) if calls else ""  # without their random ids
    return f"{message['role']}\n{text}\n{called}"


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


@dataclass
class TrainingIndex:
    """Rows, questions, conversations and clusters that are trained on.

    Args:
        rows: Digests of whole rows.
        questions: Keys of all questions, those of earlier turns included.
        last_questions: Keys of the questions that the last turn of a row answers.
        clusters: Clusters of the rows.

    Example:
        >>> index = TrainingIndex()
        >>> ask = lambda text: ({"role": "user", "content": text},)
        >>> index.add(Request("a", ask("Where is my parcel?"), "Here."))
        >>> [index.has_question(ask(text)) for text in ("Where is  my parcel? ", "Where is my lamp?")]
        [True, False]
    """

    rows: set[bytes] = field(default_factory=set)
    questions: set[Hashable] = field(default_factory=set)
    last_questions: set[Hashable] = field(default_factory=set)
    clusters: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, rows: Iterable[Row | Request]) -> TrainingIndex:
        """The index of training rows, or of requests made from them."""
        index = cls()
        for row in rows:
            index.add(row)
        return index

    def add(self, row: Row | Request) -> None:
        """Add a training row."""
        if isinstance(row, Request):
            keys: Sequence[Hashable] = question_keys(row.messages)
        else:
            keys = row_questions(row)
            self.rows.add(row_digest(row))
        self.questions.update(keys)
        self.last_questions.update(keys[-1:])
        if row.cluster:
            self.clusters.add(row.cluster)

    def has_question(self, messages: Sequence[Mapping[str, object]]) -> bool:
        """Whether the question of a conversation is in the training rows.

        Args:
            messages: The conversation up to its answer.
        """
        return any(key in self.questions for key in question_keys(messages)[-1:])

    def count(self, rows: Iterable[Row], report: SplitReport) -> None:
        """Count the rows of another split that overlap with the training rows.

        Args:
            rows: Rows of the other split.
            report: Its report, whose counters ``also_in_train``, ``question_in_train``, ``conversation_in_train`` and
                ``cluster_in_train`` are set.
        """
        report.also_in_train = report.question_in_train = 0
        report.conversation_in_train = report.cluster_in_train = 0
        for row in rows:
            keys = row_questions(row)
            is_known = keys[-1] in self.questions
            report.also_in_train += row_digest(row) in self.rows
            report.question_in_train += is_known
            report.conversation_in_train += not is_known and any(key in self.last_questions for key in keys)
            report.cluster_in_train += row.cluster in self.clusters
