"""A savings result as blocks of a document: tokens, quality and costs.

`savings_document` is the complete result, which is printed and written to the run's folder. A report uses the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from lightning_ft.document.blocks import (
    Block,
    Document,
    Fact,
    Headline,
    Plot,
    Section,
    Table,
    provenance_table,
)
from lightning_ft.document.numbers import format_count
from lightning_ft.evaluation.bootstrap import Interval, format_interval, format_range
from lightning_ft.evaluation.savings.advice import advice
from lightning_ft.evaluation.savings.first_token import first_token_text
from lightning_ft.evaluation.savings.intervals import break_even_intervals, is_unbounded, per_success_intervals
from lightning_ft.evaluation.savings.plots import Arm, Caching, draw_cost, draw_quality, draw_tokens
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.evaluation.savings.result import SavingsResult
from lightning_ft.evaluation.savings.table import (
    NONE_RIGHT,
    PARTS,
    SAVINGS,
    arm_rows,
    cost_rows,
    cost_title,
    format_percent,
    saved_share,
)
from lightning_ft.models.model_card import hub_name

_CACHING: tuple[tuple[Caching, str], ...] = (
    ("cached", "with prefix caching"),
    ("uncached", "without prefix caching"),
)

_LABELS = {
    "model": "model",
    "tokenizer": "tokenizer",
    "baseline": "hash of the baseline prompt",
    "measured": "hash of requests, prompts and scorer",
    "requests": "requests measured",
    "requests_available": "requests available",
    "requests_in_training": "requests that appear in the training rows",
    "max_new_tokens": "max_new_tokens",
    "split": "split",
    "training_data": "training data",
}


def savings_document(result: SavingsResult, plot: Plot | None = None) -> Document:
    """Compose a document from a result: verdict, warnings, tables of tokens, quality and costs, and provenance.

    Args:
        result: The result.
        plot: Plot of the result; None to leave it out.
    """
    sections = [Section("Tokens and quality", (*((plot,) if plot is not None else ()), *arms_tables(result)))]
    if result.costs is not None:
        table = Table(("", "prefix caching", "no caching"), tuple(map(tuple, cost_rows(result))), cost_title(result))
        sections.append(Section("Costs", (table,)))
    if result.provenance:
        table = provenance_table("Measured with", result.provenance, _LABELS)
        sections.append(Section("Provenance", (table,), brief=False))
    return Document((savings_headline(result),), result.warnings, (), tuple(sections), savings_about(result))


def savings_provenance(result: SavingsResult) -> dict[str, object]:
    """Provenance of a result by label, with prices, number of requests left out, and rates of truncated answers."""
    entries: dict[str, object] = dict(result.provenance)
    measured, available = entries.get("requests"), entries.get("requests_available")
    if isinstance(measured, int) and isinstance(available, int):
        entries["requests left out"] = available - measured
    for name, arm in result.arms.items():
        entries[f"truncated answers, {name}"] = format_percent(arm.truncated_rate)
    if result.costs is not None:
        prices = result.costs.prices
        entries["prices"] = f"of {prices.date}, in {prices.currency} per million tokens"
        for label, tuned in (("prompted", False), ("tuned", True)):
            full, cached, out = prices.rates(tuned=tuned)
            entries[f"prices, {label}"] = f"input {_price(full)}, cached input {_price(cached)}, output {_price(out)}"
        entries["invested"] = (
            f"training {prices.training:,.2f}, data {prices.data:,.2f}, sweep {prices.sweep:,.2f} {prices.currency}"
        )
    return {_LABELS.get(name, name): value for name, value in entries.items()}


def savings_about(result: SavingsResult) -> tuple[tuple[str, str], ...]:
    """Model, data and date of a result, as labels and texts; what wasn't recorded is left out.

    Args:
        result: The result.
    """
    found = result.provenance
    model, trained, split = (str(found.get(name, "")) for name in ("model", "training_data", "split"))
    measured = f"{result.n:,} {split} requests" if split else f"{result.n:,} requests"
    data = f"trained on {trained}; measured on {measured}" if trained else f"measured on {measured}"
    entries = (("Model", hub_name(model) or Path(model).name), ("Data", data), ("Date", result.date))
    return tuple((label, text) for label, text in entries if text)


def savings_headline(result: SavingsResult, of: str = "") -> Headline:
    """Headline of a result, with the verdict as a field of its own.

    Args:
        result: The result.
        of: Name of the result, if there are several.
    """
    return Headline(result.gate.verdict, result.headline.split(": ", 1)[1], of, advice(result))


def savings_facts(result: SavingsResult) -> tuple[Fact, ...]:
    """Key metrics of a result: tokens, quality and break-even."""
    level = f"{result.confidence:.0%} interval"
    what = "fewer tokens, but no saving," if result.gate.void else "tokens saved"
    labels = {"total": f"{what} per request", "per_success": f"{what} per success"}
    saved = {label: saved_share(result.savings[name]) for name, label in labels.items() if name in result.savings}
    quality = result.quality
    facts = [
        *(Fact(label, share, f"{level} {interval}") for label, (share, interval) in saved.items()),
        Fact(
            "quality, tuned",
            f"{quality['tuned'].value:.3f}",
            f"{quality['prompted'].value:.3f} prompted; "
            f"difference {format_interval(result.difference, '{:+.3f}'.format)}",
        ),
    ]
    if result.in_training:
        seen = len(result.in_training)
        note = f"{format_percent(seen / result.n)} of all; the tuned model may have memorized their answers"
        facts.append(Fact("requests that also appear in the training rows", f"{seen:,} of {result.n:,}", note))
    if result.costs is not None:
        break_even = break_even_intervals(result)
        facts.append(
            Fact(
                "requests until break-even",
                format_count(break_even["uncached"].value),
                f"{format_count(break_even['cached'].value)} with prefix caching",
            )
        )
    return tuple(facts)


def quality_plot(results: Mapping[str, SavingsResult], name: str = "quality") -> Plot:
    """Plot of quality over tokens per success, with one point per arm.

    The tuned arms of several results are plotted together with the prompted and untuned arms, which the results share.

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
    points = "; ".join(
        f"{label}: quality {arm.quality.value:.3f}, tokens per success: {_tokens(arm.per_success)}"
        for label, arm in arms.items()
    )
    return Plot(
        name,
        f"Quality over tokens per success. {points}.",
        f"Points further to the left are cheaper, points further up more accurate. Bars are {level:.0%} intervals.",
        partial(draw_quality, arms=arms, confidence=level),
    )


