"""How sequences that are written lie in the cache: several in one row, so that what they share is held and read once.

A decoding step reads all keys and values. With a copy of the prompt for each completion most of what it reads are
copies. Here the sequences of a bundle stand in one row of the cache, prompt first, and a mask says who sees what: the
layout that training gives to a group of completions (`data/layout.py`), a token at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ft.models.batched_generation import left_padded
from lightning_ft.rollout.cache import GrowingCache

Forward = Callable[[Tensor, GrowingCache, Tensor, "Tensor | None", int], Tensor]
"""From ids ``[b, t]``, a cache, positions ``[b, t]``, a mask and a number `k` to logits of the last `k` places,
``fp32 [b, k, vocabulary]``. The mask says which places are tokens, ``int64 [b, p + t]``, or what each new one sees,
``bool [b, 1, t, p + t]``, or is None if all are."""

_PREFIX, _HOLE = -1, -2  # whose a place is: everybody's or nobody's; prompts are 0, 1, ..., sequences come behind
_ROOM = 64  # tokens of each sequence for which there is room before the cache grows again
_PER_SEQUENCE = 0.1
"""What a place of the cache costs for each sequence of its bundle, to what reading it costs (0.018 and 0.19 us on a
CPU, for 1 to 128 sequences)."""
_STEP = 500
"""What the rest of a step costs for each sequence and each empty place of a bundle, to what reading a place costs."""


@dataclass(frozen=True, eq=False)
class ReadPrompts:
    """`b` prompts that were run through a model, ready to be written on from.

    Args:
        cache: Their keys and values, `p` places: the prefix, holes in front of shorter prompts, the prompts.
        logits: Behind the last token of each, ``fp32 [b, vocabulary]``.
        shared: Tokens of the prefix.
        lengths: Of the prompts behind it.
    """

    cache: GrowingCache
    logits: Tensor
    shared: int
    lengths: tuple[int, ...]


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
    mask = torch.cat([mask.new_ones(len(prompts), shared), mask], dim=1)  # [b, p]
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # [b, p]
    lengths = tuple(map(len, prompts))
    padded = len(set(lengths)) > 1  # without a mask attention is faster
    logits = forward(ids, cache, positions[:, shared:], mask if padded else None, 1)
    return ReadPrompts(cache, logits[:, 0], shared, lengths)


@dataclass(frozen=True)
class _Run:
    """Where tokens of the prefix, of a prompt or of a sequence stand: some places of one row of the cache."""

    row: int
    places: tuple[range, ...]


_NOWHERE = _Run(0, ())


class SharedRows:
    """`r` sequences that are written at once, in the `n` rows of a cache, up to `g` in each.

    Args:
        read: The prompts.
        times: Sequences of each, side by side.
        last: Whether the prompts' cache isn't needed afterwards, so that it may be used up.
        ahead: Tokens that each may get.
        width: Sequences of a row; 1 gives each a row, with a copy of all before it. None for what costs least.
    """

    _mask: Tensor | None
    _own: Tensor
    _positions: Tensor

    def __init__(self, read: ReadPrompts, *, times: int, last: bool, ahead: int, width: int | None = None) -> None:
        prompts, end = range(len(read.lengths)), read.cache.get_seq_length()
        self._runs = {i: _Run(i, (range(end - read.lengths[i], end),)) for i in prompts}
        if read.shared:
            self._runs[_PREFIX] = _Run(0, (range(read.shared),))
        self._cache, self._device = read.cache, read.logits.device
        self._first = len(prompts)  # number of the first sequence
        self._prompt_of = [i for i in prompts for _ in range(times)]
        self._asked, self._ahead = width, ahead
        self._stand(list(range(len(self._prompt_of))), as_read=times == 1 and last)
        self.logits = read.logits.repeat_interleave(times, 0)
        """Behind the prompt of each sequence, ``fp32 [r, vocabulary]``."""

    def keep(self, sequences: Sequence[int]) -> None:
        """Go on with some of the sequences only.

        Args:
            sequences: Which, by their numbers from 0 in the order of the prompts.
        """
        for bundle, inside in enumerate(self._inside):
            for slot, sequence in enumerate(inside):
                before = self._runs.get(self._first + sequence, _NOWHERE).places
                new = range(self._start + slot, self._cache.get_seq_length(), self._width)
                self._runs[self._first + sequence] = _Run(bundle, (*before, new))
        self._stand(sequences, as_read=False)

    def write(self, forward: Forward, tokens: Tensor) -> Tensor:
        """Append a token to each sequence.

        Args:
            forward: Runs the model.
            tokens: ``int64 [r]``.

        Returns:
            Logits behind them, ``fp32 [r, vocabulary]``.
        """
        self._ahead -= 1
        self._positions = self._positions + 1
        ids = tokens[self._filled].view(-1, self._width)
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._own], dim=-1)
        logits = forward(ids, self._cache, self._positions, self._mask, self._width)
        return logits.flatten(0, 1)[: len(tokens)]

    # ------------------------------------------------------------ the layout

    def _stand(self, sequences: Sequence[int], *, as_read: bool) -> None:
        """Lay out sequences, where each has a row by itself in the cache as it was read, else in a new one."""
        prompts = {i: self._length(i) for i in {self._prompt_of[s] for s in sequences}}
        written = [(self._prompt_of[s], self._length(self._first + s)) for s in sequences]
        shared = self._length(_PREFIX)
        self._width = self._asked or best_width(shared, prompts, written, ahead=self._ahead)
        self._inside = [list(sequences[i : i + self._width]) for i in range(0, len(sequences), self._width)]
        count = len(self._inside) * self._width
        # places of the last bundle that no sequence stands at are filled by its last one, whose result isn't used
        self._filled = torch.arange(count, device=self._device).clamp(max=len(sequences) - 1)
        ends = [shared + prompts[prompt] + own - 1 for prompt, own in written]
        self._positions = torch.tensor(ends, device=self._device)[self._filled].view(-1, self._width)
        owners = self._owners_as_read() if as_read and self._width == 1 else self._move()
        self._start = self._cache.get_seq_length()
        self._mask, self._own = self._masks(owners.to(self._device))

    def _length(self, owner: int) -> int:
        return sum(map(len, self._runs.get(owner, _NOWHERE).places))

    def _owners_as_read(self) -> Tensor:
        owners = torch.full((self._first, self._cache.get_seq_length()), _HOLE)
        for i in range(self._first):
            owners[i, : self._length(_PREFIX)] = _PREFIX
            owners[i, self._runs[i].places[0]] = i
        return owners

    def _move(self) -> Tensor:
        """Copy what the sequences need into a new cache, and say whose each place of it is, ``int64 [n, p]``."""
        runs: dict[int, _Run] = {}
        laid_out: list[list[tuple[int, int, int]]] = []  # whose each place is, and where it is copied from
        for bundle, inside in enumerate(self._inside):
            prompts = dict.fromkeys(self._prompt_of[s] for s in inside)
            row: list[tuple[int, int, int]] = []
            for owner in (_PREFIX, *prompts, *(self._first + s for s in inside)):
                start, run = len(row), self._runs.get(owner, _NOWHERE)
                row += [(owner, run.row, place) for part in run.places for place in part]
                runs[owner] = _Run(bundle, (range(start, len(row)),))
            laid_out.append(row)
        longest = max(map(len, laid_out))
        filled = torch.tensor([row + [(_HOLE, 0, 0)] * (longest - len(row)) for row in laid_out])  # [n, p, 3]
        owners, rows, places = filled.unbind(-1)
        self._runs = runs
        self._cache = self._cache.gathered(rows, places, room=_ROOM * self._width)
        return owners

    def _masks(self, owners: Tensor) -> tuple[Tensor | None, Tensor]:
        """What each sequence sees of the places so far, and of those that the next tokens get."""
        n = len(owners)
        if self._width == 1:
            filled = owners != _HOLE
            return None if bool(filled.all()) else filled.long(), owners.new_ones(n, 1)
        flat = [s for inside in self._inside for s in inside]
        sequences = torch.tensor(flat, device=owners.device)[self._filled].view(n, self._width, 1)
        prompts = torch.tensor(self._prompt_of, device=owners.device)[sequences]
        whose = owners[:, None]  # [n, 1, p]
        seen = (whose == _PREFIX) | (whose == prompts) | (whose == sequences + self._first)  # [n, g, p]
        own = torch.eye(self._width, dtype=torch.bool, device=owners.device).expand(n, 1, -1, -1)
        return seen[:, None], own


def best_width(shared: int, prompts: dict[int, int], written: Sequence[tuple[int, int]], *, ahead: int) -> int:
    """How many sequences to put into a row of the cache, so that the next steps cost least.

    More in a row means fewer copies of what they share, but each also looks at the places of the others, which a mask
    then hides.

    Args:
        shared: Tokens of the prefix.
        prompts: Tokens of each prompt behind it.
        written: Of each sequence its prompt and its own tokens so far.
        ahead: Tokens that each may get.

    Returns:
        At least 1, at most as many as there are.

    Example:
        Eight completions of a long prompt share a row of the cache; eight prompts that share nothing don't.

        >>> best_width(0, {0: 500}, [(0, 0)] * 8, ahead=16)
        8
        >>> best_width(0, dict.fromkeys(range(8), 50), [(i, 0) for i in range(8)], ahead=16)
        1
    """

    def cost(width: int) -> float:
        longest, rows = 0.0, range(0, len(written), width)
        for start in rows:
            inside = written[start : start + width]
            own = sum(length for _, length in inside) + width * ahead / 2
            longest = max(longest, shared + own + sum(prompts[i] for i in {prompt for prompt, _ in inside}))
        return len(rows) * (longest * (1 + _PER_SEQUENCE * width) + _STEP * width)

    return min({-(-len(written) // rows) for rows in range(1, len(written) + 1)}, key=cost)
