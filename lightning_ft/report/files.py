"""A result as files: JSON for a program, Markdown for a pull request, PNG for a slide."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

from lightning_ft.functional.result import SavingsResult
from lightning_ft.report.markdown import savings_markdown

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
    text = json.dumps(result.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    written[0].write_text(text + "\n", encoding="utf-8")
    picture = folder / f"{NAME}.png"
    if png:
        from lightning_ft.report.plot import plot_savings

        plot_savings(result, picture)
        written.append(picture)
    written[1].write_text(savings_markdown(result, picture.name if png else None), encoding="utf-8")
    return written


def load_savings(path: str | Path) -> SavingsResult:
    """Read a result back from its JSON file."""
    return SavingsResult.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