def tokens_plot(result: SavingsResult, name: str = "tokens") -> Plot:
    """Plot of the mean tokens per request, by part.

    Args:
        result: The result.
        name: Name of the plot.
    """
    return Plot(
        name,
        "Mean tokens per request by arm. "
        + "; ".join(f"{arm}: {records.tokens / result.n:,.0f} tokens" for arm, records in result.arms.items())
        + ".",
        "Prompted: original weights with system prompt and few-shot examples. Untuned: original weights with the "
        "request alone. Tuned: trained weights with the request alone.",
        partial(draw_tokens, result=result),
    )


def arms_tables(result: SavingsResult) -> tuple[Block, ...]:
    """Tables of tokens and quality, what the times to first token show, and the verdict of the gate.

    Args:
        result: The result.
    """
    level = f"{result.confidence:.0%}"
    savings = tuple((SAVINGS[name], *saved_share(interval)) for name, interval in result.savings.items())
    blocks: list[Block] = [
        Table(
            ("", "saved", f"{level} interval"), savings, "Savings of the tuned over the prompted arm, ratios of sums"
        ),
        Table(("", *result.arms), tuple(map(tuple, arm_rows(result))), _arms_caption(result)),
    ]
    if any(arm.parts for arm in result.arms.values()):
        rows = [(label, *(_mean_part(arm, part) for arm in result.arms.values())) for part, label in PARTS.items()]
        rows.append(("answer", *(f"{sum(arm.output_tokens) / result.n:,.1f}" for arm in result.arms.values())))
        blocks.append(Table(("", *result.arms), tuple(rows), "Mean tokens per request, by part", brief=False))
    if times := first_token_text(result):
        blocks.append(times)
    return (*blocks, gate_text(result))


