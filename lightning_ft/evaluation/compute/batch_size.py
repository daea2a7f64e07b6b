"""How large a batch is, whoever made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_ft.data.batches import PreferenceBatch, PromptBatch
from lightning_ft.data.layout import TokenBatch


def tokens_of(batch: Any, rollout: Any = None) -> tuple[int, int | Tensor] | None:
    """Token places of a batch, padding included, and how many tokens in it are targets of the loss.

    Args:
        batch: `TokenBatch`, `PreferenceBatch` (a prompt counts once) or `PromptBatch` of this package; a mapping with
            ``input_ids`` and maybe ``labels`` (-100 for none); a tensor of token ids; or a sequence that starts with
            one of these.
        rollout: What was written to a `PromptBatch`, with `lengths` of the completions.

    Returns:
        Both; None for anything else. The second may be a tensor on the batch's device, so that nothing waits for it.

    Example:
        >>> labels = torch.tensor([[-100, -100, 5, 6], [1, 2, 3, -100]])
        >>> tokens_of({"input_ids": torch.zeros(2, 4), "labels": labels})
        (8, tensor(4))
        >>> tokens_of(torch.zeros(2, 3, 32, 32)) is None
        True
    """
    if isinstance(batch, TokenBatch):
        return batch.input_ids.numel(), batch.num_targets
    if isinstance(batch, PreferenceBatch):
        judged = [example for completions in batch.completions for example in completions]
        places = sum(map(len, batch.prompts)) + sum(map(len, judged))
        return places, sum(int(example.supervised.sum()) for example in judged)
    if isinstance(batch, PromptBatch):
        written = 0 if rollout is None else sum(int(length) for length in rollout.lengths)
        return sum(map(len, batch.input_ids)) + written, written
    if isinstance(batch, Mapping) and isinstance(ids := batch.get("input_ids"), Tensor):
        labels = batch.get("labels")
        # a causal model predicts each token from those before it, so the first of a row is never a target
        return ids.numel(), (labels[..., 1:] != -100).sum() if isinstance(labels, Tensor) and labels.ndim > 1 else 0
    if isinstance(batch, Tensor) and not (batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool):
        return batch.numel(), 0
    if isinstance(batch, (list, tuple)) and batch:
        return tokens_of(batch[0])
    return None


def rows_of(batch: Any) -> int:
    """Rows of a batch; 1 of what has none.

    Example:
        >>> rows_of({"input_ids": torch.zeros(2, 4)}), rows_of("x")
        (2, 1)
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else getattr(batch, "input_ids", batch)
    if isinstance(ids, Tensor):
        return len(ids) if ids.ndim > 1 else 1
    return max(1, len(batch)) if hasattr(batch, "__len__") else 1
