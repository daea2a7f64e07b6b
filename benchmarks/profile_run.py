"""Steps of the real modules under a Lightning Trainer: some are timed, some profiled, one is counted."""

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
"""Of both modules."""


@dataclass(frozen=True)
class Case:
    """A step.

    Args:
        kind: ``SFT`` or ``GRPO``.
        size: Of the model.
        count: Rows of the batch, or completions to each prompt.
        prompt: Mean length of the prompts, tokens.
        answer: Mean length of the answers, or length of the completions.
        prompts: Prompts of a rollout.
        packing: Of supervised rows; else they are padded.
    """

    kind: str
    size: Size
    count: int
    prompt: int
    answer: int
    prompts: int = 1
    packing: bool = True

    def __str__(self) -> str:
        what = (
            f"{self.count} rows, {'packed' if self.packing else 'padded'}"
            if self.kind == "SFT"
            else f"{self.prompts} prompts in groups of {self.count}"
        )
        return f"{self.kind}, {self.size}, {what}, prompts of {self.prompt}, answers of {self.answer}"


class SeparateCounter(OperationCounter):
    """Counts attention apart."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = 0
        """Operations of attention among `flops`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count it."""
        flops, attention = self.flops, self.attention
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if "attention" in str(func):
            self.attention = attention + self.flops - flops
        return out


class Watch(Callback):
    """Times some steps as they are, then profiles some, then counts one.

    Args:
        timed: How many are timed, after one that isn't.
        profiled: How many are profiled.
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
        """Of all."""
        return 1 + self.timed + self.profiled + 1

    def events(self) -> Sequence[Any]:
        """What the profiler saw."""
        return self._profiler.events()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A step begins, and the one before ends."""
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
        """The counted step ends."""
        self.counter.__exit__(None, None, None)


def supervised(case: Case, steps: int) -> tuple[Any, list[Any], int]:
    """A module, its batches, and the tokens of one: the same in every step."""
    module = LoRAFineTuning(model(case.size), tokenizer=tokenizer(), **OPTIONS)
    examples = rows(case.count, case.size.vocabulary, prompt=case.prompt, answer=case.answer)
    batch = collate_examples(examples, packing=case.packing, pad_token_id=1)
    return module, [batch] * steps, batch.num_tokens


def policy(case: Case, steps: int) -> tuple[Any, list[Any], int]:
    """The same for GRPO; no completion ends early."""
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
    """Train; what was seen of it, and the tokens of a step."""
    watch = Watch(timed, profiled)
    module, batches, tokens = (supervised if case.kind == "SFT" else policy)(case, watch.steps)
    torch.manual_seed(0)
    fit(module, batches, callbacks=[watch])
    return watch, tokens


def peak_rate(size: int = 2048, repetitions: int = 6) -> float:
    """Operations a second of a square product in fp32, the best of several."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = a @ b
    best = math.inf
    for _ in range(repetitions):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
