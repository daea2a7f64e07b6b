"""Rendering of documents and tables as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from lightning_ft.document.blocks import NO_PLOTS, Answers, Block, Document, Plot, SideBySide, Table
from lightning_ft.printable import printable

_MAX_EXAMPLES = 3  # requests of each list of answers in a brief document
_MAX_EXAMPLE_LENGTH = 120  # characters of each text of an example
_MARKUP = re.compile(r"[\\`*_\[\]|~]")


def markdown_document(document: Document, title: str, plots: Iterable[str], *, brief: bool = False) -> str:
    """Render a document as Markdown, with relative links to its plots.

    Args:
        document: The document.
        title: Heading of the document.
        plots: Names of the rendered plots; empty if matplotlib isn't installed.
        brief: Whether to leave out sections and tables that aren't marked as brief, for a pull request.

    Example:
        >>> from lightning_ft.document.blocks import Headline
        >>> document = Document((Headline("FAIL", "Too few requests."),), ("n = 3",), (), ())
        >>> print(markdown_document(document, "Report", []))
        # Report
        <BLANKLINE>
        **FAIL: Too few requests.**
        <BLANKLINE>
        > n = 3
        <BLANKLINE>
    """
    drawn = frozenset(plots)
    lines = [f"# {markdown_text(title)}", ""]
    if document.about:
        lines += [" · ".join(f"{label}: {markdown_text(text)}" for label, text in document.about), ""]
    for headline in document.headlines:
        if headline.advice:
            lines += [f"**{markdown_text(headline.advice)}**", ""]
        verdict = f"{headline.verdict}: " if headline.verdict else ""
        of = f"{markdown_text(headline.of)}: " if headline.of else ""
        lines += [f"**{of}{verdict}{markdown_text(headline.text)}**", ""]
    for warning in document.warnings:
        lines += [f"> {markdown_text(warning)}", ""]
    if document.plots and not drawn:
        lines += [f"*{NO_PLOTS}*", ""]
    for section in document.sections:
        if brief and not section.brief:
            continue
        blocks = [line for block in section.blocks for line in _block(block, drawn, brief=brief)]
        if blocks:
            lines += [f"## {markdown_text(section.title)}", "", *blocks]
    return "\n".join(lines)


def _block(block: Block, drawn: frozenset[str], *, brief: bool) -> Iterator[str]:
    if isinstance(block, str):
        yield from (markdown_text(block), "")
    elif isinstance(block, Plot):
        if block.name in drawn:
            yield from (f"![{markdown_text(block.alt)}]({block.name}.png)", "")
    elif isinstance(block, SideBySide):
        shown = block.answers[:_MAX_EXAMPLES] if brief else block.answers
        fewer = f" {len(shown)} of them are shown here." if len(shown) < len(block.answers) else ""
        yield from (f"{markdown_text(block.caption)}{fewer}", "", *_answers_table(shown, shorten=brief), "")
    elif isinstance(block, Table) and (block.brief or not brief):
        if block.caption:
            yield from (f"{markdown_text(block.caption)}:", "")
        yield from (*markdown_table(block.columns, block.rows, block.text_columns), "")


def _answers_table(answers: Sequence[Answers], *, shorten: bool) -> list[str]:
    def text(value: str | None) -> str:
        line = " ".join((value or "").split())
        return f"{line[:_MAX_EXAMPLE_LENGTH]}..." if shorten and len(line) > _MAX_EXAMPLE_LENGTH else line

    columns = ("id", "request", "reference answer", "prompted", "score", "tuned", "score")
    rows = [
        (
            text(found.id),
            text(found.request),
            text(found.reference),
            text(found.prompted),
            f"{found.prompted_score:g}",
            text(found.tuned),
            f"{found.tuned_score:g}",
        )
        for found in answers
    ]
    return markdown_table(columns, rows, text_columns=(0, 1, 2, 3, 5))


def markdown_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Iterable[int] = frozenset({0})
) -> list[str]:
    """Format a Markdown table; returns its lines.

    Args:
        columns: Names of the columns.
        rows: Cells of each row, one per column.
        text_columns: Indices of the columns that hold text and are aligned left; numbers are aligned right.
    """
    left = frozenset(text_columns)

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    align = ["---" if column in left else "---:" for column in range(len(columns))]
    cells = [[markdown_text(cell, breaks=True) for cell in row] for row in (columns, *rows)]
    return [line(cells[0]), line(align), *map(line, cells[1:])]


def markdown_text(text: str, *, breaks: bool = False) -> str:
    r"""Escape text for Markdown; returns a single line without markup, HTML or control characters.

    Args:
        text: Text to escape.
        breaks: Whether to keep line breaks, as ``<br>``, rather than replace them by spaces.

    Example:
        >>> print(markdown_text("<b> [x](y) | a_b \x1b[2J"))
        &lt;b> \[x\](y) \| a\_b \\x1b\[2J
    """
    lines = [" ".join(printable(line).split()) for line in (text.split("\n") if breaks else [" ".join(text.split())])]
    return "<br>".join(_MARKUP.sub(r"\\\g<0>", line.replace("&", "&amp;").replace("<", "&lt;")) for line in lines)
