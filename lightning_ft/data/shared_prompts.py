"""Completions behind the prompts that they share: preference pairs, groups of samples, and their plain twin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ft.data.layout import Example, Segment, TokenBatch, lay_out
from lightning_ft.errors import ConfigError
from lightning_ft.types import Message


def lay_out_completions(
    prompts: Sequence[Tensor],
    completions: Sequence[Sequence[Example]],
    *,
    shared: bool = True,
    packing: bool = True,
    pad_token_id: int = 0,
) -> TokenBatch:
    """Lay prompts and their completions out for one forward pass.

    Either way targets stand in the order of the completions, prompt by prompt, and `groups` numbers them so.

    Args:
        prompts: Token ids, ``int64 [t]`` each, at least one.
        completions: For each prompt what follows it. Prompt tokens are never supervised.
        shared: Compute each prompt once, as the parent of its completions in a row of their own; otherwise repeat it in
            front of each.
        packing: Where prompts are repeated, lay all sequences out in one row rather than one row each.
        pad_token_id: Stands behind shorter rows.

    Raises:
        ConfigError: For a prompt without tokens or without completions.

    Example:
        >>> import torch
        >>> yes = [Example(torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool)) for ids in ([7], [8, 9])]
        >>> batch = lay_out_completions([torch.tensor([5, 6])], [yes])
        >>> batch.input_ids.tolist(), batch.targets.tolist(), batch.groups.tolist()
        ([[5, 6, 7, 8, 9]], [7, 8, 9], [0, 1, 1])
        >>> lay_out_completions([torch.tensor([5, 6])], [yes], shared=False).input_ids.tolist()
        [[5, 6, 7, 5, 6, 8, 9]]
    """
    rows: list[list[Segment]] = []
    group = 0
    for number, (prompt, behind) in enumerate(zip(prompts, completions, strict=True)):
        if not len(prompt) or not behind:
            raise ConfigError(f"Prompt {number} of a batch has no {'completions' if len(prompt) else 'tokens'}.")
        unsupervised = Example(prompt, torch.zeros(len(prompt), dtype=torch.bool))
        if shared:
            rows.append([Segment(unsupervised, group=group)])
            rows[-1] += [Segment(completion, 0, group + i) for i, completion in enumerate(behind)]
        else:
            wholes = [_joined(unsupervised, completion) for completion in behind]
            rows += [[Segment(whole, group=group + i)] for i, whole in enumerate(wholes)]
        group += len(behind)
    if not shared and packing:
        rows = [[segment for row in rows for segment in row]]
    return lay_out(rows, pad_token_id=pad_token_id)


def _joined(prompt: Example, completion: Example) -> Example:
    return Example(
        torch.cat([prompt.input_ids, completion.input_ids]), torch.cat([prompt.supervised, completion.supervised])
    )


def last_places(batch: TokenBatch) -> Tensor:
    """Where the last token of each completion stands, in the order of the completions.

    Args:
        batch: From :func:`lay_out_completions`: segments that nothing continues are the completions.

    Returns:
        Places in the flattened ``[b * s]``, ``int64 [c]``.

    Example:
        >>> import torch
        >>> one, two = (Example(torch.ones(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool)) for n in (1, 2))
        >>> prompts = [torch.tensor([5, 6]), torch.tensor([5])]
        >>> last_places(lay_out_completions(prompts, [[one, two], [one]])).tolist()
        [2, 4, 6]
    """
    rows, length = batch.segment_ids.shape
    count = batch.parents.shape[1]
    places = torch.arange(rows * length, device=batch.segment_ids.device).view(rows, length)
    ends = places.new_full((rows, count + 1), -1)  # the last column takes the padding
    segments = torch.where(batch.segment_ids < 0, count, batch.segment_ids)
    ends = ends.scatter_reduce(1, segments, places, "amax")[:, :count]  # [b, segments]
    continued = torch.zeros_like(ends, dtype=torch.bool)
    continued = torch.cat([continued, continued[:, :1]], dim=1)  # ... and here what is nobody's parent
    parents = torch.where(batch.parents < 0, count, batch.parents)
    continued = continued.scatter(1, parents, True)[:, :count]
    return ends[(ends >= 0) & ~continued]


def shared_turns(left: list[Message], right: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """The turns two conversations start with, and what is left of each.

    Example:
        >>> asked = Message(role="user", content="2+2?")
        >>> answers = [Message(role="assistant", content=content) for content in ("4", "5")]
        >>> prompt, chosen, rejected = shared_turns([asked, answers[0]], [asked, answers[1]])
        >>> prompt == [asked], chosen == answers[:1], rejected == answers[1:]
        (True, True, True)
    """
    shared = _common(left, right)
    return left[:shared], left[shared:], right[shared:]


def shared_text(left: str, right: str) -> tuple[str, str, str]:
    """The text two texts start with, and what is left of each, the space between included.

    No word is torn apart: a model reads a word otherwise than its beginning.

    Example:
        >>> shared_text("2+2? It is four.", "2+2? It is fourteen.")
        ('2+2? It is', ' four.', ' fourteen.')
    """
    shared = _common(left, right)
    while shared and (_tears(left, shared) or _tears(right, shared)):
        shared -= 1
    if left[:shared].endswith(" "):
        shared -= 1
    return left[:shared], left[shared:], right[shared:]


def _common(left: str | list[Message], right: str | list[Message]) -> int:
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _tears(text: str, place: int) -> bool:
    """Whether a word goes on there."""
    return place < len(text) and text[place - 1].isalnum() and text[place].isalnum()
