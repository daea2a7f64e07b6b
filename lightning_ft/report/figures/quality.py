"""Quality against tokens per success."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_ft.functional.bootstrap import Interval
from lightning_ft.report.figures.canvas import legend_below, logarithmic
from lightning_ft.report.figures.marks import marks, spread


@dataclass(frozen=True)
class Arm:
    """One arm.

    Args:
        quality: Mean score.
        per_success: Tokens of all attempts for each success; infinite where nothing succeeded.
    """

    quality: Interval
    per_success: Interval


def draw_quality(axes: Any, arms: Mapping[str, Arm], confidence: float = 0.95) -> None:
    """A point for each arm: further left costs less, further up is right more often.

    Args:
        axes: Of matplotlib.
        arms: By name; at least one of them succeeded.
        confidence: Of the intervals.
    """
    across = [end for arm in arms.values() for end in (arm.per_success.value, arm.per_success.lo, arm.per_success.hi)]
    finite = [end for end in across if math.isfinite(end)]
    low, high = min(finite), max(finite)
    wide = high > 20 * low
    edge = high * (3 if wide else 1.25)  # where an arm without a success is drawn
    look = marks(list(arms))
    for name, arm in arms.items():
        x, y, mark = arm.per_success, arm.quality, look[name]
        succeeded = math.isfinite(x.value)
        axes.errorbar(
            [x.value if succeeded else edge],
            [y.value],
            xerr=spread(x.value, x.lo, min(x.hi, edge * 2)) if succeeded else None,
            yerr=spread(y.value, y.lo, y.hi),
            fmt=mark.marker,
            color=mark.colour,
            markersize=9,
            capsize=4,
            label=name if succeeded else f"{name} (no success)",
            markeredgecolor="black",
        )
    if not all(map(math.isfinite, across)):
        high = edge
    if wide:
        logarithmic(axes.xaxis, "{:,.0f}".format)
        axes.set_xlim(low / 2, high * 2)
    else:
        axes.set_xlim(0, high * 1.1)
    axes.set_ylim(-0.04, 1.08)
    axes.set_xlabel("tokens per success" + (" (log scale)" if wide else "") + ", fewer is better")
    axes.set_ylabel(f"quality (mean score, {confidence:.0%} interval)")
    axes.set_title("Quality against tokens per success")
    legend_below(axes)
