"""Cost per request, with and without prefix caching, and the number of requests at which training breaks even."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date as Date
from typing import TYPE_CHECKING

from lightning_ft.errors import SavingsError

if TYPE_CHECKING:
    from lightning_ft.evaluation.savings.records import ArmRecords


@dataclass(frozen=True)
class Prices:
    """Prices per million tokens, and the costs of training.

    Args:
        input: Price of a million input tokens.
        output: Price of a million output tokens.
        cached_input: Price of a million input tokens from the provider's prefix cache; by default `input`.
        tuned_input: Price of a million input tokens of the tuned model; by default `input`.
        tuned_output: Price of a million output tokens of the tuned model; by default `output`.
        tuned_cached_input: Price of a million cached input tokens of the tuned model; by default `tuned_input` if that
            is passed, or else `cached_input`.
        training: Cost of the training run.
        data: Cost of the training data.
        sweep: Cost of the runs of the hyperparameter search.
        currency: Currency of all prices and costs, such as ``USD``.
        date: Date of the prices, ``YYYY-MM-DD``.

    Raises:
        SavingsError: If the currency or date is missing, or a price isn't a finite number of at least 0.

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
                raise SavingsError(f"Prices: {name}={value!r}, expected a finite number of at least 0.")
        if isinstance(self.date, Date):  # YAML parses an unquoted date as a date object
            object.__setattr__(self, "date", self.date.isoformat())
        if not self.currency or not self.date:
            raise SavingsError(
                'Prices need their currency and date: pass, for example, currency="USD" and date="2026-01-31".'
            )
        try:
            Date.fromisoformat(self.date)
        except ValueError as error:
            raise SavingsError(f"Prices: date={self.date!r}, expected YYYY-MM-DD.") from error

    @property
    def invested(self) -> float:
        """Total cost of training, data and sweep."""
        return self.training + self.data + self.sweep

    def rates(self, *, tuned: bool) -> tuple[float, float, float]:
        """Prices of a million input, cached input and output tokens for the tuned or the prompted arm."""
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
    """Mean cost per request of the prompted and the tuned arm, in the currency of the prices.

    Args:
        prompted_cached: Cost per request of the prompted arm, with the common prefix at the price of cached tokens.
        prompted_uncached: Cost per request of the prompted arm, with every token at full price.
        tuned_cached: Cost per request of the tuned arm, with the common prefix at the price of cached tokens.
        tuned_uncached: Cost per request of the tuned arm, with every token at full price.
        break_even_cached: Number of requests after which the investment has paid off, with prefix caching; infinite if
            tuned requests aren't cheaper.
        break_even_uncached: Number of requests after which the investment has paid off, without prefix caching.
        prices: Prices from which the costs were computed.
    """

    prompted_cached: float
    prompted_uncached: float
    tuned_cached: float
    tuned_uncached: float
    break_even_cached: float
    break_even_uncached: float
    prices: Prices


def request_cost(
    input_tokens: Sequence[float],
    cached: Sequence[float],
    output_tokens: Sequence[float],
    rates: tuple[float, float, float],
) -> float:
    """Mean cost per request: ``p_in (I - cached) + p_cached cached + p_out O``.

    Args:
        input_tokens: Number of input tokens `I` of each of ``n`` requests.
        cached: Number of input tokens of each request that are in the prefix cache.
        output_tokens: Number of output tokens `O` of each request.
        rates: Prices of a million input, cached input and output tokens.

    Example:
        >>> request_cost([1000, 1000], [900, 900], [100, 100], (10.0, 1.0, 20.0))
        0.0039
    """
    full, from_cache, out = rates
    total = full * (sum(input_tokens) - sum(cached)) + from_cache * sum(cached) + out * sum(output_tokens)
    return total / 1e6 / len(input_tokens)


def break_even_requests(invested: float, prompted: float, tuned: float) -> float:
    """Number of requests after which an investment has paid off: ``invested / (prompted - tuned)``.

    Infinite if the tuned model isn't cheaper.

    Args:
        invested: Cost of training, data and sweep.
        prompted: Cost per request of the prompted arm.
        tuned: Cost per request of the tuned arm.

    Example:
        >>> break_even_requests(20.0, prompted=0.5, tuned=0.25), break_even_requests(20.0, prompted=0.25, tuned=0.25)
        (80.0, inf)
    """
    return invested / (prompted - tuned) if prompted > tuned else math.inf


def compute_costs(prompted: ArmRecords, tuned: ArmRecords, prices: Prices) -> Costs:
    """Compute the costs of both arms, with and without prefix caching.

    Args:
        prompted: `ArmRecords` of the prompted arm.
        tuned: `ArmRecords` of the tuned arm.
        prices: Prices of tokens and of training.
    """
    means = []
    for records, is_tuned in ((prompted, False), (tuned, True)):
        for cached in (records.cached_prefix_tokens, [0] * len(records.ids)):
            rates = prices.rates(tuned=is_tuned)
            means.append(request_cost(records.input_tokens, cached, records.output_tokens, rates))
    p_cached, p_uncached, t_cached, t_uncached = means
    return Costs(
        p_cached,
        p_uncached,
        t_cached,
        t_uncached,
        break_even_requests(prices.invested, p_cached, t_cached),
        break_even_requests(prices.invested, p_uncached, t_uncached),
        prices,
    )
