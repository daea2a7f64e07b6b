"""Layout of the KV cache while decoding: several sequences share a row, so that a common prompt is kept and read once.

A decoding step reads all keys and values. With one copy of the prompt per completion, most of what it reads is copies.
Here several sequences share a row of the cache, prompt first, and a mask keeps them apart. It is the layout that
training gives to a group of completions (`data/layout.py`), extended by one token per sequence and step.

Two sequences, x and y, of one prompt ``p0 p1 p2`` in a row of the cache, after two steps::

    position   0   1   2   3   4   5   6
    token      p0  p1  p2  x0  y0  x1  y1
    x sees     *   *   *   *       *
    y sees     *   *   *       *       *

Every step appends one position per sequence of the row. When enough sequences have ended, the others are copied to a
new cache, in which the tokens of each sequence are contiguous again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_ft.models.batched_generation import left_padded
from lightning_ft.rollout.cache import GrowingCache

Forward = Callable[[Tensor, GrowingCache, Tensor, "Tensor | None", int], Tensor]
"""Function that runs the model: from ids ``[b, t]``, a cache, positions ``[b, t]``, a mask and a number `k` to the
logits of the last `k` positions, ``fp32 [b, k, vocabulary]``. The mask says which positions hold tokens,
``int64 [b, p + t]``, or what each new token attends to, ``bool [b, 1, t, p + t]``; None if all
positions hold tokens."""

# Owners of a position of the cache: the prefix, which every sequence attends to, or nobody (padding); prompts are
# 0, 1, ..., and sequences are numbered after the prompts.
_PREFIX, _PADDING = -1, -2
_ROOM = 64  # steps after which the cache has to grow again
_PER_SEQUENCE = 0.1
"""Cost of a position of the cache for each sequence in its row, relative to the cost of reading the position (0.018
and 0.19 us on a CPU, for 1 to 128 sequences)."""
_STEP = 500
"""Cost of the rest of a step per sequence (or unused slot) of a row, relative to the cost of reading a position."""


@dataclass(frozen=True, eq=False)
class PrefilledPrompts:
    """`b` prompts that were run through a model, ready to be continued.

    Args:
        cache: Keys and values, `p` positions per row: the prefix, padding before shorter prompts, the prompt.
        logits: Logits of the token after each prompt, ``fp32 [b, vocabulary]``.
        shared: Number of tokens of the prefix.
        lengths: Number of tokens of each prompt, the prefix excluded.
    """

    cache: GrowingCache
    logits: Tensor
    shared: int
    lengths: tuple[int, ...]


def prefill_prompts(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    prefix: GrowingCache | None,
    *,
    layers: int,
    pad_token_id: int,
    device: torch.device,
) -> PrefilledPrompts:
    """Run a batch of prompts through a model, left-padded.

    Args:
        forward: Function that runs the model.
        prompts: Token ids of each prompt after the prefix, none of them empty.
        prefix: Cache of the prefix that all prompts start with; it is not changed. None without a prefix.
        layers: Number of layers of the cache.
        pad_token_id: Token id at masked positions.
        device: Device of the model's inputs.
    """
    cache = GrowingCache(layers, prefix)
    shared = cache.get_seq_length()
    ids, mask = left_padded(prompts, pad_token_id)
    ids, mask = ids.to(device), mask.to(device)
    mask = torch.cat([mask.new_ones(len(prompts), shared), mask], dim=1)  # [b, p]
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [b, p]
    lengths = tuple(map(len, prompts))
    padded = len(set(lengths)) > 1  # attention is faster without a mask
    logits = forward(ids, cache, positions[:, shared:], mask if padded else None, 1)
    return PrefilledPrompts(cache, logits[:, 0], shared, lengths)


@dataclass(frozen=True)
class _Run:
    """Positions of one row of the cache that hold the tokens of the prefix, of a prompt or of a sequence."""

    row: int
    positions: tuple[range, ...]


_EMPTY_RUN = _Run(0, ())


class SharedRows:
    """`r` sequences that are decoded together, in the `n` rows of a cache, up to `g` per row.

    Args:
        prompts: Prefilled prompts.
        num_completions: Number of sequences per prompt; those of a prompt are next to each other.
        reuse_cache: Whether the cache of the prompts may be decoded into, because nothing else needs it.
        max_new_tokens: Largest number of tokens that a sequence may get.
        sequences_per_row: Number of sequences per row, `g`. 1 gives each sequence a row with a copy of its prompt.
            None takes the number with the lowest cost.
    """

    _mask: Tensor | None
    _own: Tensor
    _positions: Tensor

    def __init__(
        self,
        prompts: PrefilledPrompts,
        *,
        num_completions: int,
        reuse_cache: bool,
        max_new_tokens: int,
        sequences_per_row: int | None = None,
    ) -> None:
        indices, end = range(len(prompts.lengths)), prompts.cache.get_seq_length()
        self._runs = {i: _Run(i, (range(end - prompts.lengths[i], end),)) for i in indices}  # by owner
        if prompts.shared:
            self._runs[_PREFIX] = _Run(0, (range(prompts.shared),))
        self._cache, self._device = prompts.cache, prompts.logits.device
        self._first = len(indices)  # owner number of the first sequence
        self._prompt_of = [i for i in indices for _ in range(num_completions)]
        self._sequences_per_row, self._tokens_left = sequences_per_row, max_new_tokens
        self._lay_out(list(range(len(self._prompt_of))), reuse_cache=num_completions == 1 and reuse_cache)
        self.logits = prompts.logits.repeat_interleave(num_completions, 0)
        """Logits of the first token of each sequence, ``fp32 [r, vocabulary]``."""

    def keep(self, sequences: Sequence[int]) -> None:
        """Drop all but some of the sequences.

        Args:
            sequences: Indices of the sequences to keep, counted over the original ones in the order of the prompts.
        """
        for row, members in enumerate(self._rows):
            for slot, sequence in enumerate(members):
                earlier = self._runs.get(self._first + sequence, _EMPTY_RUN).positions
                new = range(self._start + slot, self._cache.get_seq_length(), self._width)
                self._runs[self._first + sequence] = _Run(row, (*earlier, new))
        self._lay_out(sequences, reuse_cache=False)

    def append(self, forward: Forward, tokens: Tensor) -> Tensor:
        """Append a token to each sequence.

        Args:
            forward: Function that runs the model.
            tokens: New token of each sequence, ``int64 [r]``.

        Returns:
            Logits of the tokens after them, ``fp32 [r, vocabulary]``.
        """
        self._tokens_left -= 1
        self._positions = self._positions + 1
        ids = tokens[self._slots].view(-1, self._width)
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._own], dim=-1)
        logits = forward(ids, self._cache, self._positions, self._mask, self._width)
        return logits.flatten(0, 1)[: len(tokens)]

    # ------------------------------------------------------------ the layout

    def _lay_out(self, sequences: Sequence[int], *, reuse_cache: bool) -> None:
        """Lay out sequences in the cache as it is, if allowed and each has a row of its own, or else in a new one."""
        prompts = {i: self._length(i) for i in {self._prompt_of[s] for s in sequences}}
        lengths = [(self._prompt_of[s], self._length(self._first + s)) for s in sequences]
        shared = self._length(_PREFIX)
        self._width = self._sequences_per_row or best_sequences_per_row(
            shared, prompts, lengths, max_new_tokens=self._tokens_left
        )
        self._rows = [list(sequences[i : i + self._width]) for i in range(0, len(sequences), self._width)]
        count = len(self._rows) * self._width
        # unused slots of the last row repeat its last sequence; their results are dropped
        self._slots = torch.arange(count, device=self._device).clamp(max=len(sequences) - 1)
        ends = [shared + prompts[prompt] + own - 1 for prompt, own in lengths]
        self._positions = torch.tensor(ends, device=self._device)[self._slots].view(-1, self._width)
        owners = self._prefilled_owners() if reuse_cache and self._width == 1 else self._copy_to_new_cache()
        self._start = self._cache.get_seq_length()
        self._mask, self._own = self._masks(owners.to(self._device))

    def _length(self, owner: int) -> int:
        return sum(map(len, self._runs.get(owner, _EMPTY_RUN).positions))

    def _prefilled_owners(self) -> Tensor:
        """Owner of each position of the cache as the prompts were prefilled, ``int64 [b, p]``."""
        owners = torch.full((self._first, self._cache.get_seq_length()), _PADDING)
        for i in range(self._first):
            owners[i, : self._length(_PREFIX)] = _PREFIX
            owners[i, self._runs[i].positions[0]] = i
        return owners

    def _copy_to_new_cache(self) -> Tensor:
        """Copy what the sequences attend to into a new cache; returns the owner of each position, ``int64 [n, p]``."""
        runs: dict[int, _Run] = {}
        layout: list[Tensor] = []  # [p, 3] per row; for each position its owner, and the row and position to copy from
        for index, members in enumerate(self._rows):
            prompts = dict.fromkeys(self._prompt_of[s] for s in members)
            row, length = [], 0
            for owner in (_PREFIX, *prompts, *(self._first + s for s in members)):
                start, run = length, self._runs.get(owner, _EMPTY_RUN)
                for part in run.positions:
                    positions = torch.arange(len(part)) * part.step + part.start
                    owners, rows = (torch.full_like(positions, value) for value in (owner, run.row))
                    row.append(torch.stack([owners, rows, positions], dim=-1))
                    length += len(part)
                runs[owner] = _Run(index, (range(start, length),))
            layout.append(torch.cat(row))
        owners, rows, positions = pad_sequence(layout, batch_first=True, padding_value=_PADDING).unbind(-1)  # [n, p]
        rows, positions = rows.clamp(min=0), positions.clamp(min=0)  # what padding copies isn't attended to
        self._runs = runs
        self._cache = self._cache.gather(rows, positions, room=_ROOM * self._width)
        return owners

    def _masks(self, owners: Tensor) -> tuple[Tensor | None, Tensor]:
        """Masks of what each sequence attends to: the positions so far, and the positions that a step appends."""
        n = len(owners)
        if self._width == 1:
            filled = owners != _PADDING
            return None if bool(filled.all()) else filled.long(), owners.new_ones(n, 1)
        flat = [s for members in self._rows for s in members]
        sequences = torch.tensor(flat, device=owners.device)[self._slots].view(n, self._width, 1)
        prompts = torch.tensor(self._prompt_of, device=owners.device)[sequences]
        owner = owners[:, None]  # [n, 1, p]
        visible = (owner == _PREFIX) | (owner == prompts) | (owner == sequences + self._first)  # [n, g, p]
        own = torch.eye(self._width, dtype=torch.bool, device=owners.device).expand(n, 1, -1, -1)
        return visible[:, None], own


def best_sequences_per_row(
    shared: int, prompts: dict[int, int], lengths: Sequence[tuple[int, int]], *, max_new_tokens: int
) -> int:
    """Choose how many sequences share a row of the cache, so that the next steps cost least.

    With more sequences per row there are fewer copies of what they share, but attention also computes, and masks, the
    positions of the other sequences.

    Args:
        shared: Number of tokens of the prefix.
        prompts: Number of tokens of each prompt, the prefix excluded.
        lengths: Prompt of each sequence, and the number of its own tokens so far.
        max_new_tokens: Largest number of further tokens per sequence.

    Returns:
        A number from 1 to the number of sequences.

    Example:
        Eight completions of a long prompt share a row of the cache; eight prompts that share nothing don't.

        >>> best_sequences_per_row(0, {0: 500}, [(0, 0)] * 8, max_new_tokens=16)
        8
        >>> best_sequences_per_row(0, dict.fromkeys(range(8), 50), [(i, 0) for i in range(8)], max_new_tokens=16)
        1
    """

    def cost(width: int) -> float:
        longest, rows = 0.0, range(0, len(lengths), width)
        for start in rows:
            members = lengths[start : start + width]
            own = sum(length for _, length in members) + width * max_new_tokens / 2
            longest = max(longest, shared + own + sum(prompts[i] for i in {prompt for prompt, _ in members}))
        return len(rows) * (longest * (1 + _PER_SEQUENCE * width) + _STEP * width)

    return min({-(-len(lengths) // rows) for rows in range(1, len(lengths) + 1)}, key=cost)
