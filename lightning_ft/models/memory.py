"""Memory that is free on a device."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int | None:
    """Bytes of memory that can be allocated on a device; None where the system doesn't tell.

    Args:
        device: A GPU, or the CPU.

    Example:
        >>> free = free_bytes(torch.device("cpu"))
        >>> free is None or free > 0
        True
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu" or not _MEMINFO.is_file():
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", _MEMINFO.read_text())
    return None if found is None else int(found[1]) * 1024
