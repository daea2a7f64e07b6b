"""Run steps of the real modules under a Lightning Trainer: time some, profile some, count the operations of one."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from models import Size, lengths, model, rows, tokenizer
from profile_marks import marked
from torch.profiler import ProfilerActivity, profile
from training import fit, reward

from lightning_ft import LoRAFineTuning
from lightning_ft._lightning import Callback
from lightning_ft.data.batches import PromptBatch
from lightning_ft.data.layout import collate_examples
from lightning_ft.models.flops import OperationCounter
from lightning_ft.modules.grpo import GRPO

OPTIONS: dict[str, Any] = {"dtype": "float32", "lr_schedule": "constant", "warmup_ratio": 0.0}
"""Arguments of both modules."""


@dataclass(frozen=True)
class Case:
    """A training step.

    Args:
        method: ``SFT`` or ``GRPO``.
        size: Shape of the model.
        count: Number of rows per batch, or of completions per prompt.
        prompt: Mean number of tokens per prompt.
        answer: Mean number of tokens per answer, or number of tokens per completion.
        prompts: Number of prompts per rollout.
        packing: Whether supervised rows are packed rather than padded.
    """

    method: str
    size: Size
    count: int
    prompt: int
    answer: int
    prompts: int = 1
    packing: bool = True

    def __str__(self) -> str:
        what = (
            f"{self.count} rows, {'packed' if self.packing else 'padded'}"
            if self.method == "SFT"
            else f"{self.prompts} prompts in groups of {self.count}"
        )
        return f"{self.method}, {self.size}, {what}, prompts of {self.prompt}, answers of {self.answer}"


class SeparateCounter(OperationCounter):
    """Operation counter that also counts attention separately."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = 0
        """Operations of attention, which `flops` includes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count its operations."""
        flops, attention = self.flops, self.attention
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if "attention" in str(func):
            self.attention = attention + self.flops - flops
        return out


class Watch(Callback):
    """Time some steps without the profiler, then profile some, then count the operations of one.

    Args:
        timed: Number of timed steps, after an untimed one.
        profiled: Number of profiled steps.
    """

    def __init__(self, timed: int, profiled: int) -> None:
        super().__init__()
        self.timed, self.profiled = timed, profiled
        self.times: list[float] = []
        self.watched = 0.0
        self.counter = SeparateCounter()
        self._profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self._marks = ExitStack()
        self._at = 0.0

    @property
    def steps(self) -> int:
        """Number of all steps."""
        return 1 + self.timed + self.profiled + 1

    def events(self) -> Sequence[Any]:
        """Events of the profiled steps."""
        return self._profiler.events()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Finish the measurement of the previous step, and start the next one."""
        now = time.perf_counter()
        if 1 < batch_idx <= 1 + self.timed:
            self.times.append(now - self._at)
        if batch_idx == 1 + self.timed:
            marked(self._marks, trainer)
            self._profiler.start()
        elif batch_idx == 1 + self.timed + self.profiled:
            self.watched = (now - self._at) / self.profiled
            self._profiler.stop()
            self._marks.close()
            self.counter.__enter__()
        if batch_idx <= 1 + self.timed:
            self._at = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish the counted step."""
        self.counter.__exit__(None, None, None)


def supervised(case: Case, steps: int) -> tuple[Any, list[Any], int]:
    """Build an SFT module, its batches, which are all the same, and the number of tokens per batch."""
    module = LoRAFineTuning(model(case.size), tokenizer=tokenizer(), **OPTIONS)
    examples = rows(case.count, case.size.vocabulary, prompt=case.prompt, answer=case.answer)
    batch = collate_examples(examples, packing=case.packing, pad_token_id=1)
    return module, [batch] * steps, batch.num_tokens


def policy(case: Case, steps: int) -> tuple[Any, list[Any], int]:
    """Build a GRPO module, its batches, and the number of new tokens per rollout; no completion ends early."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(2, case.size.vocabulary, (length,), generator=generator)
        for length in lengths(case.prompts, case.prompt, 0.3 if case.prompts > 1 else 0.0, generator)
    ]
    module = GRPO(
        model(case.size),
        tokenizer=tokenizer(),
        rewards=reward,
        lora=True,
        num_completions=case.count,
        max_new_tokens=case.answer,
        **OPTIONS,
    )
    module.engine.end_token_ids = (case.size.vocabulary,)  # type: ignore[attr-defined]  # no such token
    batch = PromptBatch([""] * case.prompts, prompts, columns={})
    return module, [batch] * steps, case.prompts * case.count * case.answer


def watched(case: Case, *, timed: int, profiled: int) -> tuple[Watch, int]:
    """Train, and return the measurements and the number of tokens per step."""
    watch = Watch(timed, profiled)
    module, batches, tokens = (supervised if case.method == "SFT" else policy)(case, watch.steps)
    torch.manual_seed(0)
    fit(module, batches, callbacks=[watch])
    return watch, tokens


def peak_rate(size: int = 2048, repetitions: int = 6) -> float:
    """Measure a square matrix product in fp32: operations per second, the best of several runs."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = a @ b
    best = math.inf
    for _ in range(repetitions):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
