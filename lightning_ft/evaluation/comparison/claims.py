"""Test the usual claims about fine-tuning against the results of a comparison."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_ft.document.numbers import finite
from lightning_ft.evaluation.bootstrap import Interval, format_interval
from lightning_ft.evaluation.comparison.result import Claim, Comparison, Verdict

MAX_PERPLEXITY_RISE = 0.05
"""Largest relative rise of perplexity on general text at which the base's abilities count as kept."""
_RESOURCES = {
    "flops": "FLOPs",
    "seconds": "training time",
    "peak_memory": "peak memory",
    "trainable_parameters": "trainable parameters",
    "checkpoint_bytes": "checkpoint bytes",
}
MAX_EXAMPLES = 5000
"""Largest number of training rows that counts as "thousands of examples"."""


def evaluate_claims(comparison: Comparison, *, margin: float) -> tuple[Claim, ...]:
    """Evaluate each claim that the comparison has measurements for.

    A claim is held if the whole interval is on its side of the threshold, not held if the whole interval is on the
    other side, and undecided otherwise. Thresholds come from the claims themselves, except `MAX_PERPLEXITY_RISE` and
    `MAX_EXAMPLES`, which are this project's.

    Args:
        comparison: Comparison that is complete except for its claims.
        margin: Largest acceptable loss of quality relative to the prompted model.

    Returns:
        The claims with their verdicts, grouped by claim.
    """
    return (
        *_fewer_tokens(comparison),
        *_better_than_prompt(comparison),
        *_quality_relative_to_full(comparison),
        *_compute_relative_to_full(comparison),
        *_abilities_kept(comparison),
        *_thousands_of_examples(comparison, margin),
    )


def _fewer_tokens(comparison: Comparison) -> Iterator[Claim]:
    for method, result in comparison.savings.items():
        saved = result.savings["total"]
        gate = "passed" if result.gate.passed else "void" if result.gate.void else "failed"
        evidence = f"{_percent(saved)} fewer tokens per request; quality gate {gate}"
        condition = ""
        if result.saves_half:
            verdict: Verdict = "held"
            costs = result.costs
            if costs is not None and costs.prompted_cached and costs.prompted_uncached:  # a share of no cost is none
                cached = 1 - costs.tuned_cached / costs.prompted_cached
                uncached = 1 - costs.tuned_uncached / costs.prompted_uncached
                evidence += f"; costs {uncached:.0%} less, {cached:.0%} less with the prompt's prefix cached"
        elif result.gate.void:
            verdict = "undecided"
            evidence += f": {result.gate.void}"
        elif saved.lo >= 0.5 and result.gate.underpowered and result.difference.value > -result.gate.margin:
            verdict = "undecided"
        elif saved.lo >= 0.5:
            verdict, condition = "held if", f"a loss of quality of up to {-result.gate.bound:.1%} is accepted"
        else:
            verdict = _verdict(saved, 0.5)
        yield Claim(f"{method}: fewer tokens", "50-80% fewer tokens per request", verdict, evidence, condition)


def _better_than_prompt(comparison: Comparison) -> Iterator[Claim]:
    for method, result in comparison.savings.items():
        difference = result.difference
        evidence = (
            f"{comparison.quality[method].value:.3f} against {comparison.quality['prompted'].value:.3f} prompted, "
            f"difference {difference.value:+.3f} ({difference.lo:+.3f} to {difference.hi:+.3f})"
        )
        yield Claim(
            f"{method}: better than the prompt",
            "more accurate than the base model with instructions",
            "held" if difference.lo > 0 else "not held" if difference.lo < 0 >= difference.hi else "undecided",
            evidence,
        )


def _quality_relative_to_full(comparison: Comparison) -> Iterator[Claim]:
    for method, ratios in comparison.ratios.items():
        ratio, gain = ratios["quality_ratio"], ratios["gain_retained"]
        evidence = f"{_percent(ratio)} of full fine-tuning's quality, {_percent(gain)} of its gain"
        yield Claim(
            f"{method}: quality of full", "90-95% of full fine-tuning's quality", _verdict(ratio, 0.9), evidence
        )


def _compute_relative_to_full(comparison: Comparison) -> Iterator[Claim]:
    for method, ratios in comparison.ratios.items():
        resources = {label: ratios[name] for name, label in _RESOURCES.items() if name in ratios}
        if not resources:
            continue
        within = [label for label, ratio in resources.items() if ratio.value <= 0.10]
        verdict: Verdict = "held" if len(within) == len(resources) else "held if" if within else "not held"
        evidence = ", ".join(f"{label} {finite('{:.1%}')(ratio.value)}" for label, ratio in resources.items())
        condition = f"compute means {' or '.join(within)}" if verdict == "held if" else ""
        yield Claim(f"{method}: compute", "at 1-10% of full fine-tuning's compute", verdict, evidence, condition)


def _abilities_kept(comparison: Comparison) -> Iterator[Claim]:
    for method in comparison.savings:
        results = [run.retention for run in comparison.final_runs(method) if run.retention is not None]
        if not results:
            continue
        rises = [result.ppl_ratio.value - 1 for result in results]
        kl = sum(result.kl_general.value for result in results) / len(results)
        interval = Interval(
            sum(rises) / len(rises),
            min(result.ppl_ratio.lo for result in results) - 1,
            max(result.ppl_ratio.hi for result in results) - 1,
        )
        evidence = (
            f"perplexity on general text {format_interval(interval, finite('{:+.1%}'))}, KL "
            f"{finite('{:.3f}')(kl)} nats per token"
            f"{' (a lower bound)' if any(result.lower_bound for result in results) else ''}"
        )
        verdict = _verdict(Interval(-interval.value, -interval.hi, -interval.lo), -MAX_PERPLEXITY_RISE)
        claimed = f"the base keeps its general abilities (perplexity rises by at most {MAX_PERPLEXITY_RISE:.0%})"
        yield Claim(f"{method}: abilities kept", claimed, verdict, evidence)


def _thousands_of_examples(comparison: Comparison, margin: float) -> Iterator[Claim]:
    prompted = comparison.savings and next(iter(comparison.savings.values())).quality["prompted"]
    for method, curve in comparison.learning_curve.items():
        if len(curve) < 2 or not prompted:
            continue
        right = [size for size, quality in curve.items() if quality.value > 0]
        enough = [size for size in right if curve[size].value >= prompted.value - margin]
        evidence = ", ".join(f"{size:,}: {quality.value:.3f}" for size, quality in curve.items())
        verdict: Verdict = "held" if enough and enough[0] <= MAX_EXAMPLES else "not held"
        if not right and not prompted.value:
            verdict, evidence = "undecided", f"{evidence}; no answer was right, with the prompt neither"
        if enough:
            evidence += f"; within {margin:.0%} of the prompt's {prompted.value:.3f} from {enough[0]:,} on"
        yield Claim(f"{method}: thousands are enough", "thousands of examples are enough", verdict, evidence)


def _verdict(interval: Interval, threshold: float) -> Verdict:
    """Compare an interval with the smallest value for which a claim is held."""
    if interval.lo >= threshold:
        return "held"
    return "not held" if interval.hi < threshold else "undecided"


def _percent(interval: Interval) -> str:
    return format_interval(interval, finite("{:.1%}"))
