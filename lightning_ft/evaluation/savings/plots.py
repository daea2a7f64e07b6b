"""Plots of a savings result: tokens by part, quality over tokens per success, and costs with the break-even point."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_ft.document.numbers import format_count
from lightning_ft.document.plotting import (
    DPI,
    PARTS,
    STYLE,
    add_legend_below,
    draw_marker,
    error_bar,
    escape_unprintable,
    marker_styles,
    set_log_scale,
    style_axes,
)
from lightning_ft.errors import MissingDependencyError
from lightning_ft.evaluation.bootstrap import Interval
from lightning_ft.evaluation.savings.result import SavingsResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ORDER = ("prompted", "untuned", "tuned")


def draw_tokens(axes: Axes, result: SavingsResult) -> None:
    """Draw the mean tokens per request of each arm as a bar, stacked by part.

    Args:
        axes: Axes of matplotlib.
        result: Result whose arms are drawn.
    """
    arms = [name for name in _ORDER if name in result.arms]
    columns: dict[str, list[float]] = {}
    for name in arms:
        arm = result.arms[name]
        inputs: dict[str, float] = dict(arm.parts) or {"input": float(sum(arm.input_tokens))}
        for part in PARTS:
            tokens = inputs.get(part, 0) if part != "answer" else sum(arm.output_tokens)
            columns.setdefault(part, []).append(tokens / result.n)
    bottoms = [0.0] * len(arms)
    for part, (label, color) in PARTS.items():
        if any(columns[part]):
            axes.bar(arms, columns[part], 0.6, bottom=bottoms, label=label, color=color, edgecolor="white")
            bottoms = [bottom + height for bottom, height in zip(bottoms, columns[part], strict=True)]
    for x, height in enumerate(bottoms):
        axes.text(x, height, f"{height:,.0f}", ha="center", va="bottom", fontweight="bold")
    axes.set_ylim(0, max(bottoms) * 1.12)
    axes.set_ylabel("tokens per request (mean)")
    axes.set_title("Tokens per request by part")
    add_legend_below(axes)


@dataclass(frozen=True)
class Arm:
    """Quality and tokens per success of one arm.

    Args:
        quality: Mean score.
        per_success: Tokens per success; infinite if all scores are 0.
    """

    quality: Interval
    per_success: Interval


def draw_quality(axes: Axes, arms: Mapping[str, Arm], confidence: float = 0.95) -> None:
    """Draw the quality of each arm over its tokens per success, as a point with error bars.

    Args:
        axes: Axes of matplotlib.
        arms: Arms by name.
        confidence: Confidence level of the intervals.
    """
    ends = [end for arm in arms.values() for end in (arm.per_success.value, arm.per_success.lo, arm.per_success.hi)]
    finite = [end for end in ends if math.isfinite(end)]
    low, high = (min(finite), max(finite)) if finite else (1.0, 1.0)
    wide = high > 20 * low
    edge = high * (3 if wide else 1.25)  # x of an arm without success
    look = marker_styles(list(arms))
    for name, arm in arms.items():
        x, y, mark = arm.per_success, arm.quality, look[name]
        succeeded = math.isfinite(x.value)
        draw_marker(
            axes,
            x.value if succeeded else edge,
            y.value,
            mark,
            xerr=error_bar(x.value, x.lo, min(x.hi, edge * 2)) if succeeded else None,
            yerr=error_bar(y.value, y.lo, y.hi),
            label=name if succeeded else f"{name} (no success)",
        )
    if not all(map(math.isfinite, ends)):
        high = edge
    if wide:
        set_log_scale(axes.xaxis, "{:,.0f}".format)
        axes.set_xlim(low / 2, high * 2)
    else:
        axes.set_xlim(0, high * 1.1)
    if not finite:  # no arm has a success, so the axis has no numbers
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no answer was right", transform=axes.transAxes, ha="center", color="#555555")
    axes.set_ylim(-0.04, 1.08)
    axes.set_xlabel("tokens per success" + (" (log scale)" if wide else "") + ", fewer is better")
    axes.set_ylabel(f"quality (mean score, {confidence:.0%} interval)")
    axes.set_title("Quality over tokens per success")
    add_legend_below(axes)


Caching = Literal["cached", "uncached"]
_NUM_POINTS = 60
_TITLES = {"cached": "Cost with prefix caching", "uncached": "Cost without prefix caching"}


def draw_cost(axes: Axes, result: SavingsResult, caching: Caching, break_even: Interval) -> None:
    """Draw the costs of both arms over the number of requests, with break-even as a line and its interval as a band.

    Args:
        axes: Axes of matplotlib.
        result: Result with costs.
        caching: ``cached`` to price the common prefix of all requests as cached tokens, or ``uncached``.
        break_even: Number of requests after which training has paid off; infinite if it never does.
    """
    assert result.costs is not None
    prices = result.costs.prices
    prompted, tuned = getattr(result.costs, f"prompted_{caching}"), getattr(result.costs, f"tuned_{caching}")
    first, last = _range(break_even, prices.invested, max(prompted, tuned))
    volumes = [first * (last / first) ** (k / (_NUM_POINTS - 1)) for k in range(_NUM_POINTS)]
    look = marker_styles(["prompted", "tuned"])
    axes.plot(volumes, [prompted * x for x in volumes], color=look["prompted"].color, linewidth=2.2, label="prompted")
    axes.plot(
        volumes,
        [prices.invested + tuned * x for x in volumes],
        color=look["tuned"].color,
        linewidth=2.2,
        linestyle="--",
        label=f"tuned, with {prices.invested:,.2f} {prices.currency} invested" if prices.invested else "tuned",
    )
    level = f"{result.confidence:.0%}"
    if prices.invested and break_even.lo < last:
        axes.axvspan(
            break_even.lo,
            min(break_even.hi, last),
            color="#009E73",
            alpha=0.22,
            linewidth=0,
            label=f"break-even, {level} interval",
        )
        if math.isfinite(break_even.value):
            axes.axvline(break_even.value, color="#00664B", linewidth=1.4, label="break-even")
    set_log_scale(axes.xaxis, _thousands)
    set_log_scale(axes.yaxis, lambda money: f"{money:,.0f}" if money >= 1 else f"{money:g}")
    axes.set_xlim(first, last)
    axes.set_xlabel("requests (log scale)")
    axes.set_ylabel(f"cost in {prices.currency} (log scale)")
    axes.set_title(f"{_TITLES[caching]}\n{_verdict(break_even, prices.invested)}")
    add_legend_below(axes)


def _verdict(break_even: Interval, invested: float) -> str:
    if math.isinf(break_even.value):
        return "no break-even: a tuned request isn't cheaper"
    if not invested:
        return "nothing invested: cheaper from the first request"
    return f"break-even after {format_count(break_even.value)} requests"


def _range(break_even: Interval, invested: float, per_request: float) -> tuple[float, float]:
    """Range of the number of requests: decades around break-even, or around the number that costs the investment."""
    middle = break_even.value
    if not (math.isfinite(middle) and middle > 0):
        middle = invested / per_request if invested and per_request else 1e4
    finite = [end for end in (break_even.lo, break_even.hi) if math.isfinite(end) and end > 0]
    low, high = min([middle, *finite]), max([middle, *finite])
    return 10.0 ** math.floor(math.log10(low) - 1), 10.0 ** math.ceil(math.log10(high) + 1)


def _thousands(value: float) -> str:
    """Format a large number with a suffix.

    Example:
        >>> _thousands(2e6), _thousands(1e4), _thousands(5.0)
        ('2M', '10k', '5')
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def plot_savings(result: SavingsResult, path: Path) -> None:
    """Plot a result to a PNG file.

    Args:
        result: The result.
        path: Path of the PNG file.

    Raises:
        MissingDependencyError: If matplotlib isn't installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("Plots need matplotlib: pip install 'lightning-ft[report]'.") from error
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 5.4), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)  # no window, whichever backend is configured
        headline = "\n".join(textwrap.wrap(result.headline, 100))
        figure.suptitle(headline, fontsize=12, fontweight="bold", color="#00664B" if result.gate.passed else "#A33B00")
        parts: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1))
        left, right = (part.subplots() for part in parts)
        draw_tokens(left, result)
        draw_quality(right, {name: _arm(result, name) for name in _ORDER if name in result.arms}, result.confidence)
        for axes in (left, right):
            style_axes(axes)
        escape_unprintable(figure)
        figure.savefig(path, format="png", metadata={"Software": None})  # no version in the file: it is reproducible


def _arm(result: SavingsResult, name: str) -> Arm:
    tokens = result.arms[name].tokens_per_success
    return Arm(result.quality[name], Interval(tokens, tokens, tokens))
