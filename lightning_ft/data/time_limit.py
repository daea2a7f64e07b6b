"""Limits the time and memory of untrusted Python code, in any thread."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_INTERVAL = 0.05  # seconds between checks; memory grows by up to about 5 GB/s


class TimeLimitError(Exception):
    """The code inside :func:`within` took too long."""


class MemoryLimitError(Exception):
    """The code inside :func:`within` took too much memory."""


@dataclass
class _Block:
    """A block of code that is watched.

    Args:
        thread: Thread that runs it.
        end: Time at which its limit is reached, on the clock of `time.monotonic`.
        grows: Bytes by which the process may grow meanwhile.
        memory: Bytes that the process used when the block was first checked.
        outer: The enclosing block in the same thread.
        interrupted: Whether an exception was raised in the thread.
    """

    thread: int
    end: float
    grows: float
    outer: _Block | None
    memory: int | None = field(default=None)
    interrupted: bool = field(default=False)

    def exceeds(self, now: float, memory: int) -> type[Exception] | None:
        if now > self.end:
            return TimeLimitError
        if self.memory is None:
            self.memory = memory
        return MemoryLimitError if memory - self.memory > self.grows else None


class _Watch:
    """A single thread that checks all running blocks; a timer per block would cost more than most blocks."""

    def __init__(self) -> None:
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)  # neither threads nor the holder of a lock survive a fork

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._running = False
        self._blocks: dict[int, _Block] = {}

    def start(self, seconds: float, grows: float) -> _Block:
        thread = threading.get_ident()
        with self._lock:
            if not self._running:
                self._running = True
                threading.Thread(target=self._check, name="lightning_ft time limit", daemon=True).start()
            block = _Block(thread, time.monotonic() + seconds, grows, self._blocks.get(thread))
            self._blocks[thread] = block
        return block

    def stop(self, block: _Block) -> None:
        with self._lock:
            if block.outer is None:
                self._blocks.pop(block.thread, None)
            else:
                self._blocks[block.thread] = block.outer
            if block.interrupted:
                _raise_in(block.thread, None)

    def _check(self) -> None:
        while True:
            time.sleep(_INTERVAL)
            with self._lock:
                if not self._blocks:
                    continue
                now, memory = time.monotonic(), _memory()
                for block in self._blocks.values():
                    if (error := block.exceeds(now, memory)) is not None:
                        # Again a second later, unless the block has ended: the code inside may catch this one.
                        block.interrupted, block.end, block.grows = True, now + 1.0, float("inf")
                        _raise_in(block.thread, error)


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    """Raise an error before a thread's next bytecode instruction, or cancel that if it is None.

    This interrupts loops, but not a single long operation.
    """
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


def _memory() -> int:
    """Resident memory of the process in bytes; 0 if the system doesn't report it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


_watch = _Watch()


@contextmanager
def within(seconds: float, grows: float = float("inf")) -> Iterator[None]:
    """Interrupt a block that takes too long or too much memory.

    Args:
        seconds: Time limit, checked every twentieth of a second.
        grows: Bytes by which the process may grow meanwhile; only checked where the system reports them, as Linux does.

    Raises:
        TimeLimitError: If the block takes longer.
        MemoryLimitError: If the process grows by more.

    Example:
        >>> with within(0.1):
        ...     while True:
        ...         pass
        Traceback (most recent call last):
        lightning_ft.data.time_limit.TimeLimitError
    """
    block = _watch.start(seconds, grows)
    try:
        yield
    finally:
        try:
            _watch.stop(block)
        except (TimeLimitError, MemoryLimitError):  # raised just as the block ended; the next is a second away
            _watch.stop(block)
