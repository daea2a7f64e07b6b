"""Report table of the cost of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lightning_ft.document.blocks import Block, runs_table
from lightning_ft.document.numbers import format_bytes, format_duration, format_si

if TYPE_CHECKING:
    from lightning_ft.evaluation.compute.arithmetic import ComputeResult

_MEMORY = {"cuda": "on the GPU", "resident": "of the process", "process": "of the process since its start"}


def compute_table(results: Mapping[str, ComputeResult]) -> tuple[Block, ...]:
    """Build the table of all runs.

    Args:
        results: Results by the name of the run; at least one.
    """

    def row(label: str, cell: Callable[[ComputeResult], str]) -> tuple[str, ...]:
        return (label, *(cell(result) for result in results.values()))

    rows = (
        row("training operations", lambda r: format_si(r.flops, "FLOP")),
        row("source of the count", _source),
        row("time in training steps", lambda r: format_duration(r.train_seconds)),
        row("optimizer steps", lambda r: f"{r.steps:,}"),
        row("tokens, including padding", lambda r: f"{r.tokens:,}"),
        row("supervised tokens", lambda r: f"{r.supervised_tokens:,}"),
        row("tokens per second", lambda r: _known(r.tokens_per_second, "{:,.0f}")),
        row("share of the device's peak (MFU)", lambda r: _known(r.mfu, "{:.1%}")),
        row(
            "peak memory",
            lambda r: f"{format_bytes(r.peak_memory_bytes)} {_MEMORY.get(r.memory_source, r.memory_source)}",
        ),
        row("memory at the start of training", lambda r: format_bytes(r.memory_at_start_bytes)),
        row("trainable parameters", _trained),
        row("device", lambda r: f"{r.device}, {r.dtype}" + (f", {r.ranks} ranks" if r.ranks > 1 else "")),
    )
    return runs_table(list(results), rows)


def _source(result: ComputeResult) -> str:
    if result.flops_source == "formula":
        return "a formula, since operators of compiled code can't be counted"
    missing = f"; not counted: {', '.join(result.uncounted)}" if result.uncounted else ""
    return f"counted in {result.sampled_steps:,} micro-batches, the rest in proportion{missing}"


def _trained(result: ComputeResult) -> str:
    share = f" ({result.trainable_parameters / result.parameters:.2%})" if result.parameters else ""
    return f"{format_si(result.trainable_parameters)} of {format_si(result.parameters)}{share}"


def _known(value: float | None, form: str) -> str:
    return "unknown" if value is None else form.format(value)
