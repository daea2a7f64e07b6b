"""The quality gate: a non-inferiority test of the tuned arm, its sample size, and warnings that qualify its verdict."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from statistics import fmean

from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.bootstrap import Interval
from lightning_ft.evaluation.savings.records import ArmRecords

_Z = 1.96 + 0.84  # normal quantiles for one-sided 97.5% confidence and 80% power, to two decimals


def required_requests(discordant: float, margin: float) -> int:
    """Number of requests that a paired comparison needs to rule out a loss of `margin`.

    At one-sided 97.5% confidence and 80% power it is ``(1.96 + 0.84)^2 * discordant / margin^2``, the normal
    approximation for equal paired proportions (Nam 1997, https://doi.org/10.2307/2533508), and at least
    ``ln(0.025) / ln(1 - margin)``: with fewer requests, an arm whose loss is `margin` would have no failure at all with
    a probability above 2.5%.

    Args:
        discordant: Mean squared difference of the scores of both arms; for scores of 0 and 1, the share of requests on
            which the arms differ.
        margin: Loss of quality to rule out, between 0 and 1.

    Example:
        >>> required_requests(0.10, 0.02), required_requests(0.10, 0.05), required_requests(0.0, 0.05)
        (1960, 314, 72)
    """
    by_power = math.ceil(round(_Z**2 * discordant / margin**2, 6))
    return max(by_power, math.ceil(math.log(0.025) / math.log1p(-margin)))


@dataclass(frozen=True)
class Gate:
    """Verdict on the quality of the tuned arm.

    Args:
        margin: Largest acceptable loss of quality, chosen before the measurement.
        bound: Lower one-sided 97.5% bound of tuned minus prompted quality.
        discordant: Mean squared difference of the scores of both arms.
        n: Number of requests, or of clusters if requests are resampled by cluster.
        required_n: Number of requests or clusters that the margin requires.
    """

    margin: float
    bound: float
    discordant: float
    n: int
    required_n: int

    @property
    def underpowered(self) -> bool:
        """Whether there are too few requests. If the bound is 0 or higher, the minimum for the margin is enough."""
        if self.bound >= 0:
            return self.n < required_requests(0.0, self.margin)
        return self.n < self.required_n

    @property
    def passed(self) -> bool:
        """Whether enough requests rule out a loss larger than the margin."""
        return self.bound > -self.margin and not self.underpowered


def quality_gate(difference: Interval, discordant: float, n: int, margin: float) -> Gate:
    """Test the difference in quality of two arms for non-inferiority.

    Args:
        difference: Tuned minus prompted quality, with its 95% interval.
        discordant: Mean squared difference of the scores of both arms.
        n: Number of requests or clusters.
        margin: Largest acceptable loss of quality, between 0 and 1.

    Raises:
        SavingsError: If the margin isn't between 0 and 1.

    Example:
        >>> quality_gate(Interval(0.0, -0.01, 0.01), discordant=0.05, n=1000, margin=0.02).passed
        True
        >>> quality_gate(Interval(0.0, -0.01, 0.01), discordant=0.05, n=100, margin=0.02).underpowered
        True
    """
    check_margin(margin)
    return Gate(margin, difference.lo, discordant, n, required_requests(discordant, margin))


def check_margin(margin: float) -> None:
    """Check that a margin is between 0 and 1.

    Raises:
        SavingsError: If it isn't.
    """
    if not 0 < margin < 1:
        raise SavingsError(f"margin={margin}: expected a share between 0 and 1, such as 0.02 for two points.")


def overlap_text(count: int, n: int) -> str:
    """Describe how many requests also appear in the training rows; returns an empty string if none does.

    Args:
        count: Number of these requests.
        n: Number of all requests.

    Example:
        >>> overlap_text(4, 8), overlap_text(0, 8)
        ('4 of 8 requests (50%) also appear in the training rows', '')
    """
    if not count:
        return ""
    permille = 1000 * count // n  # rounded down, so that only all requests are 100%
    share = f"{permille / 10:g}%" if permille else "under 0.1%"
    return f"{count:,} of {n:,} requests ({share}) also appear{'s' if count == 1 else ''} in the training rows"


def overlap_warnings(in_training: Collection[str], prompted: ArmRecords, tuned: ArmRecords) -> list[str]:
    """Warn of requests that also appear in the training rows, with their number and the quality on all others.

    Args:
        in_training: Ids of the requests that also appear in the training rows.
        prompted: Records of the prompted arm.
        tuned: Records of the tuned arm, for the same requests in the same order.

    Returns:
        Warnings; empty if no request appears in the training rows.
    """
    if not in_training:
        return []
    seen = frozenset(in_training)
    new = [i for i, name in enumerate(prompted.ids) if name not in seen]
    warnings = [
        f"{overlap_text(len(seen), len(prompted.ids))}: the tuned model may have memorized their answers, so "
        "its quality on new requests may be lower. Remove them from the training rows or from the requests, and "
        "measure again."
    ]
    if new:
        quality = [fmean(arm.scores[i] for i in new) for arm in (tuned, prompted)]
        warnings.append(
            f"On the {len(new):,} requests that don't appear in the training rows, quality is {quality[0]:.3f} tuned "
            f"against {quality[1]:.3f} prompted."
        )
    return warnings
