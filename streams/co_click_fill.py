"""Co-click pairs of users whose rows a worker takes over: learned from the rows, beside the events.

Pairs are nowhere but in memory, and no worker tells another: each has those of its own users, a random share by
murmur2 of the user id, and what a user's row remembers makes up for a start, a crash or a rebalance. A snapshot of a
partition's rows is taken where no event can come between it and the events that are learned live; a row's bytes are
never changed, so that the snapshot costs references alone. It is learned a hundred rows at a time, between
batches: until it is done, the source co_click finds less.

Pairs of a partition that goes away stay, and fade. One that comes back brings only what happened since it went: never
is a pair counted twice.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

import structlog

from models.co_clicks import CoClicks
from models.errors import RowError
from models.user_row import ROW, decode_rows
from models.user_value import row_of
from streams.state_thread import StateThread

log = structlog.get_logger(__name__)

FILL_ROWS = 100
"""Rows learned in one step: up to 10 ms where all are full, for which a slate may have to wait."""
REST = 3.0
"""After each step, as many times its duration belong to the events."""
_RECENT_START: int = ROW.fields["recent"][1] if ROW.fields else 0
"""A stored row that ends before it has no recent items."""

RowsOf = Callable[[int], Mapping[bytes, bytes]]


class CoClickFill:
    """Learns what the rows of taken-over partitions hold. Called from the event loop, learns in the state thread."""

    def __init__(self, rows_of: RowsOf, state: StateThread) -> None:
        self._rows_of = rows_of
        self._state = state
        self._into: CoClicks | None = None
        self._owned: set[int] = set()
        self._left_ms: dict[int, int] = {}
        """When a partition went away whose pairs are still held."""
        self._waiting: deque[tuple[int, list[bytes]]] = deque()
        self._wake = asyncio.Event()

    @property
    def rows_left(self) -> int:
        """Return how many rows are still to be learned."""
        return sum(len(values) for _, values in self._waiting)

    def follow(self, into: CoClicks | None, partitions: Iterable[int], now_ms: int) -> None:
        """Have the rows of ``partitions``, all that are owned now, learned by ``into``; None: nobody wants pairs.

        To be called where no event is being processed: before the first one of a partition gained, and where ``into``
        is another one than before.
        """
        if into is not self._into:
            self._into = into
            self._owned.clear()
            self._left_ms.clear()
            self._waiting.clear()
        owned = set(partitions)
        if into is None:
            return
        self._left_ms.update(dict.fromkeys(self._owned - owned, now_ms))
        for partition in sorted(owned - self._owned):
            after_ms = self._left_ms.pop(partition, -1)
            values = [value for value in self._rows_of(partition).values() if len(value) > _RECENT_START]
            if values:
                self._waiting.append((after_ms, values))
        self._owned = owned
        if self._waiting:
            self._wake.set()

    async def run(self) -> None:
        """Learn whatever is to be learned, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            rows, started = self.rows_left, time.monotonic()
            while self._waiting:
                began = time.monotonic()
                await self.step()
                await asyncio.sleep(REST * (time.monotonic() - began))
            log.info("co_clicks_filled", rows=rows, seconds=round(time.monotonic() - started, 3))

    async def step(self) -> None:
        """Learn the next rows."""
        into = self._into
        if into is None or not self._waiting:
            return
        after_ms, values = self._waiting[0]
        some = values[-FILL_ROWS:]
        del values[-FILL_ROWS:]
        if not values:
            self._waiting.popleft()
        await self._state.run(_learn, into, some, after_ms, time.time_ns() // 1_000_000)


def _learn(into: CoClicks, values: list[bytes], after_ms: int, now_ms: int) -> None:
    """Learn stored rows; those that cannot be read are left to the events that touch them."""
    try:
        rows = decode_rows([row_of(value) for value in values])
    except RowError:
        rows = decode_rows([row_of(value) for value in values if _is_readable(value)])
    into.learn(into.steps_of_rows(rows, after_ms), now_ms)


def _is_readable(value: bytes) -> bool:
    try:
        decode_rows([row_of(value)])
    except RowError as error:
        log.warning("co_clicks_row_unread", error=str(error))
        return False
    return True
