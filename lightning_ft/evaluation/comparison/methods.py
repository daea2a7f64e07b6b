"""Runs of several methods to one comparison: choose learning rates, pool seeds, form ratios to full fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from lightning_ft.errors import ComparisonError
from lightning_ft.evaluation.bootstrap import Interval, bootstrap_intervals
from lightning_ft.evaluation.comparison.claims import judge_claims
from lightning_ft.evaluation.comparison.result import Comparison, RunResult
from lightning_ft.evaluation.savings.arithmetic import token_savings
from lightning_ft.evaluation.savings.cost import Prices
from lightning_ft.evaluation.savings.records import ArmRecords

Metrics = Callable[[Sequence[str], Sequence[str]], Mapping[str, float]]
"""Answers and right answers to figures of the domain."""

BASELINES = ("untuned", "prompted")
"""Methods that train nothing."""
FULL = "full"
ENOUGH = 0.95
"""The share of full fine-tuning's quality whose first point counts as having reached it."""


@dataclass(frozen=True)
class Asked:
    """What the test requests were.

    Args:
        requests: Last user turn of each, in the order of the arms' ids.
        references: The right answers.
        margin: Loss of quality that would be accepted.
        prices: What tokens cost.
        metrics: The domain's own figures.
        in_training: Ids of the requests that also appear in the training rows; None where these aren't known.
        warnings: What a reader has to know of the requests.
    """

    requests: tuple[str, ...]
    references: tuple[str, ...]
    margin: float
    prices: Prices | None = None
    metrics: Metrics | None = None
    in_training: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()


def choose_learning_rates(runs: Iterable[RunResult]) -> dict[str, float]:
    """The learning rate of each method whose runs had the best validation quality; of equal ones the smallest.

    Only runs of the method's smallest seed on all of its rows count: the grid.

    Example:
        >>> runs = [RunResult("lora", 0, rate, 100, quality, None) for rate, quality in ((1e-3, 0.7), (2e-3, 0.8))]
        >>> choose_learning_rates(runs)
        {'lora': 0.002}
    """
    chosen: dict[str, float] = {}
    for method, found in _trained(runs).items():
        size, seed = max(run.size or 0 for run in found), min(run.seed for run in found)
        grid = [run for run in found if run.size == size and run.seed == seed]
        best = max(grid, key=lambda run: (run.validation_quality, -(run.learning_rate or 0.0)))
        assert best.learning_rate is not None
        chosen[method] = best.learning_rate
    return chosen


def compare_methods(
    runs: Sequence[RunResult],
    asked: Asked,
    *,
    complete: bool = True,
    provenance: Mapping[str, Any] | None = None,
    resamples: int = 9999,
    seed: int = 0,
) -> Comparison:
    """Form a comparison.

    Args:
        runs: All runs, the two of the original weights (`prompted`, `untuned`) among them.
        asked: The test requests.
        complete: Whether all planned runs were made.
        provenance: What was measured, with what.
        resamples: Draws of the bootstrap.
        seed: Of the bootstrap.

    Raises:
        ComparisonError: If an arm of the original weights is missing, nothing was trained, runs differ in precision, or
            operations of attention weren't counted.
    """
    base = {run.method: run for run in runs if run.method in BASELINES}
    missing = [name for name in BASELINES if name not in base or base[name].test is None]
    if missing:
        raise ComparisonError(f"There is no measurement of the original weights, {' and '.join(missing)}.")
    trained = _trained(runs)
    if not trained:
        raise ComparisonError("There is no run that trained anything: nothing to compare.")
    _check_comparable(runs)
    chosen = choose_learning_rates(runs)
    kept = tuple(run if _is_kept(run, chosen) else replace(run, test=None) for run in runs)
    draft = Comparison(kept, {}, {}, {}, {}, chosen)
    finals = {method: draft.final_runs(method) for method in trained}
    bootstrap = {"resamples": resamples, "seed": seed}
    prompted, untuned = _test(base["prompted"]), _test(base["untuned"])
    savings, quality, seed_quality = {}, {}, {}
    for method, found in finals.items():
        arms = [_test(run).ordered(prompted.ids, method) for run in found]
        seeds = [run.seed for run in found]
        savings[method] = replace(
            token_savings(
                _pooled([prompted] * len(arms), seeds),
                _pooled(arms, seeds),
                _pooled([untuned] * len(arms), seeds),
                margin=asked.margin,
                prices=asked.prices,
                provenance={"method": method, "learning_rate": chosen[method], "seeds": seeds},
                in_training=None if asked.in_training is None else _pooled_ids(asked.in_training, seeds),
                **bootstrap,
            ),
            requests=asked.requests * len(arms),
            references=asked.references * len(arms),
        )
        quality[method] = savings[method].quality["tuned"]
        seed_quality[method] = tuple(arm.quality for arm in arms)
    some = next(iter(savings.values()))
    quality = {"untuned": some.quality["untuned"], "prompted": some.quality["prompted"], **quality}
    warnings = [*asked.warnings, *_warnings(finals, trained, chosen, quality, complete)]
    ratios = {}
    if FULL in finals:
        full_beats_base = mean(seed_quality[FULL]) > untuned.quality
        if not full_beats_base:
            warnings.append(
                "Full fine-tuning never beat the untuned model, so no ratio to it means anything: none is given. "
                "Look at its learning rates and its data."
            )
        else:
            for method in finals:
                if method != FULL:
                    ratios[method] = _ratios(finals[method], finals[FULL], untuned, **bootstrap)
    extra = [run for method, found in trained.items() for run in found if run.learning_rate != chosen[method]]
    result = replace(
        draft,
        savings=savings,
        quality=quality,
        seed_quality=seed_quality,
        ratios=ratios,
        learning_curve={
            method: _learning_curve(found, chosen[method], **bootstrap) for method, found in trained.items()
        },
        metrics=_metrics(asked, {"untuned": [base["untuned"]], "prompted": [base["prompted"]], **finals}),
        sweep_seconds=sum(run.compute.train_seconds for run in extra if run.compute is not None),
        sweep_flops=sum(run.compute.flops for run in extra if run.compute is not None),
        complete=complete,
        warnings=tuple(warnings),
        provenance=dict(provenance or {}),
    )
    return replace(result, claims=judge_claims(result, margin=asked.margin))


