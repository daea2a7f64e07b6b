"""A document as a single, self-contained HTML file: no scripts, no requests, no external fonts.

The page is rendered from the template ``page.html.jinja`` with autoescape, so text of a result never becomes markup.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import jinja2
from markupsafe import Markup

from lightning_ft.document.blocks import NO_PLOTS, Block, Document, Plot, SideBySide, Table
from lightning_ft.document.plotting import RenderedPlot
from lightning_ft.document.style import CSS
from lightning_ft.printable import printable

_MAX_UNWRAPPED_COLUMNS = 4  # in wider tables, numbers may wrap
# Whatever an answer contains, the browser loads and runs nothing: a second safeguard in addition to autoescape.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class _Group:
    """A block of a section, or consecutive plots or lists of answers, which the page shows in columns if it is wide."""

    text: str | None = None
    table: Table | None = None
    answers: tuple[SideBySide, ...] = ()
    images: tuple[Plot, ...] = ()


def html_page(document: Document, rendered: Mapping[str, RenderedPlot], *, title: str = "Fine-tuning report") -> str:
    """Render a document as an HTML page.

    Args:
        document: The document.
        rendered: Rendered plots by name; empty if matplotlib isn't installed.
        title: Title of the page.

    Example:
        >>> from lightning_ft.document.blocks import Headline
        >>> page = html_page(Document((Headline("PASS", "1 < 2."),), (), (), ()), {})
        >>> "1 &lt; 2." in page, "<script" in page
        (True, False)
    """
    images = {name: base64.b64encode(plot.svg).decode("ascii") for name, plot in rendered.items()}

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
        no_plots=NO_PLOTS,
        max_unwrapped_columns=_MAX_UNWRAPPED_COLUMNS,
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
    environment.tests["plot"] = lambda block: isinstance(block, Plot)
    return environment


def _finalize(value: object) -> object:
    """Escape control characters, and characters that change the direction of text, in each string of the page."""
    return printable(value) if type(value) is str else value


def _groups(blocks: Sequence[Block], images: Mapping[str, str]) -> Iterator[_Group]:
    drawn = [block for block in blocks if not isinstance(block, Plot) or block.name in images]
    for _, consecutive in groupby(drawn, type):
        found = tuple(consecutive)
        if plots := tuple(block for block in found if isinstance(block, Plot)):
            yield _Group(images=plots)
        elif answers := tuple(block for block in found if isinstance(block, SideBySide)):
            yield _Group(answers=answers)
        for block in found:
            if isinstance(block, str):
                yield _Group(text=block)
            elif isinstance(block, Table):
                yield _Group(table=block)
