"""Methods side by side: what each reached, what it cost, and what became of the usual claims about fine-tuning."""

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
        step: Optimizer steps taken.
        flops: Operations of training so far.
        seconds: Time in training steps so far.
        quality: Mean score.
    """

    step: int
    flops: float
    seconds: float
    quality: float


@dataclass(frozen=True)
class RunResult:
    """One training run, or the measurement of the original weights.

    Args:
        method: ``prompted``, ``untuned``, ``full``, ``lora``, or the name of another configuration.
        seed: Of the run.
        learning_rate: Its peak; None where nothing was trained.
        size: Training rows; None where nothing was trained.
        validation_quality: Mean score on the validation rows, at the end.
        test: Answers to the test requests; they never decide anything.
        curve: Measurements on the way.
        compute: What training took.
        retention: What was forgotten.
        checkpoint_bytes: Of the weights that `export` writes.
        wall_seconds: Of the whole run: loading, training and measuring.
        config_hash: Names the configuration.
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

    def to_dict(self, *, answers: bool = True) -> dict[str, Any]:
        """As JSON types.

        Args:
            answers: With the answers to the test requests.
        """
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "test": self.test.to_dict() if self.test is not None and answers else None,
            "curve": [asdict(point) for point in self.curve],
            "compute": None if self.compute is None else self.compute.to_dict(),
            "retention": None if self.retention is None else self.retention.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunResult:
        """Back from :meth:`to_dict`."""
        return cls(
            **{name: values[name] for name in _PLAIN},
            test=None if values["test"] is None else ArmRecords.from_dict(values["test"]),
            curve=tuple(CurvePoint(**point) for point in values["curve"]),
            compute=None if values["compute"] is None else ComputeResult.from_dict(values["compute"]),
            retention=None if values["retention"] is None else RetentionResult.from_dict(values["retention"]),
        )


_PLAIN = (
    "method",
    "seed",
    "learning_rate",
    "size",
    "validation_quality",
    "checkpoint_bytes",
    "wall_seconds",
    "config_hash",
)


@dataclass(frozen=True)
class Claim:
    """A claim about fine-tuning, and what was measured of it.

    Args:
        name: In a few words.
        claimed: As it is usually made.
        verdict: ``held``, ``not held``, ``held if`` (under `condition` only), or ``undecided`` where the interval
            lies on both sides.
        evidence: The figures.
        condition: Under which it holds.
    """

    name: str
    claimed: str
    verdict: Verdict
    evidence: str
    condition: str = ""


@dataclass(frozen=True)
class Comparison:
    """All methods of a comparison.

    Args:
        runs: All runs; answers are kept of those whose learning rate was chosen.
        savings: Of each trained method against the prompt: the answers of all its seeds together.
        quality: Mean score on the test requests, by method, `untuned` and `prompted` among them. Intervals are over
            requests, all seeds of a request together.
        seed_quality: The score of each seed by itself.
        ratios: To full fine-tuning, by method and figure. `quality_ratio` and `gain_retained` have bootstrap
            intervals; those of resources are the least and the largest of the seeds.
        chosen: Learning rate of each method, by validation quality.
        learning_curve: Test quality by method and training rows.
        metrics: The domain's own, by method; intervals are the least and the largest of the seeds.
        claims: What became of the claims.
        sweep_seconds: Training time of the runs that were only there to choose a learning rate.
        sweep_flops: Their operations.
        complete: Whether all planned runs were made.
        warnings: What a reader has to know.
        provenance: What was measured, with what.
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
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def final_runs(self, method: str) -> list[RunResult]:
        """Runs of a method on all rows with its chosen learning rate, by seed."""
        found = [run for run in self.runs if run.method == method and run.learning_rate == self.chosen.get(method)]
        largest = max((run.size or 0 for run in found), default=0)
        return sorted((run for run in found if (run.size or 0) == largest), key=lambda run: run.seed)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; infinite numbers as ``"Infinity"``."""
        return {
            "runs": [run.to_dict() for run in self.runs],
            "savings": {name: result.to_dict() for name, result in self.savings.items()},
            "quality": _intervals(self.quality),
            "seed_quality": {name: list(values) for name, values in self.seed_quality.items()},
            "ratios": {name: _intervals(ratios) for name, ratios in self.ratios.items()},
            "chosen": dict(self.chosen),
            "learning_curve": {
                name: {str(size): i.to_dict() for size, i in curve.items()}
                for name, curve in self.learning_curve.items()
            },
            "metrics": {name: _intervals(metrics) for name, metrics in self.metrics.items()},
            "claims": [asdict(claim) for claim in self.claims],
            "sweep_seconds": self.sweep_seconds,
            "sweep_flops": self.sweep_flops,
            "complete": self.complete,
            "warnings": list(self.warnings),
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """Back from :meth:`to_dict`."""
        return cls(
            runs=tuple(RunResult.from_dict(run) for run in values["runs"]),
            savings={name: SavingsResult.from_dict(result) for name, result in values["savings"].items()},
            quality=_intervals_back(values["quality"]),
            seed_quality={name: tuple(scores) for name, scores in values["seed_quality"].items()},
            ratios={name: _intervals_back(ratios) for name, ratios in values["ratios"].items()},
            chosen=values["chosen"],
            learning_curve={
                name: {int(size): Interval.from_dict(i) for size, i in curve.items()}
                for name, curve in values["learning_curve"].items()
            },
            metrics={name: _intervals_back(metrics) for name, metrics in values["metrics"].items()},
            claims=tuple(Claim(**claim) for claim in values["claims"]),
            sweep_seconds=values["sweep_seconds"],
            sweep_flops=values["sweep_flops"],
            complete=values["complete"],
            warnings=tuple(values["warnings"]),
            provenance=values["provenance"],
        )


def _intervals(intervals: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: interval.to_dict() for name, interval in intervals.items()}


def _intervals_back(values: Mapping[str, Any]) -> dict[str, Interval]:
    return {name: Interval.from_dict(interval) for name, interval in values.items()}
