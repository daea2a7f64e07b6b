"""What Lightning's ModelParallelStrategy leaves to its users: data parallelism by default, one reduction of gradients
per accumulation window, and checkpoints of trainable weights only, which any number of ranks can resume from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_ft._lightning import _pl
from lightning_ft.models.shard import gradients_kept_apart

if TYPE_CHECKING:
    from pytorch_lightning.strategies import ModelParallelStrategy
else:
    ModelParallelStrategy = _pl.strategies.ModelParallelStrategy


class ShardedStrategy(ModelParallelStrategy):
    """ModelParallelStrategy for modules of this package; :func:`adopt` makes the user's own one of it."""

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Let gradients add up on each rank; Lightning's own does so for DDP only."""
        assert self.model is not None
        with gradients_kept_apart(self.model):
            yield


def adopt(strategy: Any) -> None:
    """Give a ModelParallelStrategy the methods of :class:`ShardedStrategy`, and all ranks to its data parallelism.

    Its defaults are tensor parallelism within a machine, which these modules don't have. So ``"auto"`` means as many
    ranks as there are for `data_parallel_size`, and 1 for `tensor_parallel_size`.

    Args:
        strategy: The Trainer's strategy, before its processes communicate; others are left as they are.
    """
    if not isinstance(strategy, ModelParallelStrategy) or isinstance(strategy, ShardedStrategy):
        return
    kind = type(strategy)
    bases = (ShardedStrategy,) if kind is ModelParallelStrategy else (ShardedStrategy, kind)
    strategy.__class__ = type(kind.__name__, bases, {})
    if strategy._tensor_parallel_size == "auto":
        strategy._tensor_parallel_size = 1
    if strategy._data_parallel_size == "auto" and strategy._tensor_parallel_size == 1:
        strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
