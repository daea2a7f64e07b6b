"""A document as Markdown, short enough for a pull request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lightning_ft.document.blocks import Block, Document, Picture, SideBySide, Table
from lightning_ft.document.html import NO_PICTURES
from lightning_ft.document.markdown import markdown_table, markdown_text


def pull_request(document: Document, pictures: Iterable[str]) -> str:
    """Headline, tables, and pictures by relative links; answers and provenance stand in the page.

    Args:
        document: What it says.
        pictures: Names of those that were drawn; none without matplotlib.

    Example:
        >>> from lightning_ft.document.blocks import Headline
        >>> print(pull_request(Document((Headline(False, "Too few requests."),), ("n = 3",), (), ()), []))
        # Fine-tuning report
        <BLANKLINE>
        **FAIL: Too few requests.**
        <BLANKLINE>
        > n = 3
        <BLANKLINE>
        Answers side by side and provenance: [report.html](report.html).
        <BLANKLINE>
    """
    shown = frozenset(pictures)
    lines = ["# Fine-tuning report", ""]
    for headline in document.headlines:
        verdict = f"{headline.verdict}: " if headline.verdict else ""
        of = f"{markdown_text(headline.of)}: " if headline.of else ""
        lines += [f"**{of}{verdict}{markdown_text(headline.text)}**", ""]
    for warning in document.warnings:
        lines += [f"> {markdown_text(warning)}", ""]
    if document.pictures and not shown:
        lines += [f"*{NO_PICTURES}*", ""]
    for section in document.sections:
        blocks = [line for block in section.blocks for line in _block(block, shown)]
        if blocks and section.brief:
            lines += [f"## {markdown_text(section.title)}", "", *blocks]
    lines += ["Answers side by side and provenance: [report.html](report.html).", ""]
    return "\n".join(lines)


def _block(block: Block, shown: frozenset[str]) -> Iterator[str]:
    if isinstance(block, str):
        yield from (markdown_text(block), "")
    elif isinstance(block, Picture):
        if block.name in shown:
            yield from (f"![{markdown_text(block.alt)}]({block.name}.png)", "")
    elif isinstance(block, Table) and block.brief:
        if block.caption:
            yield from (f"{markdown_text(block.caption)}:", "")
        yield from (*markdown_table(block.head, block.rows), "")
    elif isinstance(block, SideBySide):
        yield from (f"{markdown_text(block.caption).rstrip(':')}: see the page.", "")
