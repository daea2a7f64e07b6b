"""A key-value cache that starts from a prefix computed once and grows in place.

transformers' own cache makes a new tensor for every token, prefix included: with a long shared prefix most of the time
of a decoding step goes into copying it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.configuration_utils import PreTrainedConfig

_ROOM = 64  # positions that a full buffer grows by, by default


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer: ``[b, kv_heads, s, head_dim]`` views of buffers with spare positions at their end.

    Args:
        prefix: Keys and values of the shared prefix, ``[1, kv_heads, p, head_dim]`` each; None without a prefix.
    """

    def __init__(self, prefix: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self._prefix = prefix
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._room = _ROOM
        self._length = 0 if prefix is None else prefix[0].shape[-2]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, ``[b, kv_heads, t, head_dim]`` each, and return all of them."""
        start, stop = self._length, self._length + key_states.shape[-2]
        if self._buffers is None:
            self._buffers = (self._first_buffer(key_states, 0, stop), self._first_buffer(value_states, 1, stop))
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        elif stop > self._buffers[0].shape[-2]:
            keys, values = (_with_room(states[:, :, :start], stop, self._room) for states in self._buffers)
            self._buffers = (keys, values)
        self._length = stop
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = new
        return self._view()

    def _first_buffer(self, new: Tensor, index: int, stop: int) -> Tensor:
        prefix = new[:, :, :0] if self._prefix is None else self._prefix[index].expand(new.shape[0], -1, -1, -1)
        return _with_room(prefix, stop, self._room)

    def _view(self) -> tuple[Tensor, Tensor]:
        assert self._buffers is not None
        keys, values = (buffer[:, :, : self._length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys and values so far, ``[b, kv_heads, s, head_dim]`` each."""
        return self._view()

    def get_seq_length(self) -> int:
        """Number of positions filled, the prefix included."""
        return self._length

    def start_from(self, other: GrowingLayer, rows: Tensor, positions: Tensor, room: int) -> None:
        """Start with positions of another layer; see :meth:`GrowingCache.gather`."""
        if other._buffers is None:  # a layer that reuses the keys and values of another one
            return
        filled = other.filled()
        rows, positions = rows.to(other.device)[:, None], positions.to(other.device)[:, None]  # [b, 1, p]
        heads = torch.arange(filled[0].shape[1], device=other.device)[:, None]  # [kv_heads, 1]
        self._room, self._length = room, positions.shape[-1]
        keys, values = (_with_room(states[rows, heads, positions], self._length, room) for states in filled)
        self._buffers = (keys, values)
        self.dtype, self.device, self.is_initialized = other.dtype, other.device, True
        self._view()


def _with_room(states: Tensor, stop: int, room: int) -> Tensor:
    """Copy states into a new buffer of ``stop + room`` positions."""
    b, heads, length, dim = states.shape
    buffer = states.new_empty(b, heads, stop + room, dim)
    buffer[:, :, :length] = states
    return buffer


class GrowingCache(Cache):
    """A key-value cache of :class:`GrowingLayer`.

    Args:
        layers: Number of layers.
        prefix: Cache of one row, which every row of this cache starts with.
    """

    def __init__(self, layers: int, prefix: GrowingCache | None = None) -> None:
        self.growing: list[GrowingLayer] = [
            GrowingLayer(None if prefix is None else prefix.growing[i].filled()) for i in range(layers)
        ]
        super().__init__(layers=list(self.growing))

    def gather(self, rows: Tensor, positions: Tensor, *, room: int) -> GrowingCache:
        """Copy positions of this cache into a new one.

        Args:
            rows: Row of this cache that each position is copied from, ``int64 [b, p]``.
            positions: Position in that row, ``int64 [b, p]``.
            room: Number of positions that the new cache grows by whenever it is full.

        Returns:
            A cache of `b` rows with `p` positions filled.
        """
        cache = GrowingCache(len(self.growing))
        for new, old in zip(cache.growing, self.growing, strict=True):
            new.start_from(old, rows, positions, room)
        return cache


def layer_support(config: PreTrainedConfig, tokens: int) -> tuple[int, str | None]:
    """Return how many layers keep keys and values, and why a :class:`GrowingLayer` can't (None if it can).

    Args:
        config: Config of the model.
        tokens: Largest number of positions in a row, masked ones included.
    """
    layers = DynamicCache(config=config).layers
    for layer in layers:
        if type(layer) is DynamicSlidingWindowLayer:
            if tokens > layer.sliding_window:
                return len(layers), f"it attends to a sliding window of {layer.sliding_window:,} tokens only"
        elif type(layer) is not DynamicLayer:
            return len(layers), f"its cache has layers of type {type(layer).__name__}"
    return len(layers) or int(config.get_text_config(decoder=True).num_hidden_layers), None
