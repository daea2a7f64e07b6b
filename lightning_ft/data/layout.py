"""Segments to one batch of tokens: packing and shared prompts are the same thing.

A batch is a forest. A row of it holds segments, each of which continues its parent: packing is a forest of roots, a
preference pair is one prompt with two children, a group of completions one prompt with G children. From the segments
follow the position ids and who may attend to whom, so no token is computed twice and segments that aren't related never
see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from heapq import heapreplace

import torch
from torch import Tensor

from lightning_ft.errors import ConfigError


@dataclass(frozen=True)
class Example:
    """One encoded row.

    Args:
        input_ids: Token ids, ``int64 [t]``.
        supervised: Which of them are targets of the loss, ``bool [t]``. The first token of a row has nothing before it
            that could predict it, so it is never one.
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
        example: The tokens and which of them are supervised.
        parent: Index of an earlier segment of the same row whose tokens come before these, or None for a root.
        group: The index, within the batch, of the example these tokens belong to; log-probabilities are summed by it.
    """

    example: Example
    parent: int | None = None
    group: int = 0


@dataclass(eq=False)  # not frozen: with precision="bf16-true" Lightning refuses to look into frozen batches
class TokenBatch:
    """Tokens of a batch, laid out for one forward pass.

    `b` rows of `s` places hold `n` supervised tokens of `g` examples.

    Args:
        input_ids: ``int64 [b, s]``.
        position_ids: Position of each token in its own sequence, ``int64 [b, s]``.
        segment_ids: Which segment of its row a token belongs to, -1 for padding, ``int64 [b, s]``.
        parents: Parent of each segment, -1 for roots and for unused places, ``int64 [b, segments]``.
        predictors: Where the hidden state that predicts a target stands in the flattened ``[b * s]``, ``int64 [n]``.
        targets: The token to predict there, ``int64 [n]``.
        groups: The example a target belongs to, ``int64 [n]``.
        num_groups: `g`, the number of examples.
        packed: Whether rows hold several segments; if not, each row is one right-padded sequence.
        explicit_mask: Whether to tell the model who sees whom (:func:`attention_mask`) even where it could be left to
            find segments by their positions. Shared prefixes always need that.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    parents: Tensor
    predictors: Tensor
    targets: Tensor
    groups: Tensor
    num_groups: int
    packed: bool
    explicit_mask: bool = False

    @property
    def num_targets(self) -> int:
        """How many tokens are supervised."""
        return self.targets.numel()

    @property
    def num_tokens(self) -> int:
        """How many places hold a token, padding excluded."""
        return int((self.segment_ids >= 0).sum())

    @property
    def padding_fraction(self) -> float:
        """The share of places that hold no token."""
        return 1.0 - self.num_tokens / self.input_ids.numel()

    @property
    def has_shared_prefixes(self) -> bool:
        """Whether any segment continues another one."""
        return bool((self.parents >= 0).any())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TokenBatch:
        """Copy of this batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenBatch:
        """Copy of this batch in page-locked memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> TokenBatch:  # type: ignore[no-untyped-def]
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})


