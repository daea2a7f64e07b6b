"""Training cost per token by batch layout, for sequences of different lengths (see `scaling.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from harness import MIB, Ratio, Repeat, in_turns
from models import Size, model, one_row, rows, tokenizer
from training import fit

from lightning_ft import LoRAFineTuning
from lightning_ft.data.layout import Example, Segment, TokenBatch, collate_examples, lay_out
from lightning_ft.document.markdown import markdown_table

LAYOUTS = ("packed", "padded", "row", "filled", "sorted")
SUPERVISED = 35 / 205
"""Share of supervised tokens in rows of equal length: the mean share in `models.rows`."""


@dataclass(frozen=True)
class Case:
    """Model, sequences and layout of a measurement.

    Args:
        size: Shape of the model.
        layout: One of `LAYOUTS`, see `scaling.py`.
        batch: Number of sequences per step.
        steps: Number of optimizer steps per repetition.
        length: Number of tokens of each sequence; None for log-normal lengths.
        spread: Standard deviation of the logarithm of the lengths.
        prompt: Mean number of tokens per prompt, for log-normal lengths.
        answer: Mean number of tokens per answer, for log-normal lengths.
    """

    size: Size
    layout: str
    batch: int
    steps: int
    length: int | None = None
    spread: float = 0.6
    prompt: int = 170
    answer: int = 35

    def examples(self) -> list[Example]:
        """Draw the rows of a repetition."""
        count = self.batch * self.steps
        if self.length is None:
            return rows(count, self.size.vocabulary, prompt=self.prompt, answer=self.answer, spread=self.spread)
        generator = torch.Generator().manual_seed(0)
        supervised = torch.arange(self.length) >= round(self.length * (1 - SUPERVISED))
        return [
            Example(torch.randint(2, self.size.vocabulary, (self.length,), generator=generator), supervised)
            for _ in range(count)
        ]

    def batches(self) -> list[TokenBatch]:
        """Lay out the rows of a repetition as batches."""
        examples = self.examples()
        if self.layout == "sorted":
            examples = sorted(examples, key=len)
        parts = [examples[start : start + self.batch] for start in range(0, len(examples), self.batch)]
        if self.layout == "filled":
            return [filled(part) for part in parts]
        if self.layout == "row":
            return [one_row(part) for part in parts]
        return [collate_examples(part, packing=self.layout == "packed", pad_token_id=1) for part in parts]


def filled(examples: Sequence[Example]) -> TokenBatch:
    """Lay out examples by first fit, the longest first, in rows as long as the longest example."""
    capacity = max(map(len, examples))
    layout: list[list[Segment]] = []
    room: list[int] = []
    for group in sorted(range(len(examples)), key=lambda i: -len(examples[i])):
        size = len(examples[group])
        row = next((i for i, left in enumerate(room) if left >= size), None)
        if row is None:
            row = len(room)
            layout.append([])
            room.append(capacity)
        layout[row].append(Segment(examples[group], group=group))
        room[row] -= size
    return lay_out(layout, pad_token_id=1)


def training(case: Case) -> Repeat:
    """Build a contender that takes supervised LoRA steps, at a tiny learning rate so that all repetitions are equal."""
    module = _Recording(
        model(case.size), tokenizer=tokenizer(), dtype="float32", learning_rate=1e-30, lr_schedule="constant"
    )
    module.configure_model()
    batches = case.batches()

    def repeat() -> dict[str, Any]:
        module.losses = []
        fit(module, batches)
        positions = sum(batch.input_ids.numel() for batch in batches)
        tokens = sum(batch.num_tokens for batch in batches)
        return {"loss": sum(module.losses), "tokens": tokens, "positions": positions}

    return repeat


class _Recording(LoRAFineTuning):
    """LoRAFineTuning that collects the mean loss of each step."""

    losses: list[float]

    def training_step(self, batch: TokenBatch, batch_idx: int) -> torch.Tensor:
        """Train as LoRAFineTuning does, and collect the loss."""
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


@dataclass(frozen=True)
class Cost:
    """Training cost of a layout.

    Args:
        case: Case that was measured.
        seconds: Median seconds per token.
        against: Ratio of the first layout's time to this one's.
        flops: Operations per token.
        excess: Peak resident bytes beyond those of the built module.
        padding: Share of positions that are padding.
        tokens: Number of tokens per step.
    """

    case: Case
    seconds: float
    against: Ratio
    flops: float
    excess: int
    padding: float
    tokens: float


def costs(cases: Sequence[Case], pairs: int, threads: int) -> list[Cost]:
    """Measure layouts of the same rows alternately.

    Raises:
        SystemExit: If their losses or numbers of tokens differ.
    """
    measured = in_turns({case.layout: (training, case) for case in cases}, pairs=pairs, threads=threads)
    first = measured[cases[0].layout]
    found = []
    for case in cases:
        one = measured[case.layout]
        if abs(one.values["loss"] / first.values["loss"] - 1) > 1e-5 or one.values["tokens"] != first.values["tokens"]:
            raise SystemExit(
                f"{case}: the values {one.values} differ from those of the layout {cases[0].layout}: {first.values}."
            )
        tokens = one.values["tokens"]
        found.append(
            Cost(
                case,
                median(one.seconds) / tokens,
                Ratio.of([a / b for a, b in zip(first.seconds, one.seconds, strict=True)]),
                one.flops / tokens,
                one.excess,
                1 - tokens / one.values["positions"],
                tokens / case.steps,
            )
        )
    return found


def by_layout(options: Any, size: Size) -> list[Cost]:
    """Measure and print the speed of each layout at each batch size and spread of lengths."""
    found: list[Cost] = []
    base = Case(size, "packed", 8, options.steps)
    if options.small:
        base = replace(base, prompt=40, answer=10)
    for batch in options.batches:
        for spread in options.spreads:
            case = replace(base, batch=batch, spread=spread)
            if options.only in f"batch {batch}, spread {spread}":
                found += costs([replace(case, layout=name) for name in LAYOUTS], options.pairs, options.threads)
    print(
        f"\n## Packing\n\n{size}, LoRA, log-normal lengths: prompts of {base.prompt}, answers of {base.answer}, "
        f"{options.steps} steps, {options.threads} threads\n"
    )
    table = [
        [
            f"{cost.case.batch} sequences, spread {cost.case.spread:g}, {cost.case.layout}",
            f"{cost.tokens:,.0f}",
            f"{cost.padding:.1%}",
            f"{1 / cost.seconds:,.0f}",
            str(cost.against) if cost.case.layout != "packed" else "",
            f"{cost.flops / 1e6:,.2f}",
            f"{cost.excess / MIB:,.0f}",
        ]
        for cost in found
    ]
    head = ["batch", "tokens/step", "padding", "tokens/s", "speed relative to packed", "MFLOP/token", "excess MiB"]
    print("\n".join(markdown_table(head, table)), flush=True)
    return found
