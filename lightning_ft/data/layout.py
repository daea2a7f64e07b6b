"""Lays out segments as one batch of tokens, for packed rows and shared prompts alike.

A batch is a forest. Each of its rows holds segments, and a segment may continue a parent: packed examples are roots, a
preference pair is a prompt with two children, a group of completions is a prompt with G children. Position ids and the
attention mask follow from the segments, so no token is computed twice and unrelated segments never see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from heapq import heapreplace
from typing import NoReturn

import torch
from torch import Tensor

from lightning_ft.data.row_costs import SQUARE, rows_cost
from lightning_ft.errors import ConfigError


@dataclass(frozen=True)
class Example:
    """One encoded row.

    Args:
        input_ids: Token ids, ``int64 [t]``.
        supervised: Whether each token is a target of the loss, ``bool [t]``. The first token of a row is never one,
            since no token before it could predict it.
    """

    input_ids: Tensor
    supervised: Tensor

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 1 or self.input_ids.shape != self.supervised.shape:
            raise ConfigError(
                "input_ids and supervised must be 1-D and equally long, got "
                f"{tuple(self.input_ids.shape)} and {tuple(self.supervised.shape)}."
            )

    def __len__(self) -> int:
        return self.input_ids.numel()


@dataclass(frozen=True)
class Segment:
    """A run of tokens that continues `parent`.

    Args:
        example: Tokens of the segment and their supervision.
        parent: Index of an earlier segment in the same row, whose tokens precede these; None for a root.
        group: Index in the batch of the example that these tokens belong to; log-probabilities are summed by it.
    """

    example: Example
    parent: int | None = None
    group: int = 0


@dataclass(eq=False)  # not frozen: with precision="bf16-true" Lightning refuses frozen dataclasses in a batch
class TokenBatch:
    """Tokens of a batch, laid out for one forward pass.

    `b` rows of `s` positions hold `n` supervised tokens of `g` examples.

    Args:
        input_ids: ``int64 [b, s]``.
        position_ids: Position of each token in its own sequence, ``int64 [b, s]``.
        segment_ids: Index of each token's segment in its row, -1 for padding, ``int64 [b, s]``.
        parents: Index of each segment's parent, -1 for roots and unused entries, ``int64 [b, segments]``.
        predictors: Index in the flattened ``[b * s]`` of the hidden state that predicts each target, ``int64 [n]``.
        targets: Token to predict there, ``int64 [n]``.
        groups: Index of the example that each target belongs to, ``int64 [n]``.
        num_groups: Number of examples, `g`.
        num_tokens: Number of tokens, padding excluded; a number, since reading it from a tensor would wait for a GPU.
        packed: Whether rows hold several segments; otherwise each row is one right-padded sequence.
        has_shared_prefixes: Whether any segment continues another.
        boundaries: Start of each sequence in the flattened ``[b * s]``, where padding belongs to the sequence before
            it, and the end of the last one, ``int32 [sequences + 1]``; None with shared prefixes. FlashAttention's
            kernels for sequences of different lengths take them as ``cu_seqlens``.
        longest: Number of tokens of the longest sequence; 0 with shared prefixes.
        explicit_mask: Whether the model gets a mask (:func:`attention_mask`) even where it could tell segments apart by
            their position ids. Shared prefixes always need one.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    parents: Tensor
    predictors: Tensor
    targets: Tensor
    groups: Tensor
    num_groups: int
    num_tokens: int
    packed: bool
    has_shared_prefixes: bool
    boundaries: Tensor | None = None
    longest: int = 0
    explicit_mask: bool = False

    @property
    def num_targets(self) -> int:
        """Number of supervised tokens."""
        return self.targets.numel()

    @property
    def padding_fraction(self) -> float:
        """Share of positions that are padding."""
        return 1.0 - self.num_tokens / self.input_ids.numel()

    def keys(self) -> NoReturn:
        """Refuse ``model(**batch)``, where Python asks for the keys: this isn't a batch of transformers' models.

        Raises:
            ConfigError: Always; it names the argument that makes such batches.
        """
        raise ConfigError(
            "A TokenBatch is made for the modules of this package and has no keys. For a module of your own that calls "
            "model(**batch), pass batch_format='hf' to the PairDataModule."
        )

    def __getitem__(self, name: object) -> NoReturn:
        """Refuse ``batch["input_ids"]`` as :meth:`keys` does."""
        self.keys()

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> TokenBatch:
        """Copy of this batch on `device`.

        Args:
            device: The device.
            non_blocking: Whether to go on before the copies are complete; by default where they are from page-locked
                memory. (Lightning passes it for tensors only.)
        """
        return self._map(lambda tensor: copied(tensor, device, non_blocking))

    def pin_memory(self) -> TokenBatch:
        """Copy of this batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> TokenBatch:  # type: ignore[no-untyped-def]
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})


def copied(tensor: Tensor, device: torch.device | str, non_blocking: bool | None = None) -> Tensor:
    """Copy of a tensor on a device; by default the host waits only for copies from pageable memory."""
    return tensor.to(device, non_blocking=tensor.is_pinned() if non_blocking is None else non_blocking)


def lay_out(rows: Sequence[Sequence[Segment]], *, pad_token_id: int = 0) -> TokenBatch:
    """Lay out rows of segments as one batch.

    Args:
        rows: Segments of each row, parents before their children.
        pad_token_id: Token id that fills shorter rows; never attended to, never supervised.

    Returns:
        The batch, in which rows shorter than the longest are padded on the right. Targets are in the order of their
        groups, whichever row they are in.

    Raises:
        ConfigError: For no rows, or a parent that doesn't precede its child.

    Example:
        Two packed sequences of 3 and 2 tokens:

        >>> import torch
        >>> a = Example(torch.tensor([5, 6, 7]), torch.tensor([False, False, True]))
        >>> b = Example(torch.tensor([8, 9]), torch.tensor([False, True]))
        >>> batch = lay_out([[Segment(a, group=0), Segment(b, group=1)]])
        >>> batch.position_ids.tolist(), batch.predictors.tolist(), batch.targets.tolist(), batch.boundaries.tolist()
        ([[0, 1, 2, 0, 1]], [1, 3], [7, 9], [0, 3, 5])

        A prompt with two completions that share it; both are predicted from the prompt's last token:

        >>> prompt = Example(torch.tensor([5, 6]), torch.tensor([False, False]))
        >>> answers = [Example(torch.tensor([t]), torch.tensor([True])) for t in (7, 8)]
        >>> batch = lay_out([[Segment(prompt), Segment(answers[0], 0, 0), Segment(answers[1], 0, 1)]])
        >>> batch.position_ids.tolist(), batch.predictors.tolist(), batch.targets.tolist()
        ([[0, 1, 2, 2]], [1, 1], [7, 8])
    """
    if not rows or not all(rows):
        raise ConfigError("A batch needs at least one row, and a row at least one segment.")
    length = max(sum(len(segment.example) for segment in row) for row in rows)
    shape = (len(rows), length)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    segment_ids = torch.full(shape, -1, dtype=torch.int64)
    parents = torch.full((len(rows), max(len(row) for row in rows)), -1, dtype=torch.int64)
    predictors, targets, groups = [], [], []
    last = 0  # largest position of a token
    for r, row in enumerate(rows):
        start = 0
        ends: list[tuple[int, int]] = []  # per segment: column of its last token, and the position id after it
        for i, segment in enumerate(row):
            ids, supervised = segment.example.input_ids, segment.example.supervised
            stop = start + len(ids)
            if segment.parent is None:
                preceding, offset = None, 0
            elif 0 <= segment.parent < i:
                preceding, offset = ends[segment.parent]
                parents[r, i] = segment.parent
            else:
                raise ConfigError(f"Row {r}, segment {i}: its parent {segment.parent} must be an earlier segment.")
            input_ids[r, start:stop] = ids
            position_ids[r, start:stop] = torch.arange(offset, offset + len(ids))
            segment_ids[r, start:stop] = i
            indices = supervised.nonzero().flatten()
            if preceding is None:
                indices = indices[indices > 0]  # no token precedes a root's first one to predict it
            predictor = indices + start - 1
            if preceding is not None:  # a child's first token is predicted by its parent's last one
                predictor = torch.where(indices == 0, preceding, predictor)
            predictors.append(predictor + r * length)
            targets.append(ids[indices])
            groups.append(torch.full_like(indices, segment.group))
            ends.append((stop - 1 if len(ids) else (preceding or 0), offset + len(ids)))
            last = max(last, offset + len(ids) - 1)
            start = stop
        if start < length:  # position ids go on: padding must not look like the start of another packed sequence
            position_ids[r, start:] = position_ids[r, start - 1] + 1 + torch.arange(length - start)
    # Up to that of the last token of any sequence: a table of positions may end there.
    position_ids.clamp_(max=last)
    order = torch.cat(groups).argsort(stable=True)
    shared = any(segment.parent is not None for row in rows for segment in row)
    boundaries = None if shared else _boundaries(rows, length)
    return TokenBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        segment_ids=segment_ids,
        parents=parents,
        predictors=torch.cat(predictors)[order],
        targets=torch.cat(targets)[order],
        groups=torch.cat(groups)[order],
        num_groups=1 + max(segment.group for row in rows for segment in row),
        num_tokens=sum(len(segment.example) for row in rows for segment in row),
        packed=any(len(row) > 1 for row in rows),
        has_shared_prefixes=shared,
        boundaries=boundaries,
        longest=0 if shared else max(len(segment.example) for row in rows for segment in row),
    )


def _boundaries(rows: Sequence[Sequence[Segment]], length: int) -> Tensor:
    """Start of each sequence of rows of `length` positions, and the end of the last one, ``int32 [sequences + 1]``."""
    starts = [0]
    for number, row in enumerate(rows):
        start = number * length
        for segment in row:
            if len(segment.example) and start:
                starts.append(start)
            start += len(segment.example)
    return torch.tensor([*starts, len(rows) * length], dtype=torch.int32)


def collate_examples(
    examples: Sequence[Example], *, packing: bool = True, pad_token_id: int = 0, square: int | None = SQUARE
) -> TokenBatch:
    """Lay out examples several to a row, almost without padding, or as one right-padded row each.

    Both layouts hold the same tokens and targets: the choice changes speed and memory, never what is learned. The cost
    of attention grows with the square of a row's length: on a CPU, eight examples in three or four packed rows took 0.6
    of the time that they took in a single row.

    Args:
        examples: Examples of the batch.
        packing: Whether rows hold several examples, or one each.
        pad_token_id: See :func:`lay_out`.
        square: See :class:`lightning_ft.data.row_costs.RowCosts`.

    Example:
        >>> import torch
        >>> examples = [Example(torch.arange(n), torch.ones(n, dtype=torch.bool)) for n in (3, 2)]
        >>> collate_examples(examples).input_ids.tolist()
        [[0, 1, 2, 0, 1]]
        >>> collate_examples(examples, packing=False, pad_token_id=9).input_ids.tolist()
        [[0, 1, 2], [0, 1, 9]]
    """
    segments = [Segment(example, group=index) for index, example in enumerate(examples)]
    lengths = [len(example) for example in examples]
    rows = balanced_rows(lengths, square) if packing else [[i] for i in range(len(segments))]
    return lay_out([[segments[i] for i in row] for row in rows], pad_token_id=pad_token_id)


def balanced_rows(lengths: Sequence[int], square: int | None = SQUARE) -> list[list[int]]:
    """Distribute sequences over rows so that rows are short and hardly padded.

    Each sequence, the longest first, goes into the row that is shortest so far. Several numbers of rows are tried, and
    the cheapest is taken, where the cost counts padding and the square of the row length.

    Args:
        lengths: Number of tokens of each sequence; at least one sequence.
        square: See :class:`lightning_ft.data.row_costs.RowCosts`.

    Returns:
        Indices of the sequences in each row, in ascending order.

    Example:
        >>> balanced_rows([600, 150, 300, 450])
        [[0, 1], [2, 3]]
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    layouts = (_rows(lengths, longest_first, count, square) for count in row_counts(len(lengths)))
    rows, _ = min(layouts, key=lambda rows_and_cost: rows_and_cost[1])
    return [sorted(row) for row in rows]


