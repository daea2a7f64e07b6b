"""What a token costs in training by the layout of its batch, where sequences differ in length (see `scaling.py`)."""

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
"""Share of a row that is supervised where all rows are equally long: that of `models.rows`."""


@dataclass(frozen=True)
class Case:
    """What is trained on.

    Args:
        size: Of the model.
        layout: Of `LAYOUTS`, see `scaling.py`.
        batch: Sequences of a step.
        steps: Of a repetition.
        length: Of every sequence; None for log-normal ones.
        spread: Standard deviation of the logarithm of the lengths.
        prompt: Mean length of the prompts of log-normal rows.
        answer: Of their answers.
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
        """The rows of a repetition."""
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
        """The same, laid out."""
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
    """Rows as long as the longest example, filled first fit, the longest first."""
    capacity = max(map(len, examples))
    made: list[list[Segment]] = []
    room: list[int] = []
    for group in sorted(range(len(examples)), key=lambda i: -len(examples[i])):
        size = len(examples[group])
        place = next((i for i, left in enumerate(room) if left >= size), None)
        if place is None:
            place = len(room)
            made.append([])
            room.append(capacity)
        made[place].append(Segment(examples[group], group=group))
        room[place] -= size
    return lay_out(made, pad_token_id=1)


def training(case: Case) -> Repeat:
    """Supervised LoRA steps under a Lightning Trainer; the learning rate is as good as 0: all repetitions are alike."""
    module = _Recording(
        model(case.size), tokenizer=tokenizer(), dtype="float32", learning_rate=1e-30, lr_schedule="constant"
    )
    module.configure_model()
    batches = case.batches()

    def repeat() -> dict[str, Any]:
        module.losses = []
        fit(module, batches)
        places = sum(batch.input_ids.numel() for batch in batches)
        tokens = sum(batch.num_tokens for batch in batches)
        return {"loss": sum(module.losses), "tokens": tokens, "places": places}

    return repeat


class _Recording(LoRAFineTuning):
    """Keeps each step's summed loss."""

    losses: list[float]

    def training_step(self, batch: TokenBatch, batch_idx: int) -> torch.Tensor:
        """As ever."""
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


@dataclass(frozen=True)
class Cost:
    """What training on a layout costs.

    Args:
        case: What was trained on.
        seconds: Of a token, median.
        against: Time of the first layout to that of this one.
        flops: Of a token.
        excess: Peak resident bytes beyond the built module.
        padding: Share of places that hold no token.
        tokens: Of a step.
    """

    case: Case
    seconds: float
    against: Ratio
    flops: float
    excess: int
    padding: float
    tokens: float


def costs(cases: Sequence[Case], pairs: int, threads: int) -> list[Cost]:
    """Measure layouts of the same rows in turns.

    Raises:
        SystemExit: If they don't give the same loss.
    """
    measured = in_turns({case.layout: (training, case) for case in cases}, pairs=pairs, threads=threads)
    first = measured[cases[0].layout]
    found = []
    for case in cases:
        one = measured[case.layout]
        if abs(one.values["loss"] / first.values["loss"] - 1) > 1e-5 or one.values["tokens"] != first.values["tokens"]:
            raise SystemExit(f"{case}: {one.values}, but {cases[0].layout} gave {first.values}.")
        tokens = one.values["tokens"]
        found.append(
            Cost(
                case,
                median(one.seconds) / tokens,
                Ratio.of([a / b for a, b in zip(first.seconds, one.seconds, strict=True)]),
                one.flops / tokens,
                one.excess,
                1 - tokens / one.values["places"],
                tokens / case.steps,
            )
        )
    return found


def by_layout(options: Any, size: Size) -> list[Cost]:
    """Speed of layouts for lengths that differ."""
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
    head = ["batch", "tokens a step", "padding", "tokens/s", "speed against packed", "MFLOP a token", "excess MiB"]
    print("\n".join(markdown_table(head, table)), flush=True)
    return found