def _trained(runs: Iterable[RunResult]) -> dict[str, list[RunResult]]:
    found: dict[str, list[RunResult]] = {}
    for run in runs:
        if run.method not in BASELINES:
            found.setdefault(run.method, []).append(run)
    return found


def _test(run: RunResult) -> ArmRecords:
    if run.test is None:
        raise ComparisonError(f"The run {run.method}, seed {run.seed}, has no answers to the test requests.")
    return run.test


def _is_kept(run: RunResult, chosen: Mapping[str, float]) -> bool:
    return run.method in BASELINES or run.learning_rate == chosen[run.method]


def _check_comparable(runs: Sequence[RunResult]) -> None:
    dtypes = {run.compute.dtype: run.method for run in runs if run.compute is not None}
    if len(dtypes) > 1:
        named = ", ".join(f"{method} in {dtype}" for dtype, method in dtypes.items())
        raise ComparisonError(
            f"The methods ran in different precision ({named}): set dtype and precision alike, or their time, memory "
            "and quality can't be compared."
        )
    uncounted = {name for run in runs if run.compute is not None for name in run.compute.uncounted}
    if uncounted:
        raise ComparisonError(
            f"Operations of attention weren't counted ({', '.join(sorted(uncounted))}), so ratios of FLOPs would be "
            "wrong: run with attn_implementation sdpa or eager."
        )


def _pooled(arms: Sequence[ArmRecords], seeds: Sequence[int]) -> ArmRecords:
    """The same requests answered once by each seed, as one arm; a request's answers are resampled together."""
    first = arms[0]
    names = ("input_tokens", "output_tokens", "scores", "truncated", "cached_prefix_tokens")
    joined: dict[str, Any] = {name: sum((getattr(arm, name) for arm in arms), ()) for name in names}
    clusters = first.clusters or first.ids
    outputs = sum((arm.outputs for arm in arms), ()) if all(arm.outputs for arm in arms) else ()
    return replace(
        first,
        ids=_pooled_ids(first.ids, seeds),
        clusters=tuple(clusters) * len(arms),
        outputs=outputs,
        parts={name: sum(arm.parts.get(name, 0) for arm in arms) for name in first.parts},
        **joined,
    )


def _pooled_ids(ids: tuple[str, ...], seeds: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"{i} (seed {seed})" for seed in seeds for i in ids) if len(seeds) > 1 else ids


