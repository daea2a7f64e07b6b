"""Combine runs into a comparison: choose learning rates, pool seeds, compute ratios to full fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from lightning_ft.errors import ComparisonError
from lightning_ft.evaluation.bootstrap import Interval, bootstrap_intervals
from lightning_ft.evaluation.comparison.claims import evaluate_claims
from lightning_ft.evaluation.comparison.result import Comparison, RunResult
from lightning_ft.evaluation.savings.arithmetic import token_savings
from lightning_ft.evaluation.savings.cost import Prices
from lightning_ft.evaluation.savings.records import ArmRecords

Metrics = Callable[[Sequence[str], Sequence[str]], Mapping[str, float]]
"""Function of answers and reference answers that returns task-specific metrics by name."""

BASELINES = ("untuned", "prompted")
"""Methods that train nothing."""
FULL = "full"
"""Name of full fine-tuning, which ratios refer to."""
TARGET_SHARE = 0.95
"""Share of full fine-tuning's quality that counts as having reached it."""


@dataclass(frozen=True)
class EvaluationSet:
    """Test requests, and how the answers to them are evaluated.

    Args:
        requests: Last user turn of each request, in the order of the ids of the arms.
        references: Reference answer of each request.
        margin: Largest acceptable loss of quality relative to the prompted model.
        prices: Prices of tokens; None leaves costs out.
        metrics: Function that computes task-specific metrics; None for none.
        in_training: Ids of the requests that also appear in the training rows; None if these aren't known.
        warnings: Warnings about the requests, for readers of the comparison.
        constant: Score of the most frequent reference as the answer to each request; None if none is frequent.
        min_quality: Quality below which an arm is of no use; None for the default of
            :func:`lightning_ft.evaluation.savings.arithmetic.token_savings`.
    """

    requests: tuple[str, ...]
    references: tuple[str, ...]
    margin: float
    prices: Prices | None = None
    metrics: Metrics | None = None
    in_training: tuple[str, ...] | None = None
    warnings: tuple[str, ...] = ()
    constant: tuple[float, ...] | None = None
    min_quality: float | None = None


def choose_learning_rates(runs: Iterable[RunResult]) -> dict[str, float]:
    """Choose the learning rate of each method with the best validation quality; the smaller one of equals.

    Only the grid counts: the runs of a search on fewer rows, or else runs of the method's smallest seed on all of its
    training rows. A learning rate at which training diverged is never chosen.

    Args:
        runs: Runs of all methods.

    Returns:
        Learning rate by method.

    Example:
        >>> runs = [RunResult("lora", 0, rate, 100, quality, None) for rate, quality in ((1e-3, 0.7), (2e-3, 0.8))]
        >>> choose_learning_rates(runs)
        {'lora': 0.002}
    """
    chosen: dict[str, float] = {}
    for method, method_runs in _trained(run for run in runs if not run.diverged).items():
        size, seed = max(run.size or 0 for run in method_runs), min(run.seed for run in method_runs)
        searched = [run for run in method_runs if run.search]
        grid = searched or [run for run in method_runs if run.size == size and run.seed == seed]
        best = max(grid, key=lambda run: (run.validation_quality, -(run.learning_rate or 0.0)))
        assert best.learning_rate is not None
        chosen[method] = best.learning_rate
    return chosen


