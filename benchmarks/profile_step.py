"""Where the time of a training step goes: supervised LoRA, and GRPO (rollout and update).

    OMP_NUM_THREADS=2 python benchmarks/profile_step.py --json profile.json
    OMP_NUM_THREADS=1 python benchmarks/profile_step.py --small --threads 1 --pairs 1
    python benchmarks/profile_step.py --only "GRPO, vocabulary 32,000" --profiled 1

The real modules train under a Lightning Trainer. A step lasts from the start of its batch to the start of the next, so
it includes logging, loops and loaders. Some steps are timed without the profiler, then some are profiled, and the
operations of one are counted. Shares are of the profiled steps' wall time, which is longer than that of the timed steps
(both are printed), mainly for Python between operators. An operator's time excludes that of the operators it calls.

Matrix products are compared with this machine's peak, measured on a large square product in fp32 with the same number
of threads. Attention counts all pairs of queries and keys, so its rate is too high if its kernel skips some of them.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch
from harness import arguments, machine, quiet, write_json
from models import Size
from profile_groups import ATTENTION, PRODUCTS, break_down
from profile_run import Case, Watch, peak_rate, watched

from lightning_ft.document.markdown import markdown_table


@dataclass
class Profile:
    """Measurements of a case; seconds, calls and operations are per step.

    Args:
        case: Description of the case.
        tokens: Number of tokens per batch, or of new tokens per rollout.
        seconds: Seconds without the profiler.
        watched: Seconds with the profiler.
        groups: Profiled seconds of each operator group.
        parts: Calls and profiled seconds of each part of the code, including what it calls.
        operators: Name, group, calls and own seconds of the operators that take longest.
        shapes: Sizes, calls, seconds and operations of the matrix products that take longest.
        product_flops: Operations of matrix products.
        attention_flops: Operations of attention.
        peak: Operations per second of a large product.
        machine: Processor, threads and versions of packages.
    """

    case: str
    tokens: int
    seconds: float
    watched: float
    groups: dict[str, float]
    parts: dict[str, list[float]]
    operators: list[tuple[str, str, float, float]]
    shapes: list[tuple[str, float, float, float]]
    product_flops: int
    attention_flops: int
    peak: float
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def product_rate(self) -> float:
        """Operations per second of the matrix products."""
        return self.product_flops / self.groups[PRODUCTS]

    @property
    def step_rate(self) -> float:
        """Operations per second of the whole step, without the profiler."""
        return (self.product_flops + self.attention_flops) / self.seconds

    def markdown(self) -> str:
        """Write the measurements as Markdown tables."""

        def share(seconds: float) -> str:
            return f"{100 * seconds / self.watched:.1f}%"

        def rate(flops: float, seconds: float) -> str:
            return f"{flops / seconds / 1e9:.1f}" if seconds else ""

        def of_peak(flops: float, seconds: float) -> str:
            return f"{100 * flops / seconds / self.peak:.0f}%" if seconds else ""

        def ms(seconds: float) -> str:
            return f"{1e3 * seconds:,.2f}"

        flops = {PRODUCTS: self.product_flops, ATTENTION: self.attention_flops}
        groups = [
            [name, ms(seconds), share(seconds), rate(flops[name], seconds) if name in flops else ""]
            for name, seconds in self.groups.items()
        ]
        parts = [
            [name, f"{calls:,.0f}", ms(seconds), share(seconds)]
            for name, (calls, seconds) in sorted(self.parts.items(), key=lambda item: -item[1][1])
        ]
        operators = [
            [f"`{name}`", group, f"{calls:,.0f}", ms(seconds), share(seconds)]
            for name, group, calls, seconds in self.operators
        ]
        shapes = [
            [name, f"{calls:,.0f}", ms(seconds), share(seconds), rate(count, seconds), of_peak(count, seconds)]
            for name, calls, seconds, count in self.shapes
        ]
        return "\n".join(
            [
                f"## {self.case}",
                "",
                f"{ms(self.seconds)} ms per step, {ms(self.watched)} ms with the profiler "
                f"(x {self.watched / self.seconds:.2f}); {self.tokens:,} tokens, "
                f"{self.tokens / self.seconds:,.0f} per second.",
                f"Matrix products: {share(self.groups[PRODUCTS])} of the step, {self.product_flops / 1e9:.2f} GFLOP at "
                f"{self.product_rate / 1e9:.1f} GFLOP/s, {100 * self.product_rate / self.peak:.0f}% of the peak of "
                f"{self.peak / 1e9:.1f} GFLOP/s. The whole step: "
                f"{(self.product_flops + self.attention_flops) / 1e9:.2f} GFLOP at {self.step_rate / 1e9:.1f} GFLOP/s, "
                f"{100 * self.step_rate / self.peak:.0f}%.",
                "",
                *markdown_table(["operators", "ms", "share", "GFLOP/s"], groups),
                "",
                "Parts of the code, including what they call (parts may be nested):",
                "",
                *markdown_table(["part", "calls", "ms", "share"], parts),
                "",
                "Operators that take longest:",
                "",
                *markdown_table(["operator", "group", "calls", "ms", "share"], operators),
                "",
                "Matrix products that take longest, by size:",
                "",
                *markdown_table(["product", "calls", "ms", "share", "GFLOP/s", "share of peak"], shapes),
                "",
            ]
        )


def analyzed(case: Case, watch: Watch, tokens: int, peak: float, threads: int, longest: int) -> Profile:
    """Compile the profile of a run.

    Raises:
        RuntimeError: If the counter has no formula for an operator.
    """
    breakdown = break_down(watch.events(), watch.profiled, watch.watched)
    products = watch.counter.flops - watch.counter.attention
    if watch.counter.uncounted:
        raise RuntimeError(f"operators without a formula: {', '.join(watch.counter.uncounted)}")
    seen = sum(flops for _, _, flops in breakdown.products.values())
    if abs(seen / products - 1) > 0.05:  # completions of the counted step may differ in length
        logging.getLogger(__name__).warning(
            "matrix products of the profiled steps have %.3g operations, those of the counted step %.3g", seen, products
        )

    def by_time(sums: dict[Any, list[float]]) -> list[tuple[Any, list[float]]]:
        return sorted(sums.items(), key=lambda item: -item[1][1])[:longest]

    return Profile(
        str(case),
        tokens,
        median(watch.times),
        watch.watched,
        breakdown.groups,
        dict(breakdown.parts),
        [(name, group, calls, seconds) for (name, group), (calls, seconds) in by_time(breakdown.operators)],
        [(size, calls, seconds, flops) for size, (calls, seconds, flops) in by_time(breakdown.products)],
        products,
        watch.counter.attention,
        peak,
        machine(threads),
    )


WIDE = Size(vocabulary=152_000, hidden=576, layers=30)
CASES = [
    Case("SFT", Size(), count=8, prompt=170, answer=35),
    Case("SFT", Size(), count=8, prompt=170, answer=35, packing=False),
    Case("SFT", WIDE, count=2, prompt=170, answer=35),
    Case("GRPO", Size(tied=False), count=8, prompt=256, answer=64),
    Case("GRPO", replace(WIDE, tied=False), count=4, prompt=128, answer=32),
]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--profiled", type=int, default=2, help="profiled steps")
    parser.add_argument("--longest", type=int, default=12, help="operators and products listed per table")
    parser.add_argument("--small", action="store_true", help="small sizes, as a quick check that everything runs")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    peak = peak_rate()
    print(f"Peak of a product in fp32 on {options.threads} threads: {peak / 1e9:.1f} GFLOP/s.\n", flush=True)
    results = []
    for case in CASES:
        if options.small:
            size = Size(2000, 64, 2 if case.size.layers < 20 else 4, tied=case.size.tied)
            case = Case(case.method, size, case.count, 40, 10, packing=case.packing)
        if options.only not in str(case):
            continue
        watch, tokens = watched(case, timed=options.pairs, profiled=options.profiled)
        result = analyzed(case, watch, tokens, max(peak, peak_rate()), options.threads, options.longest)
        print(result.markdown(), flush=True)
        results.append(result)
        write_json([asdict(result) for result in results], options.json)


if __name__ == "__main__":
    main()
