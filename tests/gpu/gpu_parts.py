"""Checks of single parts: the head, quantized bases, compilation, and the constants that layouts depend on."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_runner import Outcome, Skipped
from gpu_setup import Setup, lora_options, tokenizer
from gpu_speed import sft_module
from gpu_timing import MIB, timed_fit
from torch import Tensor

from lightning_ft import FullFineTuning, LoRAFineTuning, ShardedStrategy
from lightning_ft.losses.logprobs import linear_logprob_sum

MOST_GRAPHS = 3


def seconds_of(setup: Setup, function: Callable[[], object], *, repeats: int = 5) -> float:
    """Seconds per call, after two calls that aren't counted."""
    for _ in range(2):
        function()
    setup.synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        function()
    setup.synchronize()
    return (time.perf_counter() - begun) / repeats


# ---------------------------------------------------------------- the head


def head(setup: Setup) -> Outcome:
    """Time and memory of the head with its loss, forward and backward, against Liger's fused cross-entropy."""
    outcome = Outcome()
    targets = 4096 if setup.on_gpu else 64
    dtype = torch.bfloat16 if setup.on_gpu else torch.float32
    generator = torch.Generator().manual_seed(0)
    width = int(setup.work.model["hidden_size"])
    states = torch.randn(targets, width, generator=generator).to(setup.device, dtype)
    weight = (torch.randn(setup.vocabulary, width, generator=generator) * 0.02).to(setup.device, dtype)
    ids = torch.randint(setup.vocabulary, (targets,), generator=generator).to(setup.device)
    peers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ours": lambda hidden, head: -linear_logprob_sum(hidden, head, ids).logprobs,
        "trl": lambda hidden, head: -_trl_logprobs(hidden, head, ids).sum(),
    }
    if importlib.util.find_spec("liger_kernel") is not None and setup.on_gpu:
        peers["liger"] = _liger(ids)
    else:
        outcome.measured["liger"] = "not installed" if setup.on_gpu else "needs a GPU"
    for trained in (False, True):
        losses, times = {}, {}
        for name, loss in peers.items():
            hidden, head_weight = states.clone().requires_grad_(), weight.clone().requires_grad_(trained)

            def step(loss: Any = loss, hidden: Tensor = hidden, head_weight: Tensor = head_weight) -> Tensor:
                hidden.grad = head_weight.grad = None
                value: Tensor = loss(hidden, head_weight)
                value.backward()
                return value

            losses[name] = float(step()) / targets
            times[name] = seconds_of(setup, step)
            what = f"{name}, {'trained' if trained else 'frozen'}"
            outcome.measured[f"{what}, ms"] = 1e3 * times[name]
            if setup.on_gpu:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                outcome.measured[f"{what}, MiB"] = (torch.cuda.max_memory_allocated() - before) / MIB
        for name in peers:
            difference = abs(losses[name] - losses["ours"])
            outcome.require(difference <= 2e-2, f"the loss of {name} differs by {difference:.1e} nats per token")
            ratio = times[name] / times["ours"]
            outcome.require(ratio >= 1.0, f"{name} is {1 / ratio:.2f} times as fast ({trained=})")
    return outcome


def _trl_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    outputs = ("log_probs", "entropy", "is_top1")
    logprobs, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, 32_768, None, 1.0, outputs)
    found: Tensor = logprobs
    return found