def compare_methods(
    runs: Sequence[RunResult],
    test_set: EvaluationSet,
    *,
    complete: bool = True,
    provenance: Mapping[str, object] | None = None,
    resamples: int = 9999,
    seed: int = 0,
) -> Comparison:
    """Compare methods by their runs.

    Args:
        runs: All runs, including those of the original weights (`prompted` and `untuned`).
        test_set: Test requests, and how answers to them are evaluated.
        complete: Whether all planned runs have finished.
        provenance: Model, data and settings of the comparison, as JSON values.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Raises:
        ComparisonError: If an arm of the original weights is missing, nothing was trained, runs differ in precision, or
            operations of attention weren't counted.
    """
    base = {run.method: run for run in runs if run.method in BASELINES}
    missing = [name for name in BASELINES if name not in base or base[name].test is None]
    if missing:
        raise ComparisonError(
            f"There is no measurement of the original weights, {' and '.join(missing)}. Add these runs."
        )
    runs = _without_unfinished_methods(runs)
    trained = _trained(runs)
    if not trained:
        remedy = "Add runs of at least one method." if complete else "Raise the budget: complete runs aren't repeated."
        raise ComparisonError(
            f"No run trained a method with its chosen learning rate, so there is nothing to compare. {remedy}"
        )
    _check_comparable(runs)
    chosen = choose_learning_rates(runs)
    kept = tuple(run if _keeps_answers(run, chosen) else replace(run, test=None) for run in runs)
    draft = Comparison(kept, {}, {}, {}, {}, chosen)
    finals = {method: draft.final_runs(method) for method in trained}
    bootstrap = {"resamples": resamples, "seed": seed}
    prompted, untuned = _test(base["prompted"]), _test(base["untuned"])
    savings, quality, seed_quality = {}, {}, {}
    for method, method_runs in finals.items():
        arms = [_test(run).ordered(prompted.ids, method) for run in method_runs]
        seeds = [run.seed for run in method_runs]
        savings[method] = replace(
            token_savings(
                _pool([prompted] * len(arms), seeds),
                _pool(arms, seeds),
                _pool([untuned] * len(arms), seeds),
                margin=test_set.margin,
                prices=test_set.prices,
                provenance={"method": method, "learning_rate": chosen[method], "seeds": seeds},
                in_training=None if test_set.in_training is None else _pool_ids(test_set.in_training, seeds),
                constant=None if test_set.constant is None else test_set.constant * len(arms),
                min_quality=test_set.min_quality,
                **bootstrap,
            ),
            requests=test_set.requests * len(arms),
            references=test_set.references * len(arms),
        )
        quality[method] = savings[method].quality["tuned"]
        seed_quality[method] = tuple(arm.quality for arm in arms)
    any_method = next(iter(savings.values()))
    quality = {"untuned": any_method.quality["untuned"], "prompted": any_method.quality["prompted"], **quality}
    warnings = [*test_set.warnings, *_warnings(finals, trained, chosen, quality, complete)]
    ratios = {}
    if FULL in finals:
        full_beats_base = mean(seed_quality[FULL]) > untuned.quality
        if not full_beats_base:
            warnings.append(
                "Full fine-tuning never beat the untuned model, so ratios to it would mean nothing and are left out. "
                "Check its learning rates and its data."
            )
        else:
            for method in finals:
                if method != FULL:
                    ratios[method] = _ratios(finals[method], finals[FULL], untuned, **bootstrap)
    sweep = [
        run
        for method, method_runs in trained.items()
        for run in method_runs
        if run.search or run.learning_rate != chosen[method]
    ]
    result = replace(
        draft,
        savings=savings,
        quality=quality,
        seed_quality=seed_quality,
        ratios=ratios,
        learning_curve={
            method: _learning_curve(method_runs, chosen[method], **bootstrap) for method, method_runs in trained.items()
        },
        metrics=_metrics(test_set, {"untuned": [base["untuned"]], "prompted": [base["prompted"]], **finals}),
        sweep_seconds=sum(run.compute.train_seconds for run in sweep if run.compute is not None),
        sweep_flops=sum(run.compute.flops for run in sweep if run.compute is not None),
        complete=complete,
        warnings=tuple(warnings),
        provenance=dict(provenance or {}),
    )
    return replace(result, claims=evaluate_claims(result, margin=test_set.margin))


def _without_unfinished_methods(runs: Sequence[RunResult]) -> list[RunResult]:
    """Leave out methods of which only runs that tried learning rates were complete when the budget ended."""
    draft = Comparison(tuple(runs), {}, {}, {}, {}, choose_learning_rates(runs))
    return [run for run in runs if run.method in BASELINES or draft.final_runs(run.method)]


