"""Report sections of a comparison of methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from lightning_ft.document.blocks import Block, Plot, Section, Table
from lightning_ft.document.numbers import format_duration, format_number, format_ratio, format_si
from lightning_ft.evaluation.bootstrap import Interval, format_interval
from lightning_ft.evaluation.comparison.plots import (
    RESOURCES,
    TrainingCurve,
    draw_learning_curve,
    draw_methods,
    draw_resources,
    draw_training,
)
from lightning_ft.evaluation.retention.sections import Tradeoff
from lightning_ft.evaluation.savings.intervals import gain_interval
from lightning_ft.evaluation.savings.sections import quality_plot

if TYPE_CHECKING:
    from lightning_ft.evaluation.comparison.result import Comparison, RunResult

_BASELINES = ("untuned", "prompted")
_QUALITY_RATIOS = {"quality_ratio": "share of full's quality", "gain_retained": "share of full's gain over untuned"}
_VERDICTS = {"held": "held", "not held": "not held", "held if": "held only if", "undecided": "undecided"}


def comparison_sections(comparison: Comparison) -> tuple[Section, ...]:
    """Build the sections on claims, methods, resources and learning curves; unmeasured ones are left out."""
    sections = (
        Section("Claims and verdicts", tuple(_claims(comparison))),
        Section("Methods side by side", tuple(_methods(comparison))),
        Section("Resources relative to full fine-tuning", tuple(_resources(comparison))),
        Section("Quality by rows and FLOPs", (*_learning(comparison), *_training(comparison))),
    )
    return tuple(section for section in sections if section.blocks)


def tradeoffs(comparison: Comparison) -> tuple[Tradeoff, ...]:
    """Return forgetting and gain of each final run in which both were measured."""
    untuned = next((run.test for run in comparison.runs if run.method == "untuned"), None)
    if untuned is None:
        return ()
    return tuple(
        Tradeoff(
            method, run.retention.kl_general, gain_interval([run.test], untuned), lower_bound=run.retention.lower_bound
        )
        for method, run in _final(comparison)
        if run.retention is not None and run.test is not None
    )


def final_runs(comparison: Comparison) -> dict[str, RunResult]:
    """Return the final runs by their names in tables: the method, and the seed where there are several."""
    finals = list(_final(comparison))
    several = {method for method, _ in finals if sum(other == method for other, _ in finals) > 1}
    return {f"{method}, seed {run.seed}" if method in several else method: run for method, run in finals}


def _final(comparison: Comparison) -> Iterator[tuple[str, RunResult]]:
    for method in comparison.chosen:
        for run in comparison.final_runs(method):
            yield method, run


def _claims(comparison: Comparison) -> Iterator[Block]:
    if comparison.claims:
        rows = tuple(
            (
                claim.name,
                claim.claimed,
                " ".join(filter(None, (_VERDICTS.get(claim.verdict, claim.verdict), claim.condition))),
                claim.evidence,
            )
            for claim in comparison.claims
        )
        yield Table(
            ("claim", "as usually made", "verdict", "evidence"),
            rows,
            "A claim is held if its whole interval is on the claim's side of the threshold",
            text_columns=frozenset({0, 1, 2, 3}),
        )


def _methods(comparison: Comparison) -> Iterator[Block]:
    quality = comparison.quality
    if not quality:
        return
    if comparison.savings:
        yield quality_plot(comparison.savings)
    words = {name: format_interval(interval, "{:.3f}".format) for name, interval in quality.items()}
    yield Plot(
        "methods",
        "Quality by method. " + "; ".join(f"{name}: {text}" for name, text in words.items()) + ".",
        "Mean score on the test requests. Bars are 95% intervals over requests, with the seeds of a request together.",
        partial(draw_methods, quality=quality, seeds=comparison.seed_quality),
        size=(6.4, max(4.4, 1.9 + 0.62 * len(quality))),
    )
    metrics = list(dict.fromkeys(name for found in comparison.metrics.values() for name in found))
    rows = tuple(
        (
            name,
            text,
            ", ".join(f"{seed:.3f}" for seed in comparison.seed_quality.get(name, ())) or "-",
            f"{comparison.chosen[name]:g}" if name in comparison.chosen else "-",
        )
        for name, text in words.items()
    )
    yield Table(
        ("method", "quality (95% interval)", "by seed", "chosen learning rate"),
        rows,
        "Quality on the test requests; the learning rate was chosen on validation rows",
    )
    if metrics:
        yield Table(
            ("method", *metrics),
            tuple(
                (
                    name,
                    *(_format_ends(found[metric], "{:.3f}".format) if metric in found else "-" for metric in metrics),
                )
                for name, found in comparison.metrics.items()
            ),
            "Task-specific metrics; in parentheses the minimum and the maximum over seeds",
        )
    if comparison.sweep_seconds:
        yield (
            f"The search for learning rates took {format_duration(comparison.sweep_seconds)} of training and "
            f"{format_si(comparison.sweep_flops, 'FLOP')} in addition to the runs above."
        )


def _resources(comparison: Comparison) -> Iterator[Block]:
    ratios = comparison.ratios
    rows = [name for name in RESOURCES if any(name in found for found in ratios.values())]
    if rows:
        seen = "; ".join(
            f"{method}: " + ", ".join(f"{RESOURCES[r]} {format_ratio(found[r].value)}" for r in rows if r in found)
            for method, found in ratios.items()
        ).replace("\n", " ")
        yield Plot(
            "resources",
            f"Resources relative to full fine-tuning. {seen}.",
            "1x is full fine-tuning; left of it is less. Bars span the minimum and the maximum over seeds.",
            partial(draw_resources, ratios=ratios),
            size=(6.4, 2.0 + 0.34 * len(rows) * (1 + 0.5 * len(ratios))),
        )
    shown = {**_QUALITY_RATIOS, **{name: RESOURCES[name].replace("\n", " ") for name in rows}}
    if ratios:
        yield Table(
            ("relative to full fine-tuning", *ratios),
            tuple(
                (label, *(_ratio(found.get(name)) for found in ratios.values()))
                for name, label in shown.items()
                if any(name in found for found in ratios.values())
            ),
            "Ratios to full fine-tuning: quality with 95% intervals over requests, resources with the minimum and the "
            "maximum over seeds",
        )


def _learning(comparison: Comparison) -> Iterator[Block]:
    curves = {name: curve for name, curve in comparison.learning_curve.items() if len(curve) > 1}
    if curves:
        baselines = {name: comparison.quality[name] for name in _BASELINES if name in comparison.quality}
        seen = "; ".join(
            f"{name}: " + ", ".join(f"{interval.value:.3f} with {size:,}" for size, interval in curve.items())
            for name, curve in curves.items()
        )
        yield Plot(
            "learning",
            f"Quality by number of training rows. {seen}.",
            "Quality of a method trained on each number of rows, next to the original weights with and without the "
            "prompt. Bars are 95% intervals over requests.",
            partial(draw_learning_curve, curves=curves, baselines=baselines),
        )


def _training(comparison: Comparison) -> Iterator[Block]:
    curves = [
        TrainingCurve(method, tuple(p.flops for p in run.curve), tuple(p.quality for p in run.curve))
        for method, run in _final(comparison)
        if any(p.flops > 0 for p in run.curve)
    ]
    if curves:
        yield Plot(
            "training",
            "Quality by training FLOPs. "
            + "; ".join(f"{c.name}: {c.quality[-1]:.3f} after {format_si(c.flops[-1], 'FLOP')}" for c in curves)
            + ".",
            "Quality on validation rows during training: a line for each seed, with the chosen learning rate.",
            partial(draw_training, curves=curves),
        )


def _ratio(interval: Interval | None) -> str:
    return "not measured" if interval is None else _format_ends(interval, _format_ratio)


def _format_ends(interval: Interval, form: Callable[[float], str]) -> str:
    """Format an interval, or its value alone if both ends read the same, as with the FLOPs of all seeds."""
    same = len({form(end) for end in (interval.value, interval.lo, interval.hi)}) == 1
    return form(interval.value) if same else format_interval(interval, form)


def _format_ratio(value: float) -> str:
    """Format with three digits; "never" if a quality was never reached."""
    return "never" if value == float("inf") else format_number(value)
