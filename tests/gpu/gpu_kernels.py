"""Checks of what runs on the device: kernels by name, products over the vocabulary, host syncs, idle time."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from gpu_runner import Outcome
from gpu_setup import Setup
from gpu_speed import sft_module
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOST_SYNCS = {"micro-batch": 3, "step": 3}
MOST_IDLE = 0.10
FORWARD, BACKWARD = r"flash.*(fwd|fprop|forward)|fmha.*forward", r"flash.*(bwd|bprop|backward)|fmha.*backward"
FLEX = {"forward": r"flex_attention(?!_backward)", "backward": r"flex_attention_backward|flex.*bwd"}
FLASH = {"forward": FORWARD, "backward": BACKWARD}
CPU = {"forward": r"attention_for_cpu$", "backward": r"attention_for_cpu_backward$"}


class VocabularyProducts(TorchDispatchMode):
    """Counts matrix products with the vocabulary as a dimension, by the dtype of their inputs.

    Args:
        vocabulary: Number of tokens in the vocabulary.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self.counts: dict[torch.dtype, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if re.search(r"mm|linear|matmul", str(func)):
            factors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf.ndim > 1][-2:]
            if any(self._vocabulary in factor.shape for factor in factors):
                dtype = factors[0].dtype
                self.counts[dtype] = self.counts.get(dtype, 0) + 1
        return out


def kernels(setup: Setup) -> Outcome:
    """Names of the attention kernels of packed and of padded rows, and dtypes of the products over the vocabulary."""
    outcome = Outcome()
    for lora in (True, False):
        for packing in (True, False):
            attention = setup.attention if packing else "sdpa"
            module = sft_module(setup, lora=lora, attention=attention)
            batches = setup.batches(2, packing=packing)
            setup.fit(module, batches[:1])  # probes, allocations, compilation
            products = VocabularyProducts(setup.vocabulary)
            with profile(activities=_activities(setup)) as profiler, products:
                setup.fit(module, batches[1:])
                setup.synchronize()
            name = f"{'LoRA' if lora else 'full'}, {'packed' if packing else 'padded'}, {attention}"
            names = device_names(setup, profiler)
            patterns = CPU if not setup.on_gpu else FLEX if attention == "flex_attention" else FLASH
            for which, pattern in patterns.items():
                if attention in ("sdpa", "eager") and packing and setup.on_gpu:
                    continue  # a dense mask, for which there is no such kernel
                found = sorted(one for one in names if re.search(pattern, one, re.IGNORECASE))
                outcome.measured[f"{name}, {which}"] = found[:2]
                outcome.require(bool(found), f"{name}: no kernel of the {which} pass matches {pattern!r}")
            counts = {str(dtype): count for dtype, count in products.counts.items()}
            outcome.measured[f"{name}, products over the vocabulary"] = counts
            outcome.require(bool(counts), f"{name}: no product over the vocabulary was seen")
            in_fp32 = products.counts.get(torch.float32, 0)
            allowed = not setup.on_gpu  # the checks' precision on a CPU
            outcome.require(allowed or not in_fp32, f"{name}: {in_fp32} products over the vocabulary in fp32")
    return outcome


def _activities(setup: Setup) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setup.on_gpu else [])]


def device_names(setup: Setup, profiler: Any) -> set[str]:
    """Names of the kernels that ran on the GPU; of operators on a CPU."""
    return {event.name for event in device_events(setup, profiler.events())}


def device_events(setup: Setup, events: Iterable[Any]) -> list[Any]:
    """Events of the device: kernels and copies on a GPU, operators on a CPU."""
    wanted = torch.autograd.DeviceType.CUDA if setup.on_gpu else torch.autograd.DeviceType.CPU
    return [event for event in events if event.device_type == wanted]


# ---------------------------------------------------------------- host syncs


