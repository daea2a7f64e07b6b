"""What methods take of full fine-tuning's resources."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ft.document.canvas import legend_below, logarithmic, marks, spread
from lightning_ft.document.numbers import scaled
from lightning_ft.evaluation.bootstrap import Interval


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
            color=look[name].color,
            markersize=8,
            capsize=4,
            markeredgecolor="black",
            label=name,
        )
    for name, interval in lines.items():
        axes.axhline(interval.value, color=look[name].color, linewidth=1.8, linestyle="--", label=name)
    logarithmic(axes.xaxis, "{:,.0f}".format)
    axes.set_xticks(sizes)
    axes.set_ylim(-0.04, 1.05)
    axes.set_xlabel("training rows (log scale)")
    axes.set_ylabel("quality on test requests")
    axes.set_title("How many rows it needs")
    legend_below(axes)


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
            color=mark.color,
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
                color=mark.color,
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


@dataclass(frozen=True)
class Curve:
    """Quality on the way of one run.

    Args:
        name: Of its method.
        flops: Operations so far, at each point.
        quality: On the validation rows, at each point.
    """

    name: str
    flops: tuple[float, ...]
    quality: tuple[float, ...]


def draw_training(axes: Any, curves: Sequence[Curve]) -> None:
    """Quality over operations of training, a line for each run.

    Args:
        axes: Of matplotlib.
        curves: At least one.
    """
    look = marks(list(dict.fromkeys(curve.name for curve in curves)))
    named: set[str] = set()
    for curve in curves:
        points = [(x, y) for x, y in zip(curve.flops, curve.quality, strict=True) if x > 0]  # 0 has no logarithm
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            f"{look[curve.name].marker}-",
            color=look[curve.name].color,
            markersize=5,
            linewidth=1.4,
            alpha=0.85,
            label=None if curve.name in named else curve.name,
        )
        named.add(curve.name)
    logarithmic(axes.xaxis, lambda flops: scaled(flops, "FLOP"))
    axes.set_ylim(-0.04, 1.05)
    axes.set_xlabel("operations of training so far (log scale)")
    axes.set_ylabel("quality on validation rows")
    axes.set_title("What training bought on the way")
    legend_below(axes)
