"""A savings result as a model card reports it: in the words of its headline, without the endpoint's address."""

from __future__ import annotations

from lightning_ft.evaluation.savings.result import SavingsResult
from lightning_ft.evaluation.scorers import SCORERS
from lightning_ft.models.card_facts import MeasuredResult, Setting
from lightning_ft.models.card_sections import SAVINGS

_HASHES = {"baseline": "hash of the baseline prompt", "measured": "hash of requests, prompts and scorer"}


def savings_for_card(result: SavingsResult) -> MeasuredResult:
    """Convert a result: verdict with its interval, warnings, and what it was measured on.

    The saving is among the metrics for the hub only if the gate passed, since it isn't to be claimed otherwise.

    Args:
        result: The result.
    """
    found = result.provenance
    address = str(found.get("prompted_by", ""))

    def public(text: str) -> str:
        return text.replace(address, "an endpoint") if address else text

    scorer = str(found.get("scorer", ""))
    graded = f"the scorer {scorer}" if scorer in (*SCORERS, "label") else "a scorer of its own"
    on = f"{result.n:,} requests"
    sentences = (
        result.headline,
        f"The prompted arm had {'another model' if address else 'the original weights'} and a prompt, the tuned arm "
        f"these weights and the request alone. Answers to {on} were graded by {graded}; the largest acceptable loss of "
        f"quality, {result.gate.margin:g}, was chosen before the measurement.",
    )
    provenance: dict[str, Setting] = {label: str(found[name]) for name, label in _HASHES.items() if name in found}
    provenance["requests"] = result.n
    if result.date:
        provenance["date"] = result.date
    metrics = {"quality": result.quality["tuned"].value}
    if result.gate.passed:
        metrics["share of tokens saved per request"] = result.savings["total"].value
    return MeasuredResult(
        SAVINGS,
        tuple(map(public, sentences)),
        tuple(map(public, result.warnings)),
        result.weights,
        metrics,
        on,
        provenance,
    )
