"""The quality gate: a test of non-inferiority, the number of requests it needs, and what may weaken it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from statistics import fmean

from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.bootstrap import Interval
from lightning_ft.evaluation.savings.records import ArmRecords

_Z = 1.96 + 0.84  # one-sided 97.5% confidence, 80% power, rounded as tables have them


def required_requests(discordant: float, margin: float) -> int:
    """Requests that a paired comparison needs to rule out a loss of `margin` with 80% power at a one-sided 97.5%.

    ``(1.96 + 0.84)^2 * discordant / margin^2``, the normal approximation for paired proportions that don't differ (Nam
    1997, https://doi.org/10.2307/2533508), and never fewer than ``ln(0.025) / ln(1 - margin)``: with fewer, a loss of
    `margin` would too often go without a single failure.

    Args:
        discordant: Mean squared difference of the two arms' scores; for scores of 0 and 1 the share of requests on
            which they differ.
        margin: The loss to rule out, as a share.

    Example:
        >>> required_requests(0.10, 0.02), required_requests(0.10, 0.05), required_requests(0.0, 0.05)
        (1960, 314, 72)
    """
    by_power = math.ceil(round(_Z**2 * discordant / margin**2, 6))
    return max(by_power, math.ceil(math.log(0.025) / math.log1p(-margin)))


@dataclass(frozen=True)
class Gate:
    """The verdict on quality.

    Args:
        margin: The loss that would be accepted, chosen beforehand.
        bound: Lower one-sided 97.5% bound of tuned minus prompted quality.
        discordant: Mean squared difference of the scores.
        n: Requests, or clusters of them where they are resampled by cluster.
        required_n: How many the margin needs.
    """

    margin: float
    bound: float
    discordant: float
    n: int
    required_n: int

    @property
    def underpowered(self) -> bool:
        """Whether there are too few requests; the least number is enough to show that tuned is no worse at all."""
        if self.bound >= 0:
            return self.n < required_requests(0.0, self.margin)
        return self.n < self.required_n

    @property
    def passed(self) -> bool:
        """Whether a loss of more than the margin is ruled out, by enough requests."""
        return self.bound > -self.margin and not self.underpowered


def quality_gate(difference: Interval, discordant: float, n: int, margin: float) -> Gate:
    """Judge the difference of two arms' quality.

    Args:
        difference: Tuned minus prompted, a 95% interval.
        discordant: Mean squared difference of the scores.
        n: Requests or clusters.
        margin: The loss that would be accepted, between 0 and 1.

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
    """Refuse a margin that isn't between 0 and 1.

    Raises:
        SavingsError: If it isn't.
    """
    if not 0 < margin < 1:
        raise SavingsError(f"margin={margin}: expected a share between 0 and 1, such as 0.02 for two points.")


def overlap_text(count: int, n: int) -> str:
    """A sentence on requests that also appear in the training rows; empty where none does.

    Args:
        count: Number of these requests.
        n: Number of all requests.

    Example:
        >>> overlap_text(4, 8), overlap_text(0, 8)
        ('4 of 8 requests (50%) also appear in the training rows', '')
    """
    if not count:
        return ""
    permille = 1000 * count // n  # never rounded up to all of them
    share = f"{permille / 10:g}%" if permille else "under 0.1%"
    return f"{count:,} of {n:,} requests ({share}) also appear{'s' if count == 1 else ''} in the training rows"


def overlap_warnings(in_training: Collection[str], prompted: ArmRecords, tuned: ArmRecords) -> list[str]:
    """Warnings about requests that also appear in the training rows: their number, and quality on all others.

    Args:
        in_training: Ids of the requests that appear in the training rows.
        prompted: Records of the original weights with the baseline's prompt.
        tuned: Records of the trained weights, for the same requests in the same order.
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
