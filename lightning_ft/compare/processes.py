"""What the processes of measured runs have in common: their environment, and what is said if one fails."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_ft._lightning import NAMESPACE, VARIABLE

LOG = "log.txt"
"""Name of the file that a process's output goes to."""


def run_environment(threads: int | None) -> dict[str, str]:
    """Environment variables of a process that uses the same Lightning package as this one.

    Args:
        threads: Number of threads; torch's default if None.
    """
    own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {**os.environ, VARIABLE: NAMESPACE, **own}


def last_lines(folder: Path) -> str:
    """The end of a process's output, for an error message.

    Args:
        folder: Folder of the run.
    """
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    return f"Last lines of {folder / LOG}:\n" + "\n".join(lines[-12:])


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Raise SystemExit on SIGTERM, which schedulers send: by default Python ends at once, and its runs go on.

    Does nothing outside the main thread, which alone may handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if earlier is None else earlier)  # None: set outside of Python
