"""Figures as files: the same figure, the same bytes, and readable where it is shrunk to a phone's width."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_ft.document.blocks import Plot
from lightning_ft.errors import MissingDependencyError
from lightning_ft.printable import printable

STYLE: Any = {
    "svg.hashsalt": "lightning-ft",  # names inside an SVG are random without it
    "svg.fonttype": "path",  # letters as shapes: no font of the reader's machine moves them
    "text.parse_math": False,  # a currency or a name may hold dollar signs
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 11.0,
    "axes.titlesize": 12.0,
    "axes.labelsize": 11.0,
    "legend.fontsize": 10.0,
    "xtick.labelsize": 10.0,
    "ytick.labelsize": 10.0,
}
DPI = 150
_LINE, _HANDLE = 76, 6  # letters of a legend that fit side by side, and how many of them a marker takes


@dataclass(frozen=True)
class RenderedPlot:
    """A picture in both forms.

    Args:
        svg: For the page.
        png: For slides and pull requests.
    """

    svg: bytes
    png: bytes


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def render_plot(picture: Plot) -> RenderedPlot:
    """Draw a picture.

    Args:
        picture: What to draw.

    Raises:
        MissingDependencyError: Without matplotlib.

    Example:
        >>> picture = Picture("line", "A line", "", lambda axes: axes.plot([0, 1]))
        >>> drawn(picture).png[1:4], drawn(picture) == drawn(picture)
        (b'PNG', True)
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("Pictures need matplotlib: pip install 'lightning-ft[report]'.") from error
    with rc_context(STYLE):
        figure = Figure(figsize=picture.size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)  # no window, whatever matplotlib is set to
        axes = figure.subplots()
        picture.draw(axes)
        style_axes(axes)
        escape_unprintable(figure)
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", metadata={"Software": None})
    return RenderedPlot(svg.getvalue(), png.getvalue())


def escape_unprintable(figure: Any) -> None:
    """Write as escapes what can't be seen in the texts of a figure, or would turn their order."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if (shown := printable(text.get_text())) != text.get_text():
            text.set_text(shown)


def style_axes(axes: Any) -> None:
    """No frame, and lines of the grid that stay behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)


def logarithmic(axis: Any, form: Callable[[float], str]) -> None:
    """A log scale with numbers as people write them: matplotlib's own are formulas.

    Args:
        axis: Of matplotlib, `axes.xaxis` or `axes.yaxis`.
        form: Writes a number.
    """
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_formatter(lambda value, _place: form(value))
    axis.set_minor_formatter(lambda _value, _place: "")


def legend_below(axes: Any) -> None:
    """A legend under the axes and their label, where it covers nothing; one for each figure or subfigure."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    rows = -(-sum(len(label) + _HANDLE for label in labels) // _LINE)
    axes.get_figure().legend(
        handles,
        labels,
        ncols=-(-len(labels) // rows),
        frameon=False,
        loc="outside lower center",
        borderaxespad=0.3,
        handlelength=1.4,
        columnspacing=1.3,
    )


class Mark(NamedTuple):
    """How the points of an arm or a method look: a marker of matplotlib and a color."""

    marker: str
    color: str


# Okabe and Ito's colors (https://jfly.uni-koeln.de/color/).
PARTS = {
    "system": ("system prompt", "#0072B2"),
    "few_shot": ("examples", "#56B4E9"),
    "template": ("chat template", "#999999"),
    "request": ("request", "#F0E442"),
    "input": ("input", "#0072B2"),
    "answer": ("answer", "#D55E00"),
}
"""Where tokens go: a label and a color, from the bottom of a bar to its top."""
_KNOWN = {
    "prompted": Mark("s", "#0072B2"),
    "untuned": Mark("o", "#999999"),
    "tuned": Mark("D", "#D55E00"),
    "lora": Mark("D", "#D55E00"),
    "full": Mark("^", "#009E73"),
}
_OTHERS = (
    Mark("v", "#CC79A7"),
    Mark("P", "#E69F00"),
    Mark("X", "#56B4E9"),
    Mark("<", "#000000"),
    Mark(">", "#B8A900"),
    Mark("h", "#7A4B00"),
)


def marks(names: Sequence[str]) -> dict[str, Mark]:
    """A mark for each name, the same for the usual ones in every picture.

    Example:
        >>> marks(["full", "frozen trunk"])["frozen trunk"]
        Mark(marker='v', color='#CC79A7')
    """
    others = [name for name in names if name not in _KNOWN]
    return {name: _KNOWN.get(name) or _OTHERS[others.index(name) % len(_OTHERS)] for name in names}


def spread(value: float, lo: float, hi: float) -> list[list[float]]:
    """An interval as matplotlib's error bars want it: how far it goes down and up, never below 0.

    Example:
        >>> spread(0.5, 0.25, 0.75)
        [[0.25], [0.25]]
    """
    return [[max(0.0, value - lo)], [max(0.0, hi - value)]]
