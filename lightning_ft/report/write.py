"""Write the report of a folder: a page, its pictures, Markdown for a pull request, JSON for a program."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_ft.atomic_files import atomic_write
from lightning_ft.document.blocks import NO_PLOTS, Document
from lightning_ft.document.canvas import RenderedPlot, can_draw, drawn
from lightning_ft.document.html import html_page
from lightning_ft.document.markdown import markdown_document
from lightning_ft.errors import DataError
from lightning_ft.printable import json_text
from lightning_ft.report.collect import COMPARISON, COMPUTE, RETENTION, SAVINGS, RunReport, collect
from lightning_ft.report.compose import document

SCHEMA_VERSION = 1
"""Of ``report.json``; it grows when a program that reads it would have to change."""
FOLDER = "report"
_log = logging.getLogger(__name__)  # only the first rank writes, so only it speaks


def write_report(folder: str | Path, output: str | Path | None = None) -> list[Path]:
    """Write ``report.html``, ``report.md``, ``report.json`` and a PNG file of every picture.

    The page is one file with its pictures in it. The same results give the same bytes. Without matplotlib there are no
    pictures, and page and Markdown say so.

    Args:
        folder: Of a run, of several, or of a comparison; see `lightning_ft.report.collect.collect`.
        output: Where to write; by default ``report`` in `folder`.

    Returns:
        The files written.

    Raises:
        DataNotFoundError: If there is no such folder.
        DataError: If there are no results in it, or a file that isn't what its name says.

    Example:
        From a shell: ``lightning-ft report runs/support-lora``.
    """
    found = collect(folder)
    if found.empty:
        raise DataError(
            f"{str(folder)!r} holds no results: none of {SAVINGS}, {RETENTION}, {COMPUTE} and {COMPARISON} is in it or "
            "below it. They are written at the end of training by TokenSavings, Retention and ComputeMeter, and by "
            "lightning-ft compare."
        )
    return write_files(found, Path(folder) / FOLDER if output is None else Path(output))


def write_files(report: RunReport, folder: Path) -> list[Path]:
    """Write the report of what was collected.

    Args:
        report: What was collected; not empty.
        folder: It is made where there is none; an earlier report in it is replaced.

    Returns:
        The files written.
    """
    said = document(report)
    pictures: dict[str, RenderedPlot] = {}
    if can_draw():
        pictures = {picture.name: drawn(picture) for picture in said.pictures}
    else:
        _log.info(NO_PLOTS)
    earlier, contents = _earlier_pictures(folder), _contents(report, said, pictures)
    for name, content in contents.items():
        with atomic_write(folder / name) as aside:
            aside.write_bytes(content)
    for name in earlier - contents.keys():
        (folder / name).unlink(missing_ok=True)
    return [folder / name for name in contents]


def report_json(report: RunReport, said: Document, pictures: Mapping[str, RenderedPlot]) -> dict[str, Any]:
    """Everything that was collected, and what is said of it, as JSON types.

    Args:
        report: What was collected.
        said: The document.
        pictures: Those that were drawn.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "headlines": [{"verdict": headline.verdict or None, **asdict(headline)} for headline in said.headlines],
        "warnings": list(said.warnings),
        "facts": [asdict(fact) for fact in said.facts],
        "pictures": [
            {"file": f"{picture.name}.png", "alt": picture.alt, "caption": picture.caption}
            for picture in said.pictures
            if picture.name in pictures
        ],
        **report.to_dict(),
    }


def report_markdown(document: Document, pictures: Iterable[str]) -> str:
    """The report as Markdown, short enough for a pull request.

    Args:
        document: The document.
        pictures: Names of the plots that were drawn.
    """
    text = markdown_document(document, "Fine-tuning report", pictures, brief=True)
    return f"{text}Answers side by side and provenance: [report.html](report.html).\n"


def _contents(report: RunReport, said: Document, pictures: Mapping[str, RenderedPlot]) -> dict[str, bytes]:
    text = json_text(report_json(report, said, pictures), indent=1)
    return {
        "report.html": html_page(said, pictures).encode(),
        "report.md": report_markdown(said, pictures).encode(),
        "report.json": (text + "\n").encode(),
        **{f"{name}.png": picture.png for name, picture in pictures.items()},
    }


def _earlier_pictures(folder: Path) -> set[str]:
    """Names of the pictures that an earlier report wrote here: this one may have fewer."""
    try:
        pictures = json.loads((folder / "report.json").read_text(encoding="utf-8"))["pictures"]
        names = [picture["file"] for picture in pictures]
        return {name for name in names if Path(name).name == name and name.endswith(".png")}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # there is no earlier report
        return set()
