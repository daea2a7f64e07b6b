"""A savings result as blocks of a document: tokens, quality, costs, and the answers that became worse.

`savings_document` is the whole result as it is printed and written next to a run; a report takes the single blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning_ft.document.blocks import (
    Block,
    Document,
    Fact,
    Headline,
    Plot,
    Section,
    SideBySide,
    Table,
    provenance_table,
)
from lightning_ft.document.numbers import format_count
from lightning_ft.evaluation.bootstrap import Interval, format_interval, format_range
from lightning_ft.evaluation.savings.intervals import break_even_intervals, is_open, per_success_intervals
from lightning_ft.evaluation.savings.plots import Arm, Kind, draw_cost, draw_quality, draw_tokens
from lightning_ft.evaluation.savings.regressions import regressions_of, worst_regressions
from lightning_ft.evaluation.savings.result import SavingsResult
from lightning_ft.evaluation.savings.table import PARTS, SAVINGS, arm_rows, cost_rows, cost_title, percent

_CACHING: tuple[tuple[Kind, str], ...] = (
    ("cached", "with the prompt's prefix cached"),
    ("uncached", "without a prefix cache"),
)


_LABELS = {
    "model": "model",
    "tokenizer": "tokenizer",
    "baseline": "hash of the prompt (baseline)",
    "measured": "hash of requests, prompts and scorer",
    "requests": "requests measured",
    "requests_available": "requests available",
    "requests_in_training": "requests that appear in the training rows",
    "max_new_tokens": "limit of new tokens",
    "split": "split",
}


def savings_document(result: SavingsResult, picture: Plot | None = None) -> Document:
    """A whole result: verdict, warnings, tables of tokens, quality and costs, and provenance.

    Args:
        result: The result.
        picture: Plot of the result, if it is drawn.
    """
    sections = [Section("Tokens and quality", (*((picture,) if picture is not None else ()), *arms_tables(result)))]
    if result.costs is not None:
        table = Table(("", "cached prefix", "no cache"), tuple(map(tuple, cost_rows(result))), cost_title(result))
        sections.append(Section("Costs", (table,)))
    if result.provenance:
        table = provenance_table("Measured with", result.provenance, _LABELS)
        sections.append(Section("Provenance", (table,), brief=False))
    return Document((savings_headline(result),), result.warnings, (), tuple(sections))


def savings_provenance(result: SavingsResult) -> dict[str, Any]:
    """Provenance of a result, with prices, exclusions and truncations, by the labels of a reader."""
    entries: dict[str, Any] = dict(result.provenance)
    measured, available = entries.get("requests"), entries.get("requests_available")
    if isinstance(measured, int) and isinstance(available, int):
        entries["requests left out"] = available - measured
    for name, arm in result.arms.items():
        entries[f"answers cut at the limit, {name}"] = percent(arm.truncated_rate)
    if result.costs is not None:
        prices = result.costs.prices
        entries["prices"] = f"of {prices.date}, in {prices.currency} for a million tokens"
        for label, tuned in (("prompted", False), ("tuned", True)):
            full, cached, out = prices.rates(tuned=tuned)
            entries[f"prices, {label}"] = f"input {full:g}, cached input {cached:g}, output {out:g}"
        entries["invested"] = (
            f"training {prices.training:,.2f}, data {prices.data:,.2f}, sweep {prices.sweep:,.2f} {prices.currency}"
        )
    return {_LABELS.get(name, name): value for name, value in entries.items()}


def savings_headline(result: SavingsResult, of: str = "") -> Headline:
    """The headline of the result, with its verdict apart."""
    return Headline(result.gate.passed, result.headline.split(": ", 1)[1], of)


def savings_facts(result: SavingsResult) -> tuple[Fact, ...]:
    """Tokens, quality and break-even, as large metrics at the top of a page."""
    level = f"{result.confidence:.0%} interval"
    total, per_success = result.savings["total"], result.savings["per_success"]
    quality = result.quality
    facts = [
        Fact("tokens saved per request", percent(total.value), f"{level} {format_range(total, percent)}"),
        Fact("tokens saved per success", percent(per_success.value), f"{level} {format_range(per_success, percent)}"),
        Fact(
            "quality, tuned",
            f"{quality['tuned'].value:.3f}",
            f"{quality['prompted'].value:.3f} prompted; "
            f"difference {format_interval(result.difference, '{:+.3f}'.format)}",
        ),
    ]
    if result.in_training:
        seen = len(result.in_training)
        note = f"{percent(seen / result.n)} of all; the tuned model may have memorized their answers"
        facts.append(Fact("requests that also appear in the training rows", f"{seen:,} of {result.n:,}", note))
    if result.costs is not None:
        spans = break_even_intervals(result)
        facts.append(
            Fact(
                "requests until training is earned back",
                format_count(spans["uncached"].value),
                f"{format_count(spans['cached'].value)} with the prompt's prefix cached",
            )
        )
    return tuple(facts)


def quality_plot(results: Mapping[str, SavingsResult], name: str = "quality") -> Plot:
    """Each arm as a point; the tuned arms of several results next to the original weights, which they share.

    Args:
        results: Results by name, at least one.
        name: Name of the plot.
    """
    arms: dict[str, Arm] = {}
    for of, result in results.items():
        per_success = per_success_intervals(result)
        for arm in ("prompted", "untuned", "tuned"):
            label = of if arm == "tuned" and len(results) > 1 else arm
            if arm in result.arms and label not in arms:
                arms[label] = Arm(result.quality[arm], per_success[arm])
    level = next(iter(results.values())).confidence
    seen = "; ".join(
        f"{label}: quality {arm.quality.value:.3f} at {_tokens(arm.per_success)} tokens per success"
        for label, arm in arms.items()
    )
    return Plot(
        name,
        f"Quality against tokens per success. {seen}.",
        f"Further left is cheaper, further up is right more often. Bars are {level:.0%} intervals over requests.",
        partial(draw_quality, arms=arms, confidence=level),
    )


def tokens_plot(result: SavingsResult, name: str = "tokens") -> Plot:
    """Mean tokens of a request by part.

    Args:
        result: The result.
        name: Name of the plot.
    """
    return Plot(
        name,
        "Mean tokens of a request by arm. "
        + "; ".join(f"{arm}: {records.tokens / result.n:,.0f} tokens" for arm, records in result.arms.items())
        + ".",
        "Prompted: original weights with system prompt and examples. Untuned: original weights, the request alone. "
        "Tuned: trained weights, the request alone.",
        partial(draw_tokens, result=result),
    )


def arms_tables(result: SavingsResult) -> tuple[Block, ...]:
    """Tables of tokens and quality, and the verdict.

    Args:
        result: The result.
    """
    level = f"{result.confidence:.0%}"
    savings = tuple(
        (SAVINGS[name], percent(interval.value), format_range(interval, percent))
        for name, interval in result.savings.items()
    )
    blocks: list[Block] = [
        Table(("saving of", "saved", f"{level} interval"), savings, "Tuned against prompted, a ratio of sums"),
        Table(("", *result.arms), tuple(map(tuple, arm_rows(result))), "Mean of a request, by arm"),
    ]
    if any(arm.parts for arm in result.arms.values()):
        rows = [
            (label, *(f"{arm.parts.get(part, 0) / result.n:,.1f}" for arm in result.arms.values()))
            for part, label in PARTS.items()
        ]
        rows.append(("answer", *(f"{sum(arm.output_tokens) / result.n:,.1f}" for arm in result.arms.values())))
        blocks.append(Table(("", *result.arms), tuple(rows), "Where the tokens of a request go, mean", brief=False))
    return (*blocks, gate_text(result))


def gate_text(result: SavingsResult) -> str:
    """The verdict on quality, with the numbers that it follows from."""
    gate = result.gate
    pooled = "" if gate.n == result.n else f" ({result.n:,} answers, those of a request or cluster counted as one)"
    return (
        f"Gate {'passed' if gate.passed else 'failed'}: the one-sided 97.5% lower bound of tuned minus prompted "
        f"quality is {gate.bound:+.4f}, and must be above {-gate.margin:+.4f}. Requests: {gate.n:,}{pooled}; "
        f"needed with {gate.discordant:.1%} discordant answers: {gate.required_n:,}. At least half of the tokens "
        f"saved: {'yes' if result.saves_half else 'not shown'}."
    )


def cost_blocks(result: SavingsResult, prefix: str = "") -> tuple[Block, ...]:
    """Plots and table of costs.

    Args:
        result: A result with prices.
        prefix: Prefix of the names of the plots.
    """
    assert result.costs is not None
    spans, level = break_even_intervals(result), f"{result.confidence:.0%}"
    pictures = tuple(
        Plot(
            f"{prefix}cost_{caching}",
            f"Cost over the number of requests {words}, prompted and tuned. Break-even: {_span(spans[caching])}.",
            f"Cost of a number of requests {words}. Break-even: {_span(spans[caching])}.",
            partial(draw_cost, result=result, kind=caching, break_even=spans[caching]),
        )
        for caching, words in _CACHING
    )
    interval = (f"{level} interval of break-even", *(_ends(spans[caching]) for caching, _ in _CACHING))
    rows = (*map(tuple, cost_rows(result)), interval)
    return (*pictures, Table(("", "cached prefix", "no cache"), rows, cost_title(result)))


def regression_blocks(result: SavingsResult) -> tuple[Block, ...]:
    """The answers that became worse."""
    worse, found = regressions_of(result), worst_regressions(result)
    if not worse:
        return ("No request was answered worse by the tuned model than by the prompted one.",)
    share = f"{worse:,} of {result.n:,} answers ({worse / result.n:.1%}) scored lower tuned than prompted."
    if not found:
        return (f"{share} The answers themselves weren't kept.",)
    shown = "All of them" if worse == len(found) else f"{len(found)} of them"
    return (SideBySide(found, f"{share} {shown}, the largest loss first:"),)


def _span(interval: Interval) -> str:
    if math.isinf(interval.value):
        return "never, a tuned request isn't cheaper" + ("" if math.isinf(interval.lo) else f" ({_ends(interval)})")
    ends = "never" if math.isinf(interval.lo) else format_range(interval, format_count)
    return f"{format_count(interval.value)} requests ({ends})"


def _ends(interval: Interval) -> str:
    return "never" if math.isinf(interval.lo) else format_range(interval, _requests)


def _requests(number: float) -> str:
    return "never" if math.isinf(number) else f"{number:,.0f}"


def _tokens(interval: Interval) -> str:
    if math.isinf(interval.value):
        return "infinitely many"
    return f"{interval.value:,.0f}" if is_open(interval) else format_interval(interval, "{:,.0f}".format)
