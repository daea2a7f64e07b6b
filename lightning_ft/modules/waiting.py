"""Work that may take longer on one rank than a collective waits, such as a reward function that calls a server.

A process group gives up on a collective after its timeout (30 minutes by default), and ranks that finish early would
wait in one for the others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from lightning_ft.distributed import is_distributed
from lightning_ft.errors import RewardError

T = TypeVar("T")
_DONE, _WORKING, _FAILED = 0, 1, 2
_LONGEST_WAIT = 5.0
"""Seconds between two checks whether all ranks are done."""


class PatientRanks:
    """Runs work on every rank and waits until all are done, however long it takes.

    Another thread polls in short collectives of a group of its own, so that none of them waits for long and the work
    may use the default group itself. A rank that dies ends them as it ends every collective.

    Example:
        >>> PatientRanks().run(lambda: 42)
        42
    """

    def __init__(self) -> None:
        self._group: torch.distributed.ProcessGroup | None = None

    def run(self, work: Callable[[], T]) -> T:
        """Run the work; all ranks must call this.

        Args:
            work: Function that is called in this thread.

        Returns:
            The result of the work.

        Raises:
            RewardError: If the work failed on another rank; the error of that rank has the reason.
        """
        if not is_distributed():
            return work()
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        state, ended = _WORKING, threading.Event()

        def poll() -> int:
            """The worst state of all ranks, once none is working or one has failed."""
            wait, worst = 0.01, _WORKING
            while worst == _WORKING:
                ended.wait(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
                value = torch.tensor(state)
                torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX, group=self._group)
                worst = int(value)
            return worst

        with ThreadPoolExecutor(1, thread_name_prefix="lightning_ft-ranks") as pool:
            polling = pool.submit(poll)
            try:
                result = work()
                state = _DONE
            except BaseException:
                state = _FAILED
                raise
            finally:
                ended.set()
        if polling.result() == _FAILED:
            raise RewardError("A reward function failed on another rank: see the error of that rank.")
        return result
