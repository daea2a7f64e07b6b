"""Lays out completions with the prompts that they share: preference pairs and groups of samples."""

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
    """Lay out prompts and their completions for one forward pass.

    Whether prompts are shared or repeated, targets are in the order of the completions, prompt by prompt, and `groups`
    numbers the completions in that order.

    Args:
        prompts: Token ids, ``int64 [t]`` each, at least one.
        completions: Completions of each prompt. Prompt tokens are never supervised.
        shared: Whether each prompt is computed once, as the parent of its completions in one row; otherwise it is
            repeated before each completion.
        packing: Whether sequences with repeated prompts share one row, or have one row each.
        pad_token_id: Token id that fills shorter rows.

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
    for number, (prompt, children) in enumerate(zip(prompts, completions, strict=True)):
        if not len(prompt) or not children:
            raise ConfigError(f"Prompt {number} of a batch has no {'completions' if len(prompt) else 'tokens'}.")
        unsupervised = Example(prompt, torch.zeros(len(prompt), dtype=torch.bool))
        if shared:
            rows.append([Segment(unsupervised, group=group)])
            rows[-1] += [Segment(completion, 0, group + i) for i, completion in enumerate(children)]
        else:
            sequences = [_joined(unsupervised, completion) for completion in children]
            rows += [[Segment(sequence, group=group + i)] for i, sequence in enumerate(sequences)]
        group += len(children)
    if not shared and packing:
        rows = [[segment for row in rows for segment in row]]
    return lay_out(rows, pad_token_id=pad_token_id)


def _joined(prompt: Example, completion: Example) -> Example:
    return Example(
        torch.cat([prompt.input_ids, completion.input_ids]), torch.cat([prompt.supervised, completion.supervised])
    )


def last_positions(batch: TokenBatch) -> Tensor:
    """Position of the last token of each completion, in the order of the completions.

    Args:
        batch: Result of :func:`lay_out_completions`, where segments without children are the completions.

    Returns:
        Indices in the flattened ``[b * s]``, ``int64 [c]``.

    Example:
        >>> import torch
        >>> one, two = (Example(torch.ones(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool)) for n in (1, 2))
        >>> prompts = [torch.tensor([5, 6]), torch.tensor([5])]
        >>> last_positions(lay_out_completions(prompts, [[one, two], [one]])).tolist()
        [2, 4, 6]
    """
    rows, length = batch.segment_ids.shape
    count = batch.parents.shape[1]
    positions = torch.arange(rows * length, device=batch.segment_ids.device).view(rows, length)
    ends = positions.new_full((rows, count + 1), -1)  # the last column takes the padding
    segments = torch.where(batch.segment_ids < 0, count, batch.segment_ids)
    ends = ends.scatter_reduce(1, segments, positions, "amax")[:, :count]  # [b, segments]
    continued = torch.zeros_like(ends, dtype=torch.bool)
    continued = torch.cat([continued, continued[:, :1]], dim=1)  # the extra column takes the parents of roots
    parents = torch.where(batch.parents < 0, count, batch.parents)
    continued = continued.scatter(1, parents, True)[:, :count]
    return ends[(ends >= 0) & ~continued]


def shared_turns(left: list[Message], right: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two conversations into the turns that both start with and the rest of each.

    Example:
        >>> question = Message(role="user", content="2+2?")
        >>> answers = [Message(role="assistant", content=content) for content in ("4", "5")]
        >>> prompt, chosen, rejected = shared_turns([question, answers[0]], [question, answers[1]])
        >>> prompt == [question], chosen == answers[:1], rejected == answers[1:]
        (True, True, True)
    """
    shared = _common(left, right)
    return left[:shared], left[shared:], right[shared:]


def shared_text(left: str, right: str) -> tuple[str, str, str]:
    """Split two texts into the text that both start with and the rest of each, which keeps the space between them.

    No word is split: the tokens of a word differ from those of its beginning.

    Example:
        >>> shared_text("2+2? It is four.", "2+2? It is fourteen.")
        ('2+2? It is', ' four.', ' fourteen.')
    """
    shared = _common(left, right)
    while shared and (_splits_word(left, shared) or _splits_word(right, shared)):
        shared -= 1
    if left[:shared].endswith(" "):
        shared -= 1
    return left[:shared], left[shared:], right[shared:]


def _common(left: str | list[Message], right: str | list[Message]) -> int:
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _splits_word(text: str, index: int) -> bool:
    """Whether an index is inside a word."""
    return index < len(text) and text[index - 1].isalnum() and text[index].isalnum()
