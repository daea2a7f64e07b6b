"""Ranks of a sharded model run it together, however much each of them has to write."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_ft.distributed import rank_and_world_size
from lightning_ft.errors import ConfigError, RolloutError
from lightning_ft.models.head import CausalLM, base_of, input_device
from lightning_ft.models.shard import is_sharded


class RankSync:
    """Gives every rank of a sharded model the same number of forward passes.

    A pass of a sharded model gathers weights from all ranks, so it hangs unless all of them run one. Ranks have
    different prompts, which end after different numbers of passes. So each pass is announced: ranks with something to
    write run theirs, the others an idle one, until none has anything left. Batches and steps of different ranks
    need not meet.

    With an unsharded model, or in one process, nothing is exchanged.

    Args:
        model: The model. Every rank of the default process group holds a part of it and makes the same calls here.
    """

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self.needed = rank_and_world_size()[1] > 1 and is_sharded(model)

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """The largest of all ranks, of each number."""
        if not self.needed:
            return list(numbers)
        most = torch.tensor(list(numbers), device=input_device(self._model))
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return [int(number) for number in most.tolist()]

    def check(self, problem: ConfigError | None) -> None:
        """Raise what is wrong with this rank's request, and on the other ranks that something is.

        A rank that raises alone would leave the others waiting for its part of the weights.

        Raises:
            ConfigError: `problem`.
            RolloutError: If only another rank has one.
        """
        (problems,) = self.agree([int(problem is not None)])
        if problem is not None:
            raise problem
        if problems:
            raise RolloutError("Another rank was asked for something that it can't generate: see that rank's error.")

    def announce(self) -> None:
        """Say that this rank is about to run a pass."""
        if self.needed:
            self._busy(1)

    def wait(self, idle: Callable[[], object]) -> None:
        """Run idle passes beside those of other ranks, until they have finished too."""
        while self.needed and int(self._busy(0)):
            idle()

    def release(self) -> None:
        """Give up the gathered weights of the root module.

        FSDP2 keeps them for a backward pass to come. After a generation none comes: they would take memory, and a
        pass after the weights have changed would still use them.
        """
        base = base_of(self._model)
        if isinstance(base, FSDPModule):
            base.reshard()

    def _busy(self, here: int) -> Tensor:
        ranks = torch.tensor(here, device=input_device(self._model))
        dist.all_reduce(ranks)
        return ranks
