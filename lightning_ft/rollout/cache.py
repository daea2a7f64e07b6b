"""A key-value cache that starts from a prefix computed once and grows in place.

transformers' own cache makes a new tensor for every token, prefix included: with a long shared prefix most of the time
of a decoding step goes into copying it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.configuration_utils import PreTrainedConfig

_ROOM = 64  # places added at a time, unless said otherwise


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, ``[b, kv_heads, s, head_dim]`` views of buffers with room at their end.

    Args:
        prefix: Keys and values of the shared prefix, ``[1, kv_heads, p, head_dim]`` each; None for none.
    """

    def __init__(self, prefix: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self._prefix = prefix
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._room = _ROOM
        self._length = 0 if prefix is None else prefix[0].shape[-2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, ``[b, kv_heads, t, head_dim]``; give back all of them."""
        start, stop = self._length, self._length + key_states.shape[-2]
        if self._buffers is None:
            self._buffers = (self._first(key_states, 0, stop), self._first(value_states, 1, stop))
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        elif stop > self._buffers[0].shape[-2]:
            keys, values = (_with_room(states[:, :, :start], stop, self._room) for states in self._buffers)
            self._buffers = (keys, values)
        self._length = stop
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = new
        return self._view()

    def _first(self, new: Tensor, which: int, stop: int) -> Tensor:
        before = new[:, :, :0] if self._prefix is None else self._prefix[which].expand(new.shape[0], -1, -1, -1)
        return _with_room(before, stop, self._room)

    def _view(self) -> tuple[Tensor, Tensor]:
        assert self._buffers is not None
        keys, values = (buffer[:, :, : self._length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys and values so far."""
        return self._view()

    def get_seq_length(self) -> int:
        """Places filled, the prefix among them."""
        return self._length

    def start_from(self, other: GrowingLayer, rows: Tensor, places: Tensor, room: int) -> None:
        """Begin with places of another layer, see :meth:`GrowingCache.gathered`."""
        if other._buffers is None:  # it takes its keys and values from another layer
            return
        filled = other.filled()
        rows, places = rows.to(other.device)[:, None], places.to(other.device)[:, None]  # [b, 1, p]
        heads = torch.arange(filled[0].shape[1], device=other.device)[:, None]  # [kv_heads, 1]
        self._room, self._length = room, places.shape[-1]
        keys, values = (_with_room(states[rows, heads, places], self._length, room) for states in filled)
        self._buffers = (keys, values)
        self.dtype, self.device, self.is_initialized = other.dtype, other.device, True
        self._view()


def _with_room(states: Tensor, stop: int, room: int) -> Tensor:
    b, heads, length, dim = states.shape
    buffer = states.new_empty(b, heads, stop + room, dim)
    buffer[:, :, :length] = states
    return buffer


class GrowingCache(Cache):
    """A cache of growing layers.

    Args:
        layers: How many.
        prefix: One row that every row starts with.
    """

    def __init__(self, layers: int, prefix: GrowingCache | None = None) -> None:
        self.growing: list[GrowingLayer] = [
            GrowingLayer(None if prefix is None else prefix.growing[i].filled()) for i in range(layers)
        ]
        super().__init__(layers=list(self.growing))

    def gathered(self, rows: Tensor, places: Tensor, *, room: int) -> GrowingCache:
        """A cache of `b` rows that begins with `p` places of this one.

        Args:
            rows: Row of this cache that each place is copied from, ``int64 [b, p]``.
            places: Place in that row, ``int64 [b, p]``.
            room: Places added whenever it is full.
        """
        cache = GrowingCache(len(self.growing))
        for new, old in zip(cache.growing, self.growing, strict=True):
            new.start_from(old, rows, places, room)
        return cache


def cache_layers(config: PreTrainedConfig, tokens: int) -> tuple[int, str | None]:
    """How many layers keep keys and values, and why they can't be kept in a :class:`GrowingLayer` (None if they can).

    Args:
        config: The model's.
        tokens: Most places that a row will have, holes included.
    """
    kinds = DynamicCache(config=config).layers
    for layer in kinds:
        if type(layer) is DynamicSlidingWindowLayer:
            if tokens > layer.sliding_window:
                return len(kinds), f"it attends to a sliding window of {layer.sliding_window:,} tokens only"
        elif type(layer) is not DynamicLayer:
            return len(kinds), f"its cache has layers of the kind {type(layer).__name__}"
    return len(kinds) or int(config.get_text_config(decoder=True).num_hidden_layers), None
