"""The result of a token savings measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.bootstrap import Interval, json_number
from lightning_ft.evaluation.savings.cost import Costs, Prices
from lightning_ft.evaluation.savings.gate import WEAK_PROMPT, Gate, overlap_text
from lightning_ft.evaluation.savings.records import ArmRecords

if TYPE_CHECKING:
    from rich.console import Console, Group

_COST_METRICS = {
    "cost_cached": "tuned_cached",
    "cost_uncached": "tuned_uncached",
    "cost_prompted_cached": "prompted_cached",
    "cost_prompted_uncached": "prompted_uncached",
    "break_even_requests": "break_even_cached",  # the conservative one: caching makes the prompted arm cheaper
    "break_even_requests_uncached": "break_even_uncached",
}


@dataclass(frozen=True)
class SavingsResult:
    """Token savings of the tuned over the prompted arm, with quality, gate and costs.

    Measured times, `date` and `weights` are ignored in comparisons for equality.

    Args:
        arms: Records of ``prompted``, ``tuned`` and, if it was measured, ``untuned``.
        savings: Savings ``input``, ``output``, ``total`` and ``per_success``, as shares of the prompted arm. The last
            is left out if no answer of either arm was right.
        quality: Mean score of each arm.
        difference: Tuned minus prompted quality.
        gate: Verdict on the difference.
        costs: Costs per request; None if there are no prices.
        confidence: Confidence level of the intervals.
        provenance: Models, settings and versions of the measurement.
        warnings: Caveats that a reader needs in order to interpret the metrics.
        requests: Last user turn of each request, in the order of the arms' ids; empty if not recorded.
        references: Reference answer of each request, in the same order; empty if not recorded.
        in_training: Ids of the requests whose question also appears in the training rows; None if the training rows
            aren't known.
        date: Day of the measurement, such as ``2026-01-31``; empty if not recorded.
        weights: Hash of the weights of the tuned arm, see `lightning_ft.models.card_facts.weights_hash`; None if not
            recorded.

    Raises:
        SavingsError: If the number of `requests` or `references` is neither 0 nor that of the arms' ids, or
            `in_training` has ids that the arms lack.
    """

    arms: Mapping[str, ArmRecords]
    savings: Mapping[str, Interval]
    quality: Mapping[str, Interval]
    difference: Interval
    gate: Gate
    costs: Costs | None = None
    confidence: float = 0.95
    provenance: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    in_training: tuple[str, ...] | None = None
    date: str = field(default="", compare=False)
    weights: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if unknown := set(self.in_training or ()) - set(self.arms["prompted"].ids):
            raise SavingsError(f"in_training has ids that no request has: {', '.join(sorted(unknown)[:5])}.")
        for name in ("requests", "references"):
            texts = getattr(self, name)
            if texts and len(texts) != self.n:
                raise SavingsError(
                    f"{name} has {len(texts):,} texts for {self.n:,} request ids. Pass one per request, in the same "
                    "order, or none."
                )

    @property
    def n(self) -> int:
        """Number of requests."""
        return len(self.arms["prompted"].ids)

    @property
    def saves_half(self) -> bool:
        """Whether at least 50% fewer tokens may be claimed: the lower bound is at least 0.5 and the gate passes."""
        return self.savings["total"].lo >= 0.5 and self.gate.passed

    @property
    def headline(self) -> str:
        """One-sentence summary with verdict and interval."""
        total, quality, gate = self.savings["total"], self.quality, self.gate
        overlap = f"; {self.overlap}." if self.overlap else "."
        if gate.void:
            return (
                f"VOID: {gate.void}, so there is no saving to claim; the tuned model's quality is "
                f"{quality['tuned'].value:.3f} (n = {self.n:,}){overlap}"
            )
        amount = f"{abs(total.value):.1%} {'fewer' if total.value >= 0 else 'more'} tokens per request"
        kept = (
            "quality kept"
            if gate.passed
            else "too few requests to assess quality"
            if self.undecided
            else "quality below min_quality"
            if gate.shortfall
            else "quality not kept"
        )
        return (
            f"{gate.verdict}: {amount} (saving {total.lo:.1%} to {total.hi:.1%}, n = "
            f"{self.n:,}); {kept}: {quality['tuned'].value:.3f} against {quality['prompted'].value:.3f} prompted "
            f"(difference at least {gate.bound:+.3f}, margin {gate.margin:.3f}){overlap}"
        )

    @property
    def overlap(self) -> str:
        """Sentence on the requests that also appear in the training rows; empty if none is known to."""
        return overlap_text(len(self.in_training or ()), self.n)

    @property
    def undecided(self) -> bool:
        """Whether the gate failed only because there are too few requests."""
        gate = self.gate
        return gate.underpowered and not gate.shortfall and self.difference.value > -gate.margin

    def metrics(self) -> dict[str, float]:
        """Metrics for logging, by name.

        Costs are per request; `cost_cached` and `cost_uncached` are those of the tuned arm. `break_even_requests` is
        the number with prefix caching.
        """
        metrics: dict[str, float] = {}
        for name, interval in self.savings.items():
            metrics |= {name: interval.value, f"{name}_lo": interval.lo, f"{name}_hi": interval.hi}
        metrics |= {f"quality_{name}": interval.value for name, interval in self.quality.items()}
        metrics |= {"quality_diff": self.difference.value, "quality_diff_lo": self.gate.bound}
        answers = [flag for name in ("prompted", "tuned") for flag in self.arms[name].truncated]
        metrics |= {
            "gate_passed": float(self.gate.passed),
            "gate_void": float(bool(self.gate.void)),
            "truncated_rate": sum(answers) / len(answers),
            "n": float(self.n),
        }
        if self.in_training is not None:
            metrics["requests_in_training"] = float(len(self.in_training))
        if self.costs is not None:
            metrics |= {name: getattr(self.costs, attribute) for name, attribute in _COST_METRICS.items()}
        return metrics

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types, with infinite numbers as ``"Infinity"`` and ``"-Infinity"``, which JSON lacks."""
        return {
            "headline": self.headline,  # for readers; from_dict ignores this and other derived values
            "saves_half": self.saves_half,
            "gate_passed": self.gate.passed,
            "verdict": self.gate.verdict,
            "n": self.n,
            "requests_in_training": None if self.in_training is None else len(self.in_training),
            "tokens_per_success": {name: json_number(arm.tokens_per_success) for name, arm in self.arms.items()},
            "savings": {name: _to_json(interval) for name, interval in self.savings.items()},
            "quality": {name: _to_json(interval) for name, interval in self.quality.items()},
            "difference": _to_json(self.difference),
            "gate": _to_json(self.gate),
            "costs": None if self.costs is None else _to_json(self.costs),
            "confidence": self.confidence,
            "date": self.date,
            "weights": self.weights,
            "provenance": dict(self.provenance),
            "warnings": list(self.warnings),
            "requests": list(self.requests),
            "references": list(self.references),
            "in_training": None if self.in_training is None else list(self.in_training),
            "arms": {name: arm.to_dict() for name, arm in self.arms.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SavingsResult:
        """Restore a result from :meth:`to_dict`."""

        def intervals(entries: Mapping[str, Mapping[str, float | str]]) -> dict[str, Interval]:
            return {name: Interval.from_dict(interval) for name, interval in entries.items()}

        costs, gate = values["costs"], _from_json(values["gate"])
        # older files have the warning of a weak prompt only
        gate.setdefault("weak", any(warning.startswith(WEAK_PROMPT) for warning in values["warnings"]))
        return cls(
            arms={name: ArmRecords.from_dict(arm) for name, arm in values["arms"].items()},
            savings=intervals(values["savings"]),
            quality=intervals(values["quality"]),
            difference=Interval.from_dict(values["difference"]),
            gate=Gate(**gate),
            costs=None if costs is None else Costs(**{**_from_json(costs), "prices": Prices(**costs["prices"])}),
            confidence=values["confidence"],
            provenance=values["provenance"],
            warnings=tuple(values["warnings"]),
            requests=tuple(values.get("requests", ())),  # older files lack both
            references=tuple(values.get("references", ())),
            in_training=None if (found := values.get("in_training")) is None else tuple(found),
            date=values.get("date", ""),
            weights=values.get("weights"),
        )

    def __rich__(self) -> Group:
        """Render as a table for rich."""
        from lightning_ft.document.terminal import terminal_document
        from lightning_ft.evaluation.savings.sections import savings_document

        return terminal_document(savings_document(self))

    def print(self, console: Console | None = None) -> None:
        """Print as a table.

        Args:
            console: Console to print to; by default the standard output.
        """
        from rich.console import Console

        (console or Console()).print(self)

    def save(self, folder: str | Path, *, png: bool | None = None) -> list[Path]:
        """Write ``token_savings.json``, ``token_savings.md`` and ``token_savings.png``.

        Args:
            folder: Folder to write to, created if needed.
            png: Whether to write the plot; None writes it if matplotlib is installed.

        Returns:
            Paths of the files written.

        Raises:
            MissingDependencyError: If `png` is True and matplotlib isn't installed.
        """
        from lightning_ft.evaluation.savings.files import save_savings

        written: list[Path] = save_savings(self, Path(folder), png=png)
        return written


def _to_json(record: Interval | Gate | Costs) -> dict[str, object]:
    """Fields of a dataclass as JSON types."""
    return {name: json_number(value) for name, value in asdict(record).items()}


def _from_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`_to_json`; nested values are left out."""
    return {
        name: float(v) if v in ("Infinity", "-Infinity", "NaN") else v
        for name, v in values.items()
        if not isinstance(v, dict)
    }
