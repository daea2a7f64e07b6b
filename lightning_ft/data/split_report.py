"""Counts of the rows in a split: read, kept, dropped, truncated, duplicated, and why."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass, field

from lightning_ft.data.raw_rows import Problem


@dataclass
class SplitReport:
    """Counts of the rows in one split, and the problems of those left out.

    Args:
        read: Number of rows read. Rows held out for validation count there, not in train.
        kept: Number of rows that are used.
        skipped: Numbers of rows left out, by reason.
        problems: Problems of the rows left out.
        truncated: Number of rows whose prompt was truncated.
        duplicates: Number of kept rows that repeat an earlier row.
        also_in_train: Number of kept rows that also appear in the training split.
        question_in_train: Number of kept rows whose question appears in the training split, with any answer, in the
            last or an earlier turn. Rows of `also_in_train` are included.
        conversation_in_train: Number of kept rows, other than those, that continue a conversation of the training
            split.
        cluster_in_train: Number of kept rows whose cluster has rows in the training split.
        other_prompt: Number of rows whose tokens before the last answer differ from those that generation starts from.
        mismatch: The first such row's text and the text that generation starts from, around the first difference.
        ignored: Columns, and keys of messages (``messages.id``), that were found and aren't read.
        notes: Other findings (byte order marks, blank lines), with their counts.
        formats: Row format of each source.
        lengths: Number of tokens of each kept row; for a pair, of each completion with its prompt.
        supervised: Number of supervised tokens of each kept row; for a pair, of each completion.
    """

    read: int = 0
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    truncated: int = 0
    duplicates: int = 0
    also_in_train: int = 0
    question_in_train: int = 0
    conversation_in_train: int = 0
    cluster_in_train: int = 0
    other_prompt: int = 0
    mismatch: tuple[str, str] | None = None
    ignored: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    formats: dict[str, str] = field(default_factory=dict)
    lengths: MutableSequence[int] = field(default_factory=lambda: array("q"))
    supervised: MutableSequence[int] = field(default_factory=lambda: array("q"))

    def skip(self, problems: Iterable[Problem]) -> None:
        """Count rows that are left out."""
        for problem in problems:
            self.problems.append(problem)
            self.skipped[problem.reason] += 1

    @property
    def overlap(self) -> list[tuple[int, str]]:
        """Overlap with the training split: nonzero counts, each with a description of its rows.

        Example:
            >>> SplitReport(kept=8, also_in_train=3, question_in_train=5).overlap
            [(3, 'rows that also appear in train'), (5, 'rows whose question appears in train')]
        """
        other_answer = self.question_in_train > self.also_in_train  # else it would repeat the first count
        counts = [
            (self.also_in_train, "rows that also appear in train"),
            (self.question_in_train if other_answer else 0, "rows whose question appears in train"),
            (self.conversation_in_train, "rows that continue a conversation of train"),
            (self.cluster_in_train, "rows of a cluster that also has rows in train"),
        ]
        return [(count, what) for count, what in counts if count]

    def token_counts(self) -> tuple[int, int, int] | None:
        """Numbers of tokens and of supervised tokens, and the largest number in a row; None if nothing is encoded."""
        return (sum(self.lengths), sum(self.supervised), max(self.lengths)) if self.lengths else None

    def summary(self, name: str) -> str:
        """One line for the log.

        Example:
            >>> SplitReport(read=3, kept=2, skipped=Counter({"empty output": 1}), lengths=[4, 6]).summary("train")
            'train: 2 of 3 rows, 10 tokens (0 supervised), longest 6; left out: 1 x empty output'
        """
        text = f"{name}: {self.kept:,} of {self.read:,} rows"
        if (counts := self.token_counts()) is not None:
            tokens, supervised, longest = counts
            text += f", {tokens:,} tokens ({supervised:,} supervised), longest {longest:,}"
        if self.skipped:
            text += "; left out: " + ", ".join(f"{n:,} x {reason}" for reason, n in self.skipped.most_common())
        for count, what in (
            (self.truncated, "prompts cut to max_length"),
            (self.duplicates, "duplicates of an earlier row"),
            *self.overlap,
        ):
            if count:
                text += f"; {count:,} {what}"
        for note, count in self.notes.items():
            text += f"; {count:,} x {note}"
        return text
