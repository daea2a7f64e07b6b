"""Grouped-query attention with a mask, without copies of keys and values.

For several queries with a mask, transformers' SDPA repeats each key and value head for every query head that reads it:
PyTorch's fused kernels for GPUs take no mask together with grouped heads. A decoding step whose sequences share rows of
the cache is such a case, and the copies are most of what it reads and writes. Here the query heads of a group become
further queries of their key and value head instead, which every kernel takes and which gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_NAME = "lightning_ft_grouped_sdpa"


def grouped_sdpa_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of few queries per sequence, with the interface of transformers' attention functions.

    What it doesn't cover (no mask, no groups, a mask per head, a position bias, a soft cap) goes to transformers' SDPA.

    Args:
        module: The attention layer.
        query: ``[b, heads, t, head_dim]``.
        key: ``[b, kv_heads, s, head_dim]``.
        value: ``[b, kv_heads, s, value_dim]``.
        attention_mask: Bias of the scores, or which keys each query sees, ``[b, 1, t, s]``.
        **options: What transformers passes to attention functions: `scaling`, `dropout`, and others.

    Returns:
        ``[b, t, heads, value_dim]``, and None instead of the weights.
    """
    b, heads, t, head_dim = query.shape
    kv_heads = key.shape[1]
    special = any(options.get(name) is not None for name in ("position_bias", "softcap"))
    if attention_mask is None or attention_mask.shape[1] != 1 or heads == kv_heads or special:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    groups = heads // kv_heads
    out = functional.scaled_dot_product_attention(
        query.reshape(b, kv_heads, groups * t, head_dim),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, groups, 1),
        dropout_p=options.get("dropout", 0.0),
        scale=options.get("scaling"),
    )
    return out.reshape(b, heads, t, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, grouped_sdpa_forward)


@contextmanager
def grouped_attention(base: PreTrainedModel) -> Iterator[None]:
    """Attention without repeated keys and values, for forward passes of few queries with an explicit mask.

    Nothing changes for a model whose attention isn't SDPA.

    Args:
        base: The model, not wrapped by PEFT.
    """
    config = base.config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
