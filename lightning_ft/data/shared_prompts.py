"""Lays out completions with the prompts that they share: preference pairs and groups of samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_ft.data.layout import Example, Segment, TokenBatch, contiguous_rows, lay_out, row_counts
from lightning_ft.data.row_costs import SQUARE, rows_cost
from lightning_ft.errors import ConfigError
from lightning_ft.types import Message


def lay_out_completions(
    prompts: Sequence[Tensor],
    completions: Sequence[Sequence[Example]],
    *,
    shared: bool = True,
    packing: bool = True,
    pad_token_id: int = 0,
    square: int | None = SQUARE,
) -> TokenBatch:
    """Lay out prompts and their completions for one forward pass.

    Targets are in the order of the completions, prompt by prompt, and `groups` numbers the completions in that order,
    whichever row they are in.

    A prompt is computed once for completions in the same row, but the attention of a row grows with the square of its
    length. So the completions of a prompt are in one row, or in several that each have the prompt, or in a row each:

        prompt 400, 4 completions of 50      1 row of 600          [p a b c d]
        prompt 16, 8 completions of 240      8 rows of 256         [p a] [p b] [p c] ...

    Of several such layouts the cheapest is chosen.

    Args:
        prompts: Token ids, ``int64 [t]`` each, at least one.
        completions: Completions of each prompt. Prompt tokens are never supervised.
        shared: Whether completions in the same row may share their prompt as their parent; otherwise it is repeated
            before each completion.
        packing: Whether rows may hold several sequences with repeated prompts, or one each.
        pad_token_id: Token id that fills shorter rows.
        square: See :class:`lightning_ft.data.row_costs.RowCosts`.

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
    for number, (prompt, children) in enumerate(zip(prompts, completions, strict=True)):
        if not len(prompt) or not children:
            raise ConfigError(f"Prompt {number} of a batch has no {'completions' if len(prompt) else 'tokens'}.")
    choices: list[list[list[_Tree]]] = []
    for number, (prompt, children) in enumerate(zip(prompts, completions, strict=True)):
        sizes = [len(completion) for completion in children]
        numbers = [1 << power for power in range((len(children) - 1).bit_length())] if shared else []
        choices.append([_trees(number, len(prompt), sizes, count) for count in (*numbers, len(children))])

    def cost(rows: Sequence[Sequence[_Tree]]) -> int:
        return rows_cost(len(rows), max(sum(tree.length for tree in row) for row in rows), square)

    alike = [[each[min(n, len(each) - 1)] for each in choices] for n in range(max(map(len, choices)))]
    cheapest = [min(each, key=lambda trees: sum(cost([[tree]]) for tree in trees)) for each in choices]
    layouts = [rows for trees in (*alike, cheapest) for rows in _rows(list(chain(*trees)), packing=packing)]
    starts = [0, *accumulate(len(children) for children in completions)]
    rows = [_segments(row, prompts, completions, starts) for row in min(layouts, key=cost)]
    return lay_out(rows, pad_token_id=pad_token_id)


class _Tree(NamedTuple):
    """A prompt and completions that share it, or one completion with its prompt as a single segment.

    Args:
        prompt: Index of the prompt.
        completions: Indices of the completions among those of the prompt.
        length: Number of tokens.
    """

    prompt: int
    completions: range
    length: int


def _trees(prompt: int, prompt_length: int, sizes: Sequence[int], count: int) -> list[_Tree]:
    """Divide the completions of a prompt over at most `count` trees, in their order."""
    parts = [range(i, i + 1) for i in range(len(sizes))] if count == len(sizes) else contiguous_rows(sizes, count)
    return [_Tree(prompt, part, prompt_length + sum(sizes[i] for i in part)) for part in parts]


def _rows(trees: list[_Tree], *, packing: bool) -> list[list[list[_Tree]]]:
    """Ways to distribute trees over rows, in their order."""
    if not packing:
        return [[[tree] for tree in trees]]
    lengths = [tree.length for tree in trees]
    ways = (contiguous_rows(lengths, count) for count in row_counts(len(trees)))
    return [[trees[row.start : row.stop] for row in way] for way in ways]


def _segments(
    row: Sequence[_Tree], prompts: Sequence[Tensor], completions: Sequence[Sequence[Example]], starts: Sequence[int]
) -> list[Segment]:
    """Segments of a row; `starts` numbers the first completion of each prompt."""
    segments: list[Segment] = []
    for tree in row:
        prompt, children, first = prompts[tree.prompt], completions[tree.prompt], starts[tree.prompt]
        if len(tree.completions) == 1:
            (i,) = tree.completions
            segments.append(Segment(_joined(prompt, children[i]), group=first + i))
        else:
            parent = len(segments)
            segments.append(Segment(Example(prompt, torch.zeros(len(prompt), dtype=torch.bool)), group=first))
            segments += [Segment(children[i], parent, first + i) for i in tree.completions]
    return segments


def _joined(prompt: Tensor, completion: Example) -> Example:
    unsupervised = torch.zeros(len(prompt), dtype=torch.bool)
    return Example(torch.cat([prompt, completion.input_ids]), torch.cat([unsupervised, completion.supervised]))


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
