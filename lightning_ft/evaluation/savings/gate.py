"""The quality gate: whether the prompt is worth replacing, and a non-inferiority test of the tuned arm."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from lightning_ft.arguments import check_number
from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.bootstrap import Interval
from lightning_ft.evaluation.savings.records import ArmRecords

_ROUNDING = 1e-9  # of a mean of scores
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


WEAK_PROMPT = "The prompted arm's quality is only"
"""Beginning of the warning of a weak prompt."""
NO_SUCCESS = "no answer was right, prompted or tuned"
"""Why there is no saving to claim if all scores of both arms are 0, also where `min_quality` allows that."""
Verdict = Literal["PASS", "FAIL", "VOID"]


@dataclass(frozen=True)
class Gate:
    """Verdict on the quality of the tuned arm.

    Args:
        margin: Largest acceptable loss of quality, chosen before the measurement.
        bound: Lower one-sided 97.5% bound of tuned minus prompted quality.
        discordant: Mean squared difference of the scores of both arms.
        n: Number of requests, or of clusters if requests are resampled by cluster.
        required_n: Number of requests or clusters that the margin requires.
        void: Why there is no saving to claim, see :func:`why_void`; empty if the prompt is worth replacing.
        shortfall: Tuned quality below `min_quality`: the difference, at least 0; 0 if it reaches it.
        weak: Whether the prompt is worth replacing and yet so weak that being no worse means little.
    """

    margin: float
    bound: float
    discordant: float
    n: int
    required_n: int
    void: str = ""
    shortfall: float = 0.0
    weak: bool = False

    @property
    def underpowered(self) -> bool:
        """Whether there are too few requests. If the bound is 0 or higher, the minimum for the margin is enough."""
        if self.bound >= 0:
            return self.n < required_requests(0.0, self.margin)
        return self.n < self.required_n

    @property
    def passed(self) -> bool:
        """Whether the prompt is worth replacing, and enough requests rule out a loss larger than the margin."""
        return not self.void and not self.shortfall and self.bound > -self.margin and not self.underpowered

    @property
    def verdict(self) -> Verdict:
        """``PASS``, ``FAIL``, or ``VOID`` if the prompt is not worth replacing, so that there is no saving to claim."""
        return "VOID" if self.void else "PASS" if self.passed else "FAIL"


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


MIN_WINS = 6
"""Number of requests or clusters in which an arm must be ahead to count as better.

With fewer, even if the arm is ahead in every request in which the two differ, an exact sign test has a p-value above
2.5%, and a bootstrap over a handful of differences can't be trusted.
"""


@dataclass(frozen=True)
class Lead:
    """How far the prompted arm is ahead of another one.

    Args:
        quality: Quality of the other arm, from 0 to 1.
        interval: Prompted minus other quality, with its 95% interval.
        wins: Number of requests, or of clusters, in which the prompted arm has the higher score.
    """

    quality: float
    interval: Interval
    wins: int

    @property
    def shown(self) -> bool:
        """Whether the prompted arm is shown to be better."""
        return self.interval.lo > 0 and self.wins >= MIN_WINS


def why_void(
    prompted: float,
    *,
    successes: int,
    untuned: Lead | None = None,
    constant: Lead | None = None,
    min_quality: float | None = None,
) -> str:
    """Why replacing the prompt saves nothing that was worth its tokens; an empty string if it was worth them.

    A tuned model is easily as good as a prompt that doesn't work. Unless `min_quality` says which quality is of use,
    the prompted arm must have some success, and be shown to be better than the same model without the prompt, and than
    a program that always gives the most frequent answer.

    Args:
        prompted: Quality of the prompted arm, from 0 to 1.
        successes: Number of requests, or of clusters, in which the prompted arm's score is above 0.
        untuned: Lead over the original weights without the prompt; None if they were not measured.
        constant: Lead over giving the most frequent reference to every request; None if no reference is frequent.
        min_quality: Quality below which an arm is of no use. It replaces the other conditions.

    Example:
        >>> why_void(0.0, successes=0)
        "the prompt isn't shown to work on this model: quality 0.000"
        >>> why_void(0.7, successes=70, untuned=Lead(0.1, Interval(0.6, 0.5, 0.7), wins=60))
        ''
        >>> why_void(0.7, successes=70, min_quality=0.9)
        "the prompt's quality, 0.700, is below min_quality=0.9"
    """
    if min_quality is not None:
        enough = prompted >= min_quality - _ROUNDING
        return "" if enough else f"the prompt's quality, {prompted:.3f}, is below {min_quality=:g}"
    if untuned is not None and not untuned.shown:
        return (
            f"the prompt isn't shown to work on this model: quality {prompted:.3f} with it, {untuned.quality:.3f} "
            "without it"
        )
    if successes < MIN_WINS:
        return f"the prompt isn't shown to work on this model: quality {prompted:.3f}"
    if constant is not None and not constant.shown:
        return (
            f"the prompt isn't shown to beat a fixed answer: quality {prompted:.3f}, against {constant.quality:.3f} "
            "for always giving the most frequent answer"
        )
    return ""


def quality_shortfall(tuned: float, min_quality: float | None) -> float:
    """By how much a quality is below the minimum; 0 if it reaches it or there is none.

    Example:
        >>> quality_shortfall(0.5, 0.75), quality_shortfall(0.8, 0.75), quality_shortfall(0.1, None)
        (0.25, 0.0, 0.0)
    """
    missing = 0.0 if min_quality is None else min_quality - tuned
    return missing if missing > _ROUNDING else 0.0


def check_min_quality(min_quality: float | None) -> None:
    """Check that a minimum quality is a share.

    Raises:
        SavingsError: If it is neither None nor from 0 to 1.
    """
    if min_quality is None:
        return
    check_number("min_quality", min_quality, SavingsError)
    if not 0 <= min_quality <= 1:
        raise SavingsError(f"min_quality={min_quality}: expected a share from 0 to 1, such as 0.5, or None.")


def check_margin(margin: float) -> None:
    """Check that a margin is between 0 and 1.

    Raises:
        SavingsError: If it isn't.
    """
    check_number("margin", margin, SavingsError)
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
