"""Quality of methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_ft.functional.bootstrap import Interval
from lightning_ft.report.figures.canvas import legend_below
from lightning_ft.report.figures.marks import marks, spread


def draw_methods(axes: Any, quality: Mapping[str, Interval], seeds: Mapping[str, Sequence[float]]) -> None:
    """Quality of each method with its interval, and each seed as a dot below.

    Args:
        axes: Of matplotlib.
        quality: By method, drawn from top to bottom.
        seeds: Each seed's quality by method; may lack methods.
    """
    names, look = list(quality), marks(list(quality))
    for row, name in enumerate(names):
        interval, mark = quality[name], look[name]
        axes.errorbar(
            [interval.value],
            [row],
            xerr=spread(interval.value, interval.lo, interval.hi),
            fmt=mark.marker,
            color=mark.colour,
            markersize=9,
            capsize=4,
            markeredgecolor="black",
        )
        axes.annotate(
            f"{interval.value:.3f}", (interval.value, row), (0, 9), textcoords="offset points", ha="center", fontsize=10
        )
        own = list(seeds.get(name, ()))
        if len(own) > 1:
            axes.plot(own, [row + 0.22] * len(own), ".", color="black", markersize=6, alpha=0.7)
    if any(len(found) > 1 for found in seeds.values()):
        axes.plot([], [], ".", color="black", alpha=0.7, label="a seed by itself")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.65)
    axes.set_xlim(-0.03, 1.06)
    axes.set_xlabel("quality on test requests (mean score, with interval)")
    axes.set_title("Quality by method")
    legend_below(axes)
