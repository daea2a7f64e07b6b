"""Supervised fine-tuning under a Lightning Trainer and by TRL's SFTTrainer: full fine-tuning and LoRA.

    python benchmarks/sft.py
    python benchmarks/sft.py --only "LoRA, vocabulary 152,000" --pairs 3 --json sft.json
    python benchmarks/sft.py --tiny --settings padded,padding_free,unfused

Both train the same random Llama in fp32 on the same tokenized rows in the same order, with the same AdamW, the same
constant learning rate, no clipping and the same initial adapter. Each repetition starts from the same weights and takes
the same steps, so the losses of all repetitions on both sides must agree.

TRL's time excludes one-time setup (its trainer and the preparation of its data set); ours creates a Lightning Trainer
in each repetition. Both log their default metrics, and keep them in memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from harness import MIB, Repeat, Result, arguments, compare, save
from models import Size, model, rows, tokenizer
from torch import nn
from torch.utils.data import DataLoader
from training import InitialWeights, forget_last_fit, silent_trainer

from lightning_ft import FullFineTuning, LoRAFineTuning
from lightning_ft.data.layout import Example, collate_examples
from lightning_ft.models.adapt import add_lora, lora_config

AGREE = {"32-true": {"losses": 1e-4}, "bf16-mixed": {"losses": 3e-2}}
DECAY = 0.01
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
FAST: dict[str, Any] = {"gradient_checkpointing": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "padding_free": {**FAST, "padding_free": True},
    "padded": FAST,
    "defaults": {},
    "checkpointed": {"padding_free": True},  # TRL's default; here ours recomputes activations too
    "ours_checkpointed": {**FAST, "padding_free": True},  # ours recomputes activations, TRL runs at its fastest
    "unfused": {**FAST, "padding_free": True, "optim": "adamw_torch"},
}
"""TRL's settings, in addition to those that the comparison needs.

The fastest one on a CPU is one of the first two, depending on sizes: TRL's head computes logits at every position
including padding, so without padding it has less to do, but attention has more. `packing` would train on different
batches. TRL's other losses are slower: they hold all logits, and run the model twice.
"""


@dataclass(frozen=True)
class Case:
    """A run of a few optimizer steps.

    Args:
        size: Shape of the model.
        lora: Whether an adapter is trained, rather than all weights.
        setting: Name of TRL's settings, a key of :data:`SETTINGS`.
        prompt: Mean number of tokens per prompt.
        answer: Mean number of tokens per answer; answers are supervised.
        batch: Number of rows per step.
        steps: Number of optimizer steps per repetition.
        packing: Whether ours packs a batch, rather than padding it on the right.
        precision: ``32-true`` or ``bf16-mixed``.
    """

    size: Size
    lora: bool
    setting: str = "padding_free"
    prompt: int = 170
    answer: int = 35
    batch: int = 8
    steps: int = 4
    packing: bool = True
    precision: str = "32-true"

    def __str__(self) -> str:
        return (
            f"{'LoRA' if self.lora else 'all weights'}, {self.size}, {self.steps} steps of {self.batch} rows, prompts "
            f"of {self.prompt}, answers of {self.answer}, {self.tokens:,} tokens, TRL {self.setting}"
            f"{'' if self.packing else ', ours padded'}{'' if self.precision == '32-true' else f', {self.precision}'}"
        )

    @property
    def rate(self) -> float:
        """Learning rate, high enough for the losses of later steps to depend on the gradients of earlier ones."""
        return 1e-3 if self.lora else 1e-4

    @property
    def checkpointed(self) -> bool:
        """Whether ours recomputes activations."""
        return self.setting.endswith("checkpointed")

    def rows(self) -> list[Example]:
        """Draw the rows of a repetition."""
        return rows(self.batch * self.steps, self.size.vocabulary, prompt=self.prompt, answer=self.answer)

    @property
    def tokens(self) -> int:
        """Number of tokens per repetition, padding excluded."""
        return sum(len(row) for row in self.rows())


def agree(case: Case) -> dict[str, float]:
    """Largest differences that the precision of a case allows."""
    return AGREE[case.precision]


def ours(case: Case) -> Repeat:
    """Build the contender that trains FullFineTuning or LoRAFineTuning under a Lightning Trainer."""
    module_class = _recording(LoRAFineTuning if case.lora else FullFineTuning)
    module = module_class(
        model(case.size),
        tokenizer=tokenizer(),
        learning_rate=case.rate,
        weight_decay=DECAY,
        lr_schedule="constant",
        warmup_ratio=0.0,
        gradient_checkpointing=case.checkpointed,
        **({"lora": LORA} if case.lora else {}),
    )
    module.configure_model()
    collate = partial(collate_examples, packing=case.packing, pad_token_id=1)
    batches = DataLoader(case.rows(), batch_size=case.batch, collate_fn=collate)  # type: ignore[arg-type]

    def run() -> list[float]:
        forget_last_fit(module)
        module.losses = []
        silent_trainer(max_steps=case.steps, precision=case.precision).fit(module, batches)
        return module.losses

    return with_restored_weights(module.model, run, case)


def _recording(module_class: type) -> Any:
    class Recording(module_class):
        """Collects each step's mean loss over the supervised tokens."""

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.losses.append(loss.item())
            return loss

    return Recording


