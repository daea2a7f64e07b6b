"""A bound on the time that somebody else's Python code may take, in any thread."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_LOOKS_EVERY = 0.25  # seconds


class TimeLimitError(Exception):
    """The code inside :func:`within` took too long."""


class _Watch:
    """One thread that looks at what runs; a timer for each call would cost more than what is called."""

    def __init__(self) -> None:
        self._ends: dict[int, float] = {}
        self._lock = threading.Lock()
        self._process = 0

    def start(self, thread: int, end: float) -> None:
        if self._process != os.getpid():  # threads don't survive a fork
            self._process, self._lock, self._ends = os.getpid(), threading.Lock(), {}
            threading.Thread(target=self._look, name="lightning_ft time limit", daemon=True).start()
        self._ends[thread] = end

    def stop(self, thread: int) -> None:
        with self._lock:
            self._ends.pop(thread, None)

    def _look(self) -> None:
        while True:
            time.sleep(_LOOKS_EVERY)
            now = time.monotonic()
            with self._lock:
                for thread in [thread for thread, end in list(self._ends.items()) if now > end]:
                    del self._ends[thread]
                    # Raised before the thread's next instruction: it interrupts loops, not a single long operation.
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TimeLimitError))


_watch = _Watch()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Interrupt the block once it has run for some time.

    Args:
        seconds: The time; it is looked at every quarter of a second.

    Raises:
        TimeLimitError: If it takes longer.

    Example:
        >>> with within(0.1):
        ...     while True:
        ...         pass
        Traceback (most recent call last):
        lightning_ft.data.time_limit.TimeLimitError
    """
    thread = threading.get_ident()
    _watch.start(thread, time.monotonic() + seconds)
    try:
        yield
    finally:
        _watch.stop(thread)
