"""Ablation of supervised fine-tuning: techniques switched on one by one, from a plain training loop to our module.

    python benchmarks/ablation.py
    python benchmarks/ablation.py --vocabulary 152000 --hidden 576 --layers 30 --json ablation.json

The first row is a tutorial's loop (right-padded rows, ``model(input_ids, attention_mask, labels=labels).loss``, AdamW).
Each further row of the table names the row that it builds on; where the two compute the same, their losses must agree.
Each row runs in its own process. A few processes alternate, in forward and reverse order: always the plain loop, and
the row that the measured one builds on.

Batches aren't sorted by length: nothing in this project does that, and it would train on different batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import sft
import torch
from harness import MIB, Measured, Ratio, Repeat, arguments, in_turns, machine, write_json
from models import Size, model, one_row
from torch import Tensor, nn

from lightning_ft.data.layout import Example, TokenBatch, collate_examples
from lightning_ft.document.markdown import markdown_table
from lightning_ft.losses.logprobs import linear_logprob_sum, module_logprobs
from lightning_ft.models.adapt import add_lora, lora_config
from lightning_ft.models.head import base_of, hidden_states
from lightning_ft.models.optim import parameter_groups

EXACT = 1e-4


@dataclass(frozen=True)
class Recipe:
    """A row of the table.

    Args:
        name: Technique that the row adds.
        after: Name of the row that it builds on and must agree with; None for the first.
        exact: Whether it computes the same losses as that row.
        engine: Training loop: ``loop`` (below), ``ours`` or ``trl`` (both in `sft.py`).
        head: How the loss is computed: ``logits`` at every position; ``supervised``: logits at supervised positions
            only; ``recomputed``: those, in chunks that the backward pass computes again; ``direct``: those, in chunks
            whose gradient is computed in the forward pass.
        unmasked: Whether the attention mask is left out, which right-padded rows don't need.
        layout: ``padded``; ``one row`` per batch, without padding; ``packed``: the number of rows that costs least,
            since attention over one long row costs more than a little padding.
        one_mask: Whether the model gets one mask for all layers, rather than building its own from transformers'.
        checkpointing: Whether activations are recomputed in the backward pass.
        fused: Whether AdamW uses its fused kernel.
        dtype: Dtype of the base model; an adapter stays fp32.
        lora: Whether an adapter is trained, rather than all weights.
        setting: Name of TRL's settings, a key of `sft.SETTINGS`.
    """

    name: str
    after: str | None = None
    exact: bool = True
    engine: str = "loop"
    head: str = "logits"
    unmasked: bool = False
    layout: str = "padded"
    one_mask: bool = False
    checkpointing: bool = False
    fused: bool = False
    dtype: str = "float32"
    lora: bool = True
    setting: str = "padded"


PLAIN = Recipe("plain loop")
UNMASKED = replace(PLAIN, name="no attention mask", after=PLAIN.name, unmasked=True)
SUPERVISED = replace(UNMASKED, name="logits of supervised positions", after=UNMASKED.name, head="supervised")
CHUNKED = replace(SUPERVISED, name="in chunks, recomputed", after=SUPERVISED.name, head="recomputed")
DIRECT = replace(CHUNKED, name="gradient in the forward pass", after=CHUNKED.name, head="direct")
FUSED = replace(DIRECT, name="fused AdamW", after=DIRECT.name, fused=True)
ONE_ROW = replace(DIRECT, name="packed into one row", after=DIRECT.name, layout="one row")
PACKED = replace(ONE_ROW, name="packed into balanced rows", after=ONE_ROW.name, layout="packed")
ONE_MASK = replace(PACKED, name="one mask for all layers", after=PACKED.name, one_mask=True)
FULL = replace(PLAIN, name="plain loop, all weights", after=PLAIN.name, exact=False, lora=False)
RECIPES = [
    PLAIN,
    UNMASKED,
    SUPERVISED,
    CHUNKED,
    DIRECT,
    FUSED,
    ONE_ROW,
    PACKED,
    ONE_MASK,
    replace(ONE_MASK, name="LoRAFineTuning under Lightning", after=ONE_MASK.name, engine="ours"),
    replace(DIRECT, name="activation checkpointing", after=DIRECT.name, checkpointing=True),
    replace(DIRECT, name="bf16 base", after=DIRECT.name, exact=False, dtype="bfloat16"),
    replace(PLAIN, name="TRL's SFTTrainer, padded", after=PLAIN.name, engine="trl", setting="padded"),
    replace(PLAIN, name="TRL's SFTTrainer, padding-free", after=PLAIN.name, engine="trl", setting="padding_free"),
    FULL,
    replace(DIRECT, name="all of them, all weights", after=FULL.name, lora=False),
    replace(FUSED, name="fused AdamW, all weights", after="all of them, all weights", lora=False),
]


def build(task: tuple[sft.Case, Recipe]) -> Repeat:
    """Build the contender that trains by a recipe."""
    case, recipe = task
    case = replace(case, lora=recipe.lora, packing=recipe.layout == "packed", setting=recipe.setting)
    if recipe.engine != "loop":
        return {"ours": sft.ours, "trl": sft.trl}[recipe.engine](case)
    network: Any = model(case.size).train()
    if recipe.checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    network = network.to(getattr(torch, recipe.dtype))
    if recipe.lora:
        network = add_lora(network.requires_grad_(False), lora_config(sft.LORA))
    examples = case.rows()
    batches = [examples[start : start + case.batch] for start in range(0, len(examples), case.batch)]
    step = _plain_loss if recipe.head == "logits" else _selected_loss

    def run() -> list[float]:
        groups = parameter_groups(network, sft.DECAY)
        optimizer = torch.optim.AdamW(groups, lr=case.rate, fused=recipe.fused or None)
        losses = []
        for batch in batches:
            loss = step(network, batch, recipe)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    return sft.with_restored_weights(network, run)


def _plain_loss(network: nn.Module, examples: list[Example], recipe: Recipe) -> Tensor:
    padded = collate_examples(examples, packing=False, pad_token_id=1)
    labels = torch.full_like(padded.input_ids, -100)
    labels.view(-1)[padded.predictors + 1] = padded.targets
    mask = None if recipe.unmasked else (padded.segment_ids >= 0).long()
    loss: Tensor = network(input_ids=padded.input_ids, attention_mask=mask, labels=labels, use_cache=False).loss
    return loss


def _selected_loss(network: Any, examples: list[Example], recipe: Recipe) -> Tensor:
    batch = (
        one_row(examples)
        if recipe.layout == "one row"
        else collate_examples(examples, packing=recipe.layout == "packed", pad_token_id=1)
    )
    batch = replace(batch, explicit_mask=recipe.one_mask)
    base = base_of(network)
    states = hidden_states(base, batch).flatten(0, 1).index_select(0, batch.predictors)
    return -HEADS[recipe.head](states, base.get_output_embeddings(), batch) / batch.num_targets


def _supervised(states: Tensor, head: Any, batch: TokenBatch) -> Tensor:
    return -nn.functional.cross_entropy(head(states).float(), batch.targets, reduction="sum")


def _recomputed(states: Tensor, head: Any, batch: TokenBatch) -> Tensor:
    return module_logprobs(states, head, batch.targets).logprobs.sum()


def _direct(states: Tensor, head: Any, batch: TokenBatch) -> Tensor:
    return linear_logprob_sum(states, head.weight, batch.targets).logprobs


HEADS: dict[str, Callable[[Tensor, Any, TokenBatch], Tensor]] = {
    "supervised": _supervised,
    "recomputed": _recomputed,
    "direct": _direct,
}


@dataclass(frozen=True)
class Row:
    """Measurements of a recipe and of those that it is compared with, taken alternately.

    Args:
        recipe: Recipe that was run.
        found: Its measurements.
        plain: Measurements of the plain loop.
        before: Measurements of the row that it builds on; None for the plain loop.
    """

    recipe: Recipe
    found: Measured
    plain: Measured
    before: Measured | None

    @property
    def apart(self) -> float | None:
        """Largest difference between a loss and the same loss of the row that it builds on."""
        if self.before is None:
            return None
        return max(abs(x - y) for x, y in zip(self.found.values["losses"], self.before.values["losses"], strict=True))

    def check(self) -> None:
        """Stop the benchmark if losses differ that should agree.

        Raises:
            SystemExit: Names the two rows and the difference.
        """
        if self.recipe.exact and self.apart is not None and not self.apart <= EXACT:
            raise SystemExit(
                f"Losses of {self.recipe.name!r} and {self.recipe.after!r} differ by {self.apart:.3g}; at most "
                f"{EXACT:g} is allowed."
            )


def turns(recipes: list[Recipe], most: int = 5) -> list[tuple[list[Recipe], list[Recipe]]]:
    """Group the recipes by the processes that run alternately; all at once would need too much memory.

    Args:
        recipes: Rows of the table.
        most: Maximum number of processes at a time.

    Returns:
        For each group its processes, and those of them that become rows of the table.
    """
    by_name = {recipe.name: recipe for recipe in RECIPES}
    groups: list[tuple[list[Recipe], list[Recipe]]] = []
    for recipe in recipes:
        needed = [PLAIN, *([by_name[recipe.after]] if recipe.after else []), recipe]
        if not groups or len({r.name for r in groups[-1][0] + needed}) > most:
            groups.append(([], []))
        running, rows = groups[-1]
        running.extend(new for new in dict.fromkeys(needed) if new not in running)
        rows.append(recipe)
    return groups


def table(rows: list[Row], steps: int) -> str:
    """Write the measurements as a Markdown table."""
    head = ["", "technique", "on top of", "s/step", "speed-up over plain", "over that row", "excess memory, MiB"]
    head += ["GFLOP/step", "last loss", "difference from that row"]
    numbers = {recipe.name: number for number, recipe in enumerate(RECIPES)}
    cells = [
        [
            f"{numbers[row.recipe.name]}",
            row.recipe.name,
            f"{numbers[row.recipe.after]}" if row.recipe.after else "",
            f"{median(row.found.seconds) / steps:.3f}",
            _ratio(row.plain, row.found),
            _ratio(row.before, row.found),
            f"{row.found.excess / MIB:,.0f}",
            f"{row.found.flops / 1e9 / steps:,.2f}",
            f"{row.found.values['losses'][-1]:.5f}",
            ("" if row.apart is None else f"{row.apart:.0e}") + ("" if row.recipe.exact else " (not exact)"),
        ]
        for row in rows
    ]
    return "\n".join(markdown_table(head, cells))


def _ratio(before: Measured | None, after: Measured) -> str:
    if before is None or before is after:
        return ""
    ratio = Ratio.of([a / b for a, b in zip(before.seconds, after.seconds, strict=True)])
    return f"{ratio.median:.2f} ({ratio.least:.2f} to {ratio.largest:.2f})"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--vocabulary", type=int, default=32_000, help="tokens in the model's vocabulary")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the model")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model")
    parser.add_argument("--prompt", type=int, default=170, help="mean length of the prompts, in tokens")
    parser.add_argument("--answer", type=int, default=35, help="mean length of the answers, in tokens")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per repetition")
    args = parser.parse_args()
    size = Size(args.vocabulary, args.hidden, args.layers)
    case = sft.Case(size, True, prompt=args.prompt, answer=args.answer, batch=args.batch, steps=args.steps)
    recipes = [recipe for recipe in RECIPES if args.only in recipe.name]
    rows: list[Row] = []
    for running, wanted in turns(recipes):
        contenders = {recipe.name: (build, (case, recipe)) for recipe in running}
        measured = in_turns(contenders, pairs=args.pairs, threads=args.threads)
        for recipe in wanted:
            rows.append(Row(recipe, measured[recipe.name], measured[PLAIN.name], measured.get(recipe.after or "")))
            rows[-1].check()
        found = [{**asdict(row.recipe), **asdict(row.found)} for row in rows]
        write_json({"case": asdict(case), "machine": machine(args.threads), "rows": found}, args.json)
    print(
        f"{size}, {case.steps} steps of {case.batch} rows, prompts of {case.prompt}, answers of {case.answer}, "
        f"{case.tokens:,} tokens; medians of {args.pairs} repetitions with {args.threads} threads\n"
    )
    print(table(rows, case.steps), flush=True)


if __name__ == "__main__":
    main()
