"""Print the tables of `docs/performance.md` from files that benchmarks wrote with `--json`.

python benchmarks/tables.py runs/benchmarks/sft.json runs/benchmarks/pairs.json ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from harness import MIB

from lightning_ft.document.markdown import markdown_table


def row(result: dict[str, Any]) -> list[str]:
    """The table's row of a case: speed, operations, memory and differences."""
    peer, ours = result["peer"], "ours"
    speed, seconds, flops, excess = (result[name] for name in ("speed", "seconds", "flops", "excess"))
    memory = excess[ours] / excess[peer] if excess[peer] else float("nan")
    return [
        f"{result['name']}, {result['case']}",
        peer,
        f"{speed['median']:.2f} ({speed['least']:.2f} to {speed['largest']:.2f}, n = {speed['pairs']})",
        f"{seconds[ours]:.2f} / {seconds[peer]:.2f}",
        f"{flops[ours] / flops[peer]:.2f}",
        f"{memory:.2f} ({excess[ours] / MIB:,.0f} / {excess[peer] / MIB:,.0f} MiB)",
        f"{max(result['apart'].values(), default=0.0):.0e}",
    ]


def main() -> None:
    heads = [
        "work",
        "compared with",
        "times as fast",
        "seconds",
        "FLOPs",
        "memory beyond the model's",
        "largest difference",
    ]
    for path in map(Path, sys.argv[1:]):
        print("\n".join(markdown_table(heads, [row(result) for result in json.loads(path.read_text())])), end="\n\n")


if __name__ == "__main__":
    main()
