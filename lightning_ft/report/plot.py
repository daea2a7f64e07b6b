"""A result as one picture: where the tokens of a request go, and quality against tokens per success."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from lightning_ft.errors import MissingDependencyError
from lightning_ft.functional.bootstrap import Interval
from lightning_ft.functional.result import SavingsResult
from lightning_ft.report.figures.canvas import DPI, STYLE, clean, tidy
from lightning_ft.report.figures.quality import Arm, draw_quality
from lightning_ft.report.figures.tokens import draw_tokens

_ORDER = ("prompted", "untuned", "tuned")


def plot_savings(result: SavingsResult, path: Path) -> None:
    """Draw a result into a PNG file.

    Args:
        result: The result.
        path: Of the file.

    Raises:
        MissingDependencyError: Without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("Pictures need matplotlib: pip install 'lightning-ft[report]'.") from error
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 5.4), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)  # no window, whatever matplotlib is set to
        headline = "\n".join(textwrap.wrap(result.headline, 100))
        figure.suptitle(headline, fontsize=12, fontweight="bold", color="#00664B" if result.gate.passed else "#A33B00")
        parts: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1))
        left, right = (part.subplots() for part in parts)
        draw_tokens(left, result)
        draw_quality(right, {name: _arm(result, name) for name in _ORDER if name in result.arms}, result.confidence)
        for axes in (left, right):
            tidy(axes)
        clean(figure)
        figure.savefig(path, format="png", metadata={"Software": None})  # the same result, the same file


def _arm(result: SavingsResult, name: str) -> Arm:
    tokens = result.arms[name].tokens_per_success
    return Arm(result.quality[name], Interval(tokens, tokens, tokens))