def _trained(runs: Iterable[RunResult]) -> dict[str, list[RunResult]]:
    by_method: dict[str, list[RunResult]] = {}
    for run in runs:
        if run.method not in BASELINES:
            by_method.setdefault(run.method, []).append(run)
    return by_method


def _test(run: RunResult) -> ArmRecords:
    if run.test is None:
        raise ComparisonError(
            f"The run {run.method}, seed {run.seed}, has no answers to the test requests. Run it again."
        )
    return run.test


def _keeps_answers(run: RunResult, chosen: Mapping[str, float]) -> bool:
    return run.method in BASELINES or (run.learning_rate == chosen[run.method] and not run.search)


def _check_comparable(runs: Sequence[RunResult]) -> None:
    dtypes = {run.compute.dtype: run.method for run in runs if run.compute is not None}
    if len(dtypes) > 1:
        named = ", ".join(f"{method} in {dtype}" for dtype, method in dtypes.items())
        raise ComparisonError(
            f"The methods ran in different precisions ({named}), so their time, memory and quality can't be compared. "
            "Set the same dtype and precision for all of them."
        )
    uncounted = {name for run in runs if run.compute is not None for name in run.compute.uncounted}
    if uncounted:
        raise ComparisonError(
            f"Operations of attention weren't counted ({', '.join(sorted(uncounted))}), so ratios of FLOPs would be "
            "wrong. Run the methods again with attn_implementation='sdpa' or 'eager'."
        )


def _pool(arms: Sequence[ArmRecords], seeds: Sequence[int]) -> ArmRecords:
    """Join the answers of all seeds into one arm; the answers to a request form a cluster of the bootstrap."""
    first = arms[0]
    names = ("input_tokens", "output_tokens", "scores", "truncated", "cached_prefix_tokens")
    joined: dict[str, Any] = {name: sum((getattr(arm, name) for arm in arms), ()) for name in names}
    clusters = first.clusters or first.ids
    outputs = sum((arm.outputs for arm in arms), ()) if all(arm.outputs for arm in arms) else ()
    return replace(
        first,
        ids=_pool_ids(first.ids, seeds),
        clusters=tuple(clusters) * len(arms),
        outputs=outputs,
        parts={name: sum(arm.parts.get(name, 0) for arm in arms) for name in first.parts},
        **joined,
    )


def _pool_ids(ids: tuple[str, ...], seeds: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"{i} (seed {seed})" for seed in seeds for i in ids) if len(seeds) > 1 else ids


def _ratios(
    runs: Sequence[RunResult], full: Sequence[RunResult], untuned: ArmRecords, **bootstrap: Any
) -> dict[str, Interval]:
    """Compute the ratios of a method's runs to those of full fine-tuning."""
    n = len(untuned.ids)
    arms = {"own": [_test(run) for run in runs], "full": [_test(run) for run in full]}
    columns: dict[str, list[float]] = {"base": list(untuned.scores)}
    for name, own_arms in arms.items():
        scores = [arm.ordered(untuned.ids, name).scores for arm in own_arms]
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
    target = TARGET_SHARE * mean(run.validation_quality for run in full)
    resources: dict[str, Callable[[RunResult], float | None]] = {
        "flops": lambda run: None if run.compute is None else run.compute.flops,
        "seconds": lambda run: None if run.compute is None else run.compute.train_seconds,
        "peak_memory": lambda run: None if run.compute is None else float(run.compute.peak_memory_bytes),
        "trainable_parameters": lambda run: None if run.compute is None else float(run.compute.trainable_parameters),
        "checkpoint_bytes": lambda run: None if run.checkpoint_bytes is None else float(run.checkpoint_bytes),
        "flops_to_95": lambda run: _first_reaching(run, target, "flops"),
        "seconds_to_95": lambda run: _first_reaching(run, target, "seconds"),
    }
    for name, resource in resources.items():
        own, other = [resource(run) for run in runs], [resource(run) for run in full]
        if None not in own and None not in other:
            ratios[name] = _ratio_range(own, other)  # type: ignore[arg-type]
    return ratios


