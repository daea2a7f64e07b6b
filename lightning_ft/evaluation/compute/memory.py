"""Measure peak memory since a point in time."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from lightning_ft.evaluation.compute.arithmetic import MemorySource

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Peak memory since the object was created.

    On CUDA it is the memory that PyTorch allocated on the device. On a CPU it is the resident set of the process, whose
    peak Linux resets on request ("5" to ``/proc/self/clear_refs``, see the manual page proc_pid_clear_refs(5));
    elsewhere it is the peak since the process started, and `source` says so. Resetting the peak affects other readers
    of it, too (`torch.cuda.max_memory_allocated`, ``VmHWM``).

    Args:
        device: Device that training runs on.

    Example:
        >>> memory = PeakMemory(torch.device("cpu"))
        >>> memory.peak() >= memory.at_start > 0
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.source: MemorySource
        """Source of the readings."""
        self.at_start: int
        """Memory in use when the object was created, in bytes."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.source, self.at_start = "cuda", torch.cuda.memory_allocated(device)
        else:
            self.source = "resident" if _reset_peak() else "process"
            self.at_start = _status_bytes("VmRSS") or _process_peak()

    def peak(self) -> int:
        """Return the peak in bytes; pending work on the device may still raise it."""
        if self.source == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return (_status_bytes("VmHWM") if self.source == "resident" else None) or _process_peak()


def _reset_peak() -> bool:
    """Reset the peak of the resident set, and return whether that worked."""
    if _status_bytes("VmHWM") is None or _status_bytes("VmRSS") is None:
        return False
    try:
        _CLEAR.write_text("5")
    except OSError:  # not Linux, or not permitted
        return False
    now, peak = _status_bytes("VmRSS"), _status_bytes("VmHWM")
    # some containers accept the write but ignore it; a small difference comes from pages freed in between
    return now is not None and peak is not None and peak <= now + max(now // 50, 2**22)


def _status_bytes(name: str) -> int | None:
    """Return a line of the process's status in bytes; None if there is no such line."""
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    found = [line.split() for line in text.splitlines() if line.startswith(f"{name}:")]
    return int(found[0][1]) * 1024 if found else None


def _process_peak() -> int:
    """Return the peak of the resident set since the process started, in bytes."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024  # KiB on Linux, bytes on macOS
