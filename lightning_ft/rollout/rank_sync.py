"""Keeps the ranks of a sharded model generating together, whatever number of passes each of them needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_ft.distributed import rank_and_world_size
from lightning_ft.errors import ConfigError, RolloutError
from lightning_ft.models.head import CausalLM, input_device
from lightning_ft.models.shard import is_sharded, reshard


class RankSync:
    """Makes every rank of a sharded model run the same number of forward passes.

    A pass of a sharded model gathers weights from all ranks, so it hangs unless all of them run one. Ranks have
    different prompts, whose completions end after different numbers of passes. So each pass is announced: ranks that
    still generate run theirs, the others an idle one, until all ranks have finished. The ranks' batches and steps
    don't have to coincide.

    With an unsharded model, or in a single process, the methods do nothing.

    Args:
        model: Model to run. Every rank of the default process group has a shard of it and makes the same calls here.
    """

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self.needed = rank_and_world_size()[1] > 1 and is_sharded(model)

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """Return the maximum of each number over the ranks."""
        if not self.needed:
            return list(numbers)
        maxima = torch.tensor(list(numbers), device=input_device(self._model))
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
        return [int(number) for number in maxima.tolist()]

    def check(self, problem: ConfigError | None) -> None:
        """Raise on every rank if the request of any rank is invalid.

        A rank that raised alone would leave the others waiting for its shard of the weights.

        Args:
            problem: Error of this rank's request; None if the request is valid.

        Raises:
            ConfigError: `problem`, on ranks that have one.
            RolloutError: If only other ranks have one.
        """
        (problems,) = self.agree([int(problem is not None)])
        if problem is not None:
            raise problem
        if problems:
            raise RolloutError("Another rank's request is invalid, so no rank generates: see that rank's error.")

    def announce(self) -> None:
        """Announce that this rank is about to run a pass."""
        if self.needed:
            self._count_running(1)

    def wait(self, idle: Callable[[], object]) -> None:
        """Run an idle pass with each pass of other ranks, until they have finished too."""
        while self.needed and int(self._count_running(0)):
            idle()

    def release(self) -> None:
        """Free gathered weights that FSDP2 keeps for a backward pass: none follows a generation."""
        reshard(self._model)

    def _count_running(self, running: int) -> Tensor:
        """Count the ranks that are about to run a pass; `running` is 1 on those, 0 on the others."""
        count = torch.tensor(running, device=input_device(self._model))
        dist.all_reduce(count)
        return count
