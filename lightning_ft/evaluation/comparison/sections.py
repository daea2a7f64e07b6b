"""Sections of a comparison of methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from lightning_ft.document.blocks import Block, Plot, Section, Table
from lightning_ft.document.numbers import format_duration, format_number, format_ratio, format_si
from lightning_ft.evaluation.bootstrap import Interval, format_interval
from lightning_ft.evaluation.comparison.plots import (
    RESOURCES,
    Curve,
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
    """Claims, methods, resources, rows and operations; what wasn't measured is left out."""
    sections = (
        Section("The claims, judged", tuple(_claims(comparison))),
        Section("Methods side by side", tuple(_methods(comparison))),
        Section("Resources relative to full fine-tuning", tuple(_resources(comparison))),
        Section("Quality, rows and operations", (*_learning(comparison), *_training(comparison))),
    )
    return tuple(section for section in sections if section.blocks)


def tradeoffs(comparison: Comparison) -> tuple[Tradeoff, ...]:
    """Forgetting and gain of every final run that was measured for both."""
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
    """The runs that count, by a name for tables: method, and seed where there are several."""
    found = list(_final(comparison))
    several = {method for method, _ in found if sum(other == method for other, _ in found) > 1}
    return {f"{method}, seed {run.seed}" if method in several else method: run for method, run in found}


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
            ("claim", "as it is made", "verdict", "what was measured"),
            rows,
            "A claim held where its whole interval is on the claim's side",
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
        "Mean score on the test requests. Bars are 95% intervals over requests, all seeds of a request together.",
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
                (name, *(_alike(found[metric], "{:.3f}".format) if metric in found else "-" for metric in metrics))
                for name, found in comparison.metrics.items()
            ),
            "The domain's own figures; in brackets the least and the largest of the seeds",
        )
    if comparison.sweep_seconds:
        yield (
            f"Looking for learning rates took {format_duration(comparison.sweep_seconds)} of training and "
            f"{format_si(comparison.sweep_flops, 'FLOP')} beside the runs that are shown."
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
            "1x is full fine-tuning; left of it is less. Bars span the least and the largest of the seeds.",
            partial(draw_resources, ratios=ratios),
            size=(6.4, 2.0 + 0.34 * len(rows) * (1 + 0.5 * len(ratios))),
        )
    shown = {**_QUALITY_RATIOS, **{name: RESOURCES[name].replace("\n", " ") for name in rows}}
    if ratios:
        yield Table(
            ("to full fine-tuning", *ratios),
            tuple(
                (label, *(_ratio(found.get(name)) for found in ratios.values()))
                for name, label in shown.items()
                if any(name in found for found in ratios.values())
            ),
            "Ratios to full fine-tuning; of quality with 95% intervals over requests, of resources with the least and "
            "the largest of the seeds",
        )


def _learning(comparison: Comparison) -> Iterator[Block]:
    curves = {name: curve for name, curve in comparison.learning_curve.items() if len(curve) > 1}
    if curves:
        levels = {name: comparison.quality[name] for name in _BASELINES if name in comparison.quality}
        seen = "; ".join(
            f"{name}: " + ", ".join(f"{interval.value:.3f} with {size:,}" for size, interval in curve.items())
            for name, curve in curves.items()
        )
        yield Plot(
            "learning",
            f"Quality over training rows. {seen}.",
            "How good a method gets with so many training rows, against the original weights with and without the "
            "prompt. Bars are 95% intervals over requests.",
            partial(draw_learning_curve, curves=curves, lines=levels),
        )


def _training(comparison: Comparison) -> Iterator[Block]:
    curves = [
        Curve(method, tuple(p.flops for p in run.curve), tuple(p.quality for p in run.curve))
        for method, run in _final(comparison)
        if any(p.flops > 0 for p in run.curve)
    ]
    if curves:
        yield Plot(
            "training",
            "Quality over training operations. "
            + "; ".join(f"{c.name}: {c.quality[-1]:.3f} after {format_si(c.flops[-1], 'FLOP')}" for c in curves)
            + ".",
            "Quality on validation rows while training went on, a line for each seed with its chosen learning rate.",
            partial(draw_training, curves=curves),
        )


def _ratio(interval: Interval | None) -> str:
    return "not measured" if interval is None else _alike(interval, _or_never)


def _alike(interval: Interval, form: Callable[[float], str]) -> str:
    """A figure with its ends, unless they read the same, as the operations of all seeds do."""
    same = len({form(end) for end in (interval.value, interval.lo, interval.hi)}) == 1
    return form(interval.value) if same else format_interval(interval, form)


def _or_never(value: float) -> str:
    """Three digits, or that a quality was never reached."""
    return "never" if value == float("inf") else format_number(value)
