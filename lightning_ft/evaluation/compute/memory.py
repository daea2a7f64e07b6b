"""Peak memory from a moment on."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from lightning_ft.evaluation.compute.arithmetic import MemoryKind

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """The most memory in use since it was made.

    On CUDA it is what PyTorch allocated on the device. On a CPU it is the resident set of the process, whose peak Linux
    starts anew on request ("5" to ``/proc/self/clear_refs``, see the manual page proc_pid_clear_refs(5)); where it
    doesn't, the peak since the process started, and `kind` says so. Either way others who read that peak (
    `torch.cuda.max_memory_allocated`, ``VmHWM``) find it started anew.

    Args:
        device: That training runs on.

    Example:
        >>> memory = PeakMemory(torch.device("cpu"))
        >>> memory.peak() >= memory.at_start > 0
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.kind: MemoryKind
        """What is measured."""
        self.at_start: int
        """Bytes in use when it was made."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.kind, self.at_start = "cuda", torch.cuda.memory_allocated(device)
        else:
            self.kind = "resident" if _start_anew() else "process"
            self.at_start = _status("VmRSS") or _largest()

    def peak(self) -> int:
        """Bytes; device work still under way may yet raise it."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return (_status("VmHWM") if self.kind == "resident" else None) or _largest()


def _start_anew() -> bool:
    if _status("VmHWM") is None or _status("VmRSS") is None:
        return False
    try:
        _CLEAR.write_text("5")
    except OSError:  # not Linux, or not allowed here
        return False
    now, peak = _status("VmRSS"), _status("VmHWM")
    # some containers accept the write and do nothing; pages freed meanwhile explain a little
    return now is not None and peak is not None and peak <= now + max(now // 50, 2**22)


def _status(name: str) -> int | None:
    """A line of the process's status, in bytes; None where there is none."""
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    found = [line.split() for line in text.splitlines() if line.startswith(f"{name}:")]
    return int(found[0][1]) * 1024 if found else None


def _largest() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024  # kilobytes everywhere else
