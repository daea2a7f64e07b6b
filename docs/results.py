"""Write tables for `docs/results.md` and `docs/small_model.md` from the results of `make results-<domain>`.

python docs/results.py runs/results/small runs/results/legal_citation ... > tables.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from statistics import mean

from lightning_ft.document.markdown import markdown_table
from lightning_ft.document.numbers import format_bytes, format_count, format_duration, format_ratio, format_si
from lightning_ft.evaluation.bootstrap import Interval
from lightning_ft.evaluation.comparison.result import Comparison
from lightning_ft.evaluation.savings.gate import Gate

RATIOS = {
    "quality_ratio": "quality",
    "gain_retained": "gain over the untuned model",
    "flops": "FLOPs",
    "seconds": "training time",
    "peak_memory": "peak memory",
    "trainable_parameters": "trainable parameters",
    "checkpoint_bytes": "checkpoint bytes",
    "flops_to_95": "FLOPs to 95% of full's quality",
    "seconds_to_95": "time to 95% of full's quality",
}


def percent(interval: Interval) -> str:
    """A share with its interval."""
    return f"{interval.value:.1%} ({interval.lo:.1%} to {interval.hi:.1%})"


def spread(interval: Interval) -> str:
    """A ratio, with its interval where that has a width."""
    if f"{interval.lo:.3g}" == f"{interval.hi:.3g}":
        return format_ratio(interval.value)
    return f"{format_ratio(interval.value)} ({interval.lo:.3g} to {interval.hi:.3g})"


def verdict(gate: Gate) -> str:
    """Outcome of the quality gate, with the reason if it failed."""
    if gate.verdict == "VOID":
        return "void"
    return "passed" if gate.passed else "too few requests" if gate.underpowered else "failed"


def arms(found: Comparison) -> Iterator[list[str]]:
    """Rows of quality, tokens and costs per method."""
    methods = list(found.quality)
    yield ["correct", *(percent(found.quality[m]) for m in methods)]
    seeds = {m: ", ".join(f"{q:.1%}" for q in found.seed_quality.get(m, ())) for m in methods}
    yield ["each seed", *(seeds[m] for m in methods)]
    for name in next(iter(found.metrics.values()), {}):
        yield [name.replace("_", " "), *(f"{found.metrics[m][name].value:.3f}" for m in methods)]
    some = next(iter(found.savings.values()))
    records = {m: found.savings[m].arms["tuned"] if m in found.savings else some.arms[m] for m in methods}
    for title, tokens in (("input tokens per request", "input_tokens"), ("output tokens", "output_tokens")):
        yield [title, *(f"{mean(getattr(records[m], tokens)):.1f}" for m in methods)]
    counts = (records[m].tokens_per_success for m in methods)
    yield ["tokens per success", *(f"{count:,.1f}" if isfinite(count) else "none right" for count in counts)]
    saved = {m: found.savings.get(m) for m in methods}
    yield ["fewer tokens per request", *("" if r is None else percent(r.savings["total"]) for r in saved.values())]
    yield [
        "fewer tokens per success",
        *("" if r is None else percent(r.savings["per_success"]) for r in saved.values()),
    ]
    yield [
        "quality gate",
        *("" if r is None else f"{verdict(r.gate)} ({r.gate.bound:+.3f})" for r in saved.values()),
    ]
    if some.costs is not None:
        for title, kind in (("cost of 1,000, no cache", "uncached"), ("with a cached prefix", "cached")):
            cells = []
            for method in methods:
                result = saved[method] or some
                arm = "tuned" if saved[method] is not None else "prompted"
                cost = 1000 * getattr(result.costs, f"{arm}_{kind}")
                cells.append("" if method == "untuned" else f"{cost:.4f} {result.costs.prices.currency}")
            yield [title, *cells]
            even = [None if r is None else getattr(r.costs, f"break_even_{kind}") for r in saved.values()]
            yield [f"break-even, {kind}", *("" if e is None else f"{format_count(e)} requests" for e in even)]


def training(found: Comparison) -> Iterator[list[str]]:
    """Rows of compute and retention per method, means over seeds."""
    runs = {method: found.final_runs(method) for method in found.savings}
    yield ["learning rate", *(f"{found.chosen[m]:g}" for m in runs)]
    costs = {m: [run.compute for run in of if run.compute is not None] for m, of in runs.items()}
    yield ["FLOPs", *(format_si(mean(c.flops for c in of), "FLOP") for of in costs.values())]
    yield ["time", *(format_duration(mean(c.train_seconds for c in of)) for of in costs.values())]
    yield ["peak memory", *(format_bytes(mean(c.peak_memory_bytes for c in of)) for of in costs.values())]
    over = {m: mean(c.peak_memory_bytes - c.memory_at_start_bytes for c in of) for m, of in costs.items()}
    yield ["of which above the start", *(format_bytes(value) for value in over.values())]
    yield ["trainable parameters", *(f"{of[0].trainable_parameters:,}" for of in costs.values())]
    yield ["checkpoint", *(format_bytes(of[0].checkpoint_bytes or 0) for of in runs.values())]
    kept = {m: [run.retention for run in of if run.retention is not None] for m, of in runs.items()}
    if all(kept.values()):
        lower = {m: "at least " if of[0].lower_bound else "" for m, of in kept.items()}
        yield [
            "KL on general text, nats",
            *(f"{lower[m]}{mean(r.kl_general.value for r in kept[m]):.3f}" for m in kept),
        ]
        yield ["perplexity on it", *(f"{mean(r.ppl_ratio.value for r in of):.3f} times" for of in kept.values())]
        yield ["same next token", *(f"{mean(r.top1_agreement.value for r in of):.1%}" for of in kept.values())]


def section(folder: Path) -> Iterator[str]:
    """Lines of one domain."""
    found = Comparison.from_dict(json.loads((folder / "comparison.json").read_text(encoding="utf-8")))
    methods = list(found.quality)
    yield f"## {folder.name}"
    yield ""
    yield f"`make results-{folder.name}`. {found.provenance['test requests']:,} test requests."
    yield ""
    yield from markdown_table(["", *methods], list(arms(found)))
    yield ""
    trained = list(found.savings)
    yield from markdown_table(["training", *trained], list(training(found)))
    yield ""
    rows = [[RATIOS[name], *(spread(found.ratios[m][name]) for m in found.ratios)] for name in RATIOS if found.ratios]
    yield from markdown_table(["to full fine-tuning", *found.ratios], rows)
    yield ""
    sizes = sorted({size for curve in found.learning_curve.values() for size in curve})
    curves = {m: [percent(curve[s]) if s in curve else "" for s in sizes] for m, curve in found.learning_curve.items()}
    yield from markdown_table(["rows", *(f"{size:,}" for size in sizes)], [[m, *cells] for m, cells in curves.items()])
    yield ""
    claims = [[c.name, f"{c.verdict}{f': {c.condition}' if c.condition else ''}", c.evidence] for c in found.claims]
    table = markdown_table(["claim", "verdict", "measured"], claims)
    yield from [table[0], "| --- | --- | --- |", *table[2:]]
    yield ""
    yield from (f"> {warning}\n" for warning in found.warnings)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print("\n".join(section(Path(argument))))
