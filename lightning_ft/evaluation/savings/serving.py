"""Serving cost of a request: prefill FLOPs and KV cache size from the model's shape, and time to first token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_ft.models.autocast import weights_cast_once
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import CausalLM, base_of
from lightning_ft.rollout.cache import GrowingCache
from lightning_ft.rollout.local import LocalEngine


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a model from which prefill FLOPs and the size of the KV cache follow.

    Args:
        weights: Number of entries of all weight matrices that each token is multiplied with, without output head and
            adapters.
        head: Number of entries of the output head, which is applied once per prompt.
        layers: Sliding window of each attention layer in tokens, or None for full attention.
        heads: Number of query heads.
        key_value_heads: Number of key and value heads.
        key_dim: Dimension of a key.
        value_dim: Dimension of a value.
        bytes_per_number: Bytes per number in the dtype of the weights, which is also that of keys and values.

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
        """Number of operations to process a prompt: ``2 (W I + H) + h (d_k + d_v) sum_layers I (I + 1)``.

        A multiplication and an addition count as two operations. Token i attends to i tokens (at most the sliding
        window of the layer) with ``h`` heads, at ``2 h (d_k + d_v)`` operations per pair. Norms, softmax, activations
        and adapters aren't counted.

        Args:
            tokens: Number of tokens `I` of the prompt.
        """
        pairs = sum(_pairs(tokens, window) for window in self.layers)
        return 2 * (self.weights * tokens + self.head) + 2 * self.heads * (self.key_dim + self.value_dim) * pairs

    def kv_cache_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of a sequence: ``h_kv (d_k + d_v) bytes sum_layers min(tokens, window)``.

        Args:
            tokens: Number of tokens of the sequence.
        """
        kept = sum(tokens if window is None else min(tokens, window) for window in self.layers)
        return self.key_value_heads * (self.key_dim + self.value_dim) * self.bytes_per_number * kept


def _pairs(tokens: int, window: int | None) -> int:
    """Number of pairs of a query and a key that it attends to."""
    w = tokens if window is None else min(tokens, window)
    return w * (w + 1) // 2 + (tokens - w) * w


def model_shape(model: CausalLM) -> ModelShape | None:
    """Shape of a model; None for architectures that the formulas don't cover (experts, state spaces, no attention)."""
    base = base_of(model)
    config: Any = base.config.get_text_config(decoder=True)
    head = base.get_output_embeddings()
    weights = 0
    for name, module in base.named_modules():
        if "lora_" in name or module is head:
            continue
        if isinstance(module, nn.Linear):  # sizes rather than numel, since quantized weights are packed
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
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if layer_types is None:
        windows: tuple[int | None, ...] = (window,) * layers
    elif set(layer_types) <= {"full_attention", "sliding_attention"}:
        windows = tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)
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
    engine: LocalEngine, prompts: Sequence[Sequence[int]], prefix_length: int, *, rounds: int
) -> dict[str, tuple[float, ...]]:
    """Measure the time from a prompt to its first new token, one request at a time.

    Args:
        engine: Engine of the model.
        prompts: Prompts of one arm.
        prefix_length: Number of tokens in the common prefix of all prompts.
        rounds: Number of prompts to time, after one pass for warm-up.

    Returns:
        Seconds of each request, ``cold`` with an empty cache and ``warm`` with the common prefix in the cache. ``warm``
        is missing if there is no common prefix, or the model's cache can't be shared.
    """
    chosen = [list(prompt) for prompt in prompts[:rounds]]
    with evaluating(engine.model), weights_cast_once(engine.model):
        engine.first_token(chosen[0])  # warm-up: the first pass of a model allocates and compiles
        seconds = {"cold": tuple(_timed(engine, prompt, None) for prompt in chosen)}
        if (
            prefix_length
            and (cached := engine.prefill_prefix(chosen[0][:prefix_length], max(map(len, chosen)) + 1)) is not None
        ):
            seconds["warm"] = tuple(_timed(engine, prompt[prefix_length:], cached) for prompt in chosen)
    return seconds


def _timed(engine: LocalEngine, prompt: Sequence[int], prefix: GrowingCache | None) -> float:
    _synchronize()
    start = time.perf_counter()
    engine.first_token(prompt, prefix)  # returns an int, so the device has finished
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
