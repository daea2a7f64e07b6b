"""Forecast of a fine-tuning run, before any training: tokens, money, resources, and quality after a pilot.

Tokens are exact, since prompts are known. Time and memory come from a few real steps. Quality is extrapolated from runs
on a few rows, with an assumption that is stated (see :func:`extrapolate`). The advice follows from these numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.bootstrap import json_number
from lightning_ft.evaluation.savings.cost import Prices, break_even_requests, request_cost

Advice = Literal["go", "more rows", "don't", "pilot first"]
_Z = 1.96  # of a 95% interval
_CACHED_THRESHOLD = 0.2
"""Smallest share of the costs that is worth training for, where the provider caches the prompt."""


@dataclass(frozen=True)
class RequestTokens:
    """Mean tokens per request, which are counted, not estimated.

    Args:
        requests: Number of requests.
        prompted: Input tokens with the prompt.
        tuned: Input tokens without it.
        prefix: Input tokens that all prompted requests start with, which a provider can cache.
        tuned_prefix: The same without the prompt.
        output: Tokens of the reference answers, with the token that ends them.
    """

    requests: int
    prompted: float
    tuned: float
    prefix: float
    tuned_prefix: float
    output: float

    @property
    def saved(self) -> float:
        """Share of all tokens of a request, input and output, that training saves."""
        return (self.prompted - self.tuned) / (self.prompted + self.output)


@dataclass(frozen=True)
class Resources:
    """What training takes, extrapolated from a few steps of it on this device.

    Args:
        rows: Number of training rows.
        tokens: Number of token positions of the whole run.
        seconds: Time in training steps.
        flops: Floating-point operations.
        peak_memory_bytes: Peak memory of the steps with the largest batch.
        measured_steps: Number of micro-batches that were measured.
        device: Name of the device.
    """

    rows: int
    tokens: int
    seconds: float
    flops: float
    peak_memory_bytes: int
    measured_steps: int
    device: str


@dataclass(frozen=True)
class QualityForecast:
    """Quality to expect from all rows.

    Args:
        rows: Number of training rows that it is for.
        value: Expected quality.
        low: Lower bound of the 95% interval.
        high: Upper bound of the 95% interval.
    """

    rows: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Pilot:
    """Qualities measured on validation requests.

    Args:
        requests: Number of validation requests.
        prompted: Quality with the prompt.
        untuned: Quality without it.
        tuned: Quality after training, by number of rows.
    """

    requests: int
    prompted: float
    untuned: float
    tuned: Mapping[int, float]


@dataclass(frozen=True)
class MoneyForecast:
    """Costs and savings in the currency of the prices.

    Args:
        prices: The prices.
        invested: Cost of training, data and sweep.
        prompted: Cost per request with the prompt, without and with a cached prefix.
        tuned: Cost per request of the tuned model, likewise.
        saved: Share of the cost that is saved, likewise.
        break_even: Number of requests at which training has paid off, likewise; infinite if it never does.
    """

    prices: Prices
    invested: float
    prompted: tuple[float, float]
    tuned: tuple[float, float]
    saved: tuple[float, float]
    break_even: tuple[float, float]


@dataclass(frozen=True)
class Forecast:
    """Everything that is known before training, and what to do.

    Args:
        advice: ``go``, ``more rows`` (quality will probably be too low), ``don't`` (too little is saved), or ``pilot
            first`` (quality is unknown, or too uncertain).
        reasons: Sentences that explain the advice.
        tokens: Tokens per request.
        money: Costs; None without prices.
        resources: Time and memory; None if no step was measured.
        pilot: Measured qualities; None without a pilot.
        quality: Quality to expect; None without a pilot.
        margin: Quality that the tuned model may lose against the prompt.
    """

    advice: Advice
    reasons: tuple[str, ...]
    tokens: RequestTokens
    money: MoneyForecast | None = None
    resources: Resources | None = None
    pilot: Pilot | None = None
    quality: QualityForecast | None = None
    margin: float = 0.02
    provenance: Mapping[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The forecast as JSON values, with infinite numbers as ``"Infinity"``."""
        values: dict[str, Any] = asdict(self)
        if self.money is not None:
            values["money"]["break_even"] = [json_number(number) for number in self.money.break_even]
        return values


