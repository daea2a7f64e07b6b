"""The decoding loop: prompts are read once, their rows are written out and leave the batch as they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ft.models.generate import left_padded
from lightning_ft.rollout.cache import GrowingCache
from lightning_ft.rollout.protocol import Completion
from lightning_ft.rollout.sampling import TokenSampler
from lightning_ft.rollout.stopping import Ending

Forward = Callable[[Tensor, GrowingCache, Tensor, "Tensor | None"], Tensor]
"""From ids ``[b, t]``, a cache, positions ``[b, t]`` and a mask ``[b, p + t]`` or None to logits ``[b, vocab]``."""


@dataclass(frozen=True, eq=False)
class ReadPrompts:
    """`b` prompts that were run through a model, ready to be written on from.

    Args:
        cache: Their keys and values, `p` places of which some stand in front of shorter prompts.
        logits: Behind the last token of each, ``fp32 [b, vocabulary]``.
        positions: Of that token, ``int64 [b, 1]``.
        mask: Which places are tokens, ``int64 [b, p]``.
        padded: Whether some are not.
    """

    cache: GrowingCache
    logits: Tensor
    positions: Tensor
    mask: Tensor
    padded: bool

    def spread(self, times: int) -> ReadPrompts:
        """The same with each prompt in so many rows, side by side. The cache is copied, so this one stays usable."""
        rows = torch.arange(len(self.logits), device=self.logits.device).repeat_interleave(times)  # [b * times]
        return ReadPrompts(
            self.cache.spread(rows), self.logits[rows], self.positions[rows], self.mask[rows], self.padded
        )


def read_prompts(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    prefix: GrowingCache | None,
    *,
    layers: int,
    pad_token_id: int,
    device: torch.device,
) -> ReadPrompts:
    """Run a batch of prompts through a model, left-padded.

    Args:
        forward: Runs the model.
        prompts: Token ids behind the prefix, none of them empty.
        prefix: What every prompt starts with, read before; it stays as it is.
        layers: Of the cache.
        pad_token_id: Stands at masked places.
        device: Of the model's inputs.
    """
    cache = GrowingCache(layers, prefix)
    shared = cache.get_seq_length()
    ids, mask = left_padded(prompts, pad_token_id)
    ids, mask = ids.to(device), mask.to(device)
    mask = torch.cat([mask.new_ones(len(prompts), shared), mask], dim=1)  # [b, p + s]
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [b, p + s]
    padded = len(set(map(len, prompts))) > 1  # without a mask attention is faster
    logits = forward(ids, cache, positions[:, shared:], mask if padded else None)
    return ReadPrompts(cache, logits, positions[:, -1:], mask, padded)


def decode_parts(
    read: ReadPrompts, parts: Sequence[int], write: Callable[[ReadPrompts], list[Completion]]
) -> list[list[Completion]]:
    """Write several completions of each prompt, some of them at a time, from prompts that were read once.

    Args:
        read: `b` prompts.
        parts: How many completions of each prompt are written together, part by part.
        write: :func:`decode`, for the rows that it is given.

    Returns:
        For each part its ``b * part`` completions, those of one prompt side by side.
    """
    done = []
    for left, size in zip(reversed(range(len(parts))), parts, strict=True):
        rows = read if list(parts) == [1] else read.spread(size)
        if not left:
            del read  # while the last part is written its memory is free
        done.append(write(rows))
        del rows
    return done


def decode(
    forward: Forward, read: ReadPrompts, sampler: TokenSampler, ending: Ending, max_new_tokens: int
) -> list[Completion]:
    """Write one completion for each row.

    The sampler is asked once a step, for the rows of the batch in their order. Rows that have ended are among them
    until a quarter of the batch has: only then does it pay to copy the cache without them.

    Args:
        forward: Runs the model.
        read: The rows to write on from; its cache is used up.
        sampler: Takes the next tokens.
        ending: Says which completions have ended.
        max_new_tokens: At most so many for each.
    """
    count = len(read.logits)
    written: list[list[int]] = [[] for _ in range(count)]
    scored = read.logits.new_zeros(count, max_new_tokens)  # fp32 [rows, max_new_tokens]
    drawn = False
    rows = list(range(count))  # which completion each row of the batch is
    going = list(range(count))  # rows of the batch that have not ended
    index = torch.arange(count, device=scored.device)  # `rows` on the device
    cache, logits, mask, last = read.cache, read.logits, read.mask, read.positions
    for step in range(max_new_tokens):
        tokens, logprobs = sampler(logits)  # [b]
        if logprobs is not None:
            drawn = True
            scored[index, step] = logprobs
        ids = tokens.tolist()
        for r in going:
            written[rows[r]].append(ids[r])
        ended = ending([written[rows[r]] for r in going])
        going = [r for r, done in zip(going, ended, strict=True) if not done]
        if not going or step == max_new_tokens - 1:
            break
        if len(going) <= 0.75 * len(rows):
            cache.keep(going)
            kept = torch.tensor(going, device=index.device)
            tokens, mask, last, index = tokens[kept], mask[kept], last[kept], index[kept]
            rows, going = [rows[r] for r in going], list(range(len(going)))
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        last = last + 1
        logits = forward(tokens[:, None], cache, last, mask if read.padded else None)
    ends = ending(written)
    scores = scored.tolist() if drawn else [[]] * count
    return [
        Completion(tuple(answer), truncated=not end, logprobs=tuple(score[: len(answer)]))
        for answer, end, score in zip(written, ends, scores, strict=True)
    ]
