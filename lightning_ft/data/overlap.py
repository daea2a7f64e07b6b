"""What the training rows ask, to find rows and requests of other splits among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_ft.data.kinds import Row
from lightning_ft.data.questions import question_keys, row_questions
from lightning_ft.data.report import SplitReport
from lightning_ft.data.request import Request


@dataclass
class TrainingIndex:
    """Rows, questions, conversations and clusters that are trained on.

    Args:
        rows: Keys of whole rows.
        questions: Keys of every question in them, those of earlier turns too.
        last_questions: Keys of the questions whose answer is the last turn of a row.
        clusters: What rows belong to.

    Example:
        >>> index = TrainingIndex()
        >>> ask = lambda text: ({"role": "user", "content": text},)
        >>> index.add(Request("a", ask("Where is my parcel?"), "Here."))
        >>> [index.asks(ask(text)) for text in ("Where is  my parcel? ", "Where is my lamp?")]
        [True, False]
    """

    rows: set[tuple[Any, ...]] = field(default_factory=set)
    questions: set[Any] = field(default_factory=set)
    last_questions: set[Any] = field(default_factory=set)
    clusters: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, rows: Iterable[Row | Request]) -> TrainingIndex:
        """The index of rows that are trained on, or of requests made of them."""
        index = cls()
        for row in rows:
            index.add(row)
        return index

    def add(self, row: Row | Request) -> None:
        """Add one row that is trained on."""
        if isinstance(row, Request):
            keys: Sequence[Any] = question_keys(row.messages)
        else:
            keys = row_questions(row)
            self.rows.add(row.key)
        self.questions.update(keys)
        self.last_questions.update(keys[-1:])
        if row.cluster:
            self.clusters.add(row.cluster)

    def asks(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the question of a conversation is trained on.

        Args:
            messages: The conversation up to its answer.
        """
        return any(key in self.questions for key in question_keys(messages)[-1:])

    def count(self, rows: Iterable[Row], report: SplitReport) -> None:
        """Count the rows of another split that overlap with the training rows.

        Args:
            rows: Of the other split.
            report: Its counters ``also_in_train``, ``question_in_train``, ``conversation_in_train`` and
                ``cluster_in_train`` are set.
        """
        report.also_in_train = report.question_in_train = 0
        report.conversation_in_train = report.cluster_in_train = 0
        for row in rows:
            keys = row_questions(row)
            is_known = keys[-1] in self.questions
            report.also_in_train += row.key in self.rows
            report.question_in_train += is_known
            report.conversation_in_train += not is_known and any(key in self.last_questions for key in keys)
            report.cluster_in_train += row.cluster in self.clusters