def _ratios(
    runs: Sequence[RunResult], full: Sequence[RunResult], untuned: ArmRecords, **bootstrap: Any
) -> dict[str, Interval]:
    """Of a method's runs to those of full fine-tuning."""
    n = len(untuned.ids)
    arms = {"own": [_test(run) for run in runs], "full": [_test(run) for run in full]}
    columns: dict[str, list[float]] = {"base": list(untuned.scores)}
    for name, found in arms.items():
        scores = [arm.ordered(untuned.ids, name).scores for arm in found]
        columns[name] = [mean(score[i] for score in scores) for i in range(n)]
    ratios = bootstrap_intervals(
        columns,
        {
            "quality_ratio": lambda s: s["own"] / s["full"],
            "gain_retained": lambda s: (s["own"] - s["base"]) / (s["full"] - s["base"]),
        },
        clusters=untuned.clusters or None,
        **bootstrap,
    )
    goal = ENOUGH * mean(run.validation_quality for run in full)
    figures: dict[str, Callable[[RunResult], float | None]] = {
        "flops": lambda run: None if run.compute is None else run.compute.flops,
        "seconds": lambda run: None if run.compute is None else run.compute.train_seconds,
        "peak_memory": lambda run: None if run.compute is None else float(run.compute.peak_memory_bytes),
        "trainable_parameters": lambda run: None if run.compute is None else float(run.compute.trainable_parameters),
        "checkpoint_bytes": lambda run: None if run.checkpoint_bytes is None else float(run.checkpoint_bytes),
        "flops_to_95": lambda run: _first(run, goal, "flops"),
        "seconds_to_95": lambda run: _first(run, goal, "seconds"),
    }
    for name, figure in figures.items():
        own, other = [figure(run) for run in runs], [figure(run) for run in full]
        if None not in own and None not in other:
            ratios[name] = _range(own, other)  # type: ignore[arg-type]
    return ratios


def _first(run: RunResult, goal: float, figure: str) -> float:
    """A figure of the first point of a run's curve that reached a quality; infinite where none did."""
    return next((getattr(point, figure) for point in run.curve if point.quality >= goal), math.inf)


def _range(own: Sequence[float], full: Sequence[float]) -> Interval:
    """Ratio of the means, with the least and the largest ratio of two seeds."""

    def ratio(a: float, b: float) -> float:
        return a / b if math.isfinite(b) and b else math.inf

    pairs = [ratio(a, b) for a, b in zip(own, full, strict=False)]
    return Interval(ratio(mean(own), mean(full)), min(pairs), max(pairs))


def _learning_curve(runs: Sequence[RunResult], rate: float, **bootstrap: Any) -> dict[int, Interval]:
    by_size: dict[int, list[ArmRecords]] = {}
    for run in runs:
        if run.learning_rate == rate and run.test is not None and run.size is not None:
            by_size.setdefault(run.size, []).append(run.test)
    curve = {}
    for size, arms in sorted(by_size.items()):
        scores = [arm.ordered(arms[0].ids, "learning curve").scores for arm in arms]
        columns = {"score": [mean(column) for column in zip(*scores, strict=True)], "n": [1.0] * len(arms[0].ids)}
        statistics = {"quality": lambda s: s["score"] / s["n"]}
        clusters = arms[0].clusters or None
        curve[size] = bootstrap_intervals(columns, statistics, clusters=clusters, **bootstrap)["quality"]
    return curve


def _metrics(asked: Asked, runs: Mapping[str, Sequence[RunResult]]) -> dict[str, dict[str, Interval]]:
    if asked.metrics is None:
        return {}
    found: dict[str, dict[str, Interval]] = {}
    for method, of_method in runs.items():
        seeds = [asked.metrics(_test(run).outputs, asked.references) for run in of_method]
        found[method] = {
            name: Interval(mean(s[name] for s in seeds), min(s[name] for s in seeds), max(s[name] for s in seeds))
            for name in seeds[0]
        }
    return found


def _warnings(
    finals: Mapping[str, Sequence[RunResult]],
    trained: Mapping[str, Sequence[RunResult]],
    chosen: Mapping[str, float],
    quality: Mapping[str, Interval],
    complete: bool,
) -> Iterable[str]:
    if not complete:
        yield "Not all planned runs were made: the budget was spent. Run the same command with a larger one to go on."
    for method, runs in finals.items():
        if len(runs) < 3:
            yield f"{method}: {len(runs)} seed(s) where at least 3 are needed to tell it from another by chance."
        grid = sorted({run.learning_rate for run in trained[method] if run.learning_rate is not None})
        if len(grid) > 1 and chosen[method] in (grid[0], grid[-1]):
            yield (
                f"{method}: the best learning rate, {chosen[method]:g}, is at the edge of its grid "
                f"({', '.join(f'{rate:g}' for rate in grid)}), so a better one may lie beyond."
            )
        elif len(grid) == 1:
            yield f"{method}: only one learning rate was tried, {grid[0]:g}."
        if quality[method].value <= quality["untuned"].value:
            yield f"{method}: training didn't make it better than the untuned model."
