"""Which tokens of a batch see each other, as a mask of positions or of segments."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_ft.data.layout import TokenBatch


def related_segments(batch: TokenBatch) -> Tensor:
    """Whether each segment of a row is another one itself or continues it, over any number of generations.

    Returns:
        ``bool [b, segments, segments]``, True where the first segment's tokens come after those of the second.

    Example:
        >>> import torch
        >>> from lightning_ft.data.layout import Example, Segment, lay_out
        >>> part = Example(torch.tensor([5]), torch.tensor([False]))
        >>> batch = lay_out([[Segment(part), Segment(part, parent=0), Segment(part, parent=1)]])
        >>> related_segments(batch)[0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    rows, count = batch.parents.shape
    itself = torch.eye(count, dtype=torch.bool, device=batch.parents.device).expand(rows, -1, -1)
    if not batch.has_shared_prefixes:
        return itself
    continues = torch.arange(count, device=batch.parents.device) == batch.parents[:, :, None]
    related = itself | continues
    for _ in range((count - 1).bit_length()):  # each product doubles the generations
        related = torch.bmm(related.float(), related.float()) > 0
    return related


def attention_mask(batch: TokenBatch) -> Tensor:
    """Attention mask: a token sees itself and the tokens before it in its own segment and in that segment's ancestors.

    Returns:
        ``bool [b, 1, s, s]``, True where the query (third dimension) may attend to the key (fourth). Padding sees only
        itself, since a softmax over nothing is not a number.

    Example:
        >>> import torch
        >>> from lightning_ft.data.layout import Example, Segment, lay_out
        >>> prompt = Example(torch.tensor([5]), torch.tensor([False]))
        >>> answer = Example(torch.tensor([7]), torch.tensor([True]))
        >>> batch = lay_out([[Segment(prompt), Segment(answer, 0, 0), Segment(answer, 0, 1)]])
        >>> attention_mask(batch)[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    related, count = related_segments(batch), batch.parents.shape[1]
    segments = batch.segment_ids.clamp(min=0)
    allowed = related.gather(1, segments[:, :, None].expand(-1, -1, count))  # [b, s, segments]
    allowed = allowed.gather(2, segments[:, None, :].expand(-1, segments.shape[1], -1))  # [b, s, s]
    columns = torch.arange(segments.shape[1], device=segments.device)
    real = batch.segment_ids >= 0
    allowed &= (columns[:, None] >= columns[None, :]) & real[:, :, None] & real[:, None, :]
    return (allowed | torch.eye(len(columns), dtype=torch.bool, device=segments.device))[:, None]
