"""Token savings: how many tokens a request no longer needs once the model is trained, and at what quality.

Two arms answer the same requests: *prompted* (original weights, system prompt and examples) and *tuned* (trained
weights, the request alone). A third, *untuned* (original weights, the request alone), shows what training added.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.bootstrap import Array, Interval, Statistic, bootstrap_intervals
from lightning_ft.evaluation.savings.cost import Costs, Prices, costs
from lightning_ft.evaluation.savings.gate import Gate, check_margin, overlap_warnings, quality_gate, required_requests
from lightning_ft.evaluation.savings.prompt import PromptBaseline
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.evaluation.savings.result import SavingsResult

__all__ = [
    "ArmRecords",
    "Costs",
    "Gate",
    "NoSuccessError",
    "Prices",
    "PromptBaseline",
    "SavingsResult",
    "required_requests",
    "token_savings",
]

MANY_TRUNCATED = 0.05


class NoSuccessError(SavingsError):
    """No answer of either arm was right, so tokens per success are undefined."""


def token_savings(
    prompted: ArmRecords,
    tuned: ArmRecords,
    untuned: ArmRecords | None = None,
    *,
    margin: float = 0.02,
    prices: Prices | None = None,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    in_training: Collection[str] | None = None,
) -> SavingsResult:
    """Compare the arms.

    Savings are ratios of sums over requests, never means of ratios: ``1 - sum(I_t + O_t) / sum(I_p + O_p)``, likewise
    for input and output tokens, and for tokens per success (the tokens of all attempts divided by the sum of the
    scores). Intervals are a paired bootstrap over requests, or over the records' clusters.

    Args:
        prompted: Original weights with system prompt and examples, ``n`` requests.
        tuned: Trained weights with the request alone, the same requests in any order.
        untuned: Original weights with the request alone.
        margin: Loss of quality that would be accepted, chosen before the measurement: 0.02 for two points.
        prices: What tokens and training cost.
        confidence: Of the intervals; the gate always uses the one-sided 97.5% bound.
        resamples: Draws of the bootstrap.
        seed: Of the bootstrap.
        provenance: What the figures come from, JSON values only, for the report.
        in_training: Ids of the requests whose question also appears in the training rows, which the verdict counts;
            None where the training rows aren't known.

    Raises:
        SavingsError: If the arms answered other requests, or `in_training` has ids that no request has.
        NoSuccessError: If nothing succeeded in either (tokens per success are
            undefined then).

    Example:
        >>> ids = tuple(str(i) for i in range(200))
        >>> right, whole = (1.0,) * 200, (False,) * 200
        >>> prompted = ArmRecords(ids, (500,) * 200, (20,) * 200, right, whole)
        >>> tuned = ArmRecords(ids, (50,) * 200, (15,) * 200, right, whole)
        >>> result = token_savings(prompted, tuned)
        >>> result.savings["total"].value, result.gate.passed, result.saves_half
        (0.875, True, True)
    """
    check_margin(margin)
    tuned = tuned.ordered(prompted.ids, "tuned")
    untuned = None if untuned is None else untuned.ordered(prompted.ids, "untuned")
    if not any(prompted.scores) and not any(tuned.scores):
        raise NoSuccessError(
            "No answer of either arm was right, so tokens per success are undefined (not zero). Look at a few "
            "answers: is the scorer too strict, or max_new_tokens too small?"
        )
    clusters = prompted.clusters or None
    arms = {"prompted": prompted, "tuned": tuned, **({} if untuned is None else {"untuned": untuned})}
    columns: dict[str, Any] = {"n": [1.0] * len(prompted.ids)}
    for name, arm in arms.items():
        columns[f"{name}_input"], columns[f"{name}_output"] = arm.input_tokens, arm.output_tokens
        columns[f"{name}_score"] = arm.scores
    statistics: dict[str, Statistic] = {
        "input": lambda s: 1 - s["tuned_input"] / s["prompted_input"],
        "output": lambda s: 1 - s["tuned_output"] / s["prompted_output"],
        "total": lambda s: 1 - _total(s, "tuned") / _total(s, "prompted"),
        "per_success": _per_success_saving,
        "diff": lambda s: (s["tuned_score"] - s["prompted_score"]) / s["n"],
        **{f"quality_{name}": _quality(name) for name in arms},
    }
    found = bootstrap_intervals(
        columns, statistics, clusters=clusters, confidence=confidence, resamples=resamples, seed=seed
    )
    difference = found["diff"]
    if confidence != 0.95:
        difference = bootstrap_intervals(
            columns, {"diff": statistics["diff"]}, clusters=clusters, resamples=resamples, seed=seed
        )["diff"]
    discordant = float(np.mean((np.array(tuned.scores) - np.array(prompted.scores)) ** 2))
    gate = quality_gate(difference, discordant, len(set(clusters or prompted.ids)), margin)
    return SavingsResult(
        arms=arms,
        savings={name: found[name] for name in ("input", "output", "total", "per_success")},
        quality={name: found[f"quality_{name}"] for name in arms},
        difference=found["diff"],
        gate=gate,
        costs=None if prices is None else costs(prompted, tuned, prices),
        confidence=confidence,
        provenance=dict(provenance or {}),
        warnings=(*overlap_warnings(in_training or (), prompted, tuned), *_warnings(gate, found["diff"], arms)),
        in_training=None if in_training is None else _ordered(in_training, prompted.ids),
    )


def _ordered(found: Collection[str], ids: Sequence[str]) -> tuple[str, ...]:
    position = {name: k for k, name in enumerate(ids)}
    return tuple(sorted(set(found), key=lambda name: position.get(name, len(ids))))


def _total(sums: Mapping[str, Array], arm: str) -> Array:
    return sums[f"{arm}_input"] + sums[f"{arm}_output"]


def _quality(arm: str) -> Statistic:
    return lambda s: s[f"{arm}_score"] / s["n"]


def _per_success_saving(sums: Mapping[str, Array]) -> Array:
    """``1 - (T_t / S_t) / (T_p / S_p)``: -inf without a tuned success, 1 without a prompted one, NaN without either."""
    ratio = (_total(sums, "tuned") * sums["prompted_score"]) / (_total(sums, "prompted") * sums["tuned_score"])
    return np.asarray(1 - ratio)


def _warnings(gate: Gate, difference: Interval, arms: Mapping[str, ArmRecords]) -> list[str]:
    found = []
    if gate.underpowered and difference.hi > -gate.margin:  # what is plainly worse needs no more requests
        need = gate.required_n if gate.bound < 0 else required_requests(0.0, gate.margin)
        found.append(
            f"Underpowered: {gate.n:,} requests can't rule out a loss of {gate.margin:.1%} in quality, {need:,} are "
            f"needed where {gate.discordant:.1%} of the pairs are discordant. The gate fails; measure "
            "more requests."
        )
    for name, arm in arms.items():
        if arm.truncated_rate > MANY_TRUNCATED:
            found.append(
                f"{arm.truncated_rate:.1%} of the {name} arm's answers hit max_new_tokens, so the limit decides how "
                "many output tokens they have."
            )
    return found
