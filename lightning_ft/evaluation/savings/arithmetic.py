"""Token savings: how many tokens per request fine-tuning saves, and at what quality.

Two arms, as in a trial, answer the same requests: *prompted* (original weights, system prompt and few-shot examples)
and *tuned* (trained weights, the request alone). A third arm, *untuned* (original weights, the request alone), shows
what training added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lightning_ft.data.prompt_baseline import PromptBaseline
from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.bootstrap import Array, Interval, Statistic, bootstrap_intervals
from lightning_ft.evaluation.savings.cost import Costs, Prices, compute_costs
from lightning_ft.evaluation.savings.gate import (
    NO_SUCCESS,
    WEAK_PROMPT,
    Gate,
    Lead,
    check_margin,
    check_min_quality,
    overlap_warnings,
    quality_gate,
    quality_shortfall,
    required_requests,
    why_void,
)
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.evaluation.savings.result import SavingsResult

__all__ = [
    "ArmRecords",
    "Costs",
    "Gate",
    "Prices",
    "PromptBaseline",
    "SavingsResult",
    "required_requests",
    "token_savings",
]

_INSPECT = (
    "No answer was right, prompted or tuned. Read a few of them in the report or in token_savings.json: the scorer may "
    "be too strict, max_new_tokens too small, or training too short."
)
_WEAK_QUALITY = 0.5  # quality of the prompted arm below which the result has a warning
_MAX_TRUNCATED_RATE = 0.05  # share of truncated answers above which the result has a warning


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
    provenance: Mapping[str, object] | None = None,
    in_training: Collection[str] | None = None,
    constant: Sequence[float] | None = None,
    min_quality: float | None = None,
) -> SavingsResult:
    """Compute the savings of the tuned over the prompted arm, with intervals and the quality gate.

    Savings are ratios of sums over requests, not means of ratios: ``1 - sum(I_t + O_t) / sum(I_p + O_p)`` for the input
    tokens `I` and output tokens `O` of the tuned and the prompted arm, likewise for input and for output tokens alone,
    and for tokens per success (the tokens of all requests divided by the sum of the scores; left out if all scores of
    both arms are 0). Intervals are from a paired bootstrap over requests, or over the records' clusters.

    Args:
        prompted: Records of the original weights with system prompt and few-shot examples, for ``n`` requests.
        tuned: Records of the trained weights with the request alone, for the same requests in any order.
        untuned: Records of the original weights with the request alone, for the same requests in any order.
        margin: Largest acceptable loss of quality, chosen before the measurement, between 0 and 1: 0.02 for two points.
        prices: Prices of tokens and of training.
        confidence: Confidence level of the intervals, between 0 and 1; the gate always uses the one-sided 97.5% bound.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.
        provenance: Origin of the metrics, as JSON values, for the report.
        in_training: Ids of the requests whose question also appears in the training rows, for warnings and the
            headline; None if the training rows aren't known.
        constant: Score of the most frequent reference as the answer to each request, in the order of
            ``prompted.ids``; None to leave out this comparison.
        min_quality: Quality below which an arm is of no use; None to require that the prompted arm is better than the
            untuned one and than `constant`, see :func:`lightning_ft.evaluation.savings.gate.why_void`.

    Raises:
        SavingsError: If the arms answered different requests or have different clusters, `in_training` has ids that no
            request has, or a number is out of range.

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
    check_min_quality(min_quality)
    if constant is not None and len(constant) != len(prompted.ids):
        raise SavingsError(f"constant has {len(constant):,} scores for {len(prompted.ids):,} requests.")
    tuned = tuned.ordered(prompted.ids, "tuned")
    untuned = None if untuned is None else untuned.ordered(prompted.ids, "untuned")
    none_right = not any(prompted.scores) and not any(tuned.scores)
    clusters = prompted.clusters or None
    for name, arm in (("tuned", tuned), ("untuned", untuned)):
        if arm is not None and arm.clusters != prompted.clusters:
            raise SavingsError(
                f"The {name} arm has other clusters than the prompted one. Pass a request's cluster to every arm."
            )
    arms = {"prompted": prompted, "tuned": tuned, **({} if untuned is None else {"untuned": untuned})}
    columns: dict[str, Sequence[float]] = {"n": [1.0] * len(prompted.ids)}
    for name, arm in arms.items():
        columns[f"{name}_input"], columns[f"{name}_output"] = arm.input_tokens, arm.output_tokens
        columns[f"{name}_score"] = arm.scores
    if constant is not None:
        columns["constant_score"] = constant
    statistics: dict[str, Statistic] = {
        "input": lambda s: 1 - s["tuned_input"] / s["prompted_input"],
        "output": lambda s: 1 - s["tuned_output"] / s["prompted_output"],
        "total": lambda s: 1 - _total(s, "tuned") / _total(s, "prompted"),
        **({} if none_right else {"per_success": _per_success_saving}),
        "diff": lambda s: (s["tuned_score"] - s["prompted_score"]) / s["n"],
        **{f"quality_{name}": _quality(name) for name in arms},
    }
    found = bootstrap_intervals(
        columns, statistics, clusters=clusters, confidence=confidence, resamples=resamples, seed=seed
    )
    difference = found["diff"]
    others = {"untuned": None if untuned is None else untuned.scores, "constant": constant}
    tests = {name: _lead(name) for name, scores in others.items() if scores is not None}
    if confidence != 0.95:
        tests["diff"] = statistics["diff"]
    tested: dict[str, Interval] = {}
    if tests:  # the gate's bounds are always those of 95% intervals
        tested = bootstrap_intervals(columns, tests, clusters=clusters, resamples=resamples, seed=seed)
        difference = tested.get("diff", difference)
    leads = {
        name: Lead(float(np.mean(scores)), tested[name], _count_wins(prompted.scores, scores, clusters))
        for name, scores in others.items()
        if scores is not None
    }
    discordant = float(np.mean((np.array(tuned.scores) - np.array(prompted.scores)) ** 2))
    gate = replace(
        quality_gate(difference, discordant, len(set(clusters or prompted.ids)), margin),
        void=NO_SUCCESS
        if none_right
        else why_void(
            prompted.quality,
            successes=_count_wins(prompted.scores, [0.0] * len(prompted.ids), clusters),
            untuned=leads.get("untuned"),
            constant=leads.get("constant"),
            min_quality=min_quality,
        ),
        shortfall=quality_shortfall(tuned.quality, min_quality),
    )
    gate = replace(gate, weak=not gate.void and min_quality is None and prompted.quality < _WEAK_QUALITY)
    return SavingsResult(
        arms=arms,
        savings={name: found[name] for name in ("input", "output", "total", "per_success") if name in found},
        quality={name: found[f"quality_{name}"] for name in arms},
        difference=found["diff"],
        gate=gate,
        costs=None if prices is None else compute_costs(prompted, tuned, prices),
        confidence=confidence,
        provenance=dict(provenance or {}),
        warnings=(
            *((_INSPECT,) if none_right else ()),
            *_weak_prompt_warnings(gate, prompted),
            *overlap_warnings(in_training or (), prompted, tuned),
            *_warnings(gate, found["diff"], arms),
        ),
        in_training=None if in_training is None else _ordered(in_training, prompted.ids),
    )


