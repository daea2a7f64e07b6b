"""What to do about a savings result, in one sentence for whoever decides: it follows from the gate's verdict alone."""

from __future__ import annotations

import math

from lightning_ft.evaluation.savings.gate import NO_SUCCESS, required_requests
from lightning_ft.evaluation.savings.result import SavingsResult


def advice(result: SavingsResult) -> str:
    """Advise to ship, to measure more, or not to ship.

    Args:
        result: The result.
    """
    if result.gate.void == NO_SUCCESS:
        return "Find out first why no answer was right: read a few, then check scorer, max_new_tokens and training."
    if result.gate.void:
        return "Don't claim a saving: the prompt that the model is compared with isn't shown to be worth its tokens."
    if result.gate.passed:
        return _if_passed(result)
    return _if_failed(result)


def _if_passed(result: SavingsResult) -> str:
    total, gate, costs = result.savings["total"], result.gate, result.costs
    if result.in_training:
        return f"Measure again before you ship: {result.overlap}, so quality on new ones may be lower."
    if total.value <= 0:
        amount = f"{-total.value:.1%} more tokens" if total.value < 0 else "as many tokens as before"
        return f"Don't ship to save tokens: quality was kept, but requests take {amount}."
    if total.lo <= 0:
        return "Measure more requests: quality was kept, but a saving isn't shown yet."
    if costs is not None and math.isinf(costs.break_even_uncached):
        return (
            f"Don't ship to save money: requests take {total.value:.1%} fewer tokens, but at these prices a tuned one "
            "isn't cheaper."
        )
    loss = "at no loss of quality" if gate.bound >= 0 else f"at a loss of quality of at most {_points(-gate.bound)}"
    condition = f" if a quality of {result.quality['tuned'].value:.3f} is enough" if gate.weak else ""
    cached = costs is not None and math.isinf(costs.break_even_cached)
    exception = "; where the prompt is cached, it doesn't save money" if cached else ""
    return f"Ship{condition}: {total.value:.1%} fewer tokens per request, {loss}{exception}."


def _if_failed(result: SavingsResult) -> str:
    gate, tuned, prompted = result.gate, result.quality["tuned"].value, result.quality["prompted"].value
    if gate.shortfall:
        return f"Don't ship: quality is {tuned:.3f}, and {tuned + gate.shortfall:.3f} is needed (min_quality)."
    if result.undecided:
        needed = (gate.required_n if gate.bound < 0 else required_requests(0.0, gate.margin)) - gate.n
        unit = "requests" if gate.n == result.n else "requests or clusters"
        return f"Ask {needed:,} more {unit}: with {gate.n:,} it can't be said whether quality was kept."
    if result.difference.value <= -gate.margin:
        return f"Don't ship: quality was not kept, {tuned:.3f} against {prompted:.3f} with the prompt."
    return (
        f"Don't ship yet: a loss of quality of up to {_points(-gate.bound)} isn't ruled out, and "
        f"{_points(gate.margin)} would be acceptable. Train on more rows, or measure more requests."
    )


def _points(share: float) -> str:
    """A difference of quality in percentage points, rounded up."""
    points = math.ceil(round(1000 * share, 6)) / 10
    return f"{points:g} point{'' if points == 1 else 's'}"
