"""A forecast as text for the console."""

from __future__ import annotations

import math

from lightning_ft.document.numbers import format_bytes, format_count, format_duration, format_si
from lightning_ft.evaluation.forecast import Forecast

_RELATIVE = (0.9, 1.0, 1.1)
"""Assumed qualities, relative to the prompt's."""


def forecast_text(forecast: Forecast) -> str:
    """Text with one line per number, and the advice first.

    Args:
        forecast: The forecast.
    """
    lines = [f"{forecast.advice}: {' '.join(forecast.reasons)}", ""]
    for title, rows in (
        ("tokens per request", _tokens(forecast)),
        ("costs", _money(forecast)),
        ("training", _resources(forecast)),
        ("quality on validation rows", _quality(forecast)),
    ):
        if rows:
            width = max(len(name) for name, _ in rows)
            lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]
    return "\n".join(lines).rstrip()


def _tokens(forecast: Forecast) -> list[tuple[str, str]]:
    tokens = forecast.tokens
    return [
        ("input with the prompt", f"{tokens.prompted:,.1f}"),
        ("input without", f"{tokens.tuned:,.1f}"),
        ("output (references)", f"{tokens.output:,.1f}"),
        ("saved", f"{tokens.saved:.1%} of all tokens, on {tokens.requests:,} requests"),
    ]


def _money(forecast: Forecast) -> list[tuple[str, str]]:
    money = forecast.money
    if money is None:
        return []
    currency = money.prices.currency
    rows = [("training and data", f"{money.invested:,.2f} {currency} (prices of {money.prices.date})")]
    for index, name in enumerate(("no cache", "prompt cached")):
        needed = money.break_even[index]
        pays = "never pays off" if math.isinf(needed) else f"pays off after {format_count(needed)} requests"
        rows.append(
            (
                f"1,000 requests, {name}",
                f"{1000 * money.prompted[index]:,.4f} to {1000 * money.tuned[index]:,.4f} {currency}, "
                f"{_change(money.saved[index])}{f'; {pays}' if money.invested else ''}",
            )
        )
    base = forecast.pilot.prompted if forecast.pilot is not None else 1.0
    if not base or not all(money.prompted):
        return rows
    for relative in _RELATIVE:
        plain, cached = (
            1 - tuned / (base * relative) / (prompted / base)
            for tuned, prompted in zip(money.tuned, money.prompted, strict=True)
        )
        label = f"per correct answer, if {relative:.0%} as good"
        rows.append((label, f"{_change(plain)}; {_change(cached)} with the prompt cached"))
    return rows


def _change(saved: float) -> str:
    return f"{saved:.0%} less" if saved >= 0 else f"{-saved:.0%} more"


def _resources(forecast: Forecast) -> list[tuple[str, str]]:
    found = forecast.resources
    if found is None:
        return []
    return [
        ("rows", f"{found.rows:,}"),
        ("token positions", f"{found.tokens:,}"),
        ("time in steps", f"{format_duration(found.seconds)} on {found.device}, from {found.measured_steps} steps"),
        ("operations", format_si(found.flops, "FLOP")),
        ("peak memory", format_bytes(found.peak_memory_bytes)),
    ]


def _quality(forecast: Forecast) -> list[tuple[str, str]]:
    pilot, quality = forecast.pilot, forecast.quality
    if pilot is None or quality is None:
        return []
    return [
        ("with the prompt", f"{pilot.prompted:.1%} of {pilot.requests:,}"),
        ("untuned", f"{pilot.untuned:.1%}"),
        *((f"after {rows:,} rows", f"{value:.1%}") for rows, value in sorted(pilot.tuned.items())),
        (f"expected from {quality.rows:,}", f"{quality.value:.1%} ({quality.low:.1%} to {quality.high:.1%})"),
    ]
