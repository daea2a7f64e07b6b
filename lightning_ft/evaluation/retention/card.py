"""A retention result as a model card reports it."""

from __future__ import annotations

from lightning_ft.evaluation.bootstrap import format_interval
from lightning_ft.evaluation.retention.arithmetic import RetentionResult
from lightning_ft.evaluation.retention.choices import ALL
from lightning_ft.models.card_facts import MeasuredResult, Setting
from lightning_ft.models.card_sections import FORGETTING


def retention_for_card(result: RetentionResult) -> MeasuredResult:
    """Convert a result: KL, perplexity and agreement on general texts, and points lost on each set of questions.

    Args:
        result: The result.
    """
    sentences = [result.headline]
    for name, answered in result.choices.items():
        if name != ALL:
            lost = format_interval(answered.lost, lambda share: f"{100 * share:+.1f}")
            sentences.append(
                f"{name}: {answered.tuned.value:.1%} of {answered.questions:,} multiple-choice questions correct, "
                f"{answered.base.value:.1%} by the base; points lost: {lost}."
            )
    provenance: dict[str, Setting] = {"hash of the texts": result.texts_hash}
    if result.step is not None:
        provenance["step"] = result.step
    if result.date:
        provenance["date"] = result.date
    return MeasuredResult(FORGETTING, tuple(sentences), (), result.weights, provenance=provenance)
