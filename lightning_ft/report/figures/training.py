"""Quality over the operations of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_ft.report.figures.canvas import legend_below, logarithmic
from lightning_ft.report.figures.marks import marks
from lightning_ft.report.numbers import scaled


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
            color=look[curve.name].colour,
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
