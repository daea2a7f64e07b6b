"""What each rank of a run holds and sends, computed from the shapes of a model's weights.

Formulas, for `N` ranks and AdamW under ``bf16-mixed``; the tests count the same on two ranks:

- **DDP.** Each rank holds all weights, the gradients of the trained ones, two running means of each, and the buckets in
  which gradients are sent, a second copy of them (the default, `gradient_as_bucket_view=False`, of PyTorch's
  `DistributedDataParallel`). Gradients are summed once per accumulation window. A ring sends ``2 (N - 1) / N`` of their
  bytes from each rank, the least possible (Patarasuk and Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002).
- **FSDP2.** Of each tensor, each rank holds ``ceil(rows / N)`` rows, and so of its gradient and running means (ZeRO
  stage 3, https://arxiv.org/abs/1910.02054, section 5). Each micro-batch gathers the weights of every layer twice, and
  those of embeddings, head and the rest once (`lightning_ft.models.shard`); trained gradients are summed into shards
  once per accumulation window. A ring sends ``N - 1`` shards from each rank, for either.

A tensor with fewer rows than ranks is padded to one row for each: the `A` matrices of LoRA, which have as many rows as
the adapter's rank, are gathered and reduced as if they had `N`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import nn

from lightning_ft.models.head import CausalLM, base_of
from lightning_ft.models.shard import mixed_precision, shard_groups

Strategy = Literal["ddp", "fsdp"]
_STATES = 2
"""Tensors that AdamW keeps for each trained one, in its shape and dtype: running means of gradients and squares."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the rank that holds the most, without activations.

    Args:
        weights: All weights, or this rank's shards of them.
        gradients: Gradients of the trained weights between the backward pass and the optimizer's step.
        optimizer: AdamW's running means.
        buckets: DDP's copy of the gradients, which is what is sent.
        gathered: FSDP2's gathered weights: a group that is used, the next one, which is on its way, and the rest.
        unsharded: FSDP2's gradients of a whole group before and while they are summed over ranks; with several
            micro-batches per step, those of all groups.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int = 0
    gathered: int = 0
    unsharded: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class RankTraffic:
    """Bytes that a rank sends in an optimizer step, by ring algorithms.

    Args:
        gathered: Bytes of weights.
        reduced: Bytes of gradients.
    """

    gathered: int
    reduced: int

    @property
    def total(self) -> int:
        """Both."""
        return self.gathered + self.reduced


class _Tensor(NamedTuple):
    """A weight: its rows, values in a row, bytes of a value as stored and as gathered, and whether it is trained."""

    rows: int
    width: int
    stored: int
    gathered: int
    trained: bool

    def shard(self, ranks: int) -> int:
        """Values of a shard, with padding."""
        return math.ceil(self.rows / ranks) * self.width


class _Group(NamedTuple):
    """Weights that are gathered together, and how often in a micro-batch."""

    tensors: list[_Tensor]
    times: int

    def gathered_shard(self, ranks: int) -> int:
        """Bytes of a shard as it is sent to be gathered."""
        return sum(t.shard(ranks) * t.gathered for t in self.tensors)

    def trained_shard(self, ranks: int) -> int:
        """Values of the shards of trained weights."""
        return sum(t.shard(ranks) for t in self.tensors if t.trained)


