"""Sums over the ranks of a run; the same calls do nothing where there is only one process."""

from __future__ import annotations

import torch
from torch import Tensor


def several_ranks() -> bool:
    """Whether there is a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def summed_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Sum of every rank's tensor, ``[...]`` on the CPU; each rank must call it.

    Args:
        values: On whatever device.
        device: Where the process group communicates.
    """
    if not several_ranks():
        return values.cpu()
    moved = values.clone() if values.device == device else values.to(device)
    torch.distributed.all_reduce(moved)
    return moved.cpu()


def largest_over_ranks(number: int, device: torch.device) -> int:
    """The largest of every rank's numbers; each rank must call it."""
    if not several_ranks():
        return number
    value = torch.tensor(number, device=device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return int(value)
