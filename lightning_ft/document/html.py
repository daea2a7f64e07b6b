"""A document as one HTML file that needs nothing else: no script, no request, no font."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping

from lightning_ft.document.blocks import Answers, Block, Document, Headline, Picture, SideBySide, Table
from lightning_ft.document.canvas import Drawn
from lightning_ft.document.style import CSS
from lightning_ft.printable import printable

NO_PICTURES = "Without pictures: matplotlib isn't installed. pip install 'lightning-ft[report]', and write it again."
_MANY = 4  # columns, beyond which figures go over two lines
# Nothing is loaded and nothing runs, whatever an answer holds: `escape` is the first lock, this is the second.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def escape(text: str) -> str:
    r"""A text with nothing in it that is markup, turns the order of characters, or can't be seen.

    Example:
        >>> print(escape("1 < 2\u202e"))
        1 &lt; 2\u202e
    """
    return html.escape(printable(text))


def html_page(document: Document, drawn: Mapping[str, Drawn]) -> str:
    """The page.

    Args:
        document: What it says.
        drawn: Pictures by name; empty without matplotlib.

    Example:
        >>> page = html_page(Document((Headline(True, "1 < 2."),), (), (), ()), {})
        >>> "1 &lt; 2." in page, "<script" in page
        (True, False)
    """
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',
        "<title>Fine-tuning report</title>",
        f"<style>\n{CSS}</style>",
        "</head>",
        "<body>",
        "<main>",
        "<h1>Fine-tuning report</h1>",
        *(_headline(headline) for headline in document.headlines),
        *_warnings(document),
        *_facts(document),
    ]
    for section in document.sections:
        lines += ["<section>", f"<h2>{escape(section.title)}</h2>", *_blocks(section.blocks, drawn), "</section>"]
    lines += ["</main>", "</body>", "</html>"]
    return "\n".join(lines) + "\n"


def _headline(headline: Headline) -> str:
    badge = f'<strong class="badge">{headline.verdict}</strong> ' if headline.verdict else ""
    of = f"<b>{escape(headline.of)}:</b> " if headline.of else ""
    kind = {"PASS": "pass", "FAIL": "fail"}.get(headline.verdict, "none")
    return f'<p class="headline {kind}">{badge}{of}{escape(headline.text)}</p>'


def _warnings(document: Document) -> Iterator[str]:
    if document.warnings:
        yield '<div class="warnings" role="note"><h2>Before you rely on this</h2><ul>'
        yield from (f"<li>{escape(warning)}</li>" for warning in document.warnings)
        yield "</ul></div>"


def _facts(document: Document) -> Iterator[str]:
    if document.facts:
        yield '<dl class="facts">'
        for fact in document.facts:
            yield (
                f"<div><dt>{escape(fact.label)}</dt><dd><b>{escape(fact.value)}</b>"
                f"<span>{escape(fact.note)}</span></dd></div>"
            )
        yield "</dl>"


def _blocks(blocks: tuple[Block, ...], drawn: Mapping[str, Drawn]) -> Iterator[str]:
    """Pictures that follow each other stand side by side where there is room."""
    pictures = [block for block in blocks if isinstance(block, Picture)]
    if pictures and not drawn:
        yield f'<p class="missing">{escape(NO_PICTURES)}</p>'
    shown: list[str] = []
    for block in blocks:
        if isinstance(block, Picture):
            if block.name in drawn:
                shown.append(_picture(block, drawn[block.name]))
            continue
        if shown:
            yield f'<div class="pictures">{"".join(shown)}</div>'
            shown = []
        yield from _block(block)
    if shown:
        yield f'<div class="pictures">{"".join(shown)}</div>'


def _block(block: str | Table | SideBySide) -> Iterator[str]:
    if isinstance(block, str):
        yield f"<p>{escape(block)}</p>"
    elif isinstance(block, Table):
        yield from _table(block)
    else:
        yield f"<p>{escape(block.caption)}</p>"
        for place, answers in enumerate(block.answers):
            yield from _answers(answers, opened=place == 0)


def _picture(picture: Picture, drawn: Drawn) -> str:
    data = base64.b64encode(drawn.svg).decode("ascii")
    return (
        f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{escape(picture.alt)}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> Iterator[str]:
    def cell(tag: str, column: int, text: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        kind = "" if column in table.texts else ' class="number"'
        return f"<{tag}{scope}{kind}>{escape(text)}</{tag}>"

    wide = ' class="wide"' if len(table.head) > _MANY else ""
    yield f'<div class="scroll" tabindex="0"><table{wide}>'
    if table.caption:
        yield f"<caption>{escape(table.caption)}</caption>"
    yield "<thead><tr>" + "".join(cell("th", k, name) for k, name in enumerate(table.head)) + "</tr></thead><tbody>"
    for row in table.rows:
        first = f'<th scope="row">{escape(row[0])}</th>'
        yield f"<tr>{first}{''.join(cell('td', k, text) for k, text in enumerate(row) if k)}</tr>"
    yield "</tbody></table></div>"


def _answers(answers: Answers, *, opened: bool) -> Iterator[str]:
    yield (
        f"<details{' open' if opened else ''}><summary>{escape(answers.id)}: "
        f"prompted scored {answers.prompted_score:g}, tuned {answers.tuned_score:g}</summary>"
    )
    yield '<div class="answers">'
    parts = [
        ("request", answers.request or None),
        ("right answer", answers.reference),
        (f"prompted answered (score {answers.prompted_score:g})", answers.prompted),
        (f"tuned answered (score {answers.tuned_score:g})", answers.tuned),
    ]
    for label, text in parts:
        if text is not None:
            shown = escape(text) if text else "<i>(nothing)</i>"
            yield f"<div><h3>{escape(label)}</h3><pre>{shown}</pre></div>"
    yield "</div></details>"
