"""Training cost per token by sequence length (see `scaling.py`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness import MIB
from models import Size
from scaling_packing import Case, Cost, costs

from lightning_ft.document.markdown import markdown_table


def by_length(options: Any, size: Size) -> list[Cost]:
    """Measure and print the cost per token at each sequence length."""
    found: list[Cost] = []
    for length in options.lengths:
        case = Case(size, "packed", batch=max(1, options.tokens // length), steps=options.steps, length=length)
        if options.only in f"{length:,}":
            layouts = ("packed", "row") if case.batch > 1 else ("packed",)  # with one sequence the two are the same
            found += costs([replace(case, layout=name) for name in layouts], options.pairs, options.threads)
    print(f"\n## Sequence length\n\n{size}, LoRA, {options.tokens:,} tokens per step, {options.threads} threads\n")
    table = [
        [
            f"{cost.case.length:,} {cost.case.layout}",
            f"{cost.case.batch}",
            f"{1e6 * cost.seconds:,.1f}",
            f"{cost.flops / 1e6:,.2f}",
            f"{cost.flops / cost.seconds / 1e9:.1f}",
            f"{cost.excess / MIB:,.0f}",
            str(cost.against) if cost.case.layout != "packed" else "",
        ]
        for cost in found
    ]
    head = ["length", "sequences", "us/token", "MFLOP/token", "GFLOP/s", "excess MiB", "speed relative to packed"]
    print("\n".join(markdown_table(head, table)), flush=True)
    return found