def _first_reaching(run: RunResult, target: float, resource: str) -> float:
    """Return a resource at the first point of a run's curve that reached a quality; infinite if none did."""
    return next((getattr(point, resource) for point in run.curve if point.quality >= target), math.inf)


def _ratio_range(own: Sequence[float], full: Sequence[float]) -> Interval:
    """Compute the ratio of the means, with the smallest and the largest ratio over pairs of seeds."""

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


def compute_metrics(metrics: Metrics, outputs: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compute task-specific metrics.

    Args:
        metrics: Function that computes them. Its values may be of any type that `float` converts.
        outputs: Answer to each request.
        references: Reference answer of each request.

    Raises:
        ComparisonError: If the function fails, or returns anything but numbers by name.

    Example:
        >>> compute_metrics(lambda outputs, references: {"answers": len(outputs)}, ["a", "b"], ["a", "c"])
        {'answers': 2.0}
    """
    name = getattr(metrics, "__qualname__", type(metrics).__qualname__)
    try:
        found: Any = metrics(outputs, references)
    except (Exception, SystemExit) as error:  # of any type: the message must name the function
        raise ComparisonError(
            f"The metrics function {name!r} failed on {len(outputs):,} answers, the first of which is "
            f"{outputs[0]!r:.60}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, Mapping):
        raise ComparisonError(f"The metrics function {name!r} returned {found!r:.60}: expected a dict of numbers.")
    numbers = {}
    for key, value in found.items():
        try:
            numbers[str(key)] = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # of tensors, RuntimeError
            raise ComparisonError(
                f"The metrics function {name!r} returned {value!r:.60} for {key!r}: expected a number."
            ) from error
    return numbers


def _metrics(test_set: EvaluationSet, runs: Mapping[str, Sequence[RunResult]]) -> dict[str, dict[str, Interval]]:
    if test_set.metrics is None:
        return {}
    metrics: dict[str, dict[str, Interval]] = {}
    for method, method_runs in runs.items():
        seeds = [compute_metrics(test_set.metrics, _test(run).outputs, test_set.references) for run in method_runs]
        metrics[method] = {
            name: Interval(mean(s[name] for s in seeds), min(s[name] for s in seeds), max(s[name] for s in seeds))
            for name in seeds[0]
        }
    return metrics


def _warnings(
    finals: Mapping[str, Sequence[RunResult]],
    trained: Mapping[str, Sequence[RunResult]],
    chosen: Mapping[str, float],
    quality: Mapping[str, Interval],
    complete: bool,
) -> Iterable[str]:
    if not complete:
        yield "Planned runs are missing, since the budget was spent. Run the same command with a larger one to go on."
    for method, runs in finals.items():
        if len(runs) < 3:
            seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
            yield f"{method}: {seeds}; at least 3 are needed to tell differences from chance."
        grid = sorted({run.learning_rate for run in trained[method] if run.learning_rate is not None})
        if len(grid) > 1 and chosen[method] in (grid[0], grid[-1]):
            yield (
                f"{method}: the best learning rate, {chosen[method]:g}, is at the edge of its grid "
                f"({', '.join(f'{rate:g}' for rate in grid)}). Extend the grid, since a better one may be outside it."
            )
        if diverged := sorted({run.learning_rate or 0.0 for run in trained[method] if run.diverged}):
            yield f"{method}: training diverged at {', '.join(f'{rate:g}' for rate in diverged)}, which isn't chosen."
        if len(grid) == 1:
            yield f"{method}: only one learning rate was tried, {grid[0]:g}. Try several; the best differs by method."
        if quality[method].value <= quality["untuned"].value:
            yield f"{method}: training didn't improve on the untuned model. Check its data and learning rates."
