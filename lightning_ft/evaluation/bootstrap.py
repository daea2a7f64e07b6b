"""Bootstrap confidence intervals of statistics that are functions of sums over requests."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lightning_ft.arguments import check_number
from lightning_ft.errors import SavingsError

T = TypeVar("T")
Array = NDArray[np.float64]
Statistic = Callable[[Mapping[str, Array]], Array]
"""Function of the columns' sums, by name, that returns an array of their common shape."""

_SEED = "rng" if "rng" in inspect.signature(stats.bootstrap).parameters else "random_state"  # renamed in scipy 1.15
_MAX_ELEMENTS = 4_000_000  # numbers in memory at a time while resampling


@dataclass(frozen=True)
class Interval:
    """A statistic with its confidence interval.

    Args:
        value: Statistic of the original sample.
        lo: Lower end of the interval. Taken alone it is a bound at half the error (97.5% for a 95% interval).
        hi: Upper end of the interval.
    """

    value: float
    lo: float
    hi: float

    def to_dict(self) -> dict[str, float | str]:
        """Convert to JSON types, see :func:`json_number`.

        Example:
            >>> Interval(2.0, 1.0, float("inf")).to_dict()
            {'value': 2.0, 'lo': 1.0, 'hi': 'Infinity'}
        """
        return {name: json_number(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, float | str]) -> Interval:
        """Restore an interval from :meth:`to_dict`."""
        return cls(**{name: float(value) for name, value in values.items()})


def json_number(value: T) -> T | str:
    """Convert numbers that JSON lacks to ``"Infinity"``, ``"-Infinity"`` and ``"NaN"``; return other values unchanged.

    Example:
        >>> json_number(float("-inf")), json_number(3)
        ('-Infinity', 3)
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def bootstrap_intervals(
    columns: Mapping[str, Sequence[float]],
    statistics: Mapping[str, Statistic],
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> dict[str, Interval]:
    """Compute confidence intervals by a paired bootstrap over requests: all numbers of a request are drawn together.

    Intervals are BCa (Efron 1987, https://doi.org/10.2307/2289144) from `scipy.stats.bootstrap`, or percentiles where
    the data are degenerate (all resamples equal, or some undefined). They depend neither on the order of the requests
    nor on their names.

    Args:
        columns: Numbers of the ``n`` requests, by name; each column has length ``n``.
        statistics: Functions of the columns' sums, by name.
        clusters: Cluster of each request, of length ``n``; whole clusters are drawn. None draws single requests.
        confidence: Confidence level of the two-sided intervals, between 0 and 1.
        resamples: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        Interval of each statistic, by name.

    Raises:
        SavingsError: If there are no requests, or `confidence` isn't between 0 and 1.

    Example:
        >>> columns = {"tuned": [20.0, 30.0, 25.0, 22.0], "prompted": [100.0, 120.0, 105.0, 98.0]}
        >>> saving = bootstrap_intervals(columns, {"total": lambda s: 1 - s["tuned"] / s["prompted"]})["total"]
        >>> round(saving.value, 3), saving.lo < saving.value < saving.hi
        (0.771, True)
    """
    check_number("confidence", confidence, SavingsError)
    if not 0 < confidence < 1:
        raise SavingsError(f"confidence={confidence}: expected a share between 0 and 1, such as 0.95.")
    names = list(columns)
    table = np.array([columns[name] for name in names], dtype=np.float64)  # [columns, n]
    if table.size == 0:
        raise SavingsError("There are no requests to measure. Pass at least one.")
    table = _canonical_order(_cluster_sums(table, clusters))  # [columns, units]

    def evaluate(*drawn: Array, axis: int = -1) -> Array:
        sums = {name: column.sum(axis=axis) for name, column in zip(names, drawn, strict=True)}
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.stack(
                [np.broadcast_to(statistic(sums), next(iter(sums.values())).shape) for statistic in statistics.values()]
            )

    values = evaluate(*table)
    units = table.shape[1]
    if units == 1:  # nothing to resample
        return {name: Interval(float(v), float(v), float(v)) for name, v in zip(statistics, values, strict=True)}
    result: Any
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # degenerate statistics are handled below
        result = stats.bootstrap(
            tuple(table),
            evaluate,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            confidence_level=confidence,
            method="BCa",
            batch=max(1, _MAX_ELEMENTS // (units * len(names))),
            **{_SEED: np.random.default_rng(seed)},
        )
    lows, highs = result.confidence_interval
    tail = (1 - confidence) / 2
    intervals = {}
    for k, name in enumerate(statistics):
        lo, hi = float(lows[k]), float(highs[k])
        drawn = result.bootstrap_distribution[k]
        if not (np.isfinite(lo) and np.isfinite(hi) and np.isfinite(drawn).all()):
            drawn = drawn[~np.isnan(drawn)]
            # "lower" and "higher" widen the interval, and never interpolate with an infinite value
            lo = float(np.quantile(drawn, tail, method="lower")) if drawn.size else float(values[k])
            hi = float(np.quantile(drawn, 1 - tail, method="higher")) if drawn.size else float(values[k])
        intervals[name] = Interval(float(values[k]), lo, hi)
    return intervals


def _cluster_sums(table: Array, clusters: Sequence[Hashable] | None) -> Array:
    """Sum the requests of each cluster, ``[columns, n]`` to ``[columns, clusters]``."""
    if clusters is None:
        return table
    index_of: dict[Hashable, int] = {}
    indices = np.array([index_of.setdefault(cluster, len(index_of)) for cluster in clusters])
    sums = np.zeros((table.shape[0], len(index_of)))
    for row, column in zip(sums, table, strict=True):
        np.add.at(row, indices, column)
    return sums


def _canonical_order(table: Array) -> Array:
    """Sort the units by their numbers, so that the resamples don't depend on the order of the requests."""
    return table[:, np.lexsort(table[::-1])]


def format_range(interval: Interval, form: Callable[[float], str]) -> str:
    """Format both ends of an interval.

    Example:
        >>> format_range(Interval(0.5, 0.25, 0.75), lambda share: f"{share:.0%}")
        '25% to 75%'
    """
    return f"{form(interval.lo)} to {form(interval.hi)}"


def format_interval(interval: Interval, form: Callable[[float], str]) -> str:
    """Format a value with its interval.

    Example:
        >>> format_interval(Interval(0.5, 0.25, 0.75), lambda share: f"{share:.0%}")
        '50% (25% to 75%)'
    """
    return f"{form(interval.value)} ({format_range(interval, form)})"
