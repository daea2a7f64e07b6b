"""What became of the rows of a split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from lightning_ft.data.raw_rows import Problem


@dataclass
class SplitReport:
    """What became of the rows of one split.

    Args:
        read: Rows found. Rows held out for validation count there, not in train.
        kept: Rows that are used.
        skipped: Rows left out, by reason.
        problems: What was wrong with them.
        truncated: Rows whose prompt was cut.
        duplicates: Kept rows that appear more than once, first occurrences not counted.
        also_in_train: Kept rows that appear in the training split too.
        question_in_train: Kept rows whose question appears in the training split, with any answer, as the last
            question of a row or an earlier one; those of `also_in_train` are among them.
        conversation_in_train: Kept rows, none of those, that go on with a conversation of the training split.
        cluster_in_train: Kept rows of clusters that the training split has rows of.
        other_prompt: Rows whose tokens before the last answer aren't those that generation starts from.
        mismatch: Of the first of them, what the row has and what generation starts from, around the first difference.
        ignored: Columns, and keys of messages (``messages.id``), that were found and mean nothing here.
        notes: Other things found (byte order marks, blank lines), with their counts.
        formats: Row format of each source.
        lengths: Tokens of each kept row; of a pair of completions those of each, its prompt included.
        supervised: Supervised tokens of the same.
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
    lengths: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)

    def skip(self, problems: Iterable[Problem]) -> None:
        """Count rows that are left out."""
        for problem in problems:
            self.problems.append(problem)
            self.skipped[problem.reason] += 1

    @property
    def overlap(self) -> list[tuple[int, str]]:
        """What the split has in common with the training split: counts of rows above 0, and of which rows.

        Example:
            >>> SplitReport(kept=8, also_in_train=3, question_in_train=5).overlap
            [(3, 'rows that also appear in train'), (5, 'rows whose question appears in train')]
        """
        other_answer = self.question_in_train > self.also_in_train  # else it would say the same again
        found = [
            (self.also_in_train, "rows that also appear in train"),
            (self.question_in_train if other_answer else 0, "rows whose question appears in train"),
            (self.conversation_in_train, "rows that go on with a conversation of train"),
            (self.cluster_in_train, "rows of a cluster that train has rows of"),
        ]
        return [(count, what) for count, what in found if count]

    def summary(self, name: str) -> str:
        """One line for the log.

        Example:
            >>> SplitReport(read=3, kept=2, skipped=Counter({"empty output": 1}), lengths=[4, 6]).summary("train")
            'train: 2 of 3 rows, 10 tokens (0 supervised), longest 6; left out: 1 x empty output'
        """
        text = f"{name}: {self.kept:,} of {self.read:,} rows"
        if self.lengths:
            tokens, supervised = sum(self.lengths), sum(self.supervised)
            text += f", {tokens:,} tokens ({supervised:,} supervised), longest {max(self.lengths):,}"
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
