"""What ranks tell each other, and work that one of them does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_ft.errors import LightningFTError, RolloutError

Own = TypeVar("Own")
Part = TypeVar("Part")


def rank_and_ranks() -> tuple[int, int]:
    """This process's number and how many there are; 0 and 1 without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(own: Own) -> list[Own]:
    """What every rank has, in their order; every rank must call it.

    Args:
        own: What this rank has: anything that can be pickled.

    Example:
        >>> gathered("a")
        ['a']
    """
    _, ranks = rank_and_ranks()
    if ranks == 1:
        return [own]
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, own)
    return every


def on_first_rank(work: Callable[[list[Own]], list[Part]], own: Own) -> Part:
    """Have rank 0 work with what every rank has.

    Every rank must call it. An error of the work is raised on all of them: a rank that raises alone leaves the others
    waiting.

    Args:
        work: Takes what the ranks have, in their order, and gives a part for each of them.
        own: What this rank has.

    Returns:
        This rank's part.

    Raises:
        LightningFTError: What the work raised.
        RolloutError: For any other error of the work.

    Example:
        >>> on_first_rank(lambda every: [sum(every)] * len(every), 3)
        3
    """
    rank, ranks = rank_and_ranks()
    if ranks == 1:
        return work([own])[0]
    every = gathered(own)
    told: list[Any] = [None]
    if rank == 0:
        try:
            told = [work(every)]
        except LightningFTError as error:
            told = [error]
        except Exception as error:
            told = [RolloutError(f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(told, src=0)
    if isinstance(told[0], Exception):
        raise told[0]
    part: Part = told[0][rank]
    return part
