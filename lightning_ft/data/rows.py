"""Read a source into checked rows, and collect the problems of all bad rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Literal

from rich.progress import track

from lightning_ft.data.fields import FieldReader
from lightning_ft.data.raw_rows import Problem, RawRow
from lightning_ft.data.row_mapping import RowFunction, load_row_function, map_rows
from lightning_ft.data.row_store import StoredRows
from lightning_ft.data.row_types import PAIRS, Row, RowT, RowType, row_digest
from lightning_ft.data.sources import Source, read_rows
from lightning_ft.data.split_report import SplitReport
from lightning_ft.data.turns import RowError
from lightning_ft.distributed import rank_zero_info, rank_zero_only
from lightning_ft.errors import DataError
from lightning_ft.printable import printable

OnBadRow = Literal["error", "skip"]

SHOW_FROM = 20_000
"""Number of rows from which a progress bar is shown."""

DETECTED_FROM = 100
"""Number of first rows of a source from which its row format is detected."""


def load_source(
    source: Source,
    name: str,
    argument: str,
    *,
    columns: Mapping[str, str] | None = None,
    format: str | RowFunction | None = None,
    on_bad_row: OnBadRow = "error",
    answered: bool = True,
    report: SplitReport | None = None,
    row_type: RowType[Any] = PAIRS,
    template_kwargs: Mapping[str, object] | None = None,
    store: StoredRows[Any] | None = None,
) -> tuple[Sequence[Any], list[Problem]]:
    """Read and check one source.

    Args:
        source: A path, a hub name, a dataset or a list of dicts.
        name: Name of the source in errors.
        argument: Name of the argument it was passed as.
        columns: Field names of the format to those in the data.
        format: Function, or its import path, that maps each source row to messages or to a row of a known format.
        on_bad_row: ``"error"`` returns the problems, ``"skip"`` counts them in `report`.
        answered: Whether rows must have an answer.
        report: Report of the split, to which the counts are added.
        row_type: Type of the rows.
        template_kwargs: Variables of the chat template for rows that don't set them.
        store: Where the good rows are written; by default a list.

    Returns:
        The good rows, and the problems (none with ``"skip"``).

    Raises:
        ConfigError: If `format` can't be imported.
        DataError: If the source as a whole can't be used, or ``"skip"`` leaves no row.

    Example:
        >>> source = [{"input": "2+2?", "output": "4"}, {"input": "", "output": "5"}]
        >>> rows, problems = load_source(source, "train", "train")
        >>> len(rows), str(problems[0])
        (1, "train, row 2, 'input': empty input. Fill it in or remove the row.")
    """
    report = report if report is not None else SplitReport()
    raw_rows = read_rows(source, name, argument, report.notes)
    if format is not None:
        raw_rows = map_rows(raw_rows, load_row_function(format), columns)
    first = list(islice(raw_rows, DETECTED_FROM))
    if not first:
        raise DataError(f"{name}: it contains no rows.")
    reader = reader_for(first, name, row_type, columns, answered=answered, template_kwargs=template_kwargs)
    report.formats[name] = reader.name if any(isinstance(raw.value, Mapping) for raw in first) else "none"

    rows: list[Any] | StoredRows[Any] = [] if store is None else store
    problems: list[Problem] = []
    read = 0
    for raw in _with_progress(chain(first, raw_rows), f"Reading {name}"):
        read += 1
        row = read_row(reader, raw)
        if isinstance(row, Problem):
            problems.append(row)
        else:
            rows.append(row)
    if reader.ignored:
        rank_zero_info(printable(f"{name}: ignored columns: {', '.join(sorted(reader.ignored))}", one_line=True))
        report.ignored += sorted(reader.ignored.difference(report.ignored))
    report.read += read
    report.kept += len(rows)
    if on_bad_row == "skip":
        report.skip(problems)
        if not rows:
            raise DataError(f"{name}: all of its {read:,} rows are bad. The first: {problems[0]}")
        problems = []
    return rows, problems


def reader_for(
    first: Sequence[RawRow],
    name: str,
    row_type: RowType[Any],
    columns: Mapping[str, str] | None,
    *,
    answered: bool = True,
    template_kwargs: Mapping[str, object] | None = None,
) -> FieldReader[Any]:
    """The reader for the rows of a source, whose row format is detected from the first ones.

    Args:
        first: First rows of the source, up to :data:`DETECTED_FROM`.
        name: Name of the source in errors.
        row_type: Type of the rows.
        columns: Field names of the format to those in the data.
        answered: Whether rows must have an answer.
        template_kwargs: Variables of the chat template for rows that don't set them.

    Raises:
        DataError: If no row format has their columns.
    """
    readable = [row for row in (raw.fields for raw in first) if isinstance(row, Mapping)]
    try:
        reader = row_type.reader(readable, columns, answered=answered)
    except RowError as error:
        raise DataError(str(Problem.of(error, name, None))) from None
    reader.defaults = dict(template_kwargs or {})
    return reader


def read_row(reader: FieldReader[RowT], raw: RawRow) -> RowT | Problem:
    """Check a row; returns the checked row, or its problem."""
    if raw.problem is not None:
        return raw.problem
    try:
        return reader.read(raw.fields, raw.source, raw.number)
    except RowError as error:
        return Problem.of(error, raw.source, raw.number)


def _with_progress(rows: Iterable[RawRow], description: str) -> Iterator[RawRow]:
    """The same rows, with a progress bar once there are many."""
    iterator = iter(rows)
    yield from islice(iterator, SHOW_FROM)
    first: list[RawRow] = list(islice(iterator, 1))
    if first:
        more = chain(first, iterator)
        yield from track(more, description=f"{description} ({SHOW_FROM:,}+)", disable=not is_rank_zero())


def is_rank_zero() -> bool:
    """Whether this process is rank 0, the one that logs and shows progress."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def count_duplicates(rows: Iterable[Row]) -> int:
    """Number of rows that repeat an earlier row."""
    count, different = 0, set()
    for row in rows:
        count += 1
        different.add(row_digest(row))
    return count - len(different)


__all__ = [
    "DETECTED_FROM",
    "OnBadRow",
    "SHOW_FROM",
    "count_duplicates",
    "is_rank_zero",
    "load_source",
    "read_row",
    "reader_for",
]
