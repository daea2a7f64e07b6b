"""Rearrange the positions of a batch: its rows in one, padded to a length, or one row for each sequence."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import pad

from lightning_ft.data.layout import Example, Segment, TokenBatch, lay_out
from lightning_ft.errors import ConfigError


def in_one_row(batch: TokenBatch) -> TokenBatch:
    """Join the rows of a batch end to end, without their padding.

    For kernels that compute only what each token sees, or that keep sequences apart only within a single row.

    Args:
        batch: A batch.

    Example:
        >>> import torch
        >>> from lightning_ft.data.layout import collate_examples
        >>> examples = [Example(torch.arange(n), torch.ones(n, dtype=torch.bool)) for n in (3, 2)]
        >>> batch = in_one_row(collate_examples(examples, packing=False))
        >>> batch.position_ids.tolist(), batch.predictors.tolist(), batch.boundaries.tolist()
        ([[0, 1, 2, 0, 1]], [0, 1, 3], [0, 3, 5])
    """
    count = batch.parents.shape[1]
    offsets = torch.arange(len(batch.parents), device=batch.segment_ids.device)[:, None] * count
    segments = (batch.segment_ids + offsets).flatten()
    real = batch.segment_ids.flatten() >= 0
    # Tokens first, in their order. Their number is known, so that the host needn't wait for a GPU to count them.
    kept = (~real).int().argsort(stable=True)[: batch.num_tokens]
    moved = real.cumsum(0) - 1  # index of each token in the new row
    boundaries = batch.boundaries
    if boundaries is not None:
        boundaries = torch.cat([moved[boundaries[:-1].long()], moved.new_full((1,), batch.num_tokens)]).int()
    return replace(
        batch,
        input_ids=batch.input_ids.flatten()[kept][None],
        position_ids=batch.position_ids.flatten()[kept][None],
        segment_ids=segments[kept][None],
        parents=torch.where(batch.parents < 0, batch.parents, batch.parents + offsets).reshape(1, -1),
        predictors=moved[batch.predictors],
        packed=True,
        boundaries=boundaries,
    )


def padded_to_multiple(batch: TokenBatch, multiple: int, *, pad_token_id: int = 0) -> TokenBatch:
    """Pad the rows of a batch on the right until their length is a multiple of a number.

    Args:
        batch: A batch. Its tokens and targets stay the same, and their counts, too.
        multiple: The number.
        pad_token_id: See :func:`lay_out`.

    Example:
        >>> import torch
        >>> from lightning_ft.data.layout import collate_examples
        >>> examples = [Example(torch.arange(n), torch.ones(n, dtype=torch.bool)) for n in (3, 2)]
        >>> batch = padded_to_multiple(collate_examples(examples, packing=False), 4, pad_token_id=9)
        >>> batch.input_ids.tolist(), batch.predictors.tolist(), batch.num_tokens
        ([[0, 1, 2, 9], [0, 1, 0, 9]], [0, 1, 4], 5)
    """
    length = batch.input_ids.shape[1]
    more = -length % multiple
    if not more:
        return batch
    positions = batch.position_ids
    following = positions[:, -1:] + torch.arange(1, more + 1, device=positions.device)
    return replace(
        batch,
        input_ids=pad(batch.input_ids, (0, more), value=pad_token_id),
        position_ids=torch.cat([positions, torch.minimum(following, positions.max())], dim=1),  # as in `lay_out`
        segment_ids=pad(batch.segment_ids, (0, more), value=-1),
        predictors=batch.predictors + batch.predictors // length * more,
        boundaries=None if batch.boundaries is None else batch.boundaries + batch.boundaries // length * more,
    )


def unpack(batch: TokenBatch, *, pad_token_id: int = 0) -> TokenBatch:
    """Give each example a right-padded row of its own, for models that can't keep packed segments apart.

    Args:
        batch: A batch without shared prefixes.
        pad_token_id: See :func:`lay_out`.

    Raises:
        ConfigError: For a batch whose segments share prefixes.

    Example:
        >>> import torch
        >>> from lightning_ft.data.layout import collate_examples
        >>> examples = [Example(torch.arange(n), torch.ones(n, dtype=torch.bool)) for n in (3, 2)]
        >>> unpack(collate_examples(examples)).input_ids.tolist()
        [[0, 1, 2], [0, 1, 0]]
    """
    if batch.has_shared_prefixes:
        raise ConfigError("Only batches without shared prefixes can be unpacked.")
    device = batch.input_ids.device
    supervised = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=device)
    supervised[batch.predictors + 1] = True
    group_of = torch.zeros(batch.input_ids.numel(), dtype=torch.int64, device=device)
    group_of[batch.predictors + 1] = batch.groups
    rows = []
    length = batch.input_ids.shape[1]
    for r, segments in enumerate(batch.segment_ids):
        for segment in segments[segments >= 0].unique_consecutive().tolist():
            indices = (segments == segment).nonzero().flatten() + r * length
            example = Example(batch.input_ids.flatten()[indices].cpu(), supervised[indices].cpu())
            group = int(group_of[indices][supervised[indices]][:1].sum())  # 0 where no token is supervised
            rows.append([Segment(example, group=group)])
    unpacked = replace(lay_out(rows, pad_token_id=pad_token_id), num_groups=batch.num_groups)
    return unpacked.to(device)
