"""What was forgotten against what was gained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ft.functional.bootstrap import Interval
from lightning_ft.report.figures.canvas import legend_below
from lightning_ft.report.figures.marks import marks, spread


@dataclass(frozen=True)
class Tradeoff:
    """One run.

    Args:
        name: Of its method; runs of one method look the same.
        forgotten: KL of base to tuned on general texts, in nats a token.
        gained: Quality over that of the untuned model.
        lower_bound: Whether the KL is a lower bound.
    """

    name: str
    forgotten: Interval
    gained: Interval
    lower_bound: bool = False


def draw_forgetting(axes: Any, runs: Sequence[Tradeoff]) -> None:
    """A point for each run: further left has forgotten less, further up has learnt more.

    Args:
        axes: Of matplotlib.
        runs: At least one.
    """
    look = marks(list(dict.fromkeys(run.name for run in runs)))
    named: set[str] = set()
    for run in runs:
        x, y, mark = run.forgotten, run.gained, look[run.name]
        bound = " (KL: lower bound)" if run.lower_bound else ""
        label = f"{run.name}{bound}"
        axes.errorbar(
            [x.value],
            [y.value],
            xerr=spread(x.value, x.lo, x.hi),
            yerr=spread(y.value, y.lo, y.hi),
            fmt=mark.marker,
            color=mark.colour,
            markersize=9,
            capsize=4,
            markeredgecolor="black",
            label=None if label in named else label,
        )
        named.add(label)
    axes.axhline(0, color="#555555", linewidth=1)
    axes.set_xlim(left=0)
    axes.margins(0.12)
    axes.set_xlabel("forgotten: KL on general text (nats per token), less is better")
    axes.set_ylabel("quality gained over the untuned model")
    axes.set_title("What was forgotten against what was gained")
    legend_below(axes)
