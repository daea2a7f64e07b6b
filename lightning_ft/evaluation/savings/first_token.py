"""Times to first token of the arms: their spread, and whether a difference is more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from scipy import stats

from lightning_ft.document.numbers import format_number
from lightning_ft.evaluation.savings.result import SavingsResult

STATES = {"cold": "", "warm": ", prefix cached"}
"""States of the cache in which a time is taken, with what a label says of them."""
TIMED_REQUESTS = 6
"""Number of requests that are timed by default: with fewer, no difference between two arms is more than noise."""
_ALPHA = 0.05  # of the two-sided sign test; six requests of six have a p-value of 3.1%, five of five of 6.3%


def format_times(seconds: Sequence[float] | None) -> str:
    """Format times in milliseconds: their median, with the fastest and the slowest.

    Args:
        seconds: Times in seconds; None, or empty, if they weren't measured.

    Example:
        >>> format_times((0.040, 0.044, 0.041)), format_times((0.04,)), format_times(None)
        ('41 (40 to 44)', '40', 'unknown')
    """
    if not seconds:
        return "unknown"
    middle, low, high = (format_number(1000 * time) for time in (median(seconds), min(seconds), max(seconds)))
    return middle if len(seconds) == 1 else f"{middle} ({low} to {high})"


def first_token_text(result: SavingsResult) -> str:
    """Describe whether the first token comes sooner tuned than prompted, or the difference is within the noise.

    The same requests are timed in both arms, so an exact sign test over them decides: it assumes no shape of the
    noise, and a single slow pass doesn't sway it.

    Args:
        result: The result.

    Returns:
        Sentences; an empty string if the arms weren't timed.
    """
    arms = [result.arms[name].first_token_seconds for name in ("prompted", "tuned")]
    verdicts = [
        f"Time to first token{label}: {_verdict(arms[0][state], arms[1][state])}."
        for state, label in STATES.items()
        if all(arm.get(state) for arm in arms)
    ]
    if not verdicts:
        return ""
    caveat = (
        "The arms are timed one after the other: another load on the machine in between would look like a difference."
    )
    return " ".join((*verdicts, caveat))


def _verdict(prompted: Sequence[float], tuned: Sequence[float]) -> str:
    n = len(prompted)
    if n != len(tuned):
        return f"whether it differs isn't known, since {n} prompted and {len(tuned)} tuned requests were timed"
    if n == 1:
        return "one time per arm was recorded, too few to tell a difference from noise"
    sooner, later = (sum(a < b for a, b in zip(*pair, strict=True)) for pair in ((tuned, prompted), (prompted, tuned)))
    if n < TIMED_REQUESTS:
        return (
            f"sooner tuned than prompted in {sooner} of {n} timed requests, too few to tell from "
            f"noise: that takes at least {TIMED_REQUESTS} (timed_requests)"
        )
    p = float(stats.binomtest(sooner, sooner + later).pvalue) if sooner + later else 1.0
    direction, count = ("sooner", sooner) if sooner >= later else ("later", later)
    counted = f"{direction} tuned than prompted in {count} of {n} timed requests"
    if p > _ALPHA:
        return f"the difference is within the noise, {counted} (sign test, p = {format_number(p, 2)})"
    return f"{counted}, more than noise explains (sign test, p = {format_number(p, 2)})"