def row_counts(most: int) -> list[int]:
    """Numbers of rows to try for a layout, up to `most`, each about a quarter larger than the one before.

    Example:
        >>> row_counts(8)
        [1, 2, 3, 4, 5, 6, 8]
    """
    return sorted({round(most / 1.25**k) for k in range(32)} - {0})


def _rows(
    lengths: Sequence[int], longest_first: Sequence[int], count: int, square: int | None
) -> tuple[list[list[int]], int]:
    """Distribute sequences over `count` rows; also returns the cost."""
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, row) for row in range(count)]  # a heap
    for i in longest_first:
        tokens, row = filled[0]
        rows[row].append(i)
        heapreplace(filled, (tokens + lengths[i], row))
    longest, _ = max(filled)
    return rows, rows_cost(count, longest, square)


def contiguous_rows(lengths: Sequence[int], count: int) -> list[range]:
    """Distribute sequences over rows in their order, so that the longest row is as short as possible.

    Args:
        lengths: Number of tokens of each sequence; at least one sequence.
        count: Largest number of rows.

    Returns:
        Range of the sequences in each row.

    Example:
        >>> contiguous_rows([600, 150, 300, 450], 2)
        [range(0, 2), range(2, 4)]
    """
    low, high = max(lengths), sum(lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(lengths, middle)) <= count else (middle + 1, high)
    return _filled(lengths, low)


def _filled(lengths: Sequence[int], capacity: int) -> list[range]:
    """Ranges of sequences in rows that are filled one after the other, up to `capacity` tokens each."""
    rows, start, tokens = [], 0, 0
    for index, length in enumerate(lengths):
        if tokens + length > capacity and index > start:
            rows.append(range(start, index))
            start, tokens = index, 0
        tokens += length
    return [*rows, range(start, len(lengths))]
