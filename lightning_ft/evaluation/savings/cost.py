"""What requests cost, with and without a cached prefix, and when training has paid for itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date as Date
from typing import Any

from lightning_ft.errors import SavingsError


@dataclass(frozen=True)
class Prices:
    """Prices for a million tokens, and what was spent before the first request.

    Args:
        input: Of input tokens.
        output: Of output tokens.
        cached_input: Of input tokens that the provider has in its prefix cache; by default those of `input`.
        tuned_input: Of the tuned model's input tokens; by default those of `input`.
        tuned_output: Of the tuned model's output tokens.
        tuned_cached_input: Of the tuned model's cached input tokens; by default `cached_input`, or `tuned_input` if
            only that is given.
        training: What the training run cost.
        data: What the data cost.
        sweep: What the runs cost that looked for good settings.
        currency: Of all of them, such as ``USD``.
        date: When the prices were valid, ``YYYY-MM-DD``.

    Raises:
        SavingsError: For a missing currency or date, or a price that isn't a number of at least 0.

    Example:
        >>> Prices(0.15, 0.60, cached_input=0.015, training=20.0, currency="EUR", date="2026-01-31").invested
        20.0
    """

    input: float
    output: float
    cached_input: float | None = None
    tuned_input: float | None = None
    tuned_output: float | None = None
    tuned_cached_input: float | None = None
    training: float = 0.0
    data: float = 0.0
    sweep: float = 0.0
    currency: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name in ("currency", "date") or value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise SavingsError(f"Prices: {name}={value!r}, expected a number of at least 0.")
        if isinstance(self.date, Date):  # YAML reads an unquoted date as one
            object.__setattr__(self, "date", self.date.isoformat())
        if not self.currency or not self.date:
            raise SavingsError(
                'Prices mean nothing without their currency and date: pass currency="USD" and date="2026-01-31", say.'
            )
        try:
            Date.fromisoformat(self.date)
        except ValueError as error:
            raise SavingsError(f"Prices: date={self.date!r}, expected YYYY-MM-DD.") from error

    @property
    def invested(self) -> float:
        """Training, data and sweep together."""
        return self.training + self.data + self.sweep

    def rates(self, *, tuned: bool) -> tuple[float, float, float]:
        """Input, cached input and output prices of one arm for a million tokens."""
        cached = self.input if self.cached_input is None else self.cached_input
        if not tuned:
            return self.input, cached, self.output
        own_cached = self.tuned_cached_input
        if own_cached is None:
            own_cached = cached if self.tuned_input is None else self.tuned_input
        return (
            self.input if self.tuned_input is None else self.tuned_input,
            own_cached,
            self.output if self.tuned_output is None else self.tuned_output,
        )


@dataclass(frozen=True)
class Costs:
    """Mean cost of a request, prompted and tuned, in the prices' currency.

    Args:
        prompted_cached: Prompted, the common prefix at the price of cached tokens.
        prompted_uncached: Prompted, every token at full price.
        tuned_cached: Tuned, likewise.
        tuned_uncached: Tuned, likewise.
        break_even_cached: Requests after which what was invested is earned back; infinite where tuned isn't cheaper.
        break_even_uncached: The same without a prefix cache.
        prices: What they were computed with.
    """

    prompted_cached: float
    prompted_uncached: float
    tuned_cached: float
    tuned_uncached: float
    break_even_cached: float
    break_even_uncached: float
    prices: Prices


def request_cost(
    input_tokens: Sequence[int], cached: Sequence[int], output_tokens: Sequence[int], rates: tuple[float, float, float]
) -> float:
    """Mean cost of a request: ``p_in (I - cached) + p_cached cached + p_out O``.

    Args:
        input_tokens: Of each request, ``n``.
        cached: Input tokens of each request that are in the prefix cache, ``n``.
        output_tokens: Of each request, ``n``.
        rates: Prices of input, cached input and output for a million tokens.

    Example:
        >>> request_cost([1000, 1000], [900, 900], [100, 100], (10.0, 1.0, 20.0))
        0.0039
    """
    full, from_cache, out = rates
    total = full * (sum(input_tokens) - sum(cached)) + from_cache * sum(cached) + out * sum(output_tokens)
    return total / 1e6 / len(input_tokens)


def break_even_requests(invested: float, prompted: float, tuned: float) -> float:
    """Requests after which `invested` is earned back; infinite where the tuned model isn't cheaper.

    ``invested / (prompted - tuned)``.

    Example:
        >>> break_even_requests(20.0, prompted=0.5, tuned=0.25), break_even_requests(20.0, prompted=0.25, tuned=0.25)
        (80.0, inf)
    """
    return invested / (prompted - tuned) if prompted > tuned else math.inf


def costs(prompted: Any, tuned: Any, prices: Prices) -> Costs:
    """Costs of both arms, always with and without a cached prefix.

    Args:
        prompted: `ArmRecords` of the prompted arm.
        tuned: `ArmRecords` of the tuned arm.
        prices: The prices.
    """
    figures = []
    for records, is_tuned in ((prompted, False), (tuned, True)):
        for cached in (records.cached_prefix_tokens, [0] * len(records.ids)):
            rates = prices.rates(tuned=is_tuned)
            figures.append(request_cost(records.input_tokens, cached, records.output_tokens, rates))
    p_cached, p_uncached, t_cached, t_uncached = figures
    return Costs(
        p_cached,
        p_uncached,
        t_cached,
        t_uncached,
        break_even_requests(prices.invested, p_cached, t_cached),
        break_even_requests(prices.invested, p_uncached, t_uncached),
        prices,
    )
