"""A result as one picture: where the tokens of a request go, and quality against tokens per success."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from lightning_ft.errors import MissingDependencyError
from lightning_ft.functional.result import SavingsResult

# Okabe and Ito's colours, told apart with every kind of colour vision (https://jfly.uni-koeln.de/color/).
_PARTS = {
    "system": ("system prompt", "#0072B2"),
    "few_shot": ("examples", "#56B4E9"),
    "template": ("chat template", "#999999"),
    "request": ("request", "#F0E442"),
    "input": ("input", "#0072B2"),
    "answer": ("answer", "#D55E00"),
}
_ARMS = {"prompted": ("s", "#0072B2"), "untuned": ("o", "#999999"), "tuned": ("D", "#D55E00")}
_LEGEND: dict[str, Any] = {  # below the axes, where it covers nothing
    "frameon": False,
    "loc": "upper center",
    "bbox_to_anchor": (0.5, -0.12),
    "handlelength": 1.2,
    "columnspacing": 1.2,
    "fontsize": 9,
}
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
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("Pictures need matplotlib: pip install 'lightning-ft[report]'.") from error
    figure = Figure(figsize=(11, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever matplotlib is set to
    headline = "\n".join(textwrap.wrap(result.headline, 105))
    figure.suptitle(headline, fontsize=12, fontweight="bold", color="#00664B" if result.gate.passed else "#A33B00")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_tokens(left, result)
    _draw_quality(right, result)
    figure.savefig(path, metadata={"Software": None})  # the same result, the same file


def _draw_tokens(axes: Any, result: SavingsResult) -> None:
    arms = [name for name in _ORDER if name in result.arms]
    columns: dict[str, list[float]] = {}
    for name in arms:
        arm = result.arms[name]
        inputs: dict[str, float] = dict(arm.parts) or {"input": float(sum(arm.input_tokens))}
        for part in _PARTS:
            tokens = inputs.get(part, 0) if part != "answer" else sum(arm.output_tokens)
            columns.setdefault(part, []).append(tokens / result.n)
    bottoms = [0.0] * len(arms)
    for part, (label, colour) in _PARTS.items():
        if any(columns[part]):
            axes.bar(arms, columns[part], 0.6, bottom=bottoms, label=label, color=colour, edgecolor="white")
            bottoms = [bottom + height for bottom, height in zip(bottoms, columns[part], strict=True)]
    for place, height in enumerate(bottoms):
        axes.text(place, height, f"{height:,.0f}", ha="center", va="bottom", fontweight="bold")
    axes.set_ylim(0, max(bottoms) * 1.12)
    axes.set_ylabel("tokens per request (mean)")
    axes.set_title("Where the tokens of a request go", fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles, labels, ncols=5, **_LEGEND)
    _tidy(axes)


def _draw_quality(axes: Any, result: SavingsResult) -> None:
    costs = {name: result.arms[name].tokens_per_success for name in _ORDER if name in result.arms}
    finite = [cost for cost in costs.values() if math.isfinite(cost)]
    logarithmic = max(finite) > 20 * min(finite)
    edge = max(finite) * (3 if logarithmic else 1.25)  # where an arm without a success is drawn
    for name, cost in costs.items():
        interval, (marker, colour) = result.quality[name], _ARMS[name]
        x, y = (cost if math.isfinite(cost) else edge), interval.value
        spread = [[max(0.0, y - interval.lo)], [max(0.0, interval.hi - y)]]
        label = name if math.isfinite(cost) else f"{name} (no success)"
        axes.errorbar(
            [x],
            [y],
            yerr=spread,
            fmt=marker,
            color=colour,
            markersize=9,
            capsize=4,
            label=label,
            markeredgecolor="black",
        )
    low, high = min([*finite, edge * 0.999]), edge
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(low / 2, high * 2)
    else:
        axes.set_xlim(0, high * 1.1)
    axes.set_ylim(-0.04, 1.08)
    axes.set_xlabel("tokens per success" + (" (log scale)" if logarithmic else "") + ", fewer is better")
    axes.set_ylabel(f"quality (mean score, {result.confidence:.0%} interval)")
    axes.set_title("Quality against tokens per success", fontsize=11)
    axes.legend(ncols=3, **_LEGEND)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
