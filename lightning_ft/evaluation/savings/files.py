"""A savings result as files: JSON for programs, Markdown for pull requests, PNG for slides."""

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

_log = logging.getLogger(__name__)  # only the first rank writes, so only it speaks
NAME = "token_savings"


def save_savings(result: SavingsResult, folder: Path, *, png: bool | None = None) -> list[Path]:
    """Write a result.

    Args:
        result: The result.
        folder: It is made where there is none; files of an earlier result are replaced.
        png: Write the picture; None: if matplotlib is installed.

    Returns:
        The files written.

    Raises:
        MissingDependencyError: If the picture is asked for without matplotlib.
    """
    if png is None:
        png = importlib.util.find_spec("matplotlib") is not None
        if not png:
            _log.info("No picture of the token savings without matplotlib: pip install 'lightning-ft[report]'.")
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{NAME}.json", folder / f"{NAME}.md"]
    write_json(written[0], result.to_dict())
    picture = folder / f"{NAME}.png"
    if png:
        from lightning_ft.evaluation.savings.plots import plot_savings

        with atomic_write(picture) as aside:
            plot_savings(result, aside)
        written.append(picture)
    write_text(written[1], savings_markdown(result, picture=png))
    return written


def savings_markdown(result: SavingsResult, *, picture: bool = False) -> str:
    """A result as Markdown.

    Args:
        result: The result.
        picture: Whether the plot is next to the file.
    """
    plot = Plot(NAME, "Tokens of a request and quality of each arm", "", lambda axes: None) if picture else None
    return markdown_document(savings_document(result, plot), "Token savings", [NAME] if picture else [])


def load_savings(path: str | Path) -> SavingsResult:
    """Read a result back from its JSON file.

    Raises:
        DataError: If it isn't one.
    """
    return read_result(Path(path), SavingsResult.from_dict)
