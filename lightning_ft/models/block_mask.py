"""The mask of a batch for FlexAttention, from its segments: no ``[s, s]`` mask is ever formed.

A block mask says for each block of queries (128 positions) which blocks of keys its tokens see. Blocks that see nothing
of each other are skipped, full ones are computed without a mask, and in the others a function decides about each pair
of positions. Which is which follows from the segments in each block:

    row         [p p p p a a b b]    a prompt with two completions, blocks of 2 positions
    blocks       p   p   a   b
    queries p   own
            p   full own
            a   full full own        (own: on the diagonal, where only earlier tokens are seen)
            b   full full  -  own    completions don't see each other

so packed rows and shared prompts take time in proportion to what is seen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad
from transformers import PreTrainedModel

from lightning_ft.data.layout import TokenBatch
from lightning_ft.data.masks import related_segments

BLOCK = 128
"""Number of positions per block, the default of FlexAttention."""


def takes_block_masks(base: PreTrainedModel) -> bool:
    """Whether a model's attention is FlexAttention, which takes block masks."""
    return bool(base.config._attn_implementation == "flex_attention")


def block_mask(batch: TokenBatch, block: int = BLOCK) -> BlockMask:
    """Block mask of a batch: a token sees itself and the tokens before it in its segment and in that one's ancestors.

    The same as :func:`lightning_ft.data.masks.attention_mask`, for FlexAttention.

    Args:
        batch: A batch, packed or with shared prefixes, on any device.
        block: Number of positions per block.

    Example:
        >>> import torch
        >>> from lightning_ft.data.layout import Example, Segment, lay_out
        >>> part = Example(torch.tensor([5, 6]), torch.tensor([False, False]))
        >>> mask = block_mask(lay_out([[Segment(part), Segment(part, 0), Segment(part, 0)]]), block=2)
        >>> mask.to_dense()[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    length = batch.segment_ids.shape[1]
    count = batch.parents.shape[1]  # also the index of padding, which is related to nothing
    related = pad(related_segments(batch), (0, 1, 0, 1), value=False)  # [b, segments + 1, segments + 1]
    segments = torch.where(batch.segment_ids < 0, count, batch.segment_ids)  # [b, s]
    shared = batch.has_shared_prefixes

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_query, of_key = segments[row, query], segments[row, key]
        kin = related[row, of_query, of_key] if shared else (of_query == of_key) & (of_query < count)
        return ((query >= key) & kin) | (query == key)

    some, full = _blocks(segments, related, block)
    return BlockMask.from_kv_blocks(*_listed(some), *_listed(full), block, seen, (length, length))


def _blocks(segments: Tensor, related: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Blocks of keys that each block of queries sees in part, and in full, ``bool [b, blocks, blocks]`` each."""
    rows, length = segments.shape
    padding = related.shape[1] - 1
    blocks = -(-length // block)
    by_block = pad(segments, (0, blocks * block - length), value=padding).view(rows, blocks, block)
    # Products of zeros and ones: whether they are zero is exact in any precision, autocast's included.
    present = related.new_zeros(rows, blocks, padding + 1, dtype=torch.float32).scatter(2, by_block, 1.0)
    seen = present @ related.float() @ present.mT > 0  # any pair of segments, one of each block
    unseen = present @ (~related).float() @ present.mT > 0
    order = torch.arange(blocks, device=segments.device)
    before, diagonal = order[:, None] > order, order[:, None] == order
    full = before & seen & ~unseen
    return (before & seen & unseen) | diagonal, full


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Number of chosen blocks per block of queries, ``int32 [b, 1, n]``, and their indices first, ``[b, 1, n, n]``."""
    indices = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1).int()[:, None], indices.int()[:, None]
