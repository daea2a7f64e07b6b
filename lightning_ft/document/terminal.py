"""Rendering of documents for the terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from lightning_ft.document.blocks import Document, Headline, Table
from lightning_ft.printable import printable

_STYLES = {"PASS": "bold green", "FAIL": "bold red", "VOID": "bold yellow"}


def terminal_document(document: Document) -> Group:
    """Render headlines, brief tables and paragraphs, and the warnings as notes; plots and answers are left out.

    Args:
        document: The document.
    """
    parts: list[RichTable | Text] = []
    for headline in document.headlines:
        parts.append(_headline(headline))
        if headline.advice:
            parts.append(Text(printable(headline.advice), style=_STYLES.get(headline.verdict, "bold")))
    for section in document.sections:
        for block in section.blocks if section.brief else ():
            if isinstance(block, str):
                parts.append(Text(printable(block)))
            elif isinstance(block, Table) and block.brief:
                parts.append(_table(block))
    parts += [Text(printable(f"Note: {warning}"), style="yellow") for warning in document.warnings]
    return Group(*parts)


def _headline(headline: Headline) -> Text:
    of = f"{headline.of}: " if headline.of else ""
    verdict = f"{headline.verdict}: " if headline.verdict else ""
    return Text(printable(f"{of}{verdict}{headline.text}"), style=_STYLES.get(headline.verdict, "bold"))


def _table(table: Table) -> RichTable:
    shown = RichTable(title=Text(printable(table.caption)), title_justify="left")
    for column, name in enumerate(table.columns):
        shown.add_column(Text(printable(name)), justify="left" if column in table.text_columns else "right")
    for row in table.rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    return shown
