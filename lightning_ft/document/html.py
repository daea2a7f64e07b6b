"""A document as one HTML file that needs nothing else: no script, no request, no font.

The page is the template ``page.html.jinja``, with autoescape: no text of a result is ever markup.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from lightning_ft.document.blocks import NO_PLOTS, Block, Document, Plot, SideBySide, Table
from lightning_ft.document.canvas import RenderedPlot
from lightning_ft.document.style import CSS
from lightning_ft.printable import printable

_MOST_COLUMNS = 4  # of a table, beyond which numbers may wrap
# Nothing is loaded and nothing runs, whatever an answer holds: autoescape is the first lock, this is the second.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class _Group:
    """A block of a section, or plots that follow each other: they are side by side where there is room."""

    text: str | None = None
    table: Table | None = None
    answers: SideBySide | None = None
    images: tuple[Plot, ...] = ()


def html_page(document: Document, drawn: Mapping[str, RenderedPlot], *, title: str = "Fine-tuning report") -> str:
    """The page.

    Args:
        document: The document.
        drawn: Plots by name; empty without matplotlib.
        title: Title of the page.

    Example:
        >>> from lightning_ft.document.blocks import Headline
        >>> page = html_page(Document((Headline(True, "1 < 2."),), (), (), ()), {})
        >>> "1 &lt; 2." in page, "<script" in page
        (True, False)
    """
    images = {name: base64.b64encode(plot.svg).decode("ascii") for name, plot in drawn.items()}

    def grouped(blocks: Sequence[Block]) -> list[_Group]:
        return list(_groups(blocks, images))

    environment = _environment()
    environment.filters["grouped"] = grouped
    template = environment.get_template("page.html.jinja")
    return template.render(
        document=document,
        title=title,
        images=images,
        css=Markup(CSS),
        policy=_POLICY,
        no_pictures=NO_PLOTS,
        most_columns=_MOST_COLUMNS,
    )


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lightning_ft.document", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
    )
    environment.tests["picture"] = lambda block: isinstance(block, Plot)
    return environment


def _finalize(value: Any) -> Any:
    """Make every text that enters the page printable: no control characters, and nothing that reorders text."""
    return printable(value) if type(value) is str else value


def _groups(blocks: Sequence[Block], images: Mapping[str, str]) -> Iterator[_Group]:
    pictures: list[Plot] = []
    for block in blocks:
        if isinstance(block, Plot):
            if block.name in images:
                pictures.append(block)
            continue
        if pictures:
            yield _Group(images=tuple(pictures))
            pictures = []
        if isinstance(block, str):
            yield _Group(text=block)
        elif isinstance(block, Table):
            yield _Group(table=block)
        else:
            yield _Group(answers=block)
    if pictures:
        yield _Group(images=tuple(pictures))