def lay_out(rows: Sequence[Sequence[Segment]], *, pad_token_id: int = 0) -> TokenBatch:
    """Lay rows of segments out as one batch.

    Args:
        rows: For each row of the batch its segments, parents before their children.
        pad_token_id: What stands at places behind the end of shorter rows; never attended to, never supervised.

    Returns:
        The batch; rows shorter than the longest are padded on the right. Targets stand in the order of their groups,
        whichever row they are in.

    Raises:
        ConfigError: For no rows, or a parent that doesn't stand before its child.

    Example:
        Two packed sequences of 3 and 2 tokens:

        >>> import torch
        >>> a = Example(torch.tensor([5, 6, 7]), torch.tensor([False, False, True]))
        >>> b = Example(torch.tensor([8, 9]), torch.tensor([False, True]))
        >>> batch = lay_out([[Segment(a, group=0), Segment(b, group=1)]])
        >>> batch.position_ids.tolist(), batch.predictors.tolist(), batch.targets.tolist()
        ([[0, 1, 2, 0, 1]], [1, 3], [7, 9])

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
    for r, row in enumerate(rows):
        start = 0
        ends: list[tuple[int, int]] = []  # per segment: its last place in the row, and the position after it
        for i, segment in enumerate(row):
            ids, supervised = segment.example.input_ids, segment.example.supervised
            stop = start + len(ids)
            if segment.parent is None:
                before, offset = None, 0
            elif 0 <= segment.parent < i:
                before, offset = ends[segment.parent]
                parents[r, i] = segment.parent
            else:
                raise ConfigError(f"Row {r}, segment {i}: its parent {segment.parent} must be an earlier segment.")
            input_ids[r, start:stop] = ids
            position_ids[r, start:stop] = torch.arange(offset, offset + len(ids))
            segment_ids[r, start:stop] = i
            places = supervised.nonzero().flatten()
            if before is None:
                places = places[places > 0]  # nothing stands before a root's first token to predict it
            predictor = places + start - 1
            if before is not None:
                predictor = torch.where(places == 0, before, predictor)
            predictors.append(predictor + r * length)
            targets.append(ids[places])
            groups.append(torch.full_like(places, segment.group))
            ends.append((stop - 1 if len(ids) else (before or 0), offset + len(ids)))
            start = stop
        if start < length:  # continuing positions: a pad is never taken for the start of another packed sequence
            position_ids[r, start:] = position_ids[r, start - 1] + 1 + torch.arange(length - start)
    order = torch.cat(groups).argsort(stable=True)
    return TokenBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        segment_ids=segment_ids,
        parents=parents,
        predictors=torch.cat(predictors)[order],
        targets=torch.cat(targets)[order],
        groups=torch.cat(groups)[order],
        num_groups=1 + max(segment.group for row in rows for segment in row),
        packed=any(len(row) > 1 for row in rows),
    )


def collate_examples(examples: Sequence[Example], *, packing: bool = True, pad_token_id: int = 0) -> TokenBatch:
    """Lay examples out several to a row, almost without padding, or as one right-padded row each.

    Both hold the same tokens and the same targets: which one is used changes speed and memory, never what is learnt.
    Attention takes the square of a row's length: eight examples in three or four packed rows took a CPU 0.6 of the time
    that they took in a single one.

    Args:
        examples: The examples of the batch.
        packing: Several to a row, or one row each.
        pad_token_id: See :func:`lay_out`.

    Example:
        >>> import torch
        >>> examples = [Example(torch.arange(n), torch.ones(n, dtype=torch.bool)) for n in (3, 2)]
        >>> collate_examples(examples).input_ids.tolist()
        [[0, 1, 2, 0, 1]]
        >>> collate_examples(examples, packing=False, pad_token_id=9).input_ids.tolist()
        [[0, 1, 2], [0, 1, 9]]
    """
    segments = [Segment(example, group=index) for index, example in enumerate(examples)]
    places = balanced_rows([len(example) for example in examples]) if packing else [[i] for i in range(len(segments))]
    return lay_out([[segments[i] for i in row] for row in places], pad_token_id=pad_token_id)


def balanced_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Which sequences to lay side by side, so that rows are short and hardly padded.

    Each sequence, the longest first, goes into the row that is shortest so far; of several numbers of rows the one is
    taken that costs least, padding and the square of a row's length together.

    Args:
        lengths: Tokens of each sequence, at least one.

    Returns:
        For each row its sequences, in their order.

    Example:
        >>> balanced_rows([600, 150, 300, 450])
        [[0, 1], [2, 3]]
    """
    count = len(lengths)
    options = {round(count / 1.25**k) for k in range(32)} - {0}
    longest_first = sorted(range(count), key=lambda i: -lengths[i])
    found = (_rows(lengths, longest_first, number) for number in sorted(options))
    rows, _ = min(found, key=lambda rows_and_cost: rows_and_cost[1])
    return [sorted(row) for row in rows]


_SQUARE = 1500
"""Places of a row whose attention costs as much as the matrix products of one place: measured on a CPU at width 256."""


