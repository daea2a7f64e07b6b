"""Token savings in a hand-written loop over several processes, with the torchmetrics metric.

    python examples/custom_loop/savings_over_ranks.py --ranks 2

Each process trains on its share of the rows and answers its share of the requests, in batches and in any order. The
metric gathers tokens and scores from all of them, so the loop needs no code for that. It only needs counts and scores,
so it also fits answers that a server has given.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_ft import PairDataModule, PromptBaseline
from lightning_ft.data.encode import encode_prompt
from lightning_ft.evaluation.savings.metric import TokenSavingsMetric
from lightning_ft.models.generate import end_token_ids
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.types import Request

SUPPORT = Path(__file__).parents[1] / "support"
BASE = Path(__file__).parents[1] / "tiny_base"


def batches(requests: Sequence[Request], fabric: Fabric, size: int = 32) -> Iterator[Sequence[Request]]:
    """This rank's share of the requests."""
    own = requests[fabric.global_rank :: fabric.world_size]
    for start in range(0, len(own), size):
        yield own[start : start + size]


def answer(
    arm: str,
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    prompt: PromptBaseline | None,
    fabric: Fabric,
    metric: TokenSavingsMetric,
) -> None:
    """Answer the requests of this rank and add them to the metric."""
    engine = LocalEngine(model, end_token_ids=end_token_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id)
    for batch in batches(requests, fabric):
        turns = [list(r.messages) if prompt is None else prompt.messages(r.messages) for r in batch]
        prompts = [encode_prompt(tokenizer, messages) for messages in turns]
        completions = engine.generate(prompts, max_new_tokens=12).completions
        texts = tokenizer.batch_decode([list(c.tokens) for c in completions], skip_special_tokens=True)
        metric.update(
            arm,
            [request.id for request in batch],
            input_tokens=[len(ids) for ids in prompts],
            output_tokens=[len(completion.tokens) for completion in completions],
            scores=[float(text.strip() == request.reference) for text, request in zip(texts, batch, strict=True)],
            truncated=[completion.truncated for completion in completions],
            clusters=[request.cluster or request.id for request in batch],
        )


def run(fabric: Fabric, steps: int, count: int) -> dict[str, Any]:
    """Measure, train and measure again; call it on all ranks.

    Args:
        fabric: Launched Fabric.
        steps: Number of optimizer steps.
        count: Number of requests to answer.

    Returns:
        The metrics, the same on all ranks.
    """
    fabric.seed_everything(0, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    data = PairDataModule(
        str(SUPPORT / "data" / "train.jsonl"),
        test=str(SUPPORT / "data" / "test.jsonl"),
        tokenizer=tokenizer,
        batch_size=16,
        packing=False,
    )
    data.setup("fit")
    data.setup("test")
    requests = data.requests("test")[:count]
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=2e-3))
    metric = TokenSavingsMetric(margin=0.05, resamples=2000)

    with model.disable_adapter():
        for arm, prompt in (("prompted", PromptBaseline.from_file(SUPPORT / "baseline.json")), ("untuned", None)):
            answer(arm, model, tokenizer, requests, prompt, fabric, metric)
    loader = data.train_dataloader()
    for batch in islice(loader, fabric.global_rank, steps * fabric.world_size, fabric.world_size):
        labels = torch.full_like(batch.input_ids, -100)
        labels.view(-1)[batch.predictors + 1] = batch.targets  # transformers shifts labels itself
        loss = wrapped(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=labels).loss
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    answer("tuned", model, tokenizer, requests, None, fabric, metric)

    result = metric.result()
    if fabric.is_global_zero:
        result.print()
    return result.metrics()


def main() -> None:
    """Run on one or several processes of this machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="Number of processes.")
    parser.add_argument("--steps", type=int, default=250, help="Number of optimizer steps.")
    parser.add_argument("--requests", type=int, default=200, help="Number of requests to answer.")
    parser.add_argument("--output", type=Path, help="JSON file for the metrics.")
    options = parser.parse_args()
    fabric = Fabric(accelerator="cpu", devices=options.ranks, strategy="ddp" if options.ranks > 1 else "auto")
    fabric.launch()
    metrics = run(fabric, options.steps, options.requests)
    if options.output is not None and fabric.is_global_zero:
        options.output.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
