"""Distilling the support prompt, against fine-tuning on the prompted model's own answers, at equal FLOPs.

    python examples/support/distill_compare.py

Neither method reads an answer of the training rows. Both start from the requests and the prompt: one learns the
prompted model's distributions (`PromptDistillation`), the other its most probable answers (`LoRAFineTuning`). The
second is run for as many epochs, and once more for as many FLOPs as the first took, what the teacher computes included.
Quality is the share of the 600 test answers that are right, agreement the share that are those of the prompted model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from lightning_ft import LoRAFineTuning, PairDataModule, PromptBaseline, PromptDataModule, PromptDistillation
from lightning_ft.evaluation.retention.measurement import measure_retention
from lightning_ft.evaluation.savings.arithmetic import token_savings
from lightning_ft.evaluation.savings.arms import run_arm
from lightning_ft.evaluation.savings.plan import measurement_plan

FOLDER = Path(__file__).parent
BASE = str(FOLDER.parent / "tiny_base")
CONFIG = yaml.safe_load((FOLDER / "distill.yaml").read_text(encoding="utf-8"))
BASELINE = PromptBaseline.from_file(FOLDER / "baseline.json")
MAX_NEW_TOKENS = 12


class FlopCounter(L.Callback):
    """Counts the operations of a few steps in each epoch, and scales them up."""

    STEPS = 4

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0
        self._epoch: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start counting."""
        self._counter = FlopCounterMode(display=False)
        if batch_idx < self.STEPS:
            self._counter.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop counting."""
        if batch_idx < self.STEPS:
            self._counter.__exit__(None, None, None)
            self._epoch.append(float(self._counter.get_total_flops()))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Scale up. In the first epoch of distillation the teacher also writes its answers."""
        self.total += sum(self._epoch) / len(self._epoch) * trainer.num_training_batches
        self._epoch = []


def fit(module: Any, data: Any, epochs: int, seed: int) -> float:
    """Train a module; returns its operations in FLOPs."""
    L.seed_everything(seed)
    counter = FlopCounter()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[counter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return counter.total


def main() -> None:
    """Run both methods with every seed, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/distill_compare.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files: dict[str, Any] = CONFIG["data"]["init_args"]
    settings: dict[str, Any] = CONFIG["model"]["init_args"]
    epochs, batch_size = CONFIG["trainer"]["max_epochs"], files["batch_size"]

    base = LoRAFineTuning(BASE, dtype="float32")
    base.configure_model()
    rows = PairDataModule(train=files["train"], test=files["test"], tokenizer=base.tokenizer)
    rows.load_rows()
    examples = {example["input"] for example in BASELINE.few_shot}  # not trained on, since the prompt has their answers
    requests = {
        "train": [request for request in rows.requests("train") if request.messages[-1]["content"] not in examples],
        "test": rows.requests("test"),
    }
    plans = {
        split: measurement_plan(base.tokenizer, found, BASELINE, scorer="exact", max_new_tokens=MAX_NEW_TOKENS)
        for split, found in requests.items()
    }
    taught = run_arm("prompted", base.model, base.tokenizer, plans["train"], timed_requests=0, batch_size=128)
    pairs = [
        {"input": request.messages[-1]["content"], "output": answer}
        for request, answer in zip(plans["train"].requests, taught.outputs, strict=True)
        if answer.strip()
    ]
    bare = [{"prompt": request.messages[-1]["content"]} for request in requests["train"]]
    prompted, untuned = (
        run_arm(name, base.model, base.tokenizer, plans["test"], timed_requests=0, batch_size=128)
        for name in ("prompted", "untuned")
    )
    results: list[dict[str, Any]] = []

    def record(method: str, seed: int, module: Any, count: int, flops: float) -> None:
        arm = run_arm("tuned", module.model, module.tokenizer, plans["test"], timed_requests=0, batch_size=128)
        retained = measure_retention(
            module.model, module.tokenizer, texts=str(FOLDER.parent / "tiny_base" / "general.jsonl"), progress=False
        )
        gate = token_savings(prompted, arm, untuned, margin=0.05).gate
        agreement = sum(a == b for a, b in zip(arm.outputs, prompted.outputs, strict=True)) / len(arm.outputs)
        results.append(
            {
                "method": method,
                "seed": seed,
                "epochs": count,
                "tflop": flops / 1e12,
                "quality": arm.quality,
                "agreement": agreement,
                "kl": retained.kl_general.value,
                "verdict": gate.verdict,
                "bound": gate.bound,
            }
        )
        print(json.dumps(results[-1]), flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"prompted": prompted.quality, "runs": results}, indent=1) + "\n")

    for seed in options.seeds:
        module = PromptDistillation(**{**settings, "model": BASE, "prompt": BASELINE, "seed": seed})
        flops = fit(module, PromptDataModule(bare, batch_size=batch_size), epochs, seed)
        record("distillation", seed, module, epochs, flops)
        spent = 0.0
        for count in (epochs, None):
            count = count or max(1, round(epochs * flops / spent))
            tuned = LoRAFineTuning(BASE, dtype="float32", learning_rate=settings["learning_rate"], seed=seed)
            spent = fit(tuned, PairDataModule(pairs, batch_size=batch_size), count, seed)
            record("its answers", seed, tuned, count, spent)


if __name__ == "__main__":
    main()
