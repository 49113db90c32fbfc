"""What Faust may commit: never past an event that was not acknowledged, and all of them when everything was."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from aiokafka import TopicPartition
from hypothesis import given
from hypothesis import strategies as st
from intervaltree import IntervalTree  # type: ignore[import-untyped]

from streams.app import build
from streams.faust_patches import DirectConsumer, _LastRead
from streams.settings import Settings
from streams.topics import TopicNames

PLACE = TopicPartition("events", 0)


class Offsets(DirectConsumer):
    """A consumer's bookkeeping of offsets, without Kafka: ``next_offset`` is committed there."""

    def __init__(self, next_offset: int) -> None:
        self._gap: Any = defaultdict(IntervalTree)
        self._acked: Any = defaultdict(list)
        self._acked_index: Any = defaultdict(set)
        self._committed_offset: Any = defaultdict(lambda: None)
        self._read_offset: Any = _LastRead(lambda: None)
        self._unacked_messages: set[Any] = set()
        self._next_offset = next_offset
        self.app = SimpleNamespace(events_topic_name=PLACE.topic, committed_offsets=self.committed_offsets)
        self.app.conf = SimpleNamespace(broker_request_timeout=5.0)
        self._thread: Any = self
        self._buffered_partitions: set[Any] = set()
        self.fetches = 0
        self.fetched_while_seeking = False

    def _get_active_partitions(self) -> set[Any]:
        return {PLACE}

    async def _getmany(self, active_partitions: Any, timeout: float) -> dict[Any, Any]:
        self.fetches += 1
        return {}

    def assignment(self) -> set[Any]:
        return {PLACE}

    async def committed_offsets(self, partitions: set[int]) -> dict[int, int]:
        return dict.fromkeys(partitions, self._next_offset)

    async def seek_events(self, offsets: dict[Any, int]) -> dict[Any, int]:
        if self.fetched_while_seeking:
            self.fetched_while_seeking = False
            self._fetching = asyncio.current_task()
            await self.perform_seek()
            self._fetching = None
        return offsets

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


async def test_what_the_fetching_task_dropped_is_sought_when_the_flow_goes_on_and_before_the_next_fetch() -> None:
    consumer = Offsets(7)
    consumer.flow_active = True
    consumer.not_waiting_next_records = asyncio.Event()
    consumer._committed_offset[PLACE] = 9
    await consumer._wait_next_records(1.0)
    assert consumer.fetches == 1

    await consumer.perform_seek()
    assert consumer._committed_offset[PLACE] == 9, "a revocation may commit by it now"
    await consumer._wait_next_records(1.0)
    assert (consumer._committed_offset[PLACE], consumer._read_offset[PLACE], consumer.fetches) == (7, 6, 1)
    await consumer._wait_next_records(1.0)
    assert consumer.fetches == 2


async def test_a_seek_of_the_recovery_does_not_stand_for_one_that_was_wanted_later() -> None:
    consumer = Offsets(7)
    consumer.flow_active = True
    consumer.not_waiting_next_records = asyncio.Event()

    async def recover() -> None:
        await consumer.perform_seek()

    consumer.fetched_while_seeking = True
    await asyncio.create_task(recover())
    await consumer._wait_next_records(1.0)
    assert consumer.fetches == 0
    await consumer._wait_next_records(1.0)
    assert consumer.fetches == 1


async def test_a_revocation_commits_what_was_acknowledged_before_it_and_not_past_a_hole(tmp_path: Path) -> None:
    committed: list[int | None] = []

    async def nothing(*args: Any) -> Any:
        raise AssertionError("not called")

    async def revoke(partitions: set[Any]) -> None:
        # Faust waits here for the batch in work, and commits.
        acknowledge(3)
        committed.append(consumer._new_offset(PLACE))

    settings = Settings.model_validate(
        {"worker": {"data_folder": tmp_path}, "kafka": {"bootstrap_servers": "localhost:1"}}
    )
    app: Any = build(settings, TopicNames.of(settings), nothing, nothing, nothing, lambda error, where: None)
    consumer = app.transport.create_consumer(nothing, on_partitions_revoked=revoke, on_partitions_assigned=nothing)

    def acknowledge(offset: int) -> None:
        Offsets.ack_offset(consumer, offset)

    for first_acknowledged in ([0, 1, 2], [1, 2]):
        consumer._committed_offset[PLACE] = 0
        for offset in first_acknowledged:
            acknowledge(offset)
        await consumer.on_partitions_revoked({PLACE})
        books = (consumer._acked, consumer._acked_index, consumer._gap, consumer._committed_offset)
        assert all(PLACE not in book for book in books), "what was revoked is another worker's"
    assert committed == [4, None]