def forecast_money(
    tokens: RequestTokens, prices: Prices, *, hourly: float | None = None, seconds: float | None = None
) -> MoneyForecast:
    """Compute costs per request and the number of requests at which training has paid off.

    Args:
        tokens: Tokens per request.
        prices: Prices of tokens, and the costs of training.
        hourly: Price of an hour of the device; with `seconds` it replaces ``prices.training``.
        seconds: Time that training takes.

    Example:
        >>> tokens = RequestTokens(1, prompted=1000, tuned=100, prefix=900, tuned_prefix=0, output=50)
        >>> prices = Prices(10.0, 20.0, cached_input=1.0, training=18.0, currency="USD", date="2026-01-31")
        >>> money = forecast_money(tokens, prices)
        >>> [round(share, 2) for share in money.saved], [round(n) for n in money.break_even]
        ([0.82, 0.31], [2000, 20000])
    """
    training = prices.training if hourly is None or seconds is None else hourly * seconds / 3600
    invested = training + prices.data + prices.sweep
    prompted, tuned = (
        tuple(
            request_cost([count], [cached], [tokens.output], prices.rates(tuned=is_tuned)) for cached in (0.0, prefix)
        )
        for count, prefix, is_tuned in (
            (tokens.prompted, tokens.prefix, False),
            (tokens.tuned, tokens.tuned_prefix, True),
        )
    )
    return MoneyForecast(
        prices=prices,
        invested=invested,
        prompted=(prompted[0], prompted[1]),
        tuned=(tuned[0], tuned[1]),
        saved=(_saved(prompted[0], tuned[0]), _saved(prompted[1], tuned[1])),
        break_even=(
            break_even_requests(invested, prompted[0], tuned[0]),
            break_even_requests(invested, prompted[1], tuned[1]),
        ),
    )


def _saved(prompted: float, tuned: float) -> float:
    return 1 - tuned / prompted if prompted else 0.0


def extrapolate(tuned: Mapping[int, float], rows: int, requests: int) -> QualityForecast:
    """Extrapolate the quality of a pilot to more rows.

    Between the two largest sizes quality changed by `d` per tripling of rows. It is assumed that each further tripling
    adds a third of the one before, so all of them together half of `d`. The interval goes from no further gain to the
    full `d` per tripling, and includes the sampling error of the pilot, whose scores are between 0 and 1. A pilot of
    which every answer is right isn't certain of that: its error is that of at least 2 other answers in `requests` + 4
    (Agresti & Coull 1998, https://doi.org/10.2307/2685469). Where no answer of the largest size is right, the curve
    hasn't begun to rise and says nothing of more rows, so the upper end is 1.

    Args:
        tuned: Quality by number of rows; at least two sizes.
        rows: Number of rows to extrapolate to.
        requests: Number of requests that each quality was measured on.

    Raises:
        SavingsError: For fewer than two sizes, or no request.

    Example:
        >>> forecast = extrapolate({100: 0.4, 300: 0.6}, 900, requests=10_000)
        >>> round(forecast.value, 2), round(forecast.low, 2), round(forecast.high, 2)
        (0.67, 0.59, 0.82)
    """
    if len(tuned) < 2 or requests < 1:
        raise SavingsError(f"A learning curve needs at least two sizes and one request, got {dict(tuned)}.")
    (small, before), (large, after) = sorted(tuned.items())[-2:]
    triplings = max(0.0, math.log(rows / large, 3))
    slope = max(0.0, (after - before) / math.log(large / small, 3))
    # d/3 + d/9 + ... for whole triplings; continuous in between
    expected = after + slope * 0.5 * (1 - 3.0**-triplings)
    error_before, error_after = (_sampling_error(quality, requests) for quality in (before, after))
    error_high = math.hypot(error_after * (1 + triplings), error_before * triplings)
    return QualityForecast(
        rows,
        _clip(expected),
        _clip(after - _Z * error_after),
        _clip(after + slope * triplings + _Z * error_high) if after > 0 else 1.0,
    )


def _sampling_error(quality: float, requests: int) -> float:
    """Standard error of a mean score, of which 0 and 1 are no certainty."""
    other = min(2 / (requests + 4), 0.5)
    share = min(max(quality, other), 1 - other)
    return math.sqrt(share * (1 - share) / requests)


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))


