"""Composition of a report from results: its sections and their order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from lightning_ft.document.blocks import Block, Document, Fact, Headline, Section, Table, provenance_table
from lightning_ft.evaluation.bootstrap import format_interval
from lightning_ft.evaluation.comparison.sections import comparison_sections, final_runs, tradeoffs
from lightning_ft.evaluation.compute.sections import compute_table
from lightning_ft.evaluation.retention.sections import (
    Tradeoff,
    forgetting_blocks,
    frontier_blocks,
    retention_facts,
    retention_table,
)
from lightning_ft.evaluation.savings.changes import change_blocks
from lightning_ft.evaluation.savings.intervals import gain_interval
from lightning_ft.evaluation.savings.result import SavingsResult
from lightning_ft.evaluation.savings.sections import (
    arms_tables,
    cost_blocks,
    quality_plot,
    savings_about,
    savings_facts,
    savings_headline,
    savings_provenance,
    tokens_plot,
)
from lightning_ft.evaluation.savings.table import format_percent
from lightning_ft.report.collect import RunReport, run_names, same_run_result

if TYPE_CHECKING:
    from lightning_ft.evaluation.compute.arithmetic import ComputeResult

_Result = TypeVar("_Result")


def compose_document(report: RunReport) -> Document:
    """Compose a document from all results that were collected.

    If there is a comparison, its savings by method replace the savings of its single runs, which follow as a table.

    Args:
        report: Results; any of them may be missing.
    """
    comparison = report.comparison
    savings: Mapping[str, SavingsResult] = report.savings if comparison is None else comparison.savings
    named = run_names(savings) if comparison is None else {name: name for name in savings}
    names = {name: called if len(savings) > 1 else "" for name, called in named.items()}
    prefixes = _prefixes(names)
    compute = _compute(report)
    sections = [
        *(comparison_sections(comparison) if comparison is not None else ()),
        *(
            _arms(result, names[name], prefixes[name], compared=comparison is not None)
            for name, result in savings.items()
        ),
        *(
            Section(_title("Costs", names[name]), cost_blocks(result, prefixes[name]))
            for name, result in savings.items()
            if result.costs is not None
        ),
        *_retention(report),
        *([Section("Training compute", compute_table(compute))] if compute else []),
        *(
            [Section("Single runs", (_single_runs(report.savings),), brief=False)]
            if comparison is not None and report.savings
            else []
        ),
        *(
            Section(_title("Answers that changed", names[name]), change_blocks(result))
            for name, result in savings.items()
        ),
        *_provenance(report, savings, names),
    ]
    return Document(
        headlines=_headlines(report, savings, names),
        warnings=_warnings(report, savings, names),
        facts=_facts(report, savings),
        sections=tuple(sections),
        about=_about(report, savings),
    )


def _arms(result: SavingsResult, of: str, prefix: str, *, compared: bool) -> Section:
    """Tokens and quality of one result; a comparison plots the quality of all its methods in a section of its own."""
    plots = [tokens_plot(result, f"{prefix}tokens")]
    if not compared:
        plots.insert(0, quality_plot({of: result}, f"{prefix}quality"))
    title = "Tokens per request" if compared else "Tokens and quality"
    return Section(_title(title, of), (*plots, *arms_tables(result)))


def _title(title: str, of: str) -> str:
    return f"{title}: {of}" if of else title


def _prefixes(names: Mapping[str, str]) -> dict[str, str]:
    """File name prefix of each result's plots: unique, and portable across file systems."""
    found: dict[str, str] = {}
    for key, name in names.items():
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        prefix = f"{slug}-" if slug else ""
        found[key] = f"{prefix}{len(found) + 1}-" if prefix in found.values() or (name and not slug) else prefix
    return found


def _headlines(
    report: RunReport, savings: Mapping[str, SavingsResult], names: Mapping[str, str]
) -> tuple[Headline, ...]:
    """Headlines of all results; a failed measurement counts as a failed gate."""
    called = run_names(report.undefined) if len(report.undefined) > 1 else dict.fromkeys(report.undefined, "")
    found = [savings_headline(result, names[name]) for name, result in savings.items()]
    found += [
        Headline("FAIL", f"{each.measurement} is undefined: {each.reason}", called[name])
        for name, failed in report.undefined.items()
        for each in failed
    ]
    return tuple(found) or (Headline("", "Token savings were not measured, so there is no verdict."),)


