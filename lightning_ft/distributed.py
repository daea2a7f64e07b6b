"""Communication between ranks: all_gather_objects values, work that one rank does for all, and rank-zero messages."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_utilities.core import rank_zero as lightning
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

from lightning_ft.errors import LightningFTError, RolloutError
from lightning_ft.printable import printable

Own = TypeVar("Own")
Part = TypeVar("Part")


def rank_and_world_size() -> tuple[int, int]:
    """This process's number and how many there are; 0 and 1 without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_gather_objects(own: Own) -> list[Own]:
    """What every rank has, in their order; every rank must call it.

    Args:
        own: Value of this rank: anything that can be pickled.

    Example:
        >>> all_gather_objects("a")
        ['a']
    """
    _, ranks = rank_and_world_size()
    if ranks == 1:
        return [own]
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, own)
    return every


def on_rank_zero(work: Callable[[list[Own]], list[Part]], own: Own) -> Part:
    """Have rank 0 work with what every rank has.

    Every rank must call it. An error of the work is raised on all of them: a rank that raises alone leaves the others
    waiting.

    Args:
        work: Takes what the ranks have, in their order, and gives a part for each of them.
        own: Value of this rank.

    Returns:
        This rank's part.

    Raises:
        LightningFTError: What the work raised.
        RolloutError: For any other error of the work.

    Example:
        >>> on_rank_zero(lambda every: [sum(every)] * len(every), 3)
        3
    """
    rank, ranks = rank_and_world_size()
    if ranks == 1:
        return work([own])[0]
    every = all_gather_objects(own)
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


def is_distributed() -> bool:
    """Whether there is a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Sum of every rank's tensor, ``[...]`` on the CPU; each rank must call it.

    Args:
        values: On whatever device.
        device: Where the process group communicates.
    """
    if not is_distributed():
        return values.cpu()
    moved = values.clone() if values.device == device else values.to(device)
    torch.distributed.all_reduce(moved)
    return moved.cpu()


def max_over_ranks(number: int, device: torch.device) -> int:
    """The largest of every rank's numbers; each rank must call it."""
    if not is_distributed():
        return number
    value = torch.tensor(number, device=device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return int(value)


if getattr(rank_zero_only, "rank", None) is None:  # set by Lightning as soon as that is imported, likewise
    _RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
    rank_zero_only.rank = next((int(os.environ[name]) for name in _RANKS if name in os.environ), 0)  # type: ignore[attr-defined]


def rank_zero_info(message: object, *, stacklevel: int = 4, **options: Any) -> None:
    """Log on the first rank.

    Args:
        message: What to say; characters that a terminal would obey are escaped.
        stacklevel: As of Lightning's function, which has frames of its own.
        options: Arguments of `logging.Logger.info`.
    """
    lightning.rank_zero_info(printable(str(message)), stacklevel=stacklevel + 1, **options)


def rank_zero_warn(message: object, *, stacklevel: int = 4, **options: Any) -> None:
    """Warn on the first rank.

    Args:
        message: What to say; characters that a terminal would obey are escaped.
        stacklevel: As of Lightning's function, which has frames of its own.
        options: Arguments of `warnings.warn`.
    """
    lightning.rank_zero_warn(printable(str(message)), stacklevel=stacklevel + 1, **options)


def warn(message: object, *, stacklevel: int = 2) -> None:
    """Warn on every rank.

    Args:
        message: What to say; characters that a terminal would obey are escaped.
        stacklevel: As of `warnings.warn`: 1 is the line that calls this function.
    """
    warnings.warn(printable(str(message)), stacklevel=stacklevel + 1)


__all__ = ["rank_zero_info", "rank_zero_only", "rank_zero_warn", "warn"]