def trl(case: Case) -> Repeat:
    """Build the contender that trains with SFTTrainer."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    class Recording(SFTTrainer):
        """Collects each step's loss, unrounded."""

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    losses: list[float] = []
    datasets.disable_progress_bars()
    network = model(case.size)
    if case.lora:
        network = add_lora(network.requires_grad_(False), lora_config(LORA))  # the same initial adapter as ours
    examples = case.rows()
    settings: dict[str, Any] = {
        "output_dir": os.path.join(tempfile.gettempdir(), "lightning_ft_benchmark_sft"),  # nothing is written there
        "use_cpu": True,
        "bf16": case.precision == "bf16-mixed",
        "per_device_train_batch_size": case.batch,
        "max_steps": case.steps,
        "max_length": None,
        "completion_only_loss": True,
        "train_sampling_strategy": "sequential",
        "learning_rate": case.rate,
        "lr_scheduler_type": "constant",
        "weight_decay": DECAY,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = Recording(
        model=network,
        processing_class=tokenizer(),
        train_dataset=datasets.Dataset.from_dict(
            {
                "input_ids": [row.input_ids.tolist() for row in examples],
                "completion_mask": [row.supervised.int().tolist() for row in examples],
            }
        ),
        args=SFTConfig(**{**settings, **SETTINGS[case.setting]}),
    )
    trainer.pop_callback(_printer())

    def run() -> list[float]:
        losses.clear()
        trainer.optimizer = trainer.lr_scheduler = None  # otherwise it continues with those of the last repetition
        trainer.train()
        return list(losses)

    return with_restored_weights(network, run, case)


def _printer() -> type:
    from transformers import PrinterCallback

    return PrinterCallback


def with_restored_weights(network: nn.Module, run: Callable[[], list[float]], case: Case) -> Repeat:
    """Make a repetition that starts from the network's current weights each time.

    Args:
        network: Network that `run` trains.
        run: Function that trains, and returns the loss of each step.
        case: What is trained.
    """
    initial = InitialWeights(network)
    expected: list[float] = []

    def repeat() -> dict[str, list[float]]:
        initial.restore()
        found = run()
        expected.extend([] if expected else found)
        # the harness compares the first repetition only
        if max(abs(a - b) for a, b in zip(expected, found, strict=True)) > agree(case)["losses"]:
            raise RuntimeError(f"Repetitions differ: the losses are {found}, those of the first repetition {expected}.")
        return {"losses": found}

    return repeat


def cases(settings: list[str], *, batch: int, steps: int, tiny: bool) -> list[Case]:
    """List all cases."""
    if tiny:
        sizes = {Size(vocabulary=2000, hidden=64, layers=2): ((40, 10),)}
    else:
        short, long = (170, 35), (60, 300)
        sizes = {
            Size(vocabulary=32_000): (short, long),
            Size(vocabulary=152_000): (short,),
            Size(vocabulary=32_000, hidden=576, layers=30): (short,),
            Size(vocabulary=152_000, hidden=576, layers=30): (short,),
        }
    return [
        Case(size, lora, setting, prompt, answer, batch, steps)
        for size, lengths in sizes.items()
        for prompt, answer in lengths
        for lora in (True, False)
        for setting in settings
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--settings",
        default="padding_free,padded,defaults,checkpointed",
        help=f"TRL's settings, separated by commas, of: {', '.join(SETTINGS)}",
    )
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per repetition")
    parser.add_argument("--padded", action="store_true", help="pad our batches instead of packing them")
    parser.add_argument("--tiny", action="store_true", help="a small size, as a quick check that everything runs")
    args = parser.parse_args()
    results: list[Result] = []
    for case in cases(args.settings.split(","), batch=args.batch, steps=args.steps, tiny=args.tiny):
        if args.only in str(case):
            case = replace(case, packing=not args.padded)
            result = compare("SFT", case, ours, trl, pairs=args.pairs, threads=args.threads, agree=agree(case))
            speeds = {side: case.tokens / seconds for side, seconds in result.seconds.items()}
            print(
                "  " + ", ".join(f"{side} {speed:,.0f} tokens/s" for side, speed in speeds.items()),
                f"(peak excess {' and '.join(f'{side} {b / MIB:,.0f} MiB' for side, b in result.excess.items())})",
                flush=True,
            )
            results.append(result)
            save(results, args.json)  # after each case: a later one may run out of memory


if __name__ == "__main__":
    main()
