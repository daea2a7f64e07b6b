"""Time, peak memory and model FLOPs of the steps of a training, ours or TRL's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_runner import Outcome
from gpu_setup import Setup
from torch import nn

from lightning_ft._lightning import Callback
from lightning_ft.data.layout import TokenBatch
from lightning_ft.models.flops import known_peak
from lightning_ft.models.passes import sequence_lengths

MIB = 2**20


@dataclass(frozen=True)
class Timing:
    """Measured steps.

    Args:
        seconds: Time of all measured steps.
        amount: Work of these steps: tokens, pairs, or completions.
        peak: Peak of allocated GPU memory within them, in bytes; 0 on a CPU.
    """

    seconds: float
    amount: int
    peak: int

    @property
    def rate(self) -> float:
        """Work per second."""
        return self.amount / self.seconds


class Clock:
    """Times steps after a few warm ones; the device is waited for at both ends only.

    Args:
        setup: Where the steps run.
        warm: Number of steps before the first timed one.
    """

    def __init__(self, setup: Setup, warm: int) -> None:
        self._setup, self._warm = setup, warm
        self._steps = self._amount = 0
        self._begun = 0.0

    def begin(self) -> None:
        """A step begins."""
        if self._steps == self._warm:
            self._setup.synchronize()
            if self._setup.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            self._begun = time.perf_counter()

    def end(self, amount: int) -> None:
        """A step of this much work ends."""
        self._amount += amount * (self._steps >= self._warm)
        self._steps += 1

    def read(self) -> Timing:
        """The measurement, after the last step."""
        self._setup.synchronize()
        peak = torch.cuda.max_memory_allocated() if self._setup.on_gpu else 0
        return Timing(time.perf_counter() - self._begun, self._amount, peak)


class TimedSteps(Callback):
    """Times the steps of a Lightning Trainer; the amount of each batch is known beforehand.

    Args:
        clock: The clock.
        amounts: Work of each batch.
    """

    def __init__(self, clock: Clock, amounts: Sequence[int]) -> None:
        self._clock, self._amounts = clock, amounts
        self.timing: Timing | None = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        self._clock.begin()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step ends; the last one is followed by nothing else that takes time."""
        self._clock.end(self._amounts[batch_idx])
        if batch_idx == len(self._amounts) - 1:
            self.timing = self._clock.read()


def timed_fit(setup: Setup, module: Any, batches: Sequence[Any], amounts: Sequence[int]) -> Timing:
    """Train once on each batch, and time all but the first ones.

    Args:
        setup: Where to train.
        module: Module to train.
        batches: Batches.
        amounts: Work of each batch.
    """
    steps = TimedSteps(Clock(setup, setup.work.warm), amounts)
    setup.fit(module, batches, callbacks=[steps])
    assert steps.timing is not None
    return steps.timing


def needed_flops(model: nn.Module, batches: Sequence[TokenBatch]) -> float:
    """FLOPs that training on these batches needs: what any implementation has to compute, recomputation excluded.

    Two per weight and token in the forward pass, the head at supervised tokens only, and attention to the tokens
    before each token in its own sequence. The backward pass takes as much again for the inputs, and as much for the
    weights that are trained.

    Args:
        model: A transformers or PEFT model.
        batches: Batches without shared prefixes.
    """
    from lightning_ft.models.backbone import head_of
    from lightning_ft.models.head import base_of

    base = base_of(model)  # type: ignore[arg-type]
    head = head_of(base)
    config = base.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    lengths = [length for batch in batches for length in sequence_lengths(batch)]
    tokens, targets = sum(batch.num_tokens for batch in batches), sum(batch.num_targets for batch in batches)
    flops = 0.0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and isinstance(weight, nn.Parameter):
            passes = 2 + weight.requires_grad
            flops += 2.0 * passes * weight.numel() * (targets if module is head else tokens)
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    return flops + 3 * config.num_hidden_layers * 4.0 * width * pairs


def compare(outcome: Outcome, ours: Timing, theirs: Timing, unit: str, *, peer: str = "trl") -> None:
    """Note speeds and memory of both sides, and require that ours is at least as good in both.

    Args:
        outcome: Where to note them.
        ours: Our measurement.
        theirs: The peer's.
        unit: What the amounts count, in the plural.
        peer: Name of the peer.
    """
    speed = ours.rate / theirs.rate
    outcome.measured |= {f"{unit}_per_second": ours.rate, f"{peer}_{unit}_per_second": theirs.rate, "speed": speed}
    outcome.require(speed >= 1.0, f"{speed:.2f} times as fast as {peer}, at least 1.0 is required")
    if theirs.peak:
        memory = ours.peak / theirs.peak
        outcome.measured |= {"peak_mib": ours.peak / MIB, f"{peer}_peak_mib": theirs.peak / MIB, "memory": memory}
        outcome.require(memory <= 1.0, f"{memory:.2f} times the peak memory of {peer}, at most 1.0 is allowed")


def utilization(outcome: Outcome, timing: Timing, flops: float, least: float, device: str) -> None:
    """Note the share of the device's peak that needed FLOPs took, and require a least share where a peak is known."""
    outcome.measured["tflops_per_second"] = flops / timing.seconds / 1e12
    peak = known_peak(torch.device(device), torch.bfloat16)
    if peak is not None:
        share = flops / timing.seconds / peak
        outcome.measured["mfu"] = share
        outcome.require(share >= least, f"{share:.1%} of the device's peak, at least {least:.0%} is required")
