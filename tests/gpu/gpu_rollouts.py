"""Sampling by the engines that need no server: tokens per second, and log-probabilities equal to the model's."""

from __future__ import annotations

import time
from typing import Any

import torch
from gpu_runner import Outcome
from gpu_setup import Setup
from gpu_timing import MIB
from peft import LoraConfig, get_peft_model

from lightning_ft.models.generate import evaluating
from lightning_ft.rollout.continuous_batching import ContinuousBatchingEngine
from lightning_ft.rollout.local import LocalEngine
from lightning_ft.rollout.protocol import Rollouts, Sampling

_LENGTHS = 4
"""How many times as long as the mean the longest completions may be."""


def rollouts(setup: Setup) -> Outcome:
    """Tokens per second of sampled completions of very different lengths, under the precision of training."""
    outcome, work = Outcome(), setup.work
    model = get_peft_model(setup.model(attention="sdpa"), LoraConfig(r=16, target_modules="all-linear"))
    prompts = [row.input_ids[: work.prompt].tolist() for row in setup.examples(2 * work.pairs)]
    # Enough end tokens that a random model ends a completion after `answer` tokens, in the mean.
    ends = torch.randperm(setup.vocabulary, generator=torch.Generator().manual_seed(0))
    end_token_ids = ends[: setup.vocabulary // work.answer].tolist()
    shared: dict[str, Any] = {"end_token_ids": end_token_ids, "batch_size": 64}
    settings = {} if setup.on_gpu else {"page_size": 16}
    engines: dict[str, Any] = {
        "local": LocalEngine(model, pad_token_id=1, **shared),
        "local, adapter merged": LocalEngine(model, pad_token_id=1, merge_adapter=True, **shared),
        "continuous batching": ContinuousBatchingEngine(model, settings=settings, **shared),
    }
    options: dict[str, Any] = {
        "max_new_tokens": _LENGTHS * work.answer,
        "sampling": Sampling(),
        "num_completions": work.group,
    }
    for name, engine in engines.items():
        with torch.autocast(setup.device, dtype=torch.bfloat16, enabled=setup.on_gpu):
            engine.generate(prompts[:2], **{**options, "max_new_tokens": 8})
            if setup.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            setup.synchronize()
            begun = time.perf_counter()
            found = engine.generate(prompts, **options)
            setup.synchronize()
            seconds = time.perf_counter() - begun
            difference = _largest_difference(setup, model, prompts, found, work.group)
        outcome.measured[f"{name}, tokens/s"] = sum(len(c.tokens) for c in found.completions) / seconds
        outcome.measured[f"{name}, difference of log-probabilities"] = difference
        if setup.on_gpu:
            outcome.measured[f"{name}, MiB"] = torch.cuda.max_memory_allocated() / MIB
        allowed = 0.1 if setup.on_gpu else 1e-3
        outcome.require(difference <= allowed, f"{name}: log-probabilities differ by {difference:.1e} in the mean")
    return outcome


def _largest_difference(
    setup: Setup, model: Any, prompts: list[list[int]], found: Rollouts, group: int, rows: int = 8
) -> float:
    """Largest mean difference, over some completions, between an engine's log-probabilities and the model's own."""
    largest = 0.0
    for number in range(0, min(rows, len(prompts)) * group, group):
        completion, prompt = found.completions[number], prompts[number // group]
        ids = torch.tensor([[*prompt, *completion.tokens]], device=setup.device)
        with evaluating(model):
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        tokens = torch.tensor(completion.tokens, device=setup.device)
        expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        reported = torch.tensor(completion.logprobs, device=setup.device)
        largest = max(largest, float((expected - reported).abs().mean()))
    return largest
