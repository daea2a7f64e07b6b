"""Rendering of plots as SVG and PNG files: byte-identical for identical data, and readable at the width of a phone."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_ft.document.blocks import Plot
from lightning_ft.errors import MissingDependencyError
from lightning_ft.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure

STYLE: Any = {  # `rcParams`, whose type differs between versions of matplotlib
    "svg.hashsalt": "lightning-ft",  # ids inside an SVG are random without it
    "svg.fonttype": "path",  # text as paths: it looks the same without the reader having the font
    "text.parse_math": False,  # a currency or a name may contain dollar signs
    "font.family": "DejaVu Sans",  # shipped with matplotlib
    "font.size": 11.0,
    "axes.titlesize": 12.0,
    "axes.labelsize": 11.0,
    "legend.fontsize": 10.0,
    "xtick.labelsize": 10.0,
    "ytick.labelsize": 10.0,
}
DPI = 150
_LEGEND_WIDTH, _HANDLE_WIDTH = 76, 6  # characters per line of a legend; characters that a marker takes up
_WITHIN_DECADE = 20.0  # ratio of the ends of a log scale up to which ticks are those of a linear scale


@dataclass(frozen=True)
class RenderedPlot:
    """A plot in both file formats.

    Args:
        svg: SVG file, for the HTML page.
        png: PNG file, for slides and pull requests.
    """

    svg: bytes
    png: bytes


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def render_plot(plot: Plot) -> RenderedPlot:
    """Draw a plot and render it as SVG and PNG.

    Args:
        plot: The plot.

    Raises:
        MissingDependencyError: If matplotlib isn't installed.

    Example:
        >>> plot = Plot("line", "A line", "", lambda axes: axes.plot([0, 1]))
        >>> render_plot(plot).png[1:4], render_plot(plot) == render_plot(plot)
        (b'PNG', True)
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("Plots need matplotlib: pip install 'lightning-ft[report]'.") from error
    with rc_context(STYLE):
        figure = Figure(figsize=plot.size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)  # no window, whichever backend is configured
        axes = figure.subplots()
        plot.draw(axes)
        style_axes(axes)
        escape_unprintable(figure)
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", metadata={"Software": None})
    return RenderedPlot(svg.getvalue(), png.getvalue())


def escape_unprintable(figure: Figure) -> None:
    """Escape characters in the texts of a figure that are invisible or change the direction of the text."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if (shown := printable(text.get_text())) != text.get_text():
            text.set_text(shown)


def style_axes(axes: Axes) -> None:
    """Remove the top and right spines and draw grid lines below the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)


def widen_y(axes: Axes, span: float) -> None:
    """Make the y axis span at least `span`: equal values would be drawn over rounding errors, with an exponent.

    Args:
        axes: Matplotlib axes with everything drawn on them.
        span: Smallest difference between the ends of the axis.
    """
    low, high = axes.get_ylim()
    if high - low < span:
        middle = (low + high) / 2
        axes.set_ylim(middle - span / 2, middle + span / 2)


def set_log_scale(axis: XAxis | YAxis, formatter: Callable[[float], str]) -> None:
    """Set a log scale whose tick labels are plain numbers; matplotlib writes powers of ten.

    Within a decade, where there may be no power of ten at all, ticks are as on a linear scale.

    Args:
        axis: Axis of matplotlib, `axes.xaxis` or `axes.yaxis`.
        formatter: Function that formats the value of a tick.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    class Locator(LogLocator):
        def tick_values(self, vmin: float, vmax: float) -> Any:
            if vmin <= 0 or vmax / vmin > _WITHIN_DECADE:
                return super().tick_values(vmin, vmax)
            return [value for value in MaxNLocator(4).tick_values(vmin, vmax) if value > 0]

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(Locator())
    axis.set_major_formatter(lambda value, _position: formatter(value))
    axis.set_minor_formatter(lambda _value, _position: "")


def add_legend_below(axes: Axes) -> None:
    """Add a legend below the axes and the axis label, where it covers no data; at most one per figure or subfigure."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    rows = -(-sum(len(label) + _HANDLE_WIDTH for label in labels) // _LEGEND_WIDTH)
    axes.figure.legend(
        handles,
        labels,
        ncols=-(-len(labels) // rows),
        frameon=False,
        loc="outside lower center",
        borderaxespad=0.3,
        handlelength=1.4,
        columnspacing=1.3,
    )


class MarkerStyle(NamedTuple):
    """Matplotlib marker and color of the points of an arm or a method."""

    marker: str
    color: str


# The color-blind-safe palette of Okabe and Ito (https://jfly.uni-koeln.de/color/).
PARTS = {
    "system": ("system prompt", "#0072B2"),
    "few_shot": ("examples", "#56B4E9"),
    "template": ("chat template", "#999999"),
    "request": ("request", "#F0E442"),
    "input": ("input", "#0072B2"),
    "answer": ("answer", "#D55E00"),
}
"""Label and color of each part of a request's tokens, from the bottom of a stacked bar to its top."""
_KNOWN = {
    "prompted": MarkerStyle("s", "#0072B2"),
    "untuned": MarkerStyle("o", "#999999"),
    "tuned": MarkerStyle("D", "#D55E00"),
    "lora": MarkerStyle("D", "#D55E00"),
    "full": MarkerStyle("^", "#009E73"),
}
_OTHERS = (
    MarkerStyle("v", "#CC79A7"),
    MarkerStyle("P", "#E69F00"),
    MarkerStyle("X", "#56B4E9"),
    MarkerStyle("<", "#000000"),
    MarkerStyle(">", "#B8A900"),
    MarkerStyle("h", "#7A4B00"),
)


def marker_styles(names: Sequence[str]) -> dict[str, MarkerStyle]:
    """Marker style of each name; common names have the same style in every plot.

    Example:
        >>> marker_styles(["full", "custom"])["custom"]
        MarkerStyle(marker='v', color='#CC79A7')
    """
    others = [name for name in names if name not in _KNOWN]
    return {name: _KNOWN.get(name) or _OTHERS[others.index(name) % len(_OTHERS)] for name in names}


def error_bar(value: float, lo: float, hi: float) -> list[list[float]]:
    """Error bar of matplotlib for an interval: distances below and above the value, at least 0.

    Example:
        >>> error_bar(0.5, 0.25, 0.75)
        [[0.25], [0.25]]
    """
    return [[max(0.0, value - lo)], [max(0.0, hi - value)]]


def draw_marker(
    axes: Axes,
    x: float,
    y: float,
    style: MarkerStyle,
    *,
    xerr: list[list[float]] | None = None,
    yerr: list[list[float]] | None = None,
    label: str | None = None,
) -> None:
    """Draw a single value as a marker with error bars.

    Args:
        axes: Matplotlib axes to draw on.
        x: Position.
        y: Position.
        style: Style of the marker.
        xerr: Horizontal bar, see :func:`error_bar`; None for none.
        yerr: Vertical bar.
        label: Entry in the legend; None for none.
    """
    axes.errorbar(
        [x],
        [y],
        xerr=xerr,
        yerr=yerr,
        fmt=style.marker,
        color=style.color,
        markersize=9,
        capsize=4,
        markeredgecolor="black",
        label=label,
    )