def _about(report: RunReport, savings: Mapping[str, SavingsResult]) -> tuple[tuple[str, str], ...]:
    """Model, data and date: what all results have in common; of dates, the latest one."""
    found = [dict(savings_about(result)) for result in (*savings.values(), *report.savings.values())]
    dates = [entry["Date"] for entry in found if "Date" in entry]
    dates += [result.date for result in report.retention.values() if result.date]
    shared = {
        label: text
        for label in ("Model", "Data")
        if len(texts := {entry.get(label, "") for entry in found[: len(savings)]}) == 1 and (text := texts.pop())
    }
    return (*shared.items(), *([("Date", max(dates))] if dates else []))


def _facts(report: RunReport, savings: Mapping[str, SavingsResult]) -> tuple[Fact, ...]:
    """Key metrics of a single result; several results are compared in tables."""
    facts: list[Fact] = []
    if len(savings) == 1:
        facts += savings_facts(next(iter(savings.values())))
    if len(report.retention) == 1 and report.comparison is None:
        facts += retention_facts(next(iter(report.retention.values())))
    return tuple(facts)


def _retention(report: RunReport) -> list[Section]:
    found = _named(report.retention)
    runs: tuple[Tradeoff, ...]
    if report.comparison is not None:
        finals = final_runs(report.comparison)
        found = {name: run.retention for name, run in finals.items() if run.retention is not None} or found
        runs = tradeoffs(report.comparison)
    else:
        names = run_names(report.savings)
        pairs = [(names[key], result, same_run_result(key, report.retention)) for key, result in report.savings.items()]
        runs = tuple(
            Tradeoff(
                "tuned" if len(pairs) == 1 else name,
                kept.kl_general,
                gain_interval([result.arms["tuned"]], result.arms["untuned"]),
                lower_bound=kept.lower_bound,
            )
            for name, result, kept in pairs
            if kept is not None and "untuned" in result.arms
        )
    blocks: tuple[Block, ...] = forgetting_blocks(runs)
    for name, frontier in _named(report.frontiers).items():
        blocks = (*blocks, *frontier_blocks(frontier, name if len(report.frontiers) > 1 else ""))
    if found:
        blocks = (*blocks, *retention_table(found))
    return [Section("Forgetting", blocks)] if blocks else []


def _compute(report: RunReport) -> dict[str, ComputeResult]:
    if report.comparison is None:
        return _named(report.compute)
    finals = final_runs(report.comparison)
    return {name: run.compute for name, run in finals.items() if run.compute is not None} or _named(report.compute)


def _named(results: Mapping[str, _Result]) -> dict[str, _Result]:
    names = run_names(results)
    return {names[key]: result for key, result in results.items()}


def _single_runs(savings: Mapping[str, SavingsResult]) -> Table:
    rows = tuple(
        (
            name,
            result.gate.verdict,
            format_interval(result.savings["total"], format_percent),
            f"{result.quality['tuned'].value:.3f}",
            f"{result.quality['prompted'].value:.3f}",
            f"{result.n:,}",
        )
        for name, result in _named(savings).items()
    )
    head = ("run", "gate", "tokens saved", "quality, tuned", "quality, prompted", "requests")
    return Table(head, rows, "Token savings of each run", text_columns=frozenset({0, 1}))


def _provenance(report: RunReport, savings: Mapping[str, SavingsResult], names: Mapping[str, str]) -> list[Section]:
    tables = [
        provenance_table(_title("Token savings", names[name]), savings_provenance(result))
        for name, result in savings.items()
    ]
    if report.comparison is not None and report.comparison.provenance:
        tables.insert(0, provenance_table("Comparison", report.comparison.provenance))
    for name, kept in _named(report.retention).items() if report.comparison is None else ():
        values = {"hash of the texts": kept.texts_hash, "step": kept.step, **kept.provenance}
        tables.append(provenance_table(_title("Forgetting", name if len(report.retention) > 1 else ""), values))
    return [Section("Provenance", tuple(tables), brief=False)] if tables else []


def _warnings(report: RunReport, savings: Mapping[str, SavingsResult], names: Mapping[str, str]) -> tuple[str, ...]:
    found: list[str] = []
    if report.comparison is not None:
        found += report.comparison.warnings
        # All methods answer the same requests, so a warning that all of them share is shown once.
        first = next((result.warnings for result in savings.values()), ())
        found += [warning for warning in first if all(warning in result.warnings for result in savings.values())]
    for name, result in savings.items():
        own = [warning for warning in result.warnings if warning not in found]
        found += [f"{names[name]}: {warning}" if names[name] else warning for warning in own]
    for compute in _compute(report).values():
        if compute.uncounted:
            found.append(
                f"Some attention operations weren't counted ({', '.join(compute.uncounted)}), so training FLOPs are "
                "underestimated."
            )
    return tuple(dict.fromkeys(found))
