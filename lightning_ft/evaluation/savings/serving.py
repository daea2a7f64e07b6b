"""What answering costs a machine, by formula from a model's shape: prefill arithmetic and cache memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import CausalLM, base_of
from lightning_ft.rollout.cache import GrowingCache
from lightning_ft.rollout.local import LocalEngine


@dataclass(frozen=True)
class ModelShape:
    """What the formulas need.

    Args:
        weights: Entries of the matrices that every token is multiplied with, the output head and adapters left out.
        head: Entries of the output head, used once for each prompt.
        layers: Attention layers; for each its window in tokens, or None for full attention.
        heads: Query heads.
        key_value_heads: Key and value heads.
        key_dim: Size of a key.
        value_dim: Size of a value.
        bytes_per_number: Of the weights' dtype, in which keys and values are kept too.

    Example:
        >>> shape = ModelShape(1000, 100, (None, None), 4, 2, 8, 8, 2)
        >>> shape.prefill_flops(10), shape.kv_cache_bytes(10)
        (34280, 1280)
    """

    weights: int
    head: int
    layers: tuple[int | None, ...]
    heads: int
    key_value_heads: int
    key_dim: int
    value_dim: int
    bytes_per_number: int

    def prefill_flops(self, tokens: int) -> int:
        """Operations to run a prompt through the model: ``2 (W I + H) + h (d_k + d_v) sum_layers I (I + 1)``.

        A multiplication and an addition count as two. Token i attends to i tokens (at most its layer's window) with
        ``h`` heads, which is ``2 h (d_k + d_v)`` for each pair. Norms, softmax and activations aren't counted, nor are
        adapters.
        """
        pairs = sum(_pairs(tokens, window) for window in self.layers)
        return 2 * (self.weights * tokens + self.head) + 2 * self.heads * (self.key_dim + self.value_dim) * pairs

    def kv_cache_bytes(self, tokens: int) -> int:
        """Memory of so many tokens' keys and values: ``h_kv (d_k + d_v) bytes sum_layers min(tokens, window)``."""
        kept = sum(tokens if window is None else min(tokens, window) for window in self.layers)
        return self.key_value_heads * (self.key_dim + self.value_dim) * self.bytes_per_number * kept


def _pairs(tokens: int, window: int | None) -> int:
    w = tokens if window is None else min(tokens, window)
    return w * (w + 1) // 2 + (tokens - w) * w


def model_shape(model: CausalLM) -> ModelShape | None:
    """The shape of a model; None where a formula would not fit it (experts, state spaces, no attention)."""
    base = base_of(model)
    config: Any = base.config.get_text_config(decoder=True)
    head = base.get_output_embeddings()
    weights = 0
    for name, module in base.named_modules():
        if "lora_" in name or module is head:
            continue
        if isinstance(module, nn.Linear):  # sizes and not numel: quantized weights are packed
            weights += module.in_features * module.out_features
        elif isinstance(module, Conv1D):
            weights += module.nx * module.nf
        elif any(parameter.ndim > 2 for parameter in module.parameters(recurse=False)):
            return None
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        return None
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not (isinstance(heads, int) and isinstance(hidden, int) and isinstance(layers, int)):
        return None
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        windows: tuple[int | None, ...] = (window,) * layers
    elif set(kinds) <= {"full_attention", "sliding_attention"}:
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    else:
        return None
    return ModelShape(
        weights=weights,
        head=hidden * int(config.vocab_size),
        layers=windows,
        heads=heads,
        key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        key_dim=getattr(config, "qk_head_dim", None) or head_dim,
        value_dim=getattr(config, "v_head_dim", None) or head_dim,
        bytes_per_number=base.dtype.itemsize,
    )


def first_token_seconds(
    engine: LocalEngine, prompts: Sequence[Sequence[int]], shared: int, *, rounds: int = 3
) -> dict[str, float]:
    """Median time from a prompt to its first new token, one request at a time.

    Args:
        engine: Holds the model.
        prompts: Prompts of one arm.
        shared: Tokens they all start with.
        rounds: How many of the prompts are timed, after one that isn't.

    Returns:
        Seconds, ``cold`` with nothing cached and ``warm`` with the shared prefix in the cache. Without a prefix to
        share, or for a model whose cache can't be shared, there is no ``warm``.
    """
    chosen = [list(prompt) for prompt in prompts[:rounds]]
    with evaluating(engine.model):
        engine.first_token(chosen[0])  # the first pass of a model allocates and compiles
        seconds = {"cold": median([_timed(engine, prompt, None) for prompt in chosen])}
        if shared and (cached := engine.read_prefix(chosen[0][:shared], max(map(len, chosen)) + 1)) is not None:
            seconds["warm"] = median([_timed(engine, prompt[shared:], cached) for prompt in chosen])
    return seconds


def _timed(engine: LocalEngine, prompt: Sequence[int], prefix: GrowingCache | None) -> float:
    _wait()
    start = time.perf_counter()
    engine.first_token(prompt, prefix)  # an int on this side, so the device has finished
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
