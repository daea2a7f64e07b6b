"""Report sections on retention: facts, a table, and a plot of forgetting against gain."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lightning_ft.document.blocks import Block, Fact, Plot, Table, runs_table
from lightning_ft.document.numbers import finite, format_number
from lightning_ft.document.plotting import MarkerStyle, add_legend_below, draw_marker, error_bar, marker_styles, widen_y
from lightning_ft.evaluation.bootstrap import Interval, format_interval, format_range

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_ft.evaluation.retention.arithmetic import RetentionResult
    from lightning_ft.evaluation.retention.frontier import FrontierResult

_COMPARED = {
    "adapter_off": "adapter off",
    "step_0": "step 0",
    "model": "second model",
}


def retention_facts(result: RetentionResult) -> tuple[Fact, ...]:
    """Build the fact on the change of perplexity on general text."""
    rise = Interval(*(end - 1 for end in (result.ppl_ratio.value, result.ppl_ratio.lo, result.ppl_ratio.hi)))
    return (
        Fact(
            "change of perplexity on general text",
            finite("{:+.1%}")(rise.value),
            f"95% interval {format_range(rise, finite('{:+.1%}'))}; "
            f"same next token at {result.top1_agreement.value:.1%} of positions",
        ),
    )


def retention_table(results: Mapping[str, RetentionResult]) -> tuple[Block, ...]:
    """Build the table of all runs.

    Args:
        results: Results by the name of the run; at least one.
    """
    values = list(results.values())

    def row(label: str, cells: Sequence[str]) -> tuple[str, ...]:
        return (label, *cells)

    rows = [
        row(
            "KL on general text, nats per token",
            [("at least " if r.lower_bound else "") + format_interval(r.kl_general, finite("{:.4f}")) for r in values],
        ),
        row("perplexity, tuned over base", [format_interval(r.ppl_ratio, finite("{:.3f}")) for r in values]),
        row("same most likely token", [format_interval(r.top1_agreement, finite("{:.1%}")) for r in values]),
        row(
            "KL on task answers, nats per token",
            [
                "not measured"
                if r.kl_task is None
                else ("at least " if r.lower_bound else "") + format_interval(r.kl_task, finite("{:.4f}"))
                for r in values
            ],
        ),
        row("compared with", [_COMPARED.get(r.base, r.base) for r in values]),
        row("general texts", [f"{r.texts:,} ({r.tokens:,} tokens)" for r in values]),
        row("task answers", [f"{r.task_rows:,} ({r.task_tokens:,} tokens)" for r in values]),
    ]
    for name in dict.fromkeys(name for r in values for name in r.choices):
        answered = [r.choices.get(name) for r in values]
        rows += [
            row(
                f"{name} questions correct ({next(a.questions for a in answered if a):,}; chance "
                f"{next(a.chance for a in answered if a):.0%}), base to tuned",
                ["not measured" if a is None else f"{a.base.value:.1%} to {a.tuned.value:.1%}" for a in answered],
            ),
            row(
                f"{name} questions, points lost",
                [
                    "not measured" if a is None else format_interval(a.lost, lambda x: f"{100 * x:+.1f}")
                    for a in answered
                ],
            ),
        ]
    return runs_table(list(results), rows, "Intervals are 95%, over texts or questions")


def forgetting_blocks(runs: Sequence[Tradeoff], name: str = "forgetting") -> tuple[Block, ...]:
    """Build the plot of forgetting against gain.

    Args:
        runs: Runs to draw; may be empty.
        name: Name of the plot.
    """
    infinite = [run.name for run in runs if not math.isfinite(run.forgotten.value)]
    runs = [run for run in runs if math.isfinite(run.forgotten.value)]
    left_out = f"Not drawn, since its KL is infinite: {', '.join(infinite)}." if infinite else ""
    if not runs:
        return (left_out,) if left_out else ()
    seen = "; ".join(
        f"{run.name}: KL {run.forgotten.value:.4f}, quality gained {run.gained.value:+.3f}" for run in runs
    )
    note = " If a KL is marked as a lower bound, more may have been forgotten." if _any_lower_bound(runs) else ""
    return (
        Plot(
            name,
            f"What was forgotten against what was gained. {seen}.",
            "A point for each run. The upper left is best: much learned, little forgotten. Bars are 95% intervals: "
            f"horizontally over texts, vertically over requests.{note}",
            partial(draw_forgetting, runs=runs),
        ),
        *([left_out] if left_out else []),
    )


def frontier_blocks(result: FrontierResult, of: str = "") -> tuple[Block, ...]:
    """Build the sentence, plot and table of a retention frontier.

    Args:
        result: The frontier.
        of: Name of its run, where there are several.
    """
    seen = "; ".join(
        f"scale {p.scale:g}: quality {p.quality.value:.3f}, KL {format_number(p.retention.kl_general.value)}"
        for p in result.points
    )
    slug = re.sub(r"[^a-z0-9]+", "-", of.lower()).strip("-")
    rows = tuple(
        (
            f"{point.scale:g}{', chosen' if point.scale == result.chosen else ''}",
            format_interval(point.quality, finite("{:.3f}")),
            ("at least " if point.retention.lower_bound else "")
            + format_interval(point.retention.kl_general, finite("{:.4f}")),
            format_interval(point.retention.ppl_ratio, finite("{:.3f}")),
        )
        for point in result.points
    )
    columns = ("scale of the update", "quality", "KL on general text, nats per token", "perplexity, tuned over base")
    return (
        f"{of}: {result.headline}" if of else result.headline,
        Plot(
            f"frontier{'-' if slug else ''}{slug}",
            f"Quality against forgetting by scale of the update. {seen}.",
            "One training, several scales of what it changed: 1 is the trained model, smaller ones are closer to the "
            "original. The upper left is best. Bars are 95% intervals.",
            partial(draw_frontier, result=result),
        ),
        Table(columns, rows, f"Quality is the mean score of {result.requests:,} validation requests"),
    )


def draw_frontier(axes: Axes, result: FrontierResult) -> None:
    """Draw quality against KL over the scales, with the budget and the choice.

    Args:
        axes: Matplotlib axes to draw on.
        result: The frontier.
    """
    kl = [point.retention.kl_general for point in result.points]
    quality = [point.quality for point in result.points]
    axes.plot([i.value for i in kl], [i.value for i in quality], color="#555555", linewidth=1)
    styles = marker_styles(["scale of the update", "chosen"])
    for x, y, point in zip(kl, quality, result.points, strict=True):
        chosen = point.scale == result.chosen
        style = styles["chosen" if chosen else "scale of the update"]
        _draw_point(axes, x, y, style, "chosen" if chosen else None)
        axes.annotate(f"{point.scale:g}", (x.value, y.value), textcoords="offset points", xytext=(6, 6))
    if "kl" in result.budget:
        axes.axvline(result.budget["kl"], color="#555555", linestyle="--", linewidth=1, label="budget")
    axes.set_xlim(left=0)
    axes.margins(0.12)
    widen_y(axes, 0.2)
    axes.set_xlabel("forgotten: KL on general text (nats per token), lower is better")
    axes.set_ylabel("quality on validation rows")
    axes.set_title("Quality against forgetting by scale of the update")
    if axes.get_legend_handles_labels()[1]:
        add_legend_below(axes)


def _draw_point(axes: Axes, x: Interval, y: Interval, style: MarkerStyle, label: str | None) -> None:
    bars = {"xerr": error_bar(x.value, x.lo, x.hi), "yerr": error_bar(y.value, y.lo, y.hi)}
    draw_marker(axes, x.value, y.value, style, **bars, label=label)


def _any_lower_bound(runs: Sequence[Tradeoff]) -> bool:
    return any(run.lower_bound for run in runs)


@dataclass(frozen=True)
class Tradeoff:
    """Forgetting and gain of one run.

    Args:
        name: Name of its method; runs of the same method are drawn alike.
        forgotten: KL(base || tuned) on general texts, in nats per token.
        gained: Gain of quality over the untuned model.
        lower_bound: Whether the KL is a lower bound.
    """

    name: str
    forgotten: Interval
    gained: Interval
    lower_bound: bool = False


def draw_forgetting(axes: Axes, runs: Sequence[Tradeoff]) -> None:
    """Draw a point for each run: further left it has forgotten less, further up it has learned more.

    Args:
        axes: Matplotlib axes to draw on.
        runs: Runs to draw; at least one.
    """
    styles = marker_styles(list(dict.fromkeys(run.name for run in runs)))
    named: set[str] = set()
    for run in runs:
        x, y, style = run.forgotten, run.gained, styles[run.name]
        bound = " (KL: lower bound)" if run.lower_bound else ""
        label = f"{run.name}{bound}"
        _draw_point(axes, x, y, style, None if label in named else label)
        named.add(label)
    axes.axhline(0, color="#555555", linewidth=1)
    axes.set_xlim(left=0)
    axes.margins(0.12)
    widen_y(axes, 0.2)
    axes.set_xlabel("forgotten: KL on general text (nats per token), lower is better")
    axes.set_ylabel("quality gained over the untuned model")
    axes.set_title("What was forgotten against what was gained")
    add_legend_below(axes)
