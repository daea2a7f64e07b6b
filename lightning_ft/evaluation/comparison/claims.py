"""What is usually claimed of fine-tuning, judged by a comparison's figures and their intervals."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_ft.evaluation.bootstrap import Interval
from lightning_ft.evaluation.comparison.result import Claim, Comparison, Verdict

FORGETTING = 0.05
"""Largest rise of perplexity on general text that counts as having kept what the base could do."""
RESOURCES = {
    "flops": "FLOPs",
    "seconds": "training time",
    "peak_memory": "peak memory",
    "trainable_parameters": "trainable parameters",
    "checkpoint_bytes": "checkpoint bytes",
}
THOUSANDS = 5000


def judge_claims(comparison: Comparison, *, margin: float) -> tuple[Claim, ...]:
    """Judge the claims that a comparison has figures for.

    A claim holds where the whole interval lies on its side, doesn't where the whole interval lies on the other, and is
    undecided in between. Thresholds are those of the claims themselves; `FORGETTING` is this project's.

    Args:
        comparison: With everything but its claims.
        margin: Loss of quality against the prompt that would be accepted.
    """
    return (
        *_fewer_tokens(comparison),
        *_better_than_prompt(comparison),
        *_quality_of_full(comparison),
        *_compute(comparison),
        *_abilities(comparison),
        *_examples(comparison, margin),
    )


def _fewer_tokens(comparison: Comparison) -> Iterator[Claim]:
    for method, result in comparison.savings.items():
        saved = result.savings["total"]
        evidence = (
            f"{_share(saved)} fewer tokens a request; quality gate {'passed' if result.gate.passed else 'failed'}"
        )
        condition = ""
        if result.saves_half:
            verdict: Verdict = "held"
            if result.costs is not None:
                costs = result.costs
                cached = 1 - costs.tuned_cached / costs.prompted_cached
                uncached = 1 - costs.tuned_uncached / costs.prompted_uncached
                evidence += f"; in money {uncached:.0%} fewer, {cached:.0%} with the prompt's prefix cached"
        elif saved.lo >= 0.5 and result.gate.underpowered and result.difference.value > -result.gate.margin:
            verdict = "undecided"
        elif saved.lo >= 0.5:
            verdict, condition = "held if", f"a loss of quality of up to {-result.gate.bound:.1%} is accepted"
        else:
            verdict = _side(saved, 0.5)
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
            _side(difference, 0.0),
            evidence,
        )


def _quality_of_full(comparison: Comparison) -> Iterator[Claim]:
    for method, ratios in comparison.ratios.items():
        ratio, gain = ratios["quality_ratio"], ratios["gain_retained"]
        evidence = f"{_share(ratio)} of full fine-tuning's quality, {_share(gain)} of its gain"
        yield Claim(f"{method}: quality of full", "90-95% of full fine-tuning's quality", _side(ratio, 0.9), evidence)


def _compute(comparison: Comparison) -> Iterator[Claim]:
    for method, ratios in comparison.ratios.items():
        found = {label: ratios[name] for name, label in RESOURCES.items() if name in ratios}
        if not found:
            continue
        within = [label for label, ratio in found.items() if ratio.value <= 0.10]
        verdict: Verdict = "held" if len(within) == len(found) else "held if" if within else "not held"
        evidence = ", ".join(f"{label} {ratio.value:.1%}" for label, ratio in found.items())
        condition = f"compute means {' or '.join(within)}" if verdict == "held if" else ""
        yield Claim(f"{method}: compute", "at 1-10% of full fine-tuning's compute", verdict, evidence, condition)


def _abilities(comparison: Comparison) -> Iterator[Claim]:
    for method in comparison.savings:
        found = [run.retention for run in comparison.final_runs(method) if run.retention is not None]
        if not found:
            continue
        rise = [result.ppl_ratio.value - 1 for result in found]
        kl = sum(result.kl_general.value for result in found) / len(found)
        interval = Interval(
            sum(rise) / len(rise),
            min(result.ppl_ratio.lo for result in found) - 1,
            max(result.ppl_ratio.hi for result in found) - 1,
        )
        evidence = (
            f"perplexity on general text {interval.value:+.1%} ({interval.lo:+.1%} to {interval.hi:+.1%}), KL "
            f"{kl:.3f} nats a token{' (a lower bound)' if any(result.lower_bound for result in found) else ''}"
        )
        side = _side(Interval(-interval.value, -interval.hi, -interval.lo), -FORGETTING)
        claimed = f"the base keeps its general abilities (perplexity rises by at most {FORGETTING:.0%})"
        yield Claim(f"{method}: abilities kept", claimed, side, evidence)


def _examples(comparison: Comparison, margin: float) -> Iterator[Claim]:
    prompted = comparison.savings and next(iter(comparison.savings.values())).quality["prompted"]
    for method, curve in comparison.learning_curve.items():
        if len(curve) < 2 or not prompted:
            continue
        enough = [size for size, quality in curve.items() if quality.value >= prompted.value - margin]
        evidence = ", ".join(f"{size:,}: {quality.value:.3f}" for size, quality in curve.items())
        verdict: Verdict = "held" if enough and enough[0] <= THOUSANDS else "not held"
        if enough:
            evidence += f"; within {margin:.0%} of the prompt's {prompted.value:.3f} from {enough[0]:,} on"
        yield Claim(f"{method}: thousands are enough", "thousands of examples are enough", verdict, evidence)


def _side(interval: Interval, least: float) -> Verdict:
    if interval.lo >= least:
        return "held"
    return "not held" if interval.hi < least else "undecided"


def _share(interval: Interval) -> str:
    return f"{interval.value:.1%} ({interval.lo:.1%} to {interval.hi:.1%})"
