"""Distilling a prompt, against fine-tuning on the prompted model's own answers; used by the distilling scripts.

Neither method reads an answer of the training rows. Both start from the requests and the prompt: one learns the
prompted model's distributions (`PromptDistillation`), the other its most probable answers (`LoRAFineTuning`). The
second is run for as many epochs, and once more for as many FLOPs as the first took, what the teacher computes included.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as L
from torch.utils.flop_counter import FlopCounterMode

from lightning_ft import LoRAFineTuning, PairDataModule, PromptBaseline, PromptDataModule, PromptDistillation
from lightning_ft.evaluation.retention.measurement import measure_retention
from lightning_ft.evaluation.savings.arithmetic import token_savings
from lightning_ft.evaluation.savings.arms import run_arm
from lightning_ft.evaluation.savings.plan import MeasurementPlan, measurement_plan
from lightning_ft.evaluation.savings.records import ArmRecords
from lightning_ft.evaluation.scorers import Scorer
from lightning_ft.types import Request


@dataclass(frozen=True)
class Task:
    """What is distilled, and how it is measured.

    Args:
        model: Folder of the base model.
        prompt: The prompt to train in.
        train: Requests of the training rows, without those that the prompt answers.
        test: Requests to measure on.
        scorer: Scorer of the answers.
        max_new_tokens: Maximum number of tokens per answer.
        epochs: Number of epochs over the training requests.
        batch_size: Rows per optimizer step.
        learning_rate: Learning rate of both methods.
        texts: General texts, whose divergence from the base is measured.
        max_texts: Largest number of them; None for all.
        margin: Margin of the quality gate.
        trainer: Further arguments of the Trainer.
    """

    model: str
    prompt: PromptBaseline
    train: Sequence[Request]
    test: Sequence[Request]
    scorer: str | Scorer
    max_new_tokens: int
    epochs: int
    batch_size: int
    learning_rate: float
    texts: str
    max_texts: int | None = None
    margin: float = 0.05
    trainer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training and what came of it.

    Args:
        method: What was learned from.
        seed: Seed of the run.
        epochs: Number of epochs.
        tflop: Operations of the training, in TFLOP.
        quality: Mean score of the answers to test requests.
        agreement: Share of the answers that are those of the prompted model.
        kl: Divergence from the base on general texts, in nats per token.
        verdict: The quality gate's verdict.
        bound: Its lower bound of the difference in quality to the prompted model.
    """

    method: str
    seed: int
    epochs: int
    tflop: float
    quality: float
    agreement: float
    kl: float
    verdict: str
    bound: float


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


class Comparison:
    """Both methods, measured on the same requests.

    Args:
        task: What is distilled.
        output: JSON file of the runs, written after each.
    """

    def __init__(self, task: Task, output: Path) -> None:
        self.task, self._output = task, output
        self._base = LoRAFineTuning(task.model, dtype="float32")
        self._base.configure_model()
        self._plans = {"train": self._plan(task.train), "test": self._plan(task.test)}
        self.prompted, self.untuned = (self._answers(name, "test", self._base) for name in ("prompted", "untuned"))
        self.runs: list[Run] = []
        print(f"right with the prompt: {self.prompted.quality:.3f}, without: {self.untuned.quality:.3f}", flush=True)

    def run(self, seeds: Sequence[int]) -> None:
        """Train with both methods and every seed; print and write each result."""
        pairs = [
            {"input": request.messages[-1]["content"], "output": answer}
            for request, answer in zip(
                self._plans["train"].requests, self._answers("prompted", "train", self._base).outputs, strict=True
            )
            if answer.strip()
        ]
        bare = [{"prompt": request.messages[-1]["content"]} for request in self.task.train]
        for seed in seeds:
            for run in self._trainings(bare, pairs, seed):
                self.runs.append(run)
                print(json.dumps(asdict(run)), flush=True)
                self._output.parent.mkdir(parents=True, exist_ok=True)
                written = {
                    "prompted": self.prompted.quality,
                    "untuned": self.untuned.quality,
                    "runs": [asdict(finished) for finished in self.runs],
                }
                self._output.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")

    def _trainings(self, bare: list[dict[str, str]], pairs: list[dict[str, str]], seed: int) -> Iterator[Run]:
        task = self.task
        distilled = PromptDistillation(
            task.model,
            prompt=task.prompt,
            lora=True,
            dtype="float32",
            learning_rate=task.learning_rate,
            temperature=0.0,
            max_new_tokens=task.max_new_tokens,
            seed=seed,
        )
        flops = self._fit(distilled, PromptDataModule(bare, batch_size=task.batch_size), task.epochs, seed)
        yield self._measured("distillation", seed, distilled, task.epochs, flops)
        spent, epochs = 0.0, task.epochs
        for _ in range(2):
            tuned = LoRAFineTuning(task.model, dtype="float32", learning_rate=task.learning_rate, seed=seed)
            spent = self._fit(tuned, PairDataModule(pairs, batch_size=task.batch_size), epochs, seed)
            yield self._measured("its answers", seed, tuned, epochs, spent)
            epochs = max(1, round(epochs * flops / spent))

    def _fit(self, module: Any, data: Any, epochs: int, seed: int) -> float:
        """Train a module; returns its operations in FLOPs."""
        L.seed_everything(seed)
        counter = FlopCounter()
        options: dict[str, Any] = {
            "accelerator": "cpu",
            "max_epochs": epochs,
            "gradient_clip_val": 1.0,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "callbacks": [counter],
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        L.Trainer(**{**options, **self.task.trainer}).fit(module, data)
        return counter.total

    def _measured(self, method: str, seed: int, module: Any, epochs: int, flops: float) -> Run:
        arm = self._answers("tuned", "test", module)
        retained = measure_retention(
            module.model, module.tokenizer, texts=self.task.texts, max_texts=self.task.max_texts, progress=False
        )
        gate = token_savings(self.prompted, arm, self.untuned, margin=self.task.margin).gate
        agreement = sum(a == b for a, b in zip(arm.outputs, self.prompted.outputs, strict=True)) / len(arm.outputs)
        kl = retained.kl_general.value
        return Run(method, seed, epochs, flops / 1e12, arm.quality, agreement, kl, gate.verdict, gate.bound)

    def _plan(self, requests: Sequence[Request]) -> MeasurementPlan:
        task = self.task
        return measurement_plan(
            self._base.tokenizer, requests, task.prompt, scorer=task.scorer, max_new_tokens=task.max_new_tokens
        )

    def _answers(self, arm: Any, split: str, module: Any) -> ArmRecords:
        return run_arm(
            arm, module.model, module.tokenizer, self._plans[split], timed_requests=0, batch_size=128, progress=False
        )
