"""Where the tokens of a request go."""

from __future__ import annotations

from typing import Any

from lightning_ft.functional.result import SavingsResult
from lightning_ft.report.figures.canvas import legend_below
from lightning_ft.report.figures.marks import PARTS

_ORDER = ("prompted", "untuned", "tuned")


def draw_tokens(axes: Any, result: SavingsResult) -> None:
    """A bar for each arm, from system prompt to answer.

    Args:
        axes: Of matplotlib.
        result: Whose arms.
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
    for part, (label, colour) in PARTS.items():
        if any(columns[part]):
            axes.bar(arms, columns[part], 0.6, bottom=bottoms, label=label, color=colour, edgecolor="white")
            bottoms = [bottom + height for bottom, height in zip(bottoms, columns[part], strict=True)]
    for place, height in enumerate(bottoms):
        axes.text(place, height, f"{height:,.0f}", ha="center", va="bottom", fontweight="bold")
    axes.set_ylim(0, max(bottoms) * 1.12)
    axes.set_ylabel("tokens per request (mean)")
    axes.set_title("Where the tokens of a request go")
    legend_below(axes)
