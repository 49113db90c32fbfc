"""The batch whose records are on their way to the broker, while the next one is prepared: one of each at most.

Preparing is the state thread's work, delivering the broker's: one after the other, each would wait for the other half
of the time. The next batch reads the rows that are on their way; it is sent when they have arrived, never before, so
that what a crash or a fence leaves behind is what one batch after the other would leave.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from streams.in_flight import InFlightMark

RowKey = tuple[int, bytes]
"""(partition, user_id bytes)."""
_NOTHING: Final[Mapping[RowKey, bytes]] = {}


class Deliveries:
    """What was begun and has not arrived. All calls but ``row`` come from the event loop."""

    def __init__(
        self,
        mark: InFlightMark,
        read_row: Callable[[int, bytes], bytes | None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._mark = mark
        self._read_row = read_row
        self._on_failure = on_failure
        self._in_work = asyncio.Lock()
        self._rows = _NOTHING
        self._task: asyncio.Task[None] | None = None
        self._begun: list[Sequence[tuple[int, int]]] = []
        """(partition, offset) of the events of each batch that was begun and has not arrived, the oldest first."""

    def row(self, partition: int, key: bytes) -> bytes | None:
        """Return a user's value as the next batch must see it: on its way, else as the table holds it."""
        on_its_way = self._rows.get((partition, key))
        return on_its_way if on_its_way is not None else self._read_row(partition, key)

    @asynccontextmanager
    async def batch(self, offsets: Sequence[tuple[int, int]]) -> AsyncIterator[None]:
        """Prepare a batch of these events, to the start of its delivery; a mark says that they are in work."""
        async with self._in_work:
            self._begun.append(offsets)
            self._note()
            yield

    @asynccontextmanager
    async def between_batches(self) -> AsyncIterator[None]:
        """Hold the next batch back, from when the one before has arrived: a model is changed then, or settings."""
        async with self._in_work:
            await self.settled()
            yield

    def start(self, rows: Mapping[RowKey, bytes], delivery: Coroutine[Any, Any, None]) -> None:
        """Deliver the batch that is in work; call it when the one before has ``settled``.

        ``rows``: what it leaves in the table when ``delivery`` is done. Where that fails, the process shall end.
        """
        if self._task is not None:
            delivery.close()
            raise RuntimeError("a batch is still on its way; its rows were kept: await settled() before the next one")
        self._rows = rows
        self._task = asyncio.create_task(self._run(delivery), name="delivery")

    async def settled(self) -> None:
        """Return when nothing is on its way. Raises what made the delivery fail."""
        task = self._task
        if task is not None:
            # The caller may be cancelled; what is on its way arrives all the same.
            await asyncio.shield(task)

    async def _run(self, delivery: Coroutine[Any, Any, None]) -> None:
        try:
            await delivery
            self._rows = _NOTHING
            self._begun.pop(0)
            self._note()
        except BaseException as error:
            # The task stays: whoever waits for it hears of the failure too.
            self._on_failure(error)
            raise
        self._task = None

    def _note(self) -> None:
        if self._begun:
            self._mark.set(offset for offsets in self._begun for offset in offsets)
        else:
            self._mark.clear()
