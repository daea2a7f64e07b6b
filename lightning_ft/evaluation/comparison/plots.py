"""Plots of a comparison: quality, learning curves, and resources relative to full fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_ft.document.numbers import format_number, format_si
from lightning_ft.document.plotting import add_legend_below, draw_marker, error_bar, marker_styles, set_log_scale
from lightning_ft.evaluation.bootstrap import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_learning_curve(
    axes: Axes, curves: Mapping[str, Mapping[int, Interval]], baselines: Mapping[str, Interval]
) -> None:
    """Draw quality against the number of training rows.

    Args:
        axes: Matplotlib axes to draw on.
        curves: Quality by method and number of training rows.
        baselines: Quality of the untrained arms by name, drawn as horizontal lines.
    """
    styles = marker_styles([*curves, *baselines])
    sizes = sorted({size for curve in curves.values() for size in curve})
    for index, (name, curve) in enumerate(curves.items()):
        shift = 1 + 0.03 * (index - (len(curves) - 1) / 2)  # so that intervals at one size don't cover each other
        xs, ys = [size * shift for size in curve], list(curve.values())
        down_up = [[max(0.0, i.value - i.lo) for i in ys], [max(0.0, i.hi - i.value) for i in ys]]
        axes.errorbar(
            xs,
            [i.value for i in ys],
            yerr=down_up,
            fmt=f"{styles[name].marker}-",
            color=styles[name].color,
            markersize=8,
            capsize=4,
            markeredgecolor="black",
            label=name,
        )
    for name, interval in baselines.items():
        axes.axhline(interval.value, color=styles[name].color, linewidth=1.8, linestyle="--", label=name)
    set_log_scale(axes.xaxis, "{:,.0f}".format)
    axes.set_xticks(sizes)
    axes.set_ylim(-0.04, 1.05)
    axes.set_xlabel("training rows (log scale)")
    axes.set_ylabel("quality on test requests")
    axes.set_title("Quality by number of training rows")
    add_legend_below(axes)


def draw_methods(axes: Axes, quality: Mapping[str, Interval], seeds: Mapping[str, Sequence[float]]) -> None:
    """Draw the quality of each method with its interval, and each seed as a dot below it.

    Args:
        axes: Matplotlib axes to draw on.
        quality: Quality by method, drawn from top to bottom.
        seeds: Quality of each seed by method; methods may be missing.
    """
    names, styles = list(quality), marker_styles(list(quality))
    for row, name in enumerate(names):
        interval, style = quality[name], styles[name]
        bar = error_bar(interval.value, interval.lo, interval.hi)
        draw_marker(axes, interval.value, row, style, xerr=bar)
        axes.annotate(
            f"{interval.value:.3f}", (interval.value, row), (0, 9), textcoords="offset points", ha="center", fontsize=10
        )
        own = list(seeds.get(name, ()))
        if len(own) > 1:
            axes.plot(own, [row + 0.22] * len(own), ".", color="black", markersize=6, alpha=0.7)
    if any(len(found) > 1 for found in seeds.values()):
        axes.plot([], [], ".", color="black", alpha=0.7, label="single seed")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.65)
    axes.set_xlim(-0.03, 1.06)
    axes.set_xlabel("quality on test requests (mean score, with interval)")
    axes.set_title("Quality by method")
    add_legend_below(axes)


RESOURCES = {
    "flops": "training FLOPs",
    "seconds": "training time",
    "peak_memory": "peak memory",
    "trainable_parameters": "trainable parameters",
    "checkpoint_bytes": "checkpoint size",
    "flops_to_95": "FLOPs to 95%\nof full's quality",
    "seconds_to_95": "time to 95%\nof full's quality",
}
"""Label of each resource, in the order in which they are drawn."""


def draw_resources(axes: Axes, ratios: Mapping[str, Mapping[str, Interval]]) -> None:
    """Draw each resource of each method as a multiple of full fine-tuning's.

    Args:
        axes: Matplotlib axes to draw on.
        ratios: Ratios to full fine-tuning by method and name; only those of :data:`RESOURCES` are drawn.
    """
    rows = [name for name in RESOURCES if any(name in found for found in ratios.values())]
    styles, methods = marker_styles(list(ratios)), list(ratios)
    finite = [
        end
        for found in ratios.values()
        for name in rows
        if name in found
        for end in (found[name].value, found[name].lo, found[name].hi)
        if math.isfinite(end) and end > 0
    ]
    low, high = min([*finite, 0.9]), max([*finite, 1.1])
    edge = high * 2.2  # position of ratios that are infinite
    step = 0.62 / max(1, len(methods))
    named: set[str] = set()
    for index, method in enumerate(methods):
        style = styles[method]
        for row, name in enumerate(rows):
            interval = ratios[method].get(name)
            if interval is None or interval.value <= 0:
                continue
            y = row + (index - (len(methods) - 1) / 2) * step
            reached = math.isfinite(interval.value)
            x = interval.value if reached else edge
            sideways = error_bar(x, interval.lo, interval.hi if math.isfinite(interval.hi) else edge)
            axes.errorbar(
                [x],
                [y],
                xerr=sideways if reached else None,
                fmt=style.marker,
                color=style.color,
                markersize=8,
                capsize=3,
                markeredgecolor="black",
                label=None if method in named else method,
            )
            named.add(method)
            text = _ratio(interval.value) if reached else "never"
            less = reached and interval.value <= 1  # then the text is on the left, away from the line at 1
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
    set_log_scale(axes.xaxis, _ratio)
    axes.set_xlim(low / 8, edge * 3)
    axes.set_yticks(range(len(rows)), [RESOURCES[name] for name in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("multiple of full fine-tuning (log scale), lower is better")
    axes.set_title("Resources relative to full fine-tuning")
    add_legend_below(axes)


def _ratio(value: float) -> str:
    """Format a multiple as a label.

    Example:
        >>> _ratio(0.0123), _ratio(0.7142), _ratio(12.0)
        ('0.0123x', '0.714x', '12x')
    """
    return f"{format_number(value)}x"


@dataclass(frozen=True)
class TrainingCurve:
    """Quality of one run during training.

    Args:
        name: Name of its method.
        flops: Floating-point operations of training so far, at each point.
        quality: Quality on the validation rows, at each point.
    """

    name: str
    flops: tuple[float, ...]
    quality: tuple[float, ...]


def draw_training(axes: Axes, curves: Sequence[TrainingCurve]) -> None:
    """Draw quality against training FLOPs, with a line for each run.

    Args:
        axes: Matplotlib axes to draw on.
        curves: Curve of each run; at least one.
    """
    styles = marker_styles(list(dict.fromkeys(curve.name for curve in curves)))
    named: set[str] = set()
    for curve in curves:
        points = [(x, y) for x, y in zip(curve.flops, curve.quality, strict=True) if x > 0]  # 0 has no logarithm
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            f"{styles[curve.name].marker}-",
            color=styles[curve.name].color,
            markersize=5,
            linewidth=1.4,
            alpha=0.85,
            label=None if curve.name in named else curve.name,
        )
        named.add(curve.name)
    set_log_scale(axes.xaxis, lambda flops: format_si(flops, "FLOP"))
    axes.set_ylim(-0.04, 1.05)
    axes.set_xlabel("training FLOPs so far (log scale)")
    axes.set_ylabel("quality on validation rows")
    axes.set_title("Quality during training")
    add_legend_below(axes)
