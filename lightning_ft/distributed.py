"""Communication between ranks: gathering, reduction, work that rank 0 does for all, and rank-zero messages."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from lightning_utilities.core import rank_zero as lightning
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

from lightning_ft.errors import LightningFTError, RolloutError
from lightning_ft.printable import printable

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Value = TypeVar("Value")
Share = TypeVar("Share")


def rank_and_world_size() -> tuple[int, int]:
    """Rank of this process and number of processes; 0 and 1 without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_gather_objects(value: Value) -> list[Value]:
    """Gather one object from each rank, in order of rank. Every rank must call it.

    Args:
        value: This rank's object, which must be picklable.

    Returns:
        Objects of all ranks.

    Example:
        >>> all_gather_objects("a")
        ['a']
    """
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return [value]
    values = [value] * world_size
    dist.all_gather_object(values, value)
    return values


def on_rank_zero(function: Callable[[list[Value]], list[Share]], value: Value) -> Share:
    """Run a function on rank 0 with the values of all ranks, and scatter its results.

    Every rank must call it. An error in the function is raised on all ranks, since the others would wait forever for a
    rank that raises alone.

    Args:
        function: Maps the values of all ranks, in order of rank, to a list of one result per rank.
        value: This rank's value, which must be picklable.

    Returns:
        This rank's result.

    Raises:
        LightningFTError: The function's own error, if it is one of this package.
        RolloutError: For any other error in the function.

    Example:
        >>> on_rank_zero(lambda values: [sum(values)] * len(values), 3)
        3
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return function([value])[0]
    values = all_gather_objects(value)
    outcome: list[Any] = [None]  # the results of all ranks, or the error
    if rank == 0:
        try:
            outcome = [function(values)]
        except LightningFTError as error:
            outcome = [error]
        except Exception as error:
            outcome = [RolloutError(f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    share: Share = outcome[0][rank]
    return share


def is_distributed() -> bool:
    """Whether a process group is initialized."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Sum a tensor over all ranks. Every rank must call it.

    Args:
        values: This rank's tensor, ``[...]``, on any device.
        device: Device on which the process group communicates.

    Returns:
        The sum, ``[...]``, on the CPU.
    """
    if not is_distributed():
        return values.cpu()
    moved = values.clone() if values.device == device else values.to(device)
    torch.distributed.all_reduce(moved)
    return moved.cpu()


def max_over_ranks(number: int, device: torch.device) -> int:
    """Maximum of a number over all ranks. Every rank must call it.

    Args:
        number: This rank's number.
        device: Device on which the process group communicates.
    """
    if not is_distributed():
        return number
    value = torch.tensor(number, device=device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return int(value)


def mesh_device(mesh: DeviceMesh) -> torch.device:
    """Device of this rank in a mesh of ranks."""
    on_gpu = mesh.device_type == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device(mesh.device_type)


def device_of_passes(weight: Tensor) -> torch.device:
    """Device on which a model's passes use a weight; between them its shard may be in the memory of the CPU.

    Args:
        weight: A parameter, sharded or not.

    Example:
        >>> device_of_passes(torch.zeros(2))
        device(type='cpu')
    """
    mesh = getattr(weight, "device_mesh", None)
    return weight.device if mesh is None else mesh_device(mesh)


if getattr(rank_zero_only, "rank", None) is None:  # Lightning sets it in the same way when it is imported
    _RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
    rank_zero_only.rank = next((int(os.environ[name]) for name in _RANKS if name in os.environ), 0)  # type: ignore[attr-defined]


def rank_zero_info(message: object, *, stacklevel: int = 4, **options: object) -> None:
    """Log a message on rank 0.

    Args:
        message: Message to log. Characters that a terminal would interpret are escaped.
        stacklevel: Stack level as for Lightning's function of this name, which adds frames of its own.
        options: Further arguments of `logging.Logger.info`.
    """
    lightning.rank_zero_info(printable(str(message)), stacklevel=stacklevel + 1, **options)


def rank_zero_warn(message: object, *, stacklevel: int = 4, **options: object) -> None:
    """Issue a warning on rank 0.

    Args:
        message: Text of the warning. Characters that a terminal would interpret are escaped.
        stacklevel: Stack level as for Lightning's function of this name, which adds frames of its own.
        options: Further arguments of `warnings.warn`.
    """
    lightning.rank_zero_warn(printable(str(message)), stacklevel=stacklevel + 1, **options)


def warn(message: object, *, stacklevel: int = 2) -> None:
    """Issue a warning on every rank that calls it.

    Args:
        message: Text of the warning. Characters that a terminal would interpret are escaped.
        stacklevel: Stack level as for `warnings.warn`, where 1 is the line that calls this function.
    """
    warnings.warn(printable(str(message)), stacklevel=stacklevel + 1)


__all__ = ["rank_zero_info", "rank_zero_only", "rank_zero_warn", "warn"]
