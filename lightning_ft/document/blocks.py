"""Building blocks of a report, independent of its format: sections of paragraphs, tables, plots and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NO_PLOTS = (
    "No plots, since matplotlib isn't installed. Run pip install 'lightning-ft[report]' and write the report again."
)
"""Text that replaces the plots if matplotlib is missing."""


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Args:
        columns: Names of the columns.
        rows: Cells of each row, one per column.
        caption: Description of the metrics in the table.
        text_columns: Indices of the columns that hold text and are aligned left; numbers are aligned right.
        brief: Whether the brief version of the document, for a pull request, includes the table.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    text_columns: frozenset[int] = frozenset({0})
    brief: bool = True


@dataclass(frozen=True)
class Plot:
    """A plot, drawn when the report is written if matplotlib is installed.

    Args:
        name: Name of its file, without suffix; unique in a report.
        alt: Alternative text for readers who can't see the plot.
        caption: Text below the plot that explains how to read it.
        draw: Function that draws the plot on matplotlib axes.
        size: Width and height in inches.
    """

    name: str
    alt: str
    caption: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (6.4, 4.4)


@dataclass(frozen=True)
class Answers:
    """The answers of the prompted and the tuned arm to one request.

    Args:
        id: Id of the request.
        request: Last user turn of the request; empty if it wasn't recorded.
        reference: Reference answer; None if it wasn't recorded.
        prompted: Answer of the prompted arm.
        tuned: Answer of the tuned arm.
        prompted_score: Score of the prompted arm's answer, from 0 to 1.
        tuned_score: Score of the tuned arm's answer, from 0 to 1.
    """

    id: str
    request: str
    reference: str | None
    prompted: str
    tuned: str
    prompted_score: float
    tuned_score: float


@dataclass(frozen=True)
class Fact:
    """A key metric, shown in large type at the top of the report.

    Args:
        label: Name of the metric.
        value: Formatted value with its unit.
        note: Interval of the value, or another remark on it.
    """

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Headline:
    """A one-sentence summary of a result.

    Args:
        verdict: ``PASS``, ``FAIL`` or ``VOID``; empty for a sentence without a verdict.
        text: The sentence, without the verdict.
        of: Name of the result, if the report has several.
        advice: What to do, in one sentence for whoever decides; empty if it doesn't follow from the result.
    """

    verdict: str
    text: str
    of: str = ""
    advice: str = ""


@dataclass(frozen=True)
class SideBySide:
    """Answers of both arms, side by side.

    Args:
        answers: Answers to each request, the largest change of quality first.
        caption: How the requests were selected.
    """

    answers: tuple[Answers, ...]
    caption: str


Block = str | Table | Plot | SideBySide
"""Content of a section; a string is a paragraph."""


@dataclass(frozen=True)
class Section:
    """A heading and its content.

    Args:
        title: Text of the heading.
        blocks: Paragraphs, tables, plots and answers, in reading order.
        brief: Whether the brief version of the document, for a pull request, includes the section.
    """

    title: str
    blocks: tuple[Block, ...]
    brief: bool = True


@dataclass(frozen=True)
class Document:
    """A complete report.

    Args:
        headlines: One headline per result that has a verdict.
        warnings: Caveats that a reader needs in order to interpret the metrics.
        facts: Key metrics at the top.
        sections: Sections in reading order.
        about: Model, data and date, each as a label and a text.
    """

    headlines: tuple[Headline, ...]
    warnings: tuple[str, ...]
    facts: tuple[Fact, ...]
    sections: tuple[Section, ...]
    about: tuple[tuple[str, str], ...] = ()

    @property
    def plots(self) -> tuple[Plot, ...]:
        """All plots, in reading order."""
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Plot))


def provenance_table(title: str, provenance: Mapping[str, object], labels: Mapping[str, str] | None = None) -> Table:
    """Table of the provenance of a result, with one row per entry.

    Args:
        title: Caption of the table.
        provenance: Entries as JSON values; names of nested entries are joined with dots.
        labels: Labels of entries by name; an entry without one is labeled with its name.
    """
    return Table(
        ("", "value"), tuple(_rows(provenance, labels or {})), title, text_columns=frozenset({0, 1}), brief=False
    )


def _rows(values: Mapping[str, object], labels: Mapping[str, str], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        label = f"{prefix}{labels.get(name, name)}"
        if isinstance(value, Mapping):
            yield from _rows(value, labels, f"{label}.")
        elif isinstance(value, (list, tuple)):
            yield label, ", ".join(map(str, value))
        else:
            yield label, "" if value is None else str(value)


_MAX_RUN_COLUMNS = 3  # with more runs, the table is transposed


def runs_table(names: Sequence[str], rows: Sequence[tuple[str, ...]], caption: str = "") -> tuple[Block, ...]:
    """Table with one column per run; with more than three runs, one row per run and a sentence on the shared values.

    Args:
        names: Names of the runs; the name of a single run is not shown.
        rows: Rows, each with a label and one cell per run.
        caption: Caption of the table.

    Example:
        >>> table, same = runs_table(["a", "b", "c", "d"], [("steps", "1", "2", "3", "4"), ("device", *["cpu"] * 4)])
        >>> table.columns, table.rows[0], same
        (('run', 'steps'), ('a', '1'), 'The same in all runs: device: cpu.')
    """
    if len(names) == 1:
        return (Table(("", "measured"), tuple(rows), caption),)
    if len(names) <= _MAX_RUN_COLUMNS:
        return (Table(("", *names), tuple(rows), caption),)
    same = [row for row in rows if len(set(row[1:])) == 1]
    differing = [row for row in rows if row not in same]
    table = Table(
        ("run", *(row[0] for row in differing)),
        tuple((name, *(row[k] for row in differing)) for k, name in enumerate(names, start=1)),
        caption,
    )
    if not same:
        return (table,)
    return (table, "The same in all runs: " + "; ".join(f"{row[0]}: {row[1]}" for row in same) + ".")