def _ordered(found: Collection[str], ids: Sequence[str]) -> tuple[str, ...]:
    """Unique ids of `found` in the order of `ids`, followed by those that `ids` lacks."""
    position = {name: k for k, name in enumerate(ids)}
    return tuple(sorted(set(found), key=lambda name: position.get(name, len(ids))))


def _total(sums: Mapping[str, Array], arm: str) -> Array:
    return sums[f"{arm}_input"] + sums[f"{arm}_output"]


def _quality(arm: str) -> Statistic:
    return lambda s: s[f"{arm}_score"] / s["n"]


def _count_wins(scores: Sequence[float], others: Sequence[float], clusters: Sequence[str] | None) -> int:
    """Number of requests, or of clusters, in which the sum of `scores` is above that of `others`."""
    ahead: Counter[object] = Counter()
    for unit, score, other in zip(clusters or range(len(scores)), scores, others, strict=True):
        ahead[unit] += score - other  # type: ignore[assignment]
    return sum(difference > 0 for difference in ahead.values())


def _lead(arm: str) -> Statistic:
    """Prompted quality minus that of another arm."""
    return lambda s: (s["prompted_score"] - s[f"{arm}_score"]) / s["n"]


def _per_success_saving(sums: Mapping[str, Array]) -> Array:
    """``1 - (T_t / S_t) / (T_p / S_p)``, tokens over successes: -inf if `S_t` is 0, 1 if `S_p` is, NaN if both are."""
    ratio = (_total(sums, "tuned") * sums["prompted_score"]) / (_total(sums, "prompted") * sums["tuned_score"])
    return np.asarray(1 - ratio)


def _weak_prompt_warnings(gate: Gate, prompted: ArmRecords) -> list[str]:
    if not gate.weak:
        return []
    return [
        f"{WEAK_PROMPT} {prompted.quality:.3f}, so being no worse is easy and means little. "
        "Try other wordings, more examples, structured outputs or a larger model for it; if this quality is of use, "
        "say so with min_quality."
    ]


def _warnings(gate: Gate, difference: Interval, arms: Mapping[str, ArmRecords]) -> list[str]:
    found, n = [], len(arms["prompted"].ids)
    # more requests wouldn't help if the loss is already certain, or if the verdict doesn't depend on it
    if gate.underpowered and not gate.void and difference.hi > -gate.margin:
        need = gate.required_n if gate.bound < 0 else required_requests(0.0, gate.margin)
        unit = "requests" if gate.n == n else "requests or clusters"
        found.append(
            f"Underpowered: {gate.n:,} {unit} can't rule out a loss of {gate.margin:.1%} in quality; {need:,} are "
            f"needed if {gate.discordant:.1%} of the pairs are discordant. The gate fails. Measure more "
            f"{unit}."
        )
    for name, arm in arms.items():
        if arm.truncated_rate > _MAX_TRUNCATED_RATE:
            found.append(
                f"{arm.truncated_rate:.1%} of the {name} arm's answers hit max_new_tokens, so this limit determines "
                "their number of output tokens. Raise it to measure their full length."
            )
    return found
