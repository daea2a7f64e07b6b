"""An event loop beside the running program, for reward functions that wait for others."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Sequence
from typing import Any


class BackgroundLoop:
    """Runs coroutines in a thread of their own, also where this thread runs a loop already, as notebooks do.

    The loop stays the same from call to call: clients keep connections that belong to the loop they were opened in.

    Example:
        >>> async def answer():
        ...     return 42
        >>> BackgroundLoop().gather([answer(), answer()])
        [42, 42]
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def gather(self, awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
        """Wait for all of them at once.

        Returns:
            Their results in order; of one that failed the exception itself.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_serve, args=(self._loop,), name="lightning_ft-rewards", daemon=True)
            thread.start()
            weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
        future = asyncio.run_coroutine_threadsafe(_gathered(awaitables), self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl+C here must stop what runs there
            future.cancel()
            raise


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _gathered(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    return list(await asyncio.gather(*awaitables, return_exceptions=True))
