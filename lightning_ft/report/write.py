"""Writing of reports: an HTML page, its plots as PNG files, Markdown for a pull request, and JSON for programs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from lightning_ft.atomic_files import atomic_write
from lightning_ft.document.blocks import NO_PLOTS, Document
from lightning_ft.document.html import html_page
from lightning_ft.document.markdown import markdown_document
from lightning_ft.document.plotting import RenderedPlot, can_draw, render_plot
from lightning_ft.errors import DataError
from lightning_ft.printable import json_text
from lightning_ft.report.collect import COMPARISON, COMPUTE, RETENTION, SAVINGS, RunReport, collect
from lightning_ft.report.compose import compose_document

SCHEMA_VERSION = 2
"""Version of the schema of ``report.json``, increased with each incompatible change."""
FOLDER = "report"
_log = logging.getLogger(__name__)  # only rank 0 writes reports, so only rank 0 logs


def write_report(folder: str | Path, output: str | Path | None = None) -> list[Path]:
    """Write ``report.html``, ``report.md``, ``report.json`` and a PNG file per plot.

    The page is a single file that includes its plots. The same results give byte-identical files. If matplotlib isn't
    installed, the report has no plots, and the page and the Markdown file say so.

    Args:
        folder: Folder of a run, of several runs or of a comparison; see :func:`lightning_ft.report.collect.collect`.
        output: Folder to write to; by default ``report`` in `folder`.

    Returns:
        Paths of the files written.

    Raises:
        DataNotFoundError: If `folder` doesn't exist.
        DataError: If it contains no results, or a file can't be read as the result that its name indicates.

    Example:
        From a shell: ``lightning-ft report runs/support-lora``.
    """
    found = collect(folder)
    if found.empty:
        raise DataError(
            f"{str(folder)!r} contains no results: none of {SAVINGS}, {RETENTION}, {COMPUTE} and {COMPARISON} is in it "
            "or below it. TokenSavings, Retention and ComputeMeter write their results at the end of training, and "
            "`lightning-ft compare` writes a comparison."
        )
    return write_files(found, Path(folder) / FOLDER if output is None else Path(output))


def write_files(report: RunReport, folder: Path) -> list[Path]:
    """Write the report of results that were collected.

    Args:
        report: Results; not empty.
        folder: Folder to write to, created if needed; an earlier report in it is replaced.

    Returns:
        Paths of the files written.
    """
    document = compose_document(report)
    plots: dict[str, RenderedPlot] = {}
    if can_draw():
        plots = {plot.name: render_plot(plot) for plot in document.plots}
    else:
        _log.info(NO_PLOTS)
    earlier, contents = _earlier_plots(folder), _contents(report, document, plots)
    for name, content in contents.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(content)
    for name in earlier - contents.keys():
        (folder / name).unlink(missing_ok=True)
    return [folder / name for name in contents]


def report_json(report: RunReport, document: Document, plots: Mapping[str, RenderedPlot]) -> dict[str, object]:
    """Convert a report and its results to JSON types.

    Args:
        report: Results.
        document: Document composed from the results.
        plots: Rendered plots by name.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "about": {label.lower(): text for label, text in document.about},
        "headlines": [{**asdict(headline), "verdict": headline.verdict or None} for headline in document.headlines],
        "warnings": list(document.warnings),
        "facts": [asdict(fact) for fact in document.facts],
        "pictures": [
            {"file": f"{plot.name}.png", "alt": plot.alt, "caption": plot.caption}
            for plot in document.plots
            if plot.name in plots
        ],
        **report.to_dict(),
    }


def report_markdown(document: Document, plots: Iterable[str]) -> str:
    """Render a report as Markdown, short enough for a pull request.

    Args:
        document: Document composed from the results.
        plots: Names of the rendered plots.
    """
    text = markdown_document(document, "Fine-tuning report", plots, brief=True)
    return f"{text}\nMore answers, in full, and provenance: [report.html](report.html).\n"


def _contents(report: RunReport, document: Document, plots: Mapping[str, RenderedPlot]) -> dict[str, bytes]:
    text = json_text(report_json(report, document, plots), indent=1)
    return {
        "report.html": html_page(document, plots).encode(),
        "report.md": report_markdown(document, plots).encode(),
        "report.json": (text + "\n").encode(),
        **{f"{name}.png": plot.png for name, plot in plots.items()},
    }


def _earlier_plots(folder: Path) -> set[str]:
    """File names of an earlier report's plots in this folder, which the new report may not overwrite."""
    try:
        plots = json.loads((folder / "report.json").read_text(encoding="utf-8"))["pictures"]
        names = [plot["file"] for plot in plots]
        return {name for name in names if Path(name).name == name and name.endswith(".png")}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # no readable earlier report
        return set()
