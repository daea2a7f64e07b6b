"""The decoding loop: sequences are written from prompts that were read once, and leave the batch as they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lightning_ft.rollout.bundles import Bundles, Forward, ReadPrompts
from lightning_ft.rollout.protocol import Completion
from lightning_ft.rollout.sampling import TokenSampler
from lightning_ft.rollout.stopping import Ending


def decode_parts(
    read: ReadPrompts,
    parts: Sequence[int],
    write: Callable[[Bundles], list[Completion]],
    *,
    max_new_tokens: int,
    width: int | None,
) -> list[list[Completion]]:
    """Write several completions of each prompt, some of them at a time, from prompts that were read once.

    Args:
        read: `b` prompts.
        parts: How many completions of each prompt are written together, part by part.
        write: :func:`decode`, for the sequences that it is given.
        max_new_tokens: At most so many for each.
        width: Sequences of a row of the cache, see :class:`Bundles`.

    Returns:
        For each part its ``b * part`` completions, those of one prompt side by side.
    """
    done = []
    for left, size in zip(reversed(range(len(parts))), parts, strict=True):
        bundles = Bundles(read, times=size, last=not left, ahead=max_new_tokens, width=width)
        if not left:
            del read  # while the last part is written its memory is free
        done.append(write(bundles))
        del bundles
    return done


def decode(
    forward: Forward, bundles: Bundles, sampler: TokenSampler, ending: Ending, max_new_tokens: int
) -> list[Completion]:
    """Write one completion for each sequence.

    The sampler is asked once a step, for the rows of the batch in their order. Rows that have ended are among them
    until a quarter of the batch has: only then does it pay to copy the cache without them.

    Args:
        forward: Runs the model.
        bundles: The sequences, each where its prompt ends; used up.
        sampler: Takes the next tokens.
        ending: Says which completions have ended.
        max_new_tokens: At most so many for each.

    Raises:
        NonFiniteError: For greedy tokens of logits that aren't finite.
    """
    logits = bundles.logits
    count = len(logits)
    written: list[list[int]] = [[] for _ in range(count)]
    scored = logits.new_zeros(count, max_new_tokens)  # fp32 [rows, max_new_tokens]
    drawn = False
    rows = list(range(count))  # which completion each row of the batch is
    going = list(range(count))  # rows of the batch that have not ended
    index = torch.arange(count, device=scored.device)  # `rows` on the device
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
            kept = torch.tensor(going, device=index.device)
            tokens, index = tokens[kept], index[kept]
            rows, going = [rows[r] for r in going], list(range(len(going)))
            bundles.keep(rows)
        logits = bundles.write(forward, tokens)
    sampler.check()
    ends = ending(written)
    scores = scored.tolist() if drawn else [[]] * count
    return [
        Completion(tuple(answer), truncated=not end, logprobs=tuple(score[: len(answer)]))
        for answer, end, score in zip(written, ends, scores, strict=True)
    ]
