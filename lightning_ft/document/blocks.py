"""What a report is made of, before it is HTML or Markdown: sections of paragraphs, tables, pictures and answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_ft.evaluation.bootstrap import Interval


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
class Picture:
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


Block = str | Table | Picture | SideBySide
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
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures, in order."""
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Picture))


def between(interval: Interval, form: Callable[[float], str]) -> str:
    """An interval in words.

    Example:
        >>> between(Interval(0.5, 0.25, 0.75), lambda share: f"{share:.0%}")
        '25% to 75%'
    """
    return f"{form(interval.lo)} to {form(interval.hi)}"


def valued(interval: Interval, form: Callable[[float], str]) -> str:
    """A figure with its interval.

    Example:
        >>> valued(Interval(0.5, 0.25, 0.75), lambda share: f"{share:.0%}")
        '50% (25% to 75%)'
    """
    return f"{form(interval.value)} ({between(interval, form)})"
