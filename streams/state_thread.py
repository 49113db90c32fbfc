"""The one thread in which state is read and changed.

Rows, catalogue, counters and index are NumPy and FAISS code: in the event loop it would hold up Kafka's clients, in
several threads it would need locks. So every function that touches state runs here, one after the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class StateThread:
    """A one-thread executor with an awaitable call."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run ``function`` in the state thread and return its result.

        A cancelled caller does not leave the function half done: it runs to its end, only the result is dropped.
        """
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self.executor, lambda: function(*args, **kwargs)))

    def close(self) -> None:
        """Wait for the function that runs and end the thread."""
        self.executor.shutdown(wait=True, cancel_futures=True)
