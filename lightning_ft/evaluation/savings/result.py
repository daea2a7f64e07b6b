"""The result of a token-savings measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_ft.errors import SavingsError
from lightning_ft.evaluation.bootstrap import Interval, json_number
from lightning_ft.evaluation.savings.cost import Costs, Prices
from lightning_ft.evaluation.savings.gate import Gate, overlap_text
from lightning_ft.evaluation.savings.records import ArmRecords

if TYPE_CHECKING:
    from rich.console import Console, Group

_COST_FIGURES = {
    "cost_cached": "tuned_cached",
    "cost_uncached": "tuned_uncached",
    "cost_prompted_cached": "prompted_cached",
    "cost_prompted_uncached": "prompted_uncached",
    "break_even_requests": "break_even_cached",  # the cached prefix is the harder case
    "break_even_requests_uncached": "break_even_uncached",
}


@dataclass(frozen=True)
class SavingsResult:
    """What training saved, and whether quality was kept. Two results are equal if they are in all but times.

    Args:
        arms: ``prompted``, ``tuned`` and, where it was measured, ``untuned``.
        savings: ``input``, ``output``, ``total`` and ``per_success``, as shares of the prompted arm.
        quality: Mean score of each arm.
        difference: Tuned minus prompted quality.
        gate: The verdict on it.
        costs: With prices only.
        confidence: Of the intervals.
        provenance: What was measured, with what.
        warnings: What a reader of the figures has to know.
        requests: What was asked, the last user turn of each, in the order of the arms' ids; empty where it wasn't kept.
        references: The right answers, in the same order; empty where they weren't kept.
        in_training: Ids of the requests whose question also appears in the training rows; None where the training rows
            aren't known.

    Raises:
        SavingsError: If there are requests or references, but not one for each id of the arms, or ids in `in_training`
            that the arms don't have.
    """

    arms: Mapping[str, ArmRecords]
    savings: Mapping[str, Interval]
    quality: Mapping[str, Interval]
    difference: Interval
    gate: Gate
    costs: Costs | None = None
    confidence: float = 0.95
    provenance: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    in_training: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.in_training or ()) - set(self.arms["prompted"].ids):
            raise SavingsError(f"in_training has ids that no request has: {', '.join(sorted(unknown)[:5])}.")
        for name in ("requests", "references"):
            texts = getattr(self, name)
            if texts and len(texts) != self.n:
                raise SavingsError(
                    f"{name} has {len(texts):,} texts for {self.n:,} request ids: give one for each, in their order, "
                    "or none."
                )

    @property
    def n(self) -> int:
        """Requests."""
        return len(self.arms["prompted"].ids)

    @property
    def saves_half(self) -> bool:
        """Whether "at least 50% fewer tokens" may be claimed: the lower bound says so and the gate passes."""
        return self.savings["total"].lo >= 0.5 and self.gate.passed

    @property
    def headline(self) -> str:
        """One sentence, with interval and verdict."""
        total, quality = self.savings["total"], self.quality
        amount = f"{abs(total.value):.1%} {'fewer' if total.value >= 0 else 'more'} tokens per request"
        kept = (
            "quality kept"
            if self.gate.passed
            else "too few requests to judge quality"
            if self._undecided
            else "quality not kept"
        )
        return (
            f"{'PASS' if self.gate.passed else 'FAIL'}: {amount} (saving {total.lo:.1%} to {total.hi:.1%}, n = "
            f"{self.n:,}); {kept}: {quality['tuned'].value:.3f} against {quality['prompted'].value:.3f} prompted "
            f"(difference at least {self.gate.bound:+.3f}, margin {self.gate.margin:.3f})"
            + (f"; {self.overlap}." if self.overlap else ".")
        )

    @property
    def overlap(self) -> str:
        """How many of the requests appear in the training rows too, in words; nothing where none is known to."""
        return overlap_text(len(self.in_training or ()), self.n)

    @property
    def _undecided(self) -> bool:
        return self.gate.underpowered and self.difference.value > -self.gate.margin

    def metrics(self) -> dict[str, float]:
        """What is logged, name to number.

        Costs are those of one request of the tuned model; `break_even_requests` is the one with a cached prefix.
        """
        figures: dict[str, float] = {}
        for name, interval in self.savings.items():
            figures |= {name: interval.value, f"{name}_lo": interval.lo, f"{name}_hi": interval.hi}
        figures |= {f"quality_{name}": interval.value for name, interval in self.quality.items()}
        figures |= {"quality_diff": self.difference.value, "quality_diff_lo": self.gate.bound}
        answers = [flag for name in ("prompted", "tuned") for flag in self.arms[name].truncated]
        figures |= {
            "gate_passed": float(self.gate.passed),
            "truncated_rate": sum(answers) / len(answers),
            "n": float(self.n),
        }
        if self.in_training is not None:
            figures["requests_in_training"] = float(len(self.in_training))
        if self.costs is not None:
            figures |= {name: getattr(self.costs, attribute) for name, attribute in _COST_FIGURES.items()}
        return figures

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; infinite numbers as ``"Infinity"`` and ``"-Infinity"``, which JSON doesn't have."""
        return {
            "headline": self.headline,  # for readers; from_dict passes over it and what else follows from the rest
            "saves_half": self.saves_half,
            "gate_passed": self.gate.passed,
            "n": self.n,
            "requests_in_training": None if self.in_training is None else len(self.in_training),
            "tokens_per_success": {name: json_number(arm.tokens_per_success) for name, arm in self.arms.items()},
            "savings": {name: _numbers(interval) for name, interval in self.savings.items()},
            "quality": {name: _numbers(interval) for name, interval in self.quality.items()},
            "difference": _numbers(self.difference),
            "gate": _numbers(self.gate),
            "costs": None if self.costs is None else _numbers(self.costs),
            "confidence": self.confidence,
            "provenance": dict(self.provenance),
            "warnings": list(self.warnings),
            "requests": list(self.requests),
            "references": list(self.references),
            "in_training": None if self.in_training is None else list(self.in_training),
            "arms": {name: arm.to_dict() for name, arm in self.arms.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SavingsResult:
        """Back from :meth:`to_dict`."""

        def intervals(of: Mapping[str, Any]) -> dict[str, Interval]:
            return {name: Interval(**_back(interval)) for name, interval in of.items()}

        costs = values["costs"]
        return cls(
            arms={name: ArmRecords.from_dict(arm) for name, arm in values["arms"].items()},
            savings=intervals(values["savings"]),
            quality=intervals(values["quality"]),
            difference=Interval(**_back(values["difference"])),
            gate=Gate(**_back(values["gate"])),
            costs=None if costs is None else Costs(**{**_back(costs), "prices": Prices(**costs["prices"])}),
            confidence=values["confidence"],
            provenance=values["provenance"],
            warnings=tuple(values["warnings"]),
            requests=tuple(values.get("requests", ())),  # files of version 0.1.0 have neither
            references=tuple(values.get("references", ())),
            in_training=None if (found := values.get("in_training")) is None else tuple(found),
        )

    def __rich__(self) -> Group:
        """As a table."""
        from lightning_ft.document.terminal import terminal_document
        from lightning_ft.evaluation.savings.sections import savings_document

        return terminal_document(savings_document(self))

    def print(self, console: Console | None = None) -> None:
        """Print it as a table."""
        from rich.console import Console

        (console or Console()).print(self)

    def save(self, folder: str | Path, *, png: bool | None = None) -> list[Path]:
        """Write ``token_savings.json``, ``.md`` and ``.png``.

        Args:
            folder: It is made where there is none.
            png: Write the picture; None: if matplotlib is installed.

        Returns:
            The files written.

        Raises:
            MissingDependencyError: If the picture is asked for without matplotlib.
        """
        from lightning_ft.evaluation.savings.files import save_savings

        written: list[Path] = save_savings(self, Path(folder), png=png)
        return written


def _numbers(record: Any) -> dict[str, Any]:
    return {name: json_number(value) for name, value in asdict(record).items()}


def _back(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: float(v) if v in ("Infinity", "-Infinity") else v for name, v in values.items() if not isinstance(v, dict)
    }