def advise(
    tokens: RequestTokens,
    *,
    money: MoneyForecast | None = None,
    pilot: Pilot | None = None,
    quality: QualityForecast | None = None,
    margin: float = 0.02,
    min_quality: float | None = None,
    requests_planned: float | None = None,
    cached: bool | None = None,
) -> tuple[Advice, tuple[str, ...]]:
    """Say whether training is worth it.

    Args:
        tokens: Tokens per request.
        money: Costs; None without prices.
        pilot: Measured qualities.
        quality: Quality to expect from all rows.
        margin: Quality that the tuned model may lose against the prompt.
        min_quality: Quality below which an arm is of no use; None for the default of the gate.
        requests_planned: Number of requests that the model will answer; None if unknown.
        cached: Whether the provider caches the prompt; by default if it has a price for cached tokens.

    Returns:
        The advice and its reasons.
    """
    reasons: list[str] = []
    if tokens.prompted <= tokens.tuned:
        return "don't", ("The prompt adds no tokens, so there is nothing to save.",)
    if money is not None:
        has_price = money.prices.cached_input is not None
        which = int(has_price if cached is None else cached)
        how = "with the prompt cached" if which else "without a cached prompt"
        saved, needed = money.saved[which], money.break_even[which]
        if saved <= 0:
            return "don't", (f"A tuned request costs {_compared(saved)} {how}.",)
        if which and saved < _CACHED_THRESHOLD:
            return "don't", (f"Your prompt is cached: training saves {saved:.0%} of the costs.",)
        reasons.append(f"A tuned request costs {_compared(saved)} {how}.")
        if money.invested:
            reasons.append(f"Training pays off after {_requests(needed)}.")
        else:
            reasons.append("What training costs isn't known: set training in the prices, or --hourly.")
        if requests_planned is not None and requests_planned < needed:
            return "don't", (*reasons, f"You plan {_requests(requests_planned)}.")
    else:
        reasons.append(f"{tokens.saved:.0%} of the tokens of a request are saved.")
    if pilot is None or quality is None:
        return "pilot first", (*reasons, "Whether quality is kept isn't known without a pilot.")
    limit = pilot.prompted - margin
    expected = f"{quality.value:.0%} ({quality.low:.0%} to {quality.high:.0%})"
    with_prompt = f"the prompt's {pilot.prompted:.0%}"
    if min_quality is not None:
        if min_quality > limit:
            limit, with_prompt = min_quality, f"{with_prompt} and min_quality={min_quality:g}"
        if pilot.prompted + _Z * _sampling_error(pilot.prompted, pilot.requests) < min_quality:
            reasons.append(
                f"With the prompt {pilot.prompted:.0%} are right, below min_quality={min_quality:g}, so no saving of "
                "its tokens can be claimed."
            )
    if quality.high < limit:
        return "more rows", (*reasons, f"With {quality.rows:,} rows expect {expected} right, against {with_prompt}.")
    useless = min_quality is None and pilot.prompted <= pilot.untuned  # as in the gate, min_quality replaces this
    if useless and quality.low <= pilot.untuned:
        return "pilot first", (
            *reasons,
            f"Neither the prompt ({pilot.prompted:.0%} right) nor the pilot is shown to be better than the model as it "
            f"is ({pilot.untuned:.0%}): with {quality.rows:,} rows {expected} may be right. Read a few answers, "
            "improve the prompt, and use more rows for the pilot.",
        )
    if quality.low >= limit:
        if useless:
            reasons.append(
                "The prompt isn't better than no prompt, so no saving of its tokens can be claimed; what training adds "
                f"is quality, {pilot.untuned:.0%} without it."
            )
        return "go", (*reasons, f"Expect {expected} right with {quality.rows:,} rows, against {with_prompt}.")
    return "pilot first", (
        *reasons,
        f"With {quality.rows:,} rows {expected} may be right, against {with_prompt}: the pilot can't decide. Use more "
        "rows or more validation requests for it.",
    )


def _compared(saved: float) -> str:
    return f"{saved:.0%} less" if saved > 0 else f"{-saved:.0%} more" if saved < 0 else "as much as a prompted one"


def _requests(number: float) -> str:
    return f"{math.ceil(number):,} requests"