def syncs(setup: Setup) -> Outcome:
    """Times that the host waits for the GPU in a micro-batch, and in a step beyond those, by PyTorch's count."""
    outcome = Outcome()
    counter = _SyncCounter(setup)
    module = _watched(sft_module(setup, lora=True), counter)
    batches = setup.batches(6)
    with counter:
        setup.fit(module, batches, accumulate_grad_batches=2, gradient_clip_val=1.0)
    for name, counts in (("micro-batch", counter.in_batches[2:]), ("step", counter.in_steps[1:])):
        outcome.measured[f"syncs in a {name}"] = max(counts)
        allowed = MOST_SYNCS[name]
        outcome.require(max(counts) <= allowed, f"{max(counts)} syncs in a {name}, at most {allowed} are allowed")
    outcome.measured["origins"] = sorted(counter.origins)[:12]
    return outcome


class _SyncCounter:
    """Counts the warnings of `torch.cuda.set_sync_debug_mode`; on a CPU there are none."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.count = 0
        self.in_batches: list[int] = []
        self.in_steps: list[int] = []
        self.origins: set[str] = set()

    def __enter__(self) -> None:
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._show  # type: ignore[assignment]
        if self._setup.on_gpu:
            torch.cuda.set_sync_debug_mode("warn")

    def __exit__(self, *error: object) -> None:
        if self._setup.on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(*error)  # type: ignore[arg-type]

    def _show(self, message: object, category: type, filename: str, lineno: int, *more: object) -> None:
        if "synchroniz" in str(message):
            self.count += 1
            self.origins.add(f"{filename.rpartition('site-packages/')[2]}:{lineno}")


def _watched(module: Any, counter: _SyncCounter) -> Any:
    """Let a module count syncs from a batch's copy to the end of its backward pass, and before each step."""

    class Watched(type(module)):  # type: ignore[misc]
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            counter.count = 0
            return super().on_before_batch_transfer(batch, dataloader_idx)

        def on_after_backward(self) -> None:
            super().on_after_backward()
            counter.in_batches.append(counter.count)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            counter.count = 0
            super().on_before_optimizer_step(optimizer)
            counter.in_steps.append(counter.count)

    module.__class__ = Watched
    return module


# ---------------------------------------------------------------- idle time


def idle(setup: Setup) -> Outcome:
    """Share of training in which the GPU does nothing."""
    outcome = Outcome()
    module = sft_module(setup, lora=True)
    batches = setup.batches(setup.work.warm + setup.work.timed)
    setup.fit(module, batches[: setup.work.warm])
    with profile(activities=_activities(setup)) as profiler:
        setup.fit(module, batches[setup.work.warm :])
        setup.synchronize()
    intervals = [(event.time_range.start, event.time_range.end) for event in device_events(setup, profiler.events())]
    share = 1.0 - busy_share(within_steps(intervals))
    outcome.measured["idle"] = share
    outcome.require(share <= MOST_IDLE, f"{share:.1%} of the time is idle, at most {MOST_IDLE:.0%} is allowed")
    return outcome


Intervals = Sequence[tuple[float, float]]


def within_steps(intervals: Intervals) -> Intervals:
    """Intervals without the first and last tenth, in which a Trainer starts and ends."""
    start, end = min(begin for begin, _ in intervals), max(stop for _, stop in intervals)
    margin = (end - start) / 10
    low, high = start + margin, end - margin
    return [(max(begin, low), min(stop, high)) for begin, stop in intervals if stop > low and begin < high]


def busy_share(intervals: Intervals) -> float:
    """Share of the time from the first to the last interval that is in any of them.

    Example:
        >>> busy_share([(0.0, 2.0), (1.0, 3.0), (4.0, 5.0)])
        0.8
    """
    ordered = sorted(intervals)
    start, reached = ordered[0]
    begun, idle_time = start, 0.0
    for begin, stop in ordered[1:]:
        idle_time += max(begin - reached, 0.0)
        reached = max(reached, stop)
    return 1.0 - idle_time / (reached - begun) if reached > begun else 1.0
