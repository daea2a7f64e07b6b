"""Sections and metadata of a model card: training, token savings, forgetting and provenance, each if it is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from peft import LoraConfig, PeftModel

from lightning_ft.models.card_facts import CardFacts, MeasuredResult, Setting
from lightning_ft.models.head import CausalLM, base_of
from lightning_ft.models.lora_checks import peft_method
from lightning_ft.printable import printable

SAVINGS, FORGETTING = "Token savings", "Forgetting"
"""Titles of the measurements that each card mentions, measured or not."""
_TAG = "lightning-ft"


def card_metadata(
    name: str, model: CausalLM, facts: CardFacts, weights: str | None, *, base: str | None, adapter: bool
) -> dict[str, Any]:
    """Metadata of a card, as the hub reads them.

    There is no `license`, since nothing here knows it.

    Args:
        name: Name of the export.
        model: Exported model.
        facts: What is known about its weights.
        weights: Hash of its weights.
        base: Name of the base on the hub; None for a local one.
        adapter: Whether the export is an adapter.
    """
    generates = base_of(model).can_generate()
    metadata: dict[str, Any] = {}
    if base is not None:
        metadata |= {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"}
    metadata |= {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation" if generates else "text-classification",
        "tags": [_TAG, *([peft_method(model).lower().replace("_", "-")] if isinstance(model, PeftModel) else [])],
    }
    if facts.training is not None and facts.training.datasets:
        metadata["datasets"] = list(facts.training.datasets)
    measured = [result for result in facts.results_for(weights) if result.metrics]
    if index := [_index_entry(result, metadata["pipeline_tag"]) for result in measured]:
        metadata["model-index"] = [{"name": name, "results": index}]
    return metadata


def _index_entry(result: MeasuredResult, task: str) -> dict[str, Any]:
    return {
        "task": {"type": task},
        "dataset": {"type": "private", "name": result.measured_on},
        "metrics": [
            {"type": metric.replace(" ", "_"), "name": metric, "value": round(value, 4)}
            for metric, value in result.metrics.items()
        ],
    }


def card_sections(model: CausalLM, facts: CardFacts, weights: str | None) -> list[str]:
    """Lines of the sections of a card.

    Args:
        model: Exported model.
        facts: What is known about its weights.
        weights: Hash of its weights.
    """
    results = list(facts.results_for(weights))
    titles = dict.fromkeys([SAVINGS, FORGETTING, *(result.title for result in facts.results)])
    lines = _training(model, facts)
    for title in titles:
        lines += [f"## {_text(title)}", "", *_measured(title, results, facts)]
    return [*lines, *_provenance(facts, results, weights)]


def _training(model: CausalLM, facts: CardFacts) -> list[str]:
    record = facts.training
    lines = ["## Training", ""]
    settings: dict[str, Setting] = {}
    if record is None:
        lines += ["On which data and with which settings these weights were trained was not recorded.", ""]
    else:
        if not record.data:
            lines += ["The training data was not recorded: it came from a DataLoader of the user's own.", ""]
        settings = {**record.data, **record.settings}
    return [*lines, *_table({**settings, **_adapter(model)})]


def _adapter(model: CausalLM) -> dict[str, Setting]:
    """Settings of an adapter that is exported, alone or merged."""
    if not isinstance(model, PeftModel):
        return {}
    config = cast(LoraConfig, model.active_peft_config)
    found: dict[str, Setting] = {
        f"adapter {label}": value
        for label, name in (("rank", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout"))
        if (value := getattr(config, name, None)) is not None
    }
    targets = getattr(config, "target_modules", None)
    if targets:
        names = {targets} if isinstance(targets, str) else {name.rsplit(".", 1)[-1] for name in targets}
        found["adapted modules"] = ", ".join(sorted(names))
    variants = [name for name in ("use_dora", "use_rslora") if getattr(config, name, False)]
    started = getattr(config, "init_lora_weights", True)
    variants += [started] if isinstance(started, str) else []
    return {**found, **({"variant": ", ".join(variants)} if variants else {})}


def _measured(title: str, results: Iterable[MeasuredResult], facts: CardFacts) -> list[str]:
    found = [result for result in results if result.title == title]
    of_run = [result.failed for result in facts.results if result.title == title]
    if not found and any(of_run):
        return ["The measurement failed, so nothing is known about it.", ""]
    if not found and of_run:
        return ["Measured in the same run, but with other weights than these, so the result isn't repeated here.", ""]
    if not found:
        return ["Not measured.", ""]
    lines: list[str] = []
    for result in found:
        for sentence in result.sentences:
            lines += [_text(sentence), ""]
        for note in result.notes:
            lines += [f"> {_text(note)}", ""]
    return lines


def _provenance(facts: CardFacts, results: Iterable[MeasuredResult], weights: str | None) -> list[str]:
    record = facts.training
    rows: dict[str, Setting] = {}
    if record is not None:
        rows |= {"date": record.date} if record.date else {}
        rows |= record.versions
    if weights is not None:
        rows["hash of the trained weights"] = weights
    for result in results:
        rows |= {f"{result.title}: {label}": value for label, value in result.provenance.items()}
    return ["## Provenance", "", *_table(rows)] if rows else []


def _table(rows: Mapping[str, Setting]) -> list[str]:
    if not rows:
        return []
    return ["| | |", "| --- | --- |", *(f"| {_text(name)} | {_cell(value)} |" for name, value in rows.items()), ""]


def _cell(value: Setting) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else _text(value)


def _text(text: str) -> str:
    """Text on one line that Markdown doesn't take for markup."""
    shown = printable(" ".join(text.split()), one_line=True).replace("&", "&amp;").replace("<", "&lt;")
    for mark in "\\`*_[]|~":
        shown = shown.replace(mark, f"\\{mark}")
    return shown
