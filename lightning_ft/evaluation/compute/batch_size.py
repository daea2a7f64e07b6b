"""Count the tokens and rows of a batch of any type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from lightning_ft.data.batches import PreferenceBatch, PromptBatch
from lightning_ft.data.layout import TokenBatch


class HasLengths(Protocol):
    """A rollout, for the tokens that it generated."""

    @property
    def lengths(self) -> Iterable[int | Tensor]:
        """Number of tokens of each completion."""


def count_tokens(batch: object, rollout: HasLengths | None = None) -> tuple[int, int | Tensor] | None:
    """Count the token positions of a batch, including padding, and the tokens in it that are targets of the loss.

    Args:
        batch: `TokenBatch`, `PreferenceBatch` (a prompt counts once) or `PromptBatch` of this package; a mapping with
            ``input_ids`` and optional ``labels`` (-100 where ignored); a tensor of token ids; or a sequence that starts
            with one of these.
        rollout: Rollout of a `PromptBatch`, with the `lengths` of its completions.

    Returns:
        Both numbers, or None for any other batch. The second may be a tensor on the batch's device, which avoids a
        synchronization.

    Example:
        >>> labels = torch.tensor([[-100, -100, 5, 6], [1, 2, 3, -100]])
        >>> count_tokens({"input_ids": torch.zeros(2, 4), "labels": labels})
        (8, tensor(4))
        >>> count_tokens(torch.zeros(2, 3, 32, 32)) is None
        True
    """
    if isinstance(batch, TokenBatch):
        return batch.input_ids.numel(), batch.num_targets
    if isinstance(batch, PreferenceBatch):
        candidates = [example for completions in batch.completions for example in completions]
        positions = sum(map(len, batch.prompts)) + sum(map(len, candidates))
        return positions, sum(int(example.supervised.sum()) for example in candidates)
    if isinstance(batch, PromptBatch):
        completion_tokens = 0 if rollout is None else sum(int(length) for length in rollout.lengths)
        return sum(map(len, batch.input_ids)) + completion_tokens, completion_tokens
    if isinstance(batch, Mapping) and isinstance(ids := batch.get("input_ids"), Tensor):
        labels = batch.get("labels")
        # a causal model predicts each token from the previous ones, so the first of a row is never a target
        return ids.numel(), (labels[..., 1:] != -100).sum() if isinstance(labels, Tensor) and labels.ndim > 1 else 0
    if isinstance(batch, Tensor) and not (batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool):
        return batch.numel(), 0
    if isinstance(batch, (list, tuple)) and batch:
        return count_tokens(batch[0])
    return None


def count_rows(batch: object) -> int:
    """Count the rows of a batch; a batch without rows counts as 1.

    Example:
        >>> count_rows({"input_ids": torch.zeros(2, 4)}), count_rows("x")
        (2, 1)
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else getattr(batch, "input_ids", batch)
    if isinstance(ids, Tensor):
        return len(ids) if ids.ndim > 1 else 1
    return max(1, len(batch)) if hasattr(batch, "__len__") else 1
