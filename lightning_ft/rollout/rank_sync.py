"""Keeps the ranks of a sharded model generating together, whatever number of passes each of them needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from lightning_ft.distributed import rank_and_world_size
from lightning_ft.errors import ConfigError, RolloutError
from lightning_ft.models.head import CausalLM, base_of, input_device
from lightning_ft.models.memory import free_bytes
from lightning_ft.models.shard import gathered_bytes, is_sharded, kept_gathered, reshard, sharded_parts
from lightning_ft.rollout.decode import idle_pass


def fits(base: PreTrainedModel) -> bool:
    """Whether all weights of a sharded model fit into half of the memory that is free on this rank's device.

    Args:
        base: The transformers model.
    """
    free = free_bytes(input_device(base))
    return free is not None and gathered_bytes(base) <= free // 2


class RankSync:
    """Makes every rank of a sharded model run the same number of forward passes.

    A pass of a sharded model gathers weights from all ranks, so it hangs unless all of them run one. Ranks have
    different prompts, whose completions end after different numbers of passes. So each pass is announced: ranks that
    still generate run theirs, the others an idle one, until all ranks have finished. The ranks' batches and steps
    don't have to coincide.

    Where all weights fit into memory, :meth:`gathered` gathers them once for all passes. Then ranks need not wait for
    each other.

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

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather all weights of a sharded model once for the passes in the block, where they fit on every rank.

        They may take half of the memory that is free; the rest is for activations and the cache. Where they don't
        fit, each pass gathers each layer.
        """
        base = base_of(self._model)
        if not isinstance(base, FSDPModule) or any(self.agree([not fits(base)])):
            yield
            return
        needed = self.needed
        with kept_gathered(base):
            idle_pass(self._model)
            for part in sharded_parts(base):  # what a pass over text may have left out
                part.unshard()
            self.needed = False
            try:
                yield
            finally:
                self.needed = needed

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
