"""Rows and labels for tables of a savings result."""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning_ft.document.numbers import finite, format_number
from lightning_ft.evaluation.bootstrap import Interval, format_range
from lightning_ft.evaluation.savings.first_token import STATES, format_times
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.evaluation.savings.result import SavingsResult

NONE_RIGHT = "none right"
"""What tables have in place of a number of tokens per success if no answer was right."""

SAVINGS = {
    "input": "input tokens",
    "output": "output tokens",
    "total": "all tokens",
    "per_success": "tokens per success",
}
"""Labels of the savings."""

PARTS = {"system": "system prompt", "few_shot": "examples", "template": "chat template", "request": "request"}
"""Labels of the parts of a request's input tokens."""


def arm_rows(result: SavingsResult) -> list[list[str]]:
    """Rows with the metrics of all arms: a label and one cell per arm."""

    def row(name: str, cell: Callable[[ArmRecords], str]) -> list[str]:
        return [name, *(cell(arm) for arm in result.arms.values())]

    n = result.n
    rows = [
        row("input tokens", lambda arm: f"{sum(arm.input_tokens) / n:,.1f}"),
        row("output tokens", lambda arm: f"{sum(arm.output_tokens) / n:,.1f}"),
        ["quality", *(f"{i.value:.3f}" for i in result.quality.values())],
        [f"{result.confidence:.0%} interval", *(f"{i.lo:.3f} to {i.hi:.3f}" for i in result.quality.values())],
        row("tokens per success", lambda arm: tokens_per_success(arm.tokens_per_success)),
        row("truncated answers", lambda arm: f"{arm.truncated_rate:.1%}"),
        row("prefill, GFLOP", lambda arm: _scaled(arm.prefill_flops, 1e9)),
        row("KV cache, MiB", lambda arm: _scaled(arm.kv_cache_bytes, 2**20)),
    ]

    for state, label in STATES.items():
        times = [arm.first_token_seconds.get(state) for arm in result.arms.values()]
        if any(times):
            rows.append([f"first token{label}, ms", *map(format_times, times)])
    return rows


def cost_title(result: SavingsResult) -> str:
    """Caption of the table of costs, with currency and date of the prices."""
    assert result.costs is not None
    return f"Cost of 1,000 requests in {result.costs.prices.currency} (prices of {result.costs.prices.date})"


def cost_rows(result: SavingsResult) -> list[list[str]]:
    """Rows with the costs: a label, the cost with prefix caching, and the cost without."""
    costs = result.costs
    assert costs is not None
    return [
        ["prompted", f"{1000 * costs.prompted_cached:,.4f}", f"{1000 * costs.prompted_uncached:,.4f}"],
        ["tuned", f"{1000 * costs.tuned_cached:,.4f}", f"{1000 * costs.tuned_uncached:,.4f}"],
        [
            f"break-even ({costs.prices.invested:,.2f} invested)",
            _requests(costs.break_even_cached),
            _requests(costs.break_even_uncached),
        ],
    ]


format_percent = finite("{:.1%}")
"""Format a share as a percentage."""


def tokens_per_success(tokens: float) -> str:
    """Format a number of tokens per success.

    Example:
        >>> tokens_per_success(3130.25), tokens_per_success(float("inf"))
        ('3,130.2', 'none right')
    """
    return f"{tokens:,.1f}" if math.isfinite(tokens) else NONE_RIGHT


def saved_share(interval: Interval) -> tuple[str, str]:
    """Format a saving and its interval. A saving per success is undefined if no answer was right.

    Example:
        >>> saved_share(Interval(0.5, 0.25, 0.75)), saved_share(Interval(0.5, float("-inf"), 0.75))
        (('50.0%', '25.0% to 75.0%'), ('50.0%', 'at most 75.0%'))
        >>> saved_share(Interval(float("-inf"), float("-inf"), 0.75))
        ('none right', 'at most 75.0%')
    """
    value = format_percent(interval.value) if math.isfinite(interval.value) else NONE_RIGHT
    if math.isfinite(interval.lo):
        return value, format_range(interval, format_percent)
    return value, f"at most {format_percent(interval.hi)}" if math.isfinite(interval.hi) else "not known"


def _requests(number: float) -> str:
    return "never" if number == float("inf") else f"{number:,.0f} requests"


def _scaled(value: float | None, unit: float) -> str:
    return "unknown" if value is None else format_number(value / unit)