def _rows(lengths: Sequence[int], longest_first: Sequence[int], count: int) -> tuple[list[list[int]], int]:
    """So many rows, and what they cost."""
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, row) for row in range(count)]  # a heap
    for i in longest_first:
        tokens, row = filled[0]
        rows[row].append(i)
        heapreplace(filled, (tokens + lengths[i], row))
    longest, _ = max(filled)
    return rows, count * longest * (_SQUARE + longest)


def in_one_row(batch: TokenBatch) -> TokenBatch:
    """The rows of a batch of roots end to end, for attention kernels that keep sequences of a single row apart only.

    Args:
        batch: Its padding stays where it is, as the end of the sequence before it.

    Example:
        >>> import torch
        >>> examples = [Example(torch.arange(n), torch.ones(n, dtype=torch.bool)) for n in (3, 3)]
        >>> in_one_row(collate_examples(examples)).position_ids.tolist()
        [[0, 1, 2, 0, 1, 2]]
    """
    count = batch.parents.shape[1]
    offsets = torch.arange(len(batch.parents), device=batch.segment_ids.device)[:, None] * count
    return replace(
        batch,
        input_ids=batch.input_ids.reshape(1, -1),
        position_ids=batch.position_ids.reshape(1, -1),
        segment_ids=torch.where(batch.segment_ids < 0, batch.segment_ids, batch.segment_ids + offsets).reshape(1, -1),
        parents=batch.parents.reshape(1, -1),
    )


def attention_mask(batch: TokenBatch) -> Tensor:
    """Who may attend to whom: a token sees itself and what stands before it in its own segment and in its ancestors.

    Returns:
        ``bool [b, 1, s, s]``, True where the query (third dimension) may attend to the key (fourth). A padding place
        sees itself only, since a softmax over nothing is not a number.

    Example:
        >>> import torch
        >>> prompt = Example(torch.tensor([5]), torch.tensor([False]))
        >>> answer = Example(torch.tensor([7]), torch.tensor([True]))
        >>> batch = lay_out([[Segment(prompt), Segment(answer, 0, 0), Segment(answer, 0, 1)]])
        >>> attention_mask(batch)[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    rows, count = batch.parents.shape
    related = torch.zeros(
        rows, count, count, dtype=torch.bool, device=batch.parents.device
    )  # [b, descendant, ancestor]
    row_index = torch.arange(rows, device=batch.parents.device)
    for child in range(count):  # parents stand before their children, so an ancestor's own row is complete by now
        parent = batch.parents[:, child]
        inherited = related[row_index, parent.clamp(min=0)]
        related[:, child] = inherited & (parent >= 0)[:, None]
        related[:, child, child] = True
    segments = batch.segment_ids.clamp(min=0)
    allowed = related.gather(1, segments[:, :, None].expand(-1, -1, count))  # [b, s, segments]
    allowed = allowed.gather(2, segments[:, None, :].expand(-1, segments.shape[1], -1))  # [b, s, s]
    places = torch.arange(segments.shape[1], device=segments.device)
    real = batch.segment_ids >= 0
    allowed &= (places[:, None] >= places[None, :]) & real[:, :, None] & real[:, None, :]
    return (allowed | torch.eye(len(places), dtype=torch.bool, device=segments.device))[:, None]


def unpack(batch: TokenBatch, *, pad_token_id: int = 0) -> TokenBatch:
    """The same examples with one right-padded row each, for models that can't keep packed segments apart.

    Args:
        batch: A batch of roots.
        pad_token_id: See :func:`lay_out`.

    Raises:
        ConfigError: For a batch whose segments share prefixes.

    Example:
        >>> import torch
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
            places = (segments == segment).nonzero().flatten() + r * length
            example = Example(batch.input_ids.flatten()[places].cpu(), supervised[places].cpu())
            group = int(group_of[places][supervised[places]][:1].sum())  # 0 where nothing is supervised: nothing to sum
            rows.append([Segment(example, group=group)])
    unpacked = replace(lay_out(rows, pad_token_id=pad_token_id), num_groups=batch.num_groups)
    return unpacked.to(device)