def rank_memory(
    model: CausalLM, ranks: int, strategy: Strategy, *, precision: str = "bf16-mixed", micro_batches: int = 1
) -> RankMemory:
    """Compute what a rank holds of weights, gradients and optimizer state.

    Args:
        model: Model, with its adapters if any, on any device (`shape_model` makes one without memory), not sharded.
        ranks: Number of ranks.
        strategy: ``"ddp"``, or ``"fsdp"`` for FSDP2 (ModelParallelStrategy).
        precision: The Trainer's precision.
        micro_batches: Number of micro-batches per optimizer step.

    Raises:
        ModelError: For FSDP2, if transformers doesn't name the model's layers.

    Example:
        >>> from transformers import LlamaConfig
        >>> from lightning_ft.planning.shapes import shape_model
        >>> sizes = {"vocab_size": 100, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> model = shape_model(LlamaConfig(**sizes, num_hidden_layers=2))
        >>> sum(p.numel() for p in model.parameters())
        2536
        >>> rank_memory(model, 1, "ddp")
        RankMemory(weights=10144, gradients=10144, optimizer=20288, buckets=0, gathered=0, unsharded=0)
        >>> rank_memory(model, 4, "fsdp").optimizer
        5072
    """
    reduced = mixed_precision(precision).reduce_dtype
    assert reduced is not None
    if strategy == "ddp":
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return RankMemory(weights, gradients, _STATES * gradients, buckets=gradients if ranks > 1 else 0)
    groups = _groups(model, precision)
    tensors = [tensor for group in groups for tensor in group.tensors]
    weights = sum(t.shard(ranks) * t.stored for t in tensors)
    gradients = sum(t.shard(ranks) * t.stored for t in tensors if t.trained)
    # Neighbors in the order of the forward pass. The rest (the last norm, tied embeddings) stays gathered.
    *inner, rest = [ranks * group.gathered_shard(ranks) for group in groups]
    gathered = max(map(sum, pairwise(inner))) + rest
    messages = [ranks * group.trained_shard(ranks) * reduced.itemsize for group in groups]
    if micro_batches > 1:  # added up in the dtype in which they are reduced
        kept = sum(t.rows * t.width for t in tensors if t.trained) * reduced.itemsize
        unsharded = kept + max(messages)
    else:
        leaving = [sum(t.rows * t.width * t.gathered for t in group.tensors if t.trained) for group in groups]
        unsharded = max(map(sum, zip(leaving, messages, strict=True)))
    return RankMemory(weights, gradients, _STATES * gradients, gathered=gathered, unsharded=unsharded)


def rank_traffic(
    model: CausalLM, ranks: int, strategy: Strategy, *, precision: str = "bf16-mixed", micro_batches: int = 1
) -> RankTraffic:
    """Compute how much a rank sends to others in an optimizer step.

    Counts of tokens and logged metrics come in addition, a few numbers per step.

    Args:
        model: Model, with its adapters if any, on any device (`shape_model` makes one without memory), not sharded.
        ranks: Number of ranks.
        strategy: ``"ddp"``, or ``"fsdp"`` for FSDP2 (ModelParallelStrategy).
        precision: The Trainer's precision.
        micro_batches: Number of micro-batches per optimizer step.

    Raises:
        ModelError: For FSDP2, if transformers doesn't name the model's layers.

    Example:
        >>> from transformers import LlamaConfig
        >>> from lightning_ft.planning.shapes import shape_model
        >>> sizes = {"vocab_size": 100, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        >>> model = shape_model(LlamaConfig(**sizes, num_hidden_layers=2))
        >>> rank_traffic(model, 2, "ddp")
        RankTraffic(gathered=0, reduced=10144)
        >>> rank_traffic(model, 2, "fsdp")
        RankTraffic(gathered=3464, reduced=5072)
    """
    reduced = mixed_precision(precision).reduce_dtype
    assert reduced is not None
    if strategy == "ddp":
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return RankTraffic(0, round(2 * (ranks - 1) / ranks * trained))
    groups = _groups(model, precision)
    gathered = sum(group.times * group.gathered_shard(ranks) for group in groups)
    trained = sum(group.trained_shard(ranks) for group in groups)
    return RankTraffic(micro_batches * (ranks - 1) * gathered, (ranks - 1) * trained * reduced.itemsize)


def _groups(model: CausalLM, precision: str) -> list[_Group]:
    """Groups of weights in the order of a forward pass; the last one is the rest, which stays gathered."""
    base = base_of(model)
    layers, ends = shard_groups(base)
    dtype = mixed_precision(precision).param_dtype
    seen: set[int] = set()

    def group(part: nn.Module, times: int) -> _Group:
        parameters = [p for p in part.parameters() if id(p) not in seen]
        seen.update(map(id, parameters))
        return _Group(list(_tensors(parameters, dtype)), times)

    of_layers = [group(layer, 2) for layer in layers]  # for the forward and for the backward pass
    first, last = (_Group([], 1), _Group([], 1)) if ends is None else (group(ends[0], 1), group(ends[1], 1))
    return [first, *of_layers, last, group(base, 1)]


def _tensors(parameters: Iterable[nn.Parameter], dtype: torch.dtype | None) -> Iterator[_Tensor]:
    for p in parameters:
        rows = p.shape[0] if p.ndim else 1
        gathered = p.element_size() if dtype is None else dtype.itemsize
        yield _Tensor(rows, p.numel() // max(1, rows), p.element_size(), gathered, p.requires_grad)
