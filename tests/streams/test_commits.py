"""What Faust may commit: never past an event that was not acknowledged, and all of them when everything was."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

from aiokafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st
from intervaltree import IntervalTree  # type: ignore[import-untyped]

from streams.faust_patches import DirectConsumer, _LastRead

PLACE = TopicPartition("events", 0)


class Offsets(DirectConsumer):
    """A consumer's bookkeeping of offsets, without Kafka: ``perform_seek`` finds ``next_offset`` there."""

    def __init__(self, next_offset: int) -> None:
        self._gap: Any = defaultdict(IntervalTree)
        self._acked: Any = defaultdict(list)
        self._acked_index: Any = defaultdict(set)
        self._committed_offset: Any = defaultdict(lambda: None)
        self._read_offset: Any = _LastRead(lambda: None)
        self._unacked_messages: set[Any] = set()
        self._next_offset = next_offset

    async def seek_to_committed(self) -> dict[Any, int | None]:
        return {PLACE: self._next_offset}

    async def read(self, offset: int) -> None:
        """Do what Faust's ``_drain_messages`` does with a message."""
        last = self._read_offset[PLACE]
        if (last is None or offset >= last) and offset - (last or 0) > 1 and last:
            await self._add_gap(PLACE, last + 1, offset)
        self._read_offset[PLACE] = offset

    def ack_offset(self, offset: int) -> None:
        """Do what Faust's ``ack`` does."""
        committed = self._committed_offset[PLACE]
        if (committed is None or offset >= committed) and offset not in self._acked_index[PLACE]:
            self._acked_index[PLACE].add(offset)
            self._acked[PLACE].append(offset)

    def commit_offset(self) -> int:
        """Commit what may be, and return what is committed."""
        offset = self._new_offset(PLACE)
        if offset is not None and self._should_commit(PLACE, offset):
            self._committed_offset[PLACE] = offset
        return int(self._committed_offset[PLACE])


@given(
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), min_size=1, max_size=30),
    st.data(),
)
def test_no_commit_passes_an_event_that_is_not_acknowledged_and_the_last_ack_commits_all(
    start: int, steps: list[tuple[int, bool, bool]], data: st.DataObject
) -> None:
    """Each step: offsets missing before the event (ends of transactions), whether acks and a commit follow it."""

    async def run() -> None:
        consumer = Offsets(start)
        await consumer.perform_seek()
        offset, waiting = start - 1, []
        for missing, acks, commits in steps:
            offset += missing + 1
            await consumer.read(offset)
            waiting.append(offset)
            if acks:
                acked = data.draw(st.sampled_from(waiting))
                waiting.remove(acked)
                consumer.ack_offset(acked)
            if commits:
                assert consumer.commit_offset() <= min(waiting, default=offset + 1)
        for left in data.draw(st.permutations(waiting)):
            consumer.ack_offset(left)
        consumer.commit_offset()
        assert consumer.commit_offset() == offset + 1

    asyncio.run(run())


async def test_events_that_were_dropped_before_the_first_commit_hold_the_commits_back() -> None:
    consumer = Offsets(0)
    await consumer.perform_seek()
    for offset in range(5):
        await consumer.read(offset)
    for offset in (2, 3, 4):
        consumer.ack_offset(offset)
    assert consumer.commit_offset() == 0
    consumer.ack_offset(0)
    assert consumer.commit_offset() == 1
    consumer.ack_offset(1)
    assert consumer.commit_offset() == 5
