"""Savings results as files: JSON for programs, Markdown for pull requests, PNG for slides."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from lightning_ft.atomic_files import atomic_write, write_json, write_text
from lightning_ft.document.blocks import Plot
from lightning_ft.document.markdown import markdown_document
from lightning_ft.evaluation.result_files import read_result
from lightning_ft.evaluation.savings.result import SavingsResult
from lightning_ft.evaluation.savings.sections import savings_document

_log = logging.getLogger(__name__)  # only rank 0 writes results, so only rank 0 logs
NAME = "token_savings"


def save_savings(result: SavingsResult, folder: Path, *, png: bool | None = None) -> list[Path]:
    """Write a result as JSON, Markdown and PNG files.

    Args:
        result: The result.
        folder: Folder to write to, created if needed; files of an earlier result are replaced.
        png: Whether to write the plot; None writes it if matplotlib is installed.

    Returns:
        Paths of the files written.

    Raises:
        MissingDependencyError: If `png` is True and matplotlib isn't installed.
    """
    if png is None:
        png = importlib.util.find_spec("matplotlib") is not None
        if not png:
            _log.info(
                "Token savings are not plotted, since matplotlib isn't installed: pip install 'lightning-ft[report]'."
            )
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{NAME}.json", folder / f"{NAME}.md"]
    write_json(written[0], result.to_dict())
    plot_path = folder / f"{NAME}.png"
    if png:
        from lightning_ft.evaluation.savings.plots import plot_savings

        with atomic_write(plot_path) as temporary:
            plot_savings(result, temporary)
        written.append(plot_path)
    write_text(written[1], savings_markdown(result, with_plot=png))
    if not png:
        plot_path.unlink(missing_ok=True)  # that of an earlier result
    return written


def savings_markdown(result: SavingsResult, *, with_plot: bool = False) -> str:
    """Render a result as Markdown.

    Args:
        result: The result.
        with_plot: Whether to embed the plot, which must be next to the file.
    """
    plot = Plot(NAME, "Tokens per request and quality of each arm", "", lambda axes: None) if with_plot else None
    return markdown_document(savings_document(result, plot), "Token savings", [NAME] if with_plot else [])


def load_savings(path: str | Path) -> SavingsResult:
    """Read a result from its JSON file.

    Raises:
        DataError: If the file can't be read, or contains no savings result.
    """
    return read_result(Path(path), SavingsResult.from_dict)
