"""Intervals of a report that results don't hold: tokens per success, break-even, gain over the untuned model."""

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
    """Tokens per success of each arm, resampled as the result's own intervals are.

    Args:
        result: The result.
        resamples: Draws of the bootstrap.

    Returns:
        By arm; the ends are infinite where an arm has draws without a success.
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
    """Requests after which training is earned back, from the interval of what one request saves.

    ``invested / (cost_prompted - cost_tuned)``: the lower end belongs to the upper end of the difference, and is
    infinite where the difference may be 0 or less.

    Args:
        result: With prices.
        resamples: Draws of the bootstrap.

    Returns:
        ``cached`` and ``uncached``; empty without prices.
    """
    if result.costs is None:
        return {}
    prices = result.costs.prices
    columns: dict[str, Sequence[float]] = {"n": [1.0] * result.n}
    statistics: dict[str, Statistic] = {}
    for kind in ("cached", "uncached"):
        paid = []
        for name, tuned in (("prompted", False), ("tuned", True)):
            arm = result.arms[name]
            from_cache = arm.cached_prefix_tokens if kind == "cached" else (0,) * result.n
            places = zip(arm.input_tokens, from_cache, arm.output_tokens, strict=True)
            paid.append([request_cost([i], [c], [o], prices.rates(tuned=tuned)) for i, c, o in places])
        columns[kind] = [prompted - tuned for prompted, tuned in zip(*paid, strict=True)]
        statistics[kind] = _ratio(kind, "n")
    clusters = result.arms["prompted"].clusters or None
    saved = bootstrap_intervals(
        columns, statistics, clusters=clusters, confidence=result.confidence, resamples=resamples
    )
    return {
        kind: Interval(*(break_even_requests(prices.invested, difference, 0.0) for difference in (i.value, i.hi, i.lo)))
        for kind, i in saved.items()
    }


def gain_interval(tuned: Sequence[ArmRecords], untuned: ArmRecords, *, resamples: int = RESAMPLES) -> Interval:
    """Quality gained over the original weights without a prompt, paired by request.

    Args:
        tuned: Answers of one run, or of several seeds, whose scores are averaged request by request.
        untuned: Answers of the original weights to the same requests.
        resamples: Draws of the bootstrap.

    Raises:
        SavingsError: If they didn't answer the same requests.

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


def is_open(interval: Interval) -> bool:
    """Whether an end is infinite.

    Example:
        >>> is_open(Interval(1.0, 0.5, float("inf"))), is_open(Interval(1.0, 0.5, 2.0))
        (True, False)
    """
    return not (math.isfinite(interval.lo) and math.isfinite(interval.hi))


def _ratio(numerator: str, denominator: str) -> Statistic:
    return lambda sums: sums[numerator] / sums[denominator]
