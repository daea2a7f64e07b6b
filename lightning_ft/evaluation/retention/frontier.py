"""The frontier of quality and forgetting of one training run, over scales of its update, and the choice on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_ft.atomic_files import write_json
from lightning_ft.document.numbers import format_number
from lightning_ft.errors import RetentionError
from lightning_ft.evaluation.bootstrap import Interval, bootstrap_intervals
from lightning_ft.evaluation.retention.arithmetic import RetentionResult
from lightning_ft.evaluation.retention.choices import ALL
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.models.update_scale import UpdateScale

BUDGETS = ("kl", "ppl_ratio", "choices_lost")
"""What a budget may limit: nats per token and the ratio of perplexities on general text, and the share of questions
that were lost."""
FILE_NAME = "retention_frontier.json"


@dataclass(frozen=True)
class FrontierPoint:
    """Quality and forgetting at one scale of the update.

    Args:
        scale: Scale of the update; 1 is the trained model.
        quality: Mean score on the requests.
        retention: What was forgotten.
    """

    scale: float
    quality: Interval
    retention: RetentionResult

    def spent(self, budget: str) -> float:
        """Value of what a budget limits."""
        if budget == "choices_lost":
            return self.retention.choices[ALL].lost.value
        return (self.retention.kl_general if budget == "kl" else self.retention.ppl_ratio).value

    def fits(self, budget: Mapping[str, float]) -> bool:
        """Whether the point estimates are within a budget."""
        return all(self.spent(name) <= limit for name, limit in budget.items())


@dataclass(frozen=True)
class FrontierResult:
    """The frontier, and the scale that was chosen on it.

    Args:
        points: Points by ascending scale.
        budget: Limits of what may be forgotten.
        chosen: Scale with the highest quality within the budget; None if no scale is within it.
        requests: Number of requests that quality was measured on.
        provenance: Settings of the measurement, as JSON values.
    """

    points: tuple[FrontierPoint, ...]
    budget: Mapping[str, float]
    chosen: float | None
    requests: int
    provenance: Mapping[str, object] = field(default_factory=dict)

    @property
    def chosen_point(self) -> FrontierPoint | None:
        """The point of the chosen scale."""
        return next((point for point in self.points if point.scale == self.chosen), None)

    @property
    def headline(self) -> str:
        """Summary in one sentence."""
        limits = ", ".join(f"{name} at most {limit:g}" for name, limit in self.budget.items()) or "no limit"
        point, full = self.chosen_point, self.points[-1]
        if point is None:
            least = self.points[0]
            return (
                f"No scale from {least.scale:g} to {full.scale:g} is within the budget ({limits}): at {least.scale:g} "
                f"the KL is {format_number(least.retention.kl_general.value)} nats per token."
            )
        return (
            f"Scale {point.scale:g} of the update has the highest quality within the budget ({limits}): quality "
            f"{point.quality.value:.3f} and KL {format_number(point.retention.kl_general.value)} nats per token, "
            f"instead of {full.quality.value:.3f} and {format_number(full.retention.kl_general.value)} at "
            f"{full.scale:g}."
        )

    def metrics(self) -> dict[str, float]:
        """Return the metrics to log by name, those of the chosen scale."""
        point = self.chosen_point
        if point is None:
            return {"within_budget": 0.0}
        return {
            "within_budget": 1.0,
            "scale": point.scale,
            "quality": point.quality.value,
            "kl": point.retention.kl_general.value,
        }

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        return {
            "points": [
                {"scale": p.scale, "quality": p.quality.to_dict(), "retention": p.retention.to_dict()}
                for p in self.points
            ],
            "budget": dict(self.budget),
            "chosen": self.chosen,
            "requests": self.requests,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FrontierResult:
        """Restore a result from :meth:`to_dict`."""
        points = tuple(
            FrontierPoint(p["scale"], Interval.from_dict(p["quality"]), RetentionResult.from_dict(p["retention"]))
            for p in values["points"]
        )
        return cls(points, values["budget"], values["chosen"], values["requests"], values["provenance"])

    def save(self, folder: str | Path) -> Path:
        """Write ``retention_frontier.json`` into a folder, which is created if it doesn't exist."""
        path = Path(folder) / FILE_NAME
        write_json(path, self.to_dict())
        return path


