"""Rows of a stream: the first ones are checked before training, the others as they come, each in the same way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Generic

import torch
from transformers import PreTrainedTokenizerBase

from lightning_ft.data.fields import FieldReader
from lightning_ft.data.layout import Example
from lightning_ft.data.overlong import RowEncoder
from lightning_ft.data.raw_rows import SHOWN, Problem, RawRow, check_values
from lightning_ft.data.row_mapping import RowFunction, load_row_function, map_rows
from lightning_ft.data.row_types import RowT, RowType, unchanged
from lightning_ft.data.rows import DETECTED_FROM, read_row, reader_for
from lightning_ft.data.split_report import SplitReport
from lightning_ft.data.splits import Splits, warn_other_prompt
from lightning_ft.data.stream_sources import StreamSource
from lightning_ft.data.templates import chat_template
from lightning_ft.data.turns import RowError
from lightning_ft.distributed import rank_zero_info, rank_zero_warn
from lightning_ft.errors import DataError


@dataclass
class StreamReport(SplitReport):
    """Counts of the rows of a stream that this rank has used since its current pass began.

    Of `problems`, only the first are kept, and no length of a row.

    Args:
        tokens: Number of tokens of the kept rows.
        supervised_tokens: Number of supervised tokens of the kept rows.
        longest: Largest number of tokens in a row.
    """

    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0

    def token_counts(self) -> tuple[int, int, int] | None:
        """See `SplitReport`."""
        return (self.tokens, self.supervised_tokens, self.longest) if self.kept else None

    def add(self, result: StreamBatch) -> None:
        """Count the rows of a batch."""
        self.read += result.read
        self.kept += len(result.origins)
        self.truncated += result.truncated
        self.other_prompt += result.other_prompt
        self.mismatch = self.mismatch or result.mismatch
        self.notes.update(result.notes)
        self.ignored += sorted(result.ignored.difference(self.ignored))
        self.tokens += sum(result.lengths)
        self.supervised_tokens += result.supervised
        self.longest = max([self.longest, *result.lengths])
        for problem in result.problems:
            self.skipped[problem.reason] += 1
            if len(self.problems) < SHOWN:
                self.problems.append(problem)


@dataclass
class StreamBatch:
    """What became of the source rows of a batch.

    Args:
        read: Number of source rows.
        origins: Source and number of each row that is used.
        problems: Problems of the others.
        lengths: Number of tokens of each example.
        supervised: Number of supervised tokens.
        truncated: Number of rows whose prompt was cut.
        other_prompt: Number of rows whose prompt differs from what generation starts from.
        mismatch: The first of these, see `SplitReport`.
        notes: Findings, with their counts.
        ignored: Columns that aren't read.
    """

    read: int = 0
    origins: list[tuple[str, int]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    supervised: int = 0
    truncated: int = 0
    other_prompt: int = 0
    mismatch: tuple[str, str] | None = None
    notes: Counter[str] = field(default_factory=Counter)
    ignored: set[str] = field(default_factory=set)


class StreamRows(torch.utils.data.Dataset[tuple[list[Any], StreamBatch]], Generic[RowT]):
    """Checks and encodes source rows, in the process that asks for them.

    Args:
        readers: Reader of each source, by its name.
        checks_values: Whether each source whose values are still to be checked fills nested objects.
        encoder: Encoder of the rows.
        follow: Function that completes a row; see `RowType.follow`.
        format: Function that maps source rows.
        columns: Field names of the format to those in the data.
    """

    def __init__(
        self,
        readers: dict[str, FieldReader[RowT]],
        checks_values: dict[str, bool],
        encoder: RowEncoder[RowT],
        follow: Callable[[RowT], RowT],
        format: RowFunction | None,
        columns: Any,
    ) -> None:
        self._readers, self._checks_values = readers, checks_values
        self._encoder, self._follow = encoder, follow
        self._format, self._columns = format, columns

    def __getitem__(self, raw_rows: Sequence[RawRow]) -> tuple[list[tuple[RowT, tuple[Example, ...]]], StreamBatch]:
        result = StreamBatch(read=len(raw_rows))
        kept: list[tuple[RowT, tuple[Example, ...]]] = []
        for source, group in groupby(raw_rows, key=lambda raw: raw.source):
            reader = self._readers[source]
            for raw in prepared(group, self._checks_values.get(source), self._format, self._columns):
                encoded = self._encode(raw, reader, result)
                if encoded is not None:
                    kept.append(encoded)
            result.ignored |= reader.ignored
        return kept, result

    def _encode(
        self, raw: RawRow, reader: FieldReader[RowT], result: StreamBatch
    ) -> tuple[RowT, tuple[Example, ...]] | None:
        row = read_row(reader, raw)
        if isinstance(row, Problem):
            result.problems.append(row)
            return None
        try:
            row = self._follow(row)
        except RowError as error:
            result.problems.append(Problem.of(error, raw.source, raw.number))
            return None
        outcome = self._encoder(row)
        if isinstance(outcome, Problem):
            result.problems.append(outcome)
            return None
        encoded, used = outcome
        result.origins.append((raw.source, raw.number))
        result.lengths += [len(example) for example in encoded.examples]
        result.supervised += sum(int(example.supervised.sum()) for example in encoded.examples)
        result.truncated += used is not row
        result.other_prompt += not encoded.prompt_matches
        result.mismatch = result.mismatch or encoded.mismatch
        result.notes.update(encoded.notes)
        return row, encoded.examples


def prepared(
    rows: Iterable[RawRow], checks_values: bool | None, format: RowFunction | None, columns: Any
) -> Iterator[RawRow]:
    """Source rows with plain values, mapped by `format=`."""
    checked = iter(rows) if checks_values is None else check_values(rows, filled=checks_values)
    return checked if format is None else map_rows(checked, format, columns)


class RowStream(Generic[RowT]):
    """The training rows of a DataModule that are read while training.

    Args:
        sources: Sources of the rows, which are read one after the other.
        splits: The other splits, with the rules for all rows.
        name: Name of the split.
    """

    def __init__(self, sources: Sequence[StreamSource], splits: Splits[RowT], name: str = "train") -> None:
        self.sources, self.name, self._splits = sources, name, splits
        self.report = StreamReport()
        self.rows: StreamRows[RowT] | None = None
        self.first: RowT | None = None
        self.first_examples: tuple[Example, ...] = ()
        """The first row that can be used, and its examples."""
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._reported: set[str] = set()

    def head(self) -> list[RawRow]:
        """The first rows of all sources, with plain values, and mapped by `format=`."""
        format = self._row_function()
        return [raw for source in self.sources for raw in self._head(source, format)]

    def _row_function(self) -> RowFunction | None:
        format = self._splits.rules.format
        return None if format is None else load_row_function(format)

    def _head(self, source: StreamSource, format: RowFunction | None) -> list[RawRow]:
        head = source.head(DETECTED_FROM)
        return list(prepared(head, source.checks_values, format, self._splits.rules.columns))

    def start(self, tokenizer: PreTrainedTokenizerBase, row_type: RowType[RowT]) -> None:
        """Detect the row formats, and check and encode the first rows of each source.

        Args:
            tokenizer: The tokenizer.
            row_type: Type of the rows.

        Raises:
            DataError: With all bad ones of the first rows, or if none of them can be used.
        """
        if self._tokenizer is tokenizer:
            return
        rules, format = self._splits.rules, self._row_function()
        readers: dict[str, FieldReader[RowT]] = {}
        good: list[RowT] = []
        for source in self.sources:
            first = self._head(source, format)
            if not first:
                raise DataError(f"{source.name}: it contains no rows.")
            reader = reader_for(first, source.name, row_type, rules.columns, template_kwargs=rules.template_kwargs)
            readers[source.name] = reader
            good += [row for row in (read_row(reader, raw) for raw in first) if not isinstance(row, Problem)]
            self.report.formats[source.name] = reader.name
        self.rows = StreamRows(
            readers,
            {source.name: source.checks_values for source in self.sources if source.checks_values is not None},
            RowEncoder(tokenizer, rules.max_length, rules.on_overlong, row_type),
            row_type.follow(self.name, good) if good else unchanged,
            format,
            rules.columns,
        )
        kept, problems = [], []
        for source in self.sources:
            rows, result = self.rows[source.head(DETECTED_FROM)]
            kept += rows
            problems += result.problems
        self._splits.raise_fatal(problems)
        if not kept:
            raise DataError(
                f"{self.name}: none of the first {len(problems):,} rows can be used. The first: {problems[0]}"
            )
        (self.first, self.first_examples), self._tokenizer = kept[0], tokenizer
        formats = ", ".join(f"{format} ({source})" for source, format in self.report.formats.items())
        rank_zero_info(f"{self.name}: row format {formats}; rows are read, checked and tokenized while training")

    def begin(self) -> None:
        """Count from zero: a new pass begins."""
        self.report = replace(StreamReport(), formats=self.report.formats)

    def count(self, result: StreamBatch) -> None:
        """Count the rows of a batch, and tell what is found for the first time.

        Raises:
            DataError: With all bad rows of the batch, unless they are left out.
        """
        self._splits.raise_fatal(result.problems)
        self.report.add(result)
        for problem in result.problems:
            if problem.reason not in self._reported:
                self._reported.add(problem.reason)
                rank_zero_warn(f"{self.name}: a row is left out, and all others like it, which are counted. {problem}")
        if result.mismatch is not None and "mismatch" not in self._reported:
            self._reported.add("mismatch")
            warn_other_prompt(self.name, f"in {result.other_prompt:,} of {len(result.origins):,} rows", result.mismatch)
        assert self._tokenizer is not None  # the rows were encoded
        if result.notes:
            self._splits.warn_of_notes(self.name, result.notes, chat_template(self._tokenizer))

    def tell(self, rank: int, world_size: int) -> None:
        """Log the counts of the pass; of several ranks, rank 0 logs its own."""
        if self.report.read:
            whose = self.name if world_size == 1 else f"{self.name} (rows of rank {rank} of {world_size})"
            rank_zero_info(self.report.summary(whose))
