"""Quality over training rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_ft.functional.bootstrap import Interval
from lightning_ft.report.figures.canvas import legend_below, logarithmic
from lightning_ft.report.figures.marks import marks


def draw_learning_curve(axes: Any, curves: Mapping[str, Mapping[int, Interval]], lines: Mapping[str, Interval]) -> None:
    """Quality over the number of training rows.

    Args:
        axes: Of matplotlib.
        curves: By method and rows.
        lines: Quality of what isn't trained, drawn as levels.
    """
    look = marks([*curves, *lines])
    sizes = sorted({size for curve in curves.values() for size in curve})
    for place, (name, curve) in enumerate(curves.items()):
        shift = 1 + 0.03 * (place - (len(curves) - 1) / 2)  # so that intervals at one size don't cover each other
        xs, ys = [size * shift for size in curve], list(curve.values())
        down_up = [[max(0.0, i.value - i.lo) for i in ys], [max(0.0, i.hi - i.value) for i in ys]]
        axes.errorbar(
            xs,
            [i.value for i in ys],
            yerr=down_up,
            fmt=f"{look[name].marker}-",
            color=look[name].colour,
            markersize=8,
            capsize=4,
            markeredgecolor="black",
            label=name,
        )
    for name, interval in lines.items():
        axes.axhline(interval.value, color=look[name].colour, linewidth=1.8, linestyle="--", label=name)
    logarithmic(axes.xaxis, "{:,.0f}".format)
    axes.set_xticks(sizes)
    axes.set_ylim(-0.04, 1.05)
    axes.set_xlabel("training rows (log scale)")
    axes.set_ylabel("quality on test requests")
    axes.set_title("How many rows it needs")
    legend_below(axes)