def _mean_part(arm: ArmRecords, part: str) -> str:
    # an endpoint counts the tokens of a whole prompt only
    return f"{arm.parts.get(part, 0) / len(arm.ids):,.1f}" if arm.parts else "unknown"


def _arms_caption(result: SavingsResult) -> str:
    timed = max((len(times) for arm in result.arms.values() for times in arm.first_token_seconds.values()), default=0)
    caption = "Mean per request, by arm"
    return (
        f"{caption}; of times the median, and the fastest to the slowest of {timed} requests" if timed > 1 else caption
    )


def gate_text(result: SavingsResult) -> str:
    """Verdict of the quality gate, with the numbers from which it follows."""
    gate = result.gate
    if gate.void:
        return f"Gate void: {gate.void}."
    pooled = "" if gate.n == result.n else f" ({result.n:,} answers; those to one request or cluster count as one)"
    return (
        f"Gate {'passed' if gate.passed else 'failed'}: the one-sided 97.5% lower bound of tuned minus prompted "
        f"quality is {gate.bound:+.4f}, and must be above {-gate.margin:+.4f}. Requests: {gate.n:,}{pooled}; "
        f"required with {gate.discordant:.1%} discordant answers: {gate.required_n:,}. At least half of the tokens "
        f"saved: {_saves_half(result)}."
    )


def _saves_half(result: SavingsResult) -> str:
    if result.saves_half:
        return "yes"
    return "not shown" if result.savings["total"].lo < 0.5 else "yes, but quality isn't shown to be kept"


def cost_blocks(result: SavingsResult, prefix: str = "") -> tuple[Block, ...]:
    """Plots and table of the costs.

    Args:
        result: Result with costs.
        prefix: Prefix of the plots' names.
    """
    assert result.costs is not None
    break_even, level = break_even_intervals(result), f"{result.confidence:.0%}"
    plots = tuple(
        Plot(
            f"{prefix}cost_{caching}",
            f"Prompted and tuned cost over the number of requests, {condition}. Break-even: "
            f"{_describe(break_even[caching])}.",
            f"Cost over the number of requests, {condition}. Break-even: {_describe(break_even[caching])}.",
            partial(draw_cost, result=result, caching=caching, break_even=break_even[caching]),
        )
        for caching, condition in _CACHING
    )
    interval = (f"{level} interval of break-even", *(_ends(break_even[caching]) for caching, _ in _CACHING))
    rows = (*map(tuple, cost_rows(result)), interval)
    return (*plots, Table(("", "prefix caching", "no caching"), rows, cost_title(result)))


def _describe(interval: Interval) -> str:
    if math.isinf(interval.value):
        return "never, a tuned request isn't cheaper" + ("" if math.isinf(interval.lo) else f" ({_ends(interval)})")
    ends = "never" if math.isinf(interval.lo) else format_range(interval, format_count)
    return f"{format_count(interval.value)} requests ({ends})"


def _ends(interval: Interval) -> str:
    return "never" if math.isinf(interval.lo) else format_range(interval, _requests)


def _requests(number: float) -> str:
    return "never" if math.isinf(number) else f"{number:,.0f}"


def _price(price: float) -> str:
    """Format a price: all of its digits, with separators and without an exponent."""
    whole, _, cents = f"{price:,.10f}".partition(".")
    return f"{whole}.{cents}".rstrip("0").rstrip(".")


def _tokens(interval: Interval) -> str:
    if math.isinf(interval.value):
        return NONE_RIGHT
    return f"{interval.value:,.0f}" if is_unbounded(interval) else format_interval(interval, "{:,.0f}".format)
