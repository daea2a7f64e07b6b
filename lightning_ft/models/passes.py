"""Split a batch into several forward passes, for models whose sequences would change each other in one pass.

A part is a batch of its own that records the position of each of its tokens in the flattened whole batch:

    whole   [a a a a b b c c c]        parts   [a a a a]  positions [0 1 2 3]
    (a is longer than the others)              [b b c c c] positions [4 5 6 7 8]

so the parts' hidden states and log-probs can be put back in the order of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_ft.data.layout import Example, Segment, TokenBatch, balanced_rows, lay_out
from lightning_ft.errors import ModelError
from lightning_ft.models.lengths import LengthSwitch


@dataclass(frozen=True, eq=False)
class Part:
    """Part of a batch that takes one forward pass.

    Args:
        batch: Batch of these sequences, `b` rows of `s` positions, with `m` of the targets.
        positions: Position in the flattened whole batch of each token of `batch`, -1 for padding, ``int64 [b * s]``.
        targets: Index of each of its targets among those of the whole batch, ``int64 [m]``.
    """

    batch: TokenBatch
    positions: Tensor
    targets: Tensor


def sequence_lengths(batch: TokenBatch) -> list[int]:
    """Return the number of tokens of each sequence, row by row; a shared prompt counts in each of its sequences.

    Example:
        >>> one, two = (Example(torch.ones(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool)) for n in (1, 2))
        >>> sequence_lengths(lay_out([[Segment(one), Segment(two)], [Segment(two)]]))
        [1, 2, 2]
        >>> sequence_lengths(lay_out([[Segment(one), Segment(two, parent=0)]]))
        [3]
    """
    count = batch.parents.shape[1]
    segments = torch.where(batch.segment_ids < 0, count, batch.segment_ids)  # the last column takes the padding
    ends = batch.position_ids.new_full((len(segments), count + 1), -1)
    ends = ends.scatter_reduce(1, segments, batch.position_ids, "amax") + 1
    ends = ends.scatter(1, torch.where(batch.parents < 0, count, batch.parents), 0)[:, :count]  # what is continued
    return [int(length) for length in ends.flatten().tolist() if length > 0]


def switched_parts(batch: TokenBatch, switch: LengthSwitch) -> list[Part] | None:
    """Split a batch into the passes that it needs if long sequences change others; None if one pass is enough.

    Raises:
        ModelError: For a batch with shared prefixes whose sequences can't share a pass.
    """
    groups = switch.groups(sequence_lengths(batch))
    return None if len(groups) == 1 else parts_of(batch, groups)


def parts_of(batch: TokenBatch, groups: Sequence[Sequence[int]]) -> list[Part]:
    """Lay out groups of a batch's sequences as separate batches.

    Args:
        batch: Batch without shared prefixes.
        groups: Indices of sequences, as :func:`sequence_lengths` counts them, each in one group.

    Raises:
        ModelError: For a batch whose sequences share prefixes.
    """
    if batch.has_shared_prefixes:
        raise ModelError(
            "Sequences that share a prompt are on both sides of the length at which this model's positions change, so "
            "they can't go through it in one pass. Pass share_prompts=False."
        )
    runs = _runs(batch)
    return [_part(batch, [runs[i] for i in group]) for group in groups]


def _runs(batch: TokenBatch) -> list[range]:
    """Return the range of each sequence in the flattened batch."""
    runs, length = [], batch.segment_ids.shape[1]
    for row, segments in enumerate(batch.segment_ids.cpu()):
        start = row * length
        found, counts = segments.unique_consecutive(return_counts=True)
        for segment, count in zip(found.tolist(), counts.tolist(), strict=True):
            if segment >= 0:
                runs.append(range(start, start + count))
            start += count
    return runs


def _part(batch: TokenBatch, runs: Sequence[range]) -> Part:
    device, whole = batch.input_ids.device, batch.input_ids.numel()
    rows = balanced_rows([len(run) for run in runs]) if batch.packed else [[i] for i in range(len(runs))]
    # Lay out the flat positions as if they were token ids: the result says where each token comes from.
    where = [Example(torch.tensor(run), torch.zeros(len(run), dtype=torch.bool)) for run in runs]
    layout = lay_out([[Segment(where[i]) for i in row] for row in rows], pad_token_id=whole).to(device)
    positions = layout.input_ids.flatten()
    padding = batch.input_ids[batch.segment_ids < 0][:1]
    tokens = torch.cat([batch.input_ids.flatten(), padding if len(padding) else batch.input_ids.new_zeros(1)])
    local = torch.full((whole + 1,), -1, dtype=torch.int64, device=device)
    local[positions] = torch.arange(len(positions), device=device)
    predictors = local[batch.predictors]
    targets = (predictors >= 0).nonzero().flatten()
    part = replace(
        layout,
        input_ids=tokens[positions].view(layout.input_ids.shape),
        predictors=predictors[targets],
        targets=batch.targets[targets],
        groups=batch.groups[targets],
        num_groups=batch.num_groups,
        explicit_mask=batch.explicit_mask and layout.packed,
    )
    return Part(part, torch.where(positions == whole, -1, positions), targets)


def put_back(parts: Sequence[Part], states: Sequence[Tensor], batch: TokenBatch) -> Tensor:
    """Put the states of parts at the positions of the whole batch, ``[b, s, d]``, with zeros for padding.

    Args:
        parts: All parts of the batch.
        states: States of each part, ``[b, s, d]``.
        batch: Whole batch.
    """
    every = torch.cat([part.positions for part in parts])
    real = every >= 0
    flat = torch.cat([hidden.flatten(0, 1) for hidden in states])[real]
    whole = flat.new_zeros(batch.input_ids.numel(), flat.shape[-1]).index_copy(0, every[real], flat)
    return whole.view(*batch.input_ids.shape, -1)
