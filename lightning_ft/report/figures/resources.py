"""What methods take of full fine-tuning's resources."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_ft.functional.bootstrap import Interval
from lightning_ft.report.figures.canvas import legend_below, logarithmic
from lightning_ft.report.figures.marks import marks, spread

RESOURCES = {
    "flops": "training FLOPs",
    "seconds": "training time",
    "peak_memory": "peak memory",
    "trainable_parameters": "trainable parameters",
    "checkpoint_bytes": "checkpoint size",
    "flops_to_95": "FLOPs to 95%\nof full's quality",
    "seconds_to_95": "time to 95%\nof full's quality",
}
"""What each ratio is of, in the order in which they are drawn."""


def draw_resources(axes: Any, ratios: Mapping[str, Mapping[str, Interval]]) -> None:
    """Each resource of each method as a multiple of full fine-tuning's.

    Args:
        axes: Of matplotlib.
        ratios: By method and figure; others than :data:`RESOURCES` are left out.
    """
    rows = [name for name in RESOURCES if any(name in found for found in ratios.values())]
    look, methods = marks(list(ratios)), list(ratios)
    finite = [
        end
        for found in ratios.values()
        for name in rows
        if name in found
        for end in (found[name].value, found[name].lo, found[name].hi)
        if math.isfinite(end) and end > 0
    ]
    low, high = min([*finite, 0.9]), max([*finite, 1.1])
    edge = high * 2.2  # where what was never reached is drawn
    step = 0.62 / max(1, len(methods))
    named: set[str] = set()
    for place, method in enumerate(methods):
        mark = look[method]
        for row, name in enumerate(rows):
            interval = ratios[method].get(name)
            if interval is None or interval.value <= 0:
                continue
            y = row + (place - (len(methods) - 1) / 2) * step
            reached = math.isfinite(interval.value)
            x = interval.value if reached else edge
            sideways = spread(x, interval.lo, interval.hi if math.isfinite(interval.hi) else edge)
            axes.errorbar(
                [x],
                [y],
                xerr=sideways if reached else None,
                fmt=mark.marker,
                color=mark.colour,
                markersize=8,
                capsize=3,
                markeredgecolor="black",
                label=None if method in named else method,
            )
            named.add(method)
            text = _ratio(interval.value) if reached else "never"
            less = reached and interval.value <= 1  # then the text stands on the side that the line at 1 isn't on
            end = interval.lo if less else interval.hi if math.isfinite(interval.hi) and reached else x
            axes.annotate(
                text,
                (end, y),
                (-9 if less else 9, 0),
                textcoords="offset points",
                ha="right" if less else "left",
                va="center",
                fontsize=10,
            )
    axes.axvline(1, color="#009E73", linewidth=1.6, label="full fine-tuning")
    logarithmic(axes.xaxis, _ratio)
    axes.set_xlim(low / 8, edge * 3)
    axes.set_yticks(range(len(rows)), [RESOURCES[name] for name in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("multiple of full fine-tuning (log scale), less is better")
    axes.set_title("What it takes, relative to full fine-tuning")
    legend_below(axes)


def _ratio(value: float) -> str:
    """A multiple as a label.

    Example:
        >>> _ratio(0.0123), _ratio(0.7142), _ratio(12.0)
        ('0.0123x', '0.714x', '12x')
    """
    return f"{value:.3g}x"
