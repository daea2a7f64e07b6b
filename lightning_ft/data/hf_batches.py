"""Batches in the format of transformers: a dict of ``input_ids``, ``attention_mask`` and ``labels``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_ft.data.layout import Example, TokenBatch, collate_examples
from lightning_ft.errors import ConfigError

_KNOWN = {"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids", "special_tokens_mask", "length"}
IGNORED = -100
"""Label of a token that isn't supervised."""


def from_hf(batch: Mapping[str, Tensor], *, pad_token_id: int = 0) -> TokenBatch:
    """Convert a batch of transformers; padding on either side is removed, and tokens keep their labels.

    Args:
        batch: ``input_ids``, ``int64 [b, s]``, ``labels`` of the same shape with -100 where a token isn't supervised,
            and ``attention_mask``, ``[b, s]``, with 0 for padding; without one all tokens count. Where ``position_ids``
            begin again within a row, it holds several sequences.
        pad_token_id: Id that shorter rows are padded with.

    Raises:
        ConfigError: If a field is missing or has another shape, a label differs from its token, or padding is
            supervised.

    Example:
        >>> ids, labels = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[-100, 6, 7], [-100, 9, -100]])
        >>> mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> found = from_hf({"input_ids": ids, "labels": labels, "attention_mask": mask})
        >>> found.targets.tolist(), found.num_tokens
        ([6, 7, 9], 5)
    """
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.ndim != 2 or ids.shape != labels.shape:
        found = {name: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for name, v in batch.items()}
        raise ConfigError(f"A batch has {found}: expected input_ids and labels of the same shape [b, s].")
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if real.shape != ids.shape:
        raise ConfigError(f"attention_mask has the shape {tuple(real.shape)}: expected {tuple(ids.shape)}.")
    if unknown := [name for name, value in batch.items() if isinstance(value, Tensor) and name not in _KNOWN]:
        raise ConfigError(
            f"A batch has {unknown[0]!r}, which these modules don't pass to the model: leave it out, or train with a "
            "module of your own."
        )
    positions = batch.get("position_ids")
    supervised = labels != IGNORED
    if bool((supervised & ~real).any()):
        raise ConfigError("labels supervise padding: set them to -100 where attention_mask is 0.")
    if bool((supervised & (labels != ids)).any()):
        raise ConfigError(
            "labels differ from input_ids at supervised tokens: pass labels that are not shifted, as the models of "
            "transformers take them."
        )
    examples = []
    for number, kept in enumerate(real):
        row, which = ids[number][kept].cpu(), supervised[number][kept].cpu()
        starts = [0]
        if positions is not None:  # rows that were packed: positions begin again
            within = positions.expand_as(ids)[number][kept].tolist()
            starts += [i for i in range(1, len(within)) if within[i] <= within[i - 1]]
        for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
            examples.append(Example(row[start:stop], which[start:stop]))
    return collate_examples(examples, packing=False, pad_token_id=pad_token_id).to(ids.device)


def to_hf(examples: Sequence[Example], *, pad_token_id: int = 0) -> dict[str, Tensor]:
    """Lay out examples as a batch of transformers, padded on the right.

    Args:
        examples: Examples, `b` of them.
        pad_token_id: Id of the padding token.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, ``int64 [b, s]`` each.

    Example:
        >>> example = Example(torch.tensor([5, 6]), torch.tensor([False, True]))
        >>> {name: value.tolist() for name, value in to_hf([example]).items()}
        {'input_ids': [[5, 6]], 'attention_mask': [[1, 1]], 'labels': [[-100, 6]]}
    """
    shape = (len(examples), max(map(len, examples)))
    ids, mask = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, example in enumerate(examples):
        count = len(example)
        ids[row, :count], mask[row, :count] = example.input_ids, 1
        labels[row, :count] = torch.where(example.supervised, example.input_ids, IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