def _liger(ids: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, head: fused(head, hidden, ids)  # type: ignore[no-any-return]


# ---------------------------------------------------------------- quantized bases


def qlora(setup: Setup) -> Outcome:
    """Training an adapter over a base in 4 bits: speed, memory, and a loss that falls."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes isn't installed")
    outcome = Outcome()
    work = setup.work
    with tempfile.TemporaryDirectory() as folder:
        setup.model(dtype=torch.bfloat16).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        module = LoRAFineTuning(
            folder,
            lora=lora_options(),
            quantization="4bit",
            attn_implementation=setup.attention,
            learning_rate=1e-3,
            lr_schedule="constant",
            warmup_ratio=0.0,
        )
        batches = setup.batches(1) * (work.warm + work.timed)  # the same one, whose loss has to fall
        losses = _recorded(module)
        timing = timed_fit(setup, module, batches, [batch.num_tokens for batch in batches])
    outcome.measured |= {"tokens_per_second": timing.rate, "first_loss": losses[0], "last_loss": losses[-1]}
    outcome.require(losses[-1] < losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    if setup.on_gpu:
        outcome.measured["peak_mib"] = timing.peak / MIB
    quantized = [p for p in module.model.parameters() if p.dtype == torch.uint8]
    outcome.require(bool(quantized), "no weight is quantized")
    return outcome


# ---------------------------------------------------------------- sharding


def sharding(setup: Setup) -> Outcome:
    """Losses of training over FSDP2, all of whose shards are on this GPU, or in the memory of the CPU."""
    outcome = Outcome()
    batches = setup.batches(1) * 3  # the same one, whose loss has to fall
    modes: dict[str, Callable[[], dict[str, Any]]] = {
        "whole": dict,
        "offloaded": lambda: {"strategy": ShardedStrategy(cpu_offload=True)},
        "sharded": lambda: {"strategy": ShardedStrategy()},
    }
    with tempfile.TemporaryDirectory() as folder:
        setup.model(layers=2).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        for quantization in (None, "4bit") if importlib.util.find_spec("bitsandbytes") is not None else (None,):
            found = {}
            for mode, strategy in modes.items():
                module = _sharded_module(setup, folder, quantization)
                found[mode] = _recorded(module)
                setup.fit(module, batches, gradient_clip_val=1.0, **strategy())
                kept = {p.device.type for p in module.parameters()}
                # Lightning moves an unsharded model to the CPU at the end.
                expected = {"offloaded": {"cpu"}, "sharded": {setup.device}}.get(mode, kept)
                outcome.require(kept == expected, f"{mode} weights are on {kept} after training, not on {expected}")
            name = quantization or "full"
            outcome.measured |= {f"{name}_{mode}_losses": losses for mode, losses in found.items()}
            for mode in ("offloaded", "sharded"):
                most = max(abs(one - other) for one, other in zip(found[mode], found["whole"], strict=True))
                outcome.require(most < 0.05, f"{name}: {mode} losses differ by {most:.3g}, 0.05 is allowed")
                outcome.require(found[mode][-1] < found[mode][0], f"{name}: the loss of {mode} training doesn't fall")
    return outcome


def _sharded_module(setup: Setup, folder: str, quantization: str | None) -> Any:
    options: dict[str, Any] = {"learning_rate": 1e-3, "lr_schedule": "constant", "warmup_ratio": 0.0}
    options |= {"dtype": "float32", "attn_implementation": setup.attention}
    if quantization is None:
        return FullFineTuning(folder, **options)
    return LoRAFineTuning(folder, lora=lora_options(), quantization=quantization, **options)


def _recorded(module: Any) -> list[float]:
    """List of the losses of each micro-batch, filled in training."""
    losses: list[float] = []

    class Recording(type(module)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            losses.append(float(loss))
            return loss

    module.__class__ = Recording
    return losses


# ---------------------------------------------------------------- compilation


def compile_graphs(setup: Setup) -> Outcome:
    """Graphs of a compiled backbone over packed batches of many shapes, and its speed against the uncompiled one."""
    from torch._dynamo.utils import counters

    outcome = Outcome()
    batches = setup.batches(setup.work.warm + setup.work.timed)
    amounts = [batch.num_tokens for batch in batches]
    backend = "inductor" if setup.on_gpu else "eager"
    rates = {}
    for compiled in (False, True):
        attention = "sdpa" if setup.attention == "flex_attention" else setup.attention
        options = {"torch_compile": {"backend": backend}} if compiled else {}
        module = sft_module(setup, lora=True, attention=attention, **options)
        counters.clear()
        rates[compiled] = timed_fit(setup, module, batches, amounts).rate
        del module
    graphs = int(counters["stats"]["unique_graphs"])
    outcome.measured |= {
        "graphs": graphs,
        "shapes": len({tuple(batch.input_ids.shape) for batch in batches}),
        "compiled_tokens_per_second": rates[True],
        "tokens_per_second": rates[False],
    }
    outcome.require(1 <= graphs <= MOST_GRAPHS, f"{graphs} graphs, 1 to {MOST_GRAPHS} are allowed")
    return outcome


# ---------------------------------------------------------------- constants of layouts


def row_constants(setup: Setup) -> Outcome:
    """Positions of masked SDPA that cost as much as a position of products, in units of the model's width.

    It is the constant of this device for `lightning_ft.data.row_costs`, which is counted until it has been measured.
    """
    outcome = Outcome()
    work = setup.work.model
    width, heads = int(work["hidden_size"]), int(work["num_attention_heads"])
    dtype = torch.bfloat16 if setup.on_gpu else torch.float32
    length = 4096 if setup.on_gpu else 256

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=setup.device, dtype=dtype)

    states, weight = random(length, width), random(12 * width, width)  # the weights of a layer, about
    query, key, value = (random(1, heads, length, width // heads) for _ in range(3))
    mask = torch.zeros(1, 1, length, length, device=setup.device, dtype=dtype)

    def attend() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    products = seconds_of(setup, lambda: states @ weight.t()) / length
    attention = seconds_of(setup, attend) / length**2
    outcome.measured |= {"width": width, "square_per_width": products / attention / width}
    return outcome
