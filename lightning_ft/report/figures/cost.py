"""What a volume of requests costs, and from which on training has paid for itself."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning_ft.functional.bootstrap import Interval
from lightning_ft.functional.result import SavingsResult
from lightning_ft.report.figures.canvas import legend_below, logarithmic
from lightning_ft.report.figures.marks import marks
from lightning_ft.report.numbers import rounded

Kind = Literal["cached", "uncached"]
_POINTS = 60
_TITLES = {"cached": "Cost with the prompt's prefix cached", "uncached": "Cost without a prefix cache"}


def draw_cost(axes: Any, result: SavingsResult, kind: Kind, break_even: Interval) -> None:
    """Cost of both arms over the number of requests, with the break-even point and its interval as a band.

    Args:
        axes: Of matplotlib.
        result: With prices.
        kind: Whether the prefix that all requests have in common is paid at the price of cached tokens.
        break_even: Requests after which training is earned back; infinite where it never is.
    """
    assert result.costs is not None
    prices = result.costs.prices
    prompted, tuned = getattr(result.costs, f"prompted_{kind}"), getattr(result.costs, f"tuned_{kind}")
    first, last = _range(break_even, prices.invested, max(prompted, tuned))
    volumes = [first * (last / first) ** (k / (_POINTS - 1)) for k in range(_POINTS)]
    look = marks(["prompted", "tuned"])
    axes.plot(volumes, [prompted * x for x in volumes], color=look["prompted"].colour, linewidth=2.2, label="prompted")
    axes.plot(
        volumes,
        [prices.invested + tuned * x for x in volumes],
        color=look["tuned"].colour,
        linewidth=2.2,
        linestyle="--",
        label=f"tuned, with {prices.invested:,.2f} {prices.currency} invested" if prices.invested else "tuned",
    )
    level = f"{result.confidence:.0%}"
    if prices.invested and break_even.lo < last:
        axes.axvspan(
            break_even.lo,
            min(break_even.hi, last),
            color="#009E73",
            alpha=0.22,
            linewidth=0,
            label=f"break-even, {level} interval",
        )
        if math.isfinite(break_even.value):
            axes.axvline(break_even.value, color="#00664B", linewidth=1.4, label="break-even")
    logarithmic(axes.xaxis, _thousands)
    logarithmic(axes.yaxis, lambda money: f"{money:,.0f}" if money >= 1 else f"{money:g}")
    axes.set_xlim(first, last)
    axes.set_xlabel("requests (log scale)")
    axes.set_ylabel(f"cost in {prices.currency} (log scale)")
    axes.set_title(f"{_TITLES[kind]}\n{_verdict(break_even, prices.invested)}")
    legend_below(axes)


def _verdict(break_even: Interval, invested: float) -> str:
    if math.isinf(break_even.value):
        return "never earned back: a tuned request isn't cheaper"
    if not invested:
        return "nothing was invested: cheaper from the first request"
    return f"earned back after {rounded(break_even.value)} requests"


def _range(break_even: Interval, invested: float, per_request: float) -> tuple[float, float]:
    """Requests to draw: some decades around break-even, or around where the investment is spent on requests."""
    middle = break_even.value
    if not (math.isfinite(middle) and middle > 0):
        middle = invested / per_request if invested and per_request else 1e4
    finite = [end for end in (break_even.lo, break_even.hi) if math.isfinite(end) and end > 0]
    low, high = min([middle, *finite]), max([middle, *finite])
    return 10.0 ** math.floor(math.log10(low) - 1), 10.0 ** math.ceil(math.log10(high) + 1)


def _thousands(value: float) -> str:
    """Long numbers of an axis as people say them.

    Example:
        >>> _thousands(2e6), _thousands(1e4), _thousands(5.0)
        ('2M', '10k', '5')
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