def check_budget(budget: Mapping[str, float] | None, scales: Sequence[float], *, choices: bool) -> None:
    """Check a budget and the scales to try.

    Args:
        budget: Limits by name, see `BUDGETS`.
        scales: Scales of the update.
        choices: Whether multiple-choice questions are measured.

    Raises:
        RetentionError: For an unknown name, a limit that isn't a number or can't be measured, and for scales that
            aren't numbers above 0 and at most 1, or don't end with 1.

    Example:
        >>> check_budget({"kl": 0.05}, (0.5, 1.0), choices=False)
    """
    if budget is not None and not isinstance(budget, Mapping):
        raise RetentionError(f"budget={budget!r}: expected a dict such as {{'kl': 0.05}}.")
    for name, limit in (budget or {}).items():
        if name not in BUDGETS:
            raise RetentionError(f"budget has no {name!r}: expected {', '.join(BUDGETS)}.")
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or limit != limit:
            raise RetentionError(f"budget: {name} is {limit!r}, expected a number.")
        if name != "choices_lost" and limit < 0:
            raise RetentionError(f"budget: {name} is {limit!r}, expected a number of at least 0.")
        if name == "choices_lost" and not choices:
            raise RetentionError("budget: choices_lost needs multiple-choice questions. Pass choices=.")
    expected = "expected different numbers above 0, the largest of them 1"
    if not isinstance(scales, (list, tuple)) or any(not isinstance(scale, (int, float)) for scale in scales):
        raise RetentionError(f"scales={scales!r}: {expected}, as a list.")
    if not scales or any(not 0 < scale <= 1 for scale in scales) or max(scales) != 1 or len(set(scales)) < len(scales):
        raise RetentionError(f"scales={list(scales)}: {expected}.")


def sweep_scales(
    update: UpdateScale,
    scales: Sequence[float],
    answer: Callable[[], ArmRecords],
    retention: Callable[[], RetentionResult],
    *,
    budget: Mapping[str, float] | None = None,
    resamples: int = 9999,
    seed: int = 0,
    provenance: Mapping[str, object] | None = None,
) -> FrontierResult:
    """Measure a trained model at several scales of its update, without further training.

    The model is left at the chosen scale, or at 1 if none is within the budget.

    Args:
        update: The update of the model.
        scales: Scales to try.
        answer: Function that answers requests with the model as it is, and grades the answers.
        retention: Function that measures what the model as it is has forgotten.
        budget: Limits of what may be forgotten, on point estimates; None for no limit.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.
        provenance: Settings of the measurement, as JSON values.

    Raises:
        Exception: What `answer` or `retention` raise; the update is scaled back to 1 before.
    """
    points, count = [], 0
    try:
        for scale in sorted(scales):
            update.set(scale)
            arm = answer()
            count = len(arm.scores)
            quality = bootstrap_intervals(
                {"score": arm.scores, "n": [1.0] * count},
                {"quality": lambda s: s["score"] / s["n"]},
                clusters=arm.clusters or None,
                resamples=resamples,
                seed=seed,
            )["quality"]
            points.append(FrontierPoint(scale, quality, retention()))
    except BaseException:
        update.set(1.0)
        raise
    limits = dict(budget or {})
    within = [point for point in points if point.fits(limits)]
    best = max(within, key=lambda p: (p.quality.value, -p.retention.kl_general.value), default=None)
    update.set(1.0 if best is None else best.scale)
    return FrontierResult(tuple(points), limits, None if best is None else best.scale, count, provenance or {})
