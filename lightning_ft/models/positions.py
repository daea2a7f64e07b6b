"""Find out whether a model can process a token at a given position, by running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from lightning_ft.models.backbone import accepts, backbone_of
from lightning_ft.models.generate import evaluating
from lightning_ft.models.head import as_forward, input_device

_aten = torch.ops.aten


def reads_position(base: PreTrainedModel, position: int) -> bool:
    """Whether a model can process a sequence with a token at this position.

    Learned position tables have an end; rotary positions have none, whatever their quality. The model runs one token at
    that position, or a sequence of that length if it takes no position ids. On a GPU an index past the end of a table
    would kill the process, so indices are checked before they are used.

    Args:
        base: A transformers model on any device. If it is sharded, all ranks must make this call.
        position: Position of the token, counted from 0.

    Returns:
        False if the model can't; True also if a pass at position 0 fails too, for another reason.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_positions=8, n_embd=8, n_layer=1, n_head=1, vocab_size=9))
        >>> reads_position(model, 7), reads_position(model, 8)
        (True, False)
    """
    return as_forward(base, _reads, position) or not as_forward(base, _reads, 0)


def _reads(base: PreTrainedModel, position: int) -> bool:
    run = backbone_of(base)
    device = input_device(base)
    by_position = accepts(base.base_model, "position_ids")
    ids = torch.zeros(1, 1 if by_position else position + 1, dtype=torch.int64, device=device)
    options = {"position_ids": torch.tensor([[position]], device=device)} if by_position else {}
    with evaluating(base), _CheckedIndices():
        try:
            run(input_ids=ids, **options)
        except torch.OutOfMemoryError:
            return True  # the position exists, but there isn't enough memory
        except Exception:  # a forward pass may raise anything for shapes that don't match
            return False
    return True


class _CheckedIndices(TorchDispatchMode):
    """Raises an IndexError for an index past the end of a table, before a kernel is launched with it."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        find = _TABLES.get(func.overloadpacket)
        for size, indices in () if find is None else find(*args):
            if indices.numel() and int(indices.max()) >= size:
                raise IndexError(f"index {int(indices.max())} of a table of {size}")
        return func(*args, **(kwargs or {}))


_Lookups = Iterator[tuple[int, Tensor]]


def _rows_of(table: Tensor, indices: Tensor, *_: object) -> _Lookups:
    yield table.shape[0], indices


def _entries_of(table: Tensor, indices: list[Tensor | None], *_: object) -> _Lookups:
    for size, one in zip(table.shape, indices, strict=False):
        if one is not None and one.dtype not in (torch.bool, torch.uint8):
            yield size, one


def _along(table: Tensor, dim: int, indices: Tensor, *_: object) -> _Lookups:
    yield table.shape[dim], indices


_TABLES: dict[object, Callable[..., _Lookups]] = {
    _aten.embedding: _rows_of,
    _aten.index: _entries_of,
    _aten.index_select: _along,
    _aten.gather: _along,
}
"""Operators that index into their first argument."""
