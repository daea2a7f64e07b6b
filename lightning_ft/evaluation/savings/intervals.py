"""Intervals that only reports show: tokens per success, break-even, and gain over the untuned arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from lightning_ft.evaluation.bootstrap import Interval, Statistic, bootstrap_intervals
from lightning_ft.evaluation.savings.cost import break_even_requests, request_cost
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.evaluation.savings.result import SavingsResult

RESAMPLES = 9999


def per_success_intervals(result: SavingsResult, *, resamples: int = RESAMPLES) -> dict[str, Interval]:
    """Tokens per success of each arm, with intervals from the same bootstrap as the result's own.

    Args:
        result: The result.
        resamples: Number of bootstrap resamples.

    Returns:
        Interval by arm; ends are infinite if an arm has resamples without a success.
    """
    columns: dict[str, Sequence[float]] = {}
    statistics: dict[str, Statistic] = {}
    for name, arm in result.arms.items():
        columns[f"{name}_tokens"] = [i + o for i, o in zip(arm.input_tokens, arm.output_tokens, strict=True)]
        columns[f"{name}_score"] = arm.scores
        statistics[name] = _ratio(f"{name}_tokens", f"{name}_score")
    clusters = result.arms["prompted"].clusters or None
    return bootstrap_intervals(
        columns, statistics, clusters=clusters, confidence=result.confidence, resamples=resamples
    )


def break_even_intervals(result: SavingsResult, *, resamples: int = RESAMPLES) -> dict[str, Interval]:
    """Number of requests after which training has paid off, from the interval of the savings per request.

    It is ``invested / (cost_prompted - cost_tuned)``. The lower end follows from the upper end of the difference and
    vice versa; an end is infinite if that of the difference is 0 or less.

    Args:
        result: The result, with costs.
        resamples: Number of bootstrap resamples.

    Returns:
        Intervals ``cached`` and ``uncached``, with and without prefix caching; empty if the result has no costs.
    """
    if result.costs is None:
        return {}
    prices = result.costs.prices
    columns: dict[str, Sequence[float]] = {"n": [1.0] * result.n}
    statistics: dict[str, Statistic] = {}
    for caching in ("cached", "uncached"):
        paid = []
        for name, tuned in (("prompted", False), ("tuned", True)):
            arm = result.arms[name]
            from_cache = arm.cached_prefix_tokens if caching == "cached" else (0,) * result.n
            tokens = zip(arm.input_tokens, from_cache, arm.output_tokens, strict=True)
            paid.append([request_cost([i], [c], [o], prices.rates(tuned=tuned)) for i, c, o in tokens])
        columns[caching] = [prompted - tuned for prompted, tuned in zip(*paid, strict=True)]
        statistics[caching] = _ratio(caching, "n")
    clusters = result.arms["prompted"].clusters or None
    saved = bootstrap_intervals(
        columns, statistics, clusters=clusters, confidence=result.confidence, resamples=resamples
    )
    return {
        caching: Interval(
            *(break_even_requests(prices.invested, difference, 0.0) for difference in (i.value, i.hi, i.lo))
        )
        for caching, i in saved.items()
    }


def gain_interval(tuned: Sequence[ArmRecords], untuned: ArmRecords, *, resamples: int = RESAMPLES) -> Interval:
    """Gain in quality of the tuned over the untuned arm, paired by request.

    Args:
        tuned: Records of one run, or of one run per seed, whose scores are averaged per request.
        untuned: Records of the original weights with the request alone, for the same requests.
        resamples: Number of bootstrap resamples.

    Raises:
        SavingsError: If the arms answered different requests.

    Example:
        >>> arm = lambda scores: ArmRecords(("a", "b"), (9, 9), (1, 1), scores, (False, False))
        >>> gain_interval([arm((1.0, 1.0))], arm((0.0, 1.0)), resamples=99).value
        0.5
    """
    arms = [arm.ordered(untuned.ids, "tuned") for arm in tuned]
    gained = [mean(scores) - base for *scores, base in zip(*(arm.scores for arm in arms), untuned.scores, strict=True)]
    columns = {"gained": gained, "n": [1.0] * len(gained)}
    found = bootstrap_intervals(
        columns, {"gain": _ratio("gained", "n")}, clusters=untuned.clusters or None, resamples=resamples
    )
    return found["gain"]


def is_unbounded(interval: Interval) -> bool:
    """Whether an end is infinite.

    Example:
        >>> is_unbounded(Interval(1.0, 0.5, float("inf"))), is_unbounded(Interval(1.0, 0.5, 2.0))
        (True, False)
    """
    return not (math.isfinite(interval.lo) and math.isfinite(interval.hi))


def _ratio(numerator: str, denominator: str) -> Statistic:
    return lambda sums: sums[numerator] / sums[denominator]
