"""A result as a table on the screen."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.evaluation.savings.result import SavingsResult
from lightning_ft.printable import printable

SAVINGS = {
    "input": "input tokens",
    "output": "output tokens",
    "total": "all tokens",
    "per_success": "tokens per success",
}
"""What each saving is of."""


def savings_table(result: SavingsResult) -> Group:
    """Headline, arms, savings and costs of a result."""
    level = f"{result.confidence:.0%}"
    arms = Table(title="Mean of a request", title_justify="left")
    arms.add_column("")
    for name in result.arms:
        arms.add_column(name, justify="right")
    for row in arm_rows(result):
        arms.add_row(*row)
    savings = Table(title="Tuned against prompted", title_justify="left")
    for column in ("saving of", "saved", f"{level} interval"):
        savings.add_column(column, justify="left" if column == "saving of" else "right")
    for name, interval in result.savings.items():
        savings.add_row(SAVINGS[name], percent(interval.value), f"{percent(interval.lo)} to {percent(interval.hi)}")
    style = "bold green" if result.gate.passed else "bold red"
    notes = [Text(printable(f"Note: {warning}"), style="yellow") for warning in result.warnings]
    parts: list[Table | Text] = [Text(printable(result.headline), style=style), arms, savings]
    if result.costs is not None:
        table = Table(title=Text(printable(cost_title(result))), title_justify="left")
        for column in ("", "cached prefix", "no cache"):
            table.add_column(column, justify="right" if column else "left")
        for row in cost_rows(result):
            table.add_row(*row)
        parts.append(table)
    return Group(*parts, *notes)


def arm_rows(result: SavingsResult) -> list[list[str]]:
    """What there is to say of each arm: a name and one cell for each arm."""

    def row(name: str, cell: Callable[[ArmRecords], str]) -> list[str]:
        return [name, *(cell(arm) for arm in result.arms.values())]

    n = result.n
    rows = [
        row("input tokens", lambda arm: f"{sum(arm.input_tokens) / n:,.1f}"),
        row("output tokens", lambda arm: f"{sum(arm.output_tokens) / n:,.1f}"),
        ["quality", *(f"{i.value:.3f}" for i in result.quality.values())],
        [f"{result.confidence:.0%} interval", *(f"{i.lo:.3f} to {i.hi:.3f}" for i in result.quality.values())],
        row("tokens per success", lambda arm: f"{arm.tokens_per_success:,.1f}"),
        row("answers cut at the limit", lambda arm: f"{arm.truncated_rate:.1%}"),
        row("prefill, GFLOP", lambda arm: _scaled(arm.prefill_flops, 1e9)),
        row("KV cache, MiB", lambda arm: _scaled(arm.kv_cache_bytes, 2**20)),
    ]

    def first_token(kind: str) -> Callable[[ArmRecords], str]:
        return lambda arm: _scaled(arm.first_token_seconds.get(kind), 1e-3)

    for kind, name in (("cold", "first token, ms"), ("warm", "first token, prefix cached, ms")):
        if any(kind in arm.first_token_seconds for arm in result.arms.values()):
            rows.append(row(name, first_token(kind)))
    return rows


def cost_title(result: SavingsResult) -> str:
    """Unit and date of the prices."""
    assert result.costs is not None
    return f"Cost of 1,000 requests in {result.costs.prices.currency} (prices of {result.costs.prices.date})"


def cost_rows(result: SavingsResult) -> list[list[str]]:
    """A name, the figure with a cached prefix, the figure without."""
    costs = result.costs
    assert costs is not None
    return [
        ["prompted", f"{1000 * costs.prompted_cached:,.4f}", f"{1000 * costs.prompted_uncached:,.4f}"],
        ["tuned", f"{1000 * costs.tuned_cached:,.4f}", f"{1000 * costs.tuned_uncached:,.4f}"],
        [
            f"{costs.prices.invested:,.2f} earned back after",
            _requests(costs.break_even_cached),
            _requests(costs.break_even_uncached),
        ],
    ]


def percent(share: float) -> str:
    """A share as a percentage.

    Example:
        >>> percent(0.875), percent(float("-inf"))
        ('87.5%', '-infinite')
    """
    return f"{share:.1%}" if abs(share) != float("inf") else ("-infinite" if share < 0 else "infinite")


def _requests(number: float) -> str:
    return "never" if number == float("inf") else f"{number:,.0f} requests"


def _scaled(value: float | None, unit: float) -> str:
    return "unknown" if value is None else f"{value / unit:,.3g}"
