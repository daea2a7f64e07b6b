"""Result of a comparison of methods: quality, cost, and verdicts on the usual claims about fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightning_ft.evaluation.bootstrap import Interval
from lightning_ft.evaluation.compute.arithmetic import ComputeResult
from lightning_ft.evaluation.retention.arithmetic import RetentionResult
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.evaluation.savings.result import SavingsResult

Verdict = Literal["held", "not held", "held if", "undecided"]


@dataclass(frozen=True)
class CurvePoint:
    """A measurement on the validation rows during a run.

    Args:
        step: Number of optimizer steps so far.
        flops: Floating-point operations of training so far.
        seconds: Time in training steps so far, in seconds.
        quality: Mean score on the validation rows.
    """

    step: int
    flops: float
    seconds: float
    quality: float


@dataclass(frozen=True)
class RunResult:
    """Result of one training run, or the measurement of the original weights.

    Args:
        method: Name of the method: ``prompted``, ``untuned``, ``full``, ``lora``, or that of another configuration.
        seed: Seed of the run.
        learning_rate: Peak learning rate; None if nothing was trained.
        size: Number of training rows; None if nothing was trained.
        validation_quality: Mean score on the validation rows at the end of the run.
        test: Answers to the test requests; no choice depends on them.
        curve: Measurements on the validation rows during training.
        compute: Operations, time and memory of training.
        retention: How far the model moved from its base.
        checkpoint_bytes: Size in bytes of the weights that `export` writes.
        wall_seconds: Duration of the whole run in seconds: loading, training and measuring.
        config_hash: Hash of the configuration.
        search: Whether the run only served the choice of the learning rate, on fewer rows than the others.
        diverged: Why training ended early, with a loss, gradients or weights that weren't finite; empty if it didn't.
            Such a run has a quality of 0 and no answers.
    """

    method: str
    seed: int
    learning_rate: float | None
    size: int | None
    validation_quality: float
    test: ArmRecords | None
    curve: tuple[CurvePoint, ...] = ()
    compute: ComputeResult | None = None
    retention: RetentionResult | None = None
    checkpoint_bytes: int | None = None
    wall_seconds: float = 0.0
    config_hash: str = ""
    search: bool = False
    diverged: str = ""

    def to_dict(self, *, answers: bool = True) -> dict[str, Any]:
        """Convert to JSON types.

        Args:
            answers: Whether to include the answers to the test requests.
        """
        return {
            **{name: getattr(self, name) for name in _JSON_FIELDS},
            "test": self.test.to_dict() if self.test is not None and answers else None,
            "curve": [asdict(point) for point in self.curve],
            "compute": None if self.compute is None else self.compute.to_dict(),
            "retention": None if self.retention is None else self.retention.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunResult:
        """Restore a result from :meth:`to_dict`."""
        return cls(
            **{name: values[name] for name in _JSON_FIELDS if name in values},
            test=None if values["test"] is None else ArmRecords.from_dict(values["test"]),
            curve=tuple(CurvePoint(**point) for point in values["curve"]),
            compute=None if values["compute"] is None else ComputeResult.from_dict(values["compute"]),
            retention=None if values["retention"] is None else RetentionResult.from_dict(values["retention"]),
        )


_JSON_FIELDS = (
    "method",
    "seed",
    "learning_rate",
    "size",
    "validation_quality",
    "checkpoint_bytes",
    "wall_seconds",
    "config_hash",
    "search",
    "diverged",
)


@dataclass(frozen=True)
class Claim:
    """A claim about fine-tuning with its verdict.

    Args:
        name: Short name of the claim.
        claimed: Claim as it is usually made.
        verdict: ``held``, ``not held``, ``held if`` (under `condition` only), or ``undecided`` if the interval includes
            the claim's threshold.
        evidence: Measurements that the verdict follows from.
        condition: Condition under which a ``held if`` claim is held.
    """

    name: str
    claimed: str
    verdict: Verdict
    evidence: str
    condition: str = ""


@dataclass(frozen=True)
class Comparison:
    """Results of all methods of a comparison.

    Args:
        runs: All runs. Those with the chosen learning rate include their answers.
        savings: Token savings of each trained method relative to the prompted model, over the answers of all its seeds.
        quality: Mean score on the test requests, by method, including `untuned` and `prompted`. Intervals are over
            requests, with all seeds of a request resampled together.
        seed_quality: Mean score of each seed on the test requests, by method.
        ratios: Ratios to full fine-tuning, by method and quantity. `quality_ratio` and `gain_retained` have bootstrap
            intervals; intervals of resources span the minimum and the maximum over seeds.
        chosen: Learning rate with the best validation quality, by method.
        learning_curve: Quality on the test requests, by method and number of training rows.
        metrics: Task-specific metrics, by method; intervals span the minimum and the maximum over seeds.
        claims: Usual claims about fine-tuning, with their verdicts.
        sweep_seconds: Training time in seconds of the runs that only served the choice of the learning rate.
        sweep_flops: Floating-point operations of those runs.
        complete: Whether all planned runs have finished.
        warnings: Warnings that affect how the results may be read.
        provenance: Model, data and settings of the comparison, as JSON values.
    """

    runs: tuple[RunResult, ...]
    savings: Mapping[str, SavingsResult]
    quality: Mapping[str, Interval]
    seed_quality: Mapping[str, tuple[float, ...]]
    ratios: Mapping[str, Mapping[str, Interval]]
    chosen: Mapping[str, float]
    learning_curve: Mapping[str, Mapping[int, Interval]] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    sweep_seconds: float = 0.0
    sweep_flops: float = 0.0
    complete: bool = True
    warnings: tuple[str, ...] = ()
    provenance: Mapping[str, object] = field(default_factory=dict)

    def final_runs(self, method: str) -> list[RunResult]:
        """Return the runs of a method on all training rows with its chosen learning rate, sorted by seed."""
        found = [
            run
            for run in self.runs
            if run.method == method and run.learning_rate == self.chosen.get(method) and not run.search
        ]
        largest = max((run.size or 0 for run in found), default=0)
        return sorted((run for run in found if (run.size or 0) == largest), key=lambda run: run.seed)

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types, with infinite numbers as ``"Infinity"``."""
        return {
            "runs": [run.to_dict() for run in self.runs],
            "savings": {name: result.to_dict() for name, result in self.savings.items()},
            "quality": _dump_intervals(self.quality),
            "seed_quality": {name: list(values) for name, values in self.seed_quality.items()},
            "ratios": {name: _dump_intervals(ratios) for name, ratios in self.ratios.items()},
            "chosen": dict(self.chosen),
            "learning_curve": {
                name: {str(size): i.to_dict() for size, i in curve.items()}
                for name, curve in self.learning_curve.items()
            },
            "metrics": {name: _dump_intervals(metrics) for name, metrics in self.metrics.items()},
            "claims": [asdict(claim) for claim in self.claims],
            "sweep_seconds": self.sweep_seconds,
            "sweep_flops": self.sweep_flops,
            "complete": self.complete,
            "warnings": list(self.warnings),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """Restore a comparison from :meth:`to_dict`."""
        return cls(
            runs=tuple(RunResult.from_dict(run) for run in values["runs"]),
            savings={name: SavingsResult.from_dict(result) for name, result in values["savings"].items()},
            quality=_parse_dump_intervals(values["quality"]),
            seed_quality={name: tuple(scores) for name, scores in values["seed_quality"].items()},
            ratios={name: _parse_dump_intervals(ratios) for name, ratios in values["ratios"].items()},
            chosen=values["chosen"],
            learning_curve={
                name: {int(size): Interval.from_dict(i) for size, i in curve.items()}
                for name, curve in values["learning_curve"].items()
            },
            metrics={name: _parse_dump_intervals(metrics) for name, metrics in values["metrics"].items()},
            claims=tuple(Claim(**claim) for claim in values["claims"]),
            sweep_seconds=values["sweep_seconds"],
            sweep_flops=values["sweep_flops"],
            complete=values["complete"],
            warnings=tuple(values["warnings"]),
            provenance=values["provenance"],
        )


def _dump_intervals(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float | str]]:
    return {name: interval.to_dict() for name, interval in intervals.items()}


def _parse_dump_intervals(values: Mapping[str, Mapping[str, float | str]]) -> dict[str, Interval]:
    return {name: Interval.from_dict(interval) for name, interval in values.items()}
