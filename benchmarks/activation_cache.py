"""Cost of a training step with cached activations, and of ten epochs, relative to full fine-tuning.

    python benchmarks/activation_cache.py --pairs 5

Two contenders alternate on the same batch: full fine-tuning, and an adapter in the top layers that reads the output of
the frozen layers from disk. The first epoch, which computes that output, is measured separately; the total over epochs
is computed from both. Before anything is timed, a step with cached activations is checked to equal a step that computes
them, bit for bit.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from harness import Result, arguments, compare, write_json
from models import Size, model, rows, tokenizer

from lightning_ft import FullFineTuning, LoRAFineTuning
from lightning_ft.data.layout import TokenBatch, collate_examples
from lightning_ft.models.flops import OperationCounter

EPOCHS = 10


@dataclass(frozen=True)
class Case:
    """A model, its adapters, and the batch.

    Args:
        size: Shape of the model.
        top: Number of top layers with adapters.
        rank: Rank of the adapters.
        batch_size: Rows per step.
    """

    size: Size
    top: int = 2
    rank: int = 16
    batch_size: int = 8

    def __str__(self) -> str:
        return f"{self.size}, adapters in the top {self.top}"


def batch_of(case: Case) -> TokenBatch:
    return collate_examples(rows(case.batch_size, case.size.vocabulary), packing=False, pad_token_id=1)


def step(module: Any, optimizer: torch.optim.Optimizer, batch: TokenBatch) -> Mapping[str, Any]:
    """Run forward, backward, and an optimizer step with a learning rate of 0, so that all repetitions are equal."""
    loss = module.training_step(batch, 0)
    (loss / batch.num_targets).backward()
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss.item()}


def full(case: Case) -> Any:
    module = FullFineTuning(model(case.size), tokenizer=tokenizer())
    module.configure_model()
    optimizer, batch = torch.optim.AdamW(module.parameters(), lr=0.0), batch_of(case)
    return lambda: step(module, optimizer, batch)


def frozen_module(case: Case, folder: str | None) -> LoRAFineTuning:
    module = LoRAFineTuning(
        model(case.size), tokenizer=tokenizer(), lora={"r": case.rank}, top_layers=case.top, activation_cache=folder
    )
    module.configure_model()
    return module


def trained(module: LoRAFineTuning) -> list[torch.nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def check(case: Case) -> None:
    """Stop if a step with cached activations differs from the step that computes them."""
    module, batch = frozen_module(case, tempfile.mkdtemp()), batch_of(case)
    gradients = []
    for _ in range(2):  # computed, then read
        loss = module.training_step(batch, 0)
        loss.backward()
        gradients.append([loss.detach(), *(parameter.grad for parameter in trained(module))])
        module.zero_grad()
        module.on_train_end()
    if not all(map(torch.equal, *gradients)):
        raise SystemExit(f"[{case}]: a step with cached activations differs from the step that computes them.")


def frozen(case: Case) -> Any:
    module, batch = frozen_module(case, tempfile.mkdtemp()), batch_of(case)
    optimizer = torch.optim.AdamW(trained(module), lr=0.0)
    return lambda: step(module, optimizer, batch)


def first_epoch(case: Case) -> tuple[int, float]:
    """Operations and seconds that it takes to compute a batch's activations."""
    module, batch = frozen_module(case, tempfile.mkdtemp()), batch_of(case)
    reader = module._activations._open(module)
    reader.frozen.states(torch.arange(3))
    with OperationCounter() as outside:
        started = time.perf_counter()
        reader._states(batch)
        seconds = time.perf_counter() - started
    assert not outside.flops
    return reader.flops, seconds


def main() -> None:
    parser = arguments(__doc__)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = [
        Case(Size(32_000, 256, 8), top=1),
        Case(Size(32_000, 256, 16), top=2),
        Case(Size(32_000, 256, 16), top=1),
        Case(Size(32_000, 576, 30), top=2),
        Case(Size(152_000, 576, 30), top=2, batch_size=4),
    ]
    found: list[dict[str, Any]] = []
    for case in (case for case in cases if options.only in str(case)):
        check(case)
        result: Result = compare(
            "step with cached activations",
            case,
            frozen,
            full,
            peer_name="full fine-tuning",
            pairs=options.pairs,
            threads=options.threads,
            agree={"loss": 1e-4},
        )
        flops, seconds = first_epoch(case)
        every = result.flops["full fine-tuning"], result.seconds["full fine-tuning"]
        ours = result.flops["ours"], result.seconds["ours"]
        share = [(once + EPOCHS * a) / (EPOCHS * b) for once, a, b in zip((flops, seconds), ours, every, strict=True)]
        print(
            f"  {EPOCHS} epochs, the first one filling the cache: operations x {share[0]:.3f}, time x {share[1]:.3f}",
            flush=True,
        )
        found.append(
            {**asdict(result), "case": str(case), "epochs": EPOCHS, "flops_share": share[0], "time_share": share[1]}
        )
    write_json(found, options.json)


if __name__ == "__main__":
    main()
