"""What a report is made of, before it is HTML or Markdown: sections of paragraphs, tables, pictures and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NO_PLOTS = "Without plots: matplotlib isn't installed. Run pip install 'lightning-ft[report]' and write it again."
"""What a document says in place of plots."""


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Args:
        head: Names of the columns.
        rows: Cells, as many in each row as there are columns.
        caption: What the figures are.
        texts: Columns that hold words, which stand to the left; numbers stand to the right.
        brief: Whether a pull request shows it, too.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    texts: frozenset[int] = frozenset({0})
    brief: bool = True


@dataclass(frozen=True)
class Plot:
    """A picture that is drawn when the report is written, if matplotlib is installed.

    Args:
        name: Of its file, without suffix; unique in a report.
        alt: What it shows, for whoever can't see it.
        caption: What a reader has to know to read it.
        draw: Draws it on the axes that it is given.
        size: Width and height in inches.
    """

    name: str
    alt: str
    caption: str
    draw: Callable[[Any], None]
    size: tuple[float, float] = (6.4, 4.4)


@dataclass(frozen=True)
class Answers:
    """One request and what the arms answered.

    Args:
        id: Of the request.
        request: What was asked; empty where it wasn't kept.
        reference: The right answer; None where it wasn't kept.
        prompted: The prompted arm's answer.
        tuned: The tuned arm's answer.
        prompted_score: From 0 to 1.
        tuned_score: From 0 to 1.
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
    """A figure that stands large at the top.

    Args:
        label: What it is.
        value: The figure with its unit.
        note: Its interval, or what else belongs to it.
    """

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Headline:
    """The sentence that says it all.

    Args:
        passed: The verdict; None for a sentence that judges nothing.
        text: The sentence, without the verdict.
        of: What it is about, where there are several.
    """

    passed: bool | None
    text: str
    of: str = ""

    @property
    def verdict(self) -> str:
        """``PASS``, ``FAIL``, or nothing."""
        return "" if self.passed is None else "PASS" if self.passed else "FAIL"


@dataclass(frozen=True)
class SideBySide:
    """Answers of both arms to some requests.

    Args:
        answers: The worst first.
        caption: How they were chosen.
    """

    answers: tuple[Answers, ...]
    caption: str


Block = str | Table | Plot | SideBySide
"""What may stand below a heading; a text is a paragraph."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it.

    Args:
        title: The heading.
        blocks: In order.
        brief: Whether a pull request shows it, too.
    """

    title: str
    blocks: tuple[Block, ...]
    brief: bool = True


@dataclass(frozen=True)
class Document:
    """A whole report.

    Args:
        headlines: One for each result that has a verdict.
        warnings: What a reader of the figures has to know.
        facts: The figures at the top.
        sections: In the order in which they are read.
    """

    headlines: tuple[Headline, ...]
    warnings: tuple[str, ...]
    facts: tuple[Fact, ...]
    sections: tuple[Section, ...]

    @property
    def pictures(self) -> tuple[Plot, ...]:
        """All pictures, in order."""
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Plot))


def provenance_table(title: str, provenance: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> Table:
    """The provenance of a result, one row per entry.

    Args:
        title: Caption of the table.
        provenance: JSON values; nested ones get names with dots.
        labels: Labels of entries, by name.
    """
    return Table(("", "value"), tuple(_rows(provenance, labels or {})), title, texts=frozenset({0, 1}), brief=False)


def _rows(values: Mapping[str, Any], labels: Mapping[str, str], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        label = f"{prefix}{labels.get(name, name)}"
        if isinstance(value, Mapping):
            yield from _rows(value, labels, f"{label}.")
        elif isinstance(value, (list, tuple)):
            yield label, ", ".join(map(str, value))
        else:
            yield label, "" if value is None else str(value)


_MOST_COLUMNS = 3  # of runs, beyond which each run gets a row


def runs_table(names: Sequence[str], rows: Sequence[tuple[str, ...]], caption: str = "") -> tuple[Block, ...]:
    """One column per run; of more than a few runs one row per run, with a sentence for what is the same in all.

    Args:
        names: Names of the runs; that of a single run is left out.
        rows: Rows of a label and one cell per run.
        caption: Caption of the table.

    Example:
        >>> table, same = runs_table(["a", "b", "c", "d"], [("steps", "1", "2", "3", "4"), ("device", *["cpu"] * 4)])
        >>> table.head, table.rows[0], same
        (('run', 'steps'), ('a', '1'), 'The same in all runs: device: cpu.')
    """
    if len(names) == 1:
        return (Table(("", "measured"), tuple(rows), caption),)
    if len(names) <= _MOST_COLUMNS:
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
