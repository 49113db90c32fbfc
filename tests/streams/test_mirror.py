"""When a mirror has caught up, over a log held in memory: marks of transactions, rebalances in quick succession."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from aiokafka import TopicPartition
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streams import mirror as mirror_module
from streams.mirror import Mirror, Record
from streams.settings import Settings

TOPIC = "users"
MARK = None
"""A log entry that no reader is given: the mark of a transaction."""


@dataclass
class Entry:
    """A record as a consumer hands it on."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    topic: str = TOPIC
    timestamp: int = 0
    headers: Sequence[tuple[str, bytes]] = ()


@dataclass
class LogConsumer:
    """A consumer of logs held in memory: a list of keys a partition. End offsets come when ``go_on`` is set."""

    logs: dict[int, list[bytes | None]]
    at: dict[TopicPartition, int] = field(default_factory=dict)
    asking: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.go_on.set()

    async def start(self) -> None:
        """Nothing to connect to."""

    async def stop(self) -> None:
        """Nothing to close."""

    def assign(self, partitions: Iterable[TopicPartition]) -> None:
        self.at = dict.fromkeys(partitions, 0)

    def assignment(self) -> frozenset[TopicPartition]:
        return frozenset(self.at)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        assert partition in self.at, f"{partition} is not assigned"
        self.at[partition] = offset

    async def position(self, partition: TopicPartition) -> int:
        return self.at[partition]

    def highwater(self, partition: TopicPartition) -> int:
        return len(self.logs[partition.partition])

    async def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        self.asking.set()
        await asyncio.sleep(0)
        await self.go_on.wait()
        return {tp: len(self.logs[tp.partition]) for tp in partitions}

    async def beginning_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 0)

    async def getmany(self, *, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[Entry]]:
        await asyncio.sleep(0)
        found = {}
        for tp, at in self.at.items():
            end = min(len(self.logs[tp.partition]), at + max_records)
            self.at[tp] = end
            entries = [(offset, self.logs[tp.partition][offset]) for offset in range(at, end)]
            records = [Entry(tp.partition, offset, key, b"") for offset, key in entries if key is not MARK]
            if records:
                found[tp] = records
        return found


class Keys:
    """What was applied and not forgotten since, as ``Profiles`` keeps it: keys by partition."""

    def __init__(self) -> None:
        self.held: dict[int, list[bytes | None]] = {}

    def apply(self, records: Sequence[Record]) -> None:
        for record in records:
            self.held.setdefault(record.partition, []).append(record.key)


@dataclass
class Mirrored:
    """A mirror that runs, the logs behind it and what it applied."""

    mirror: Mirror
    consumer: LogConsumer
    keys: Keys

    def rebalance(self, *partitions: int) -> None:
        """Do what a worker does: forget what is not assigned, then mirror what is."""
        for gone in self.keys.held.keys() - set(partitions):
            del self.keys.held[gone]
        self.mirror.assign(partitions)

    async def caught_up(self) -> None:
        await asyncio.wait_for(self.mirror.caught_up.wait(), 10)

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(10_000):
            if condition():
                return
            await asyncio.sleep(0)
        raise AssertionError("the mirror never came that far")


@asynccontextmanager
async def mirrored(logs: dict[int, list[bytes | None]], *assigned: int) -> AsyncIterator[Mirrored]:
    consumer, keys = LogConsumer(logs), Keys()
    made = Mirrored(Mirror(Settings(), TOPIC, keys.apply, max_records=2), consumer, keys)
    made.mirror.assign(assigned)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mirror_module, "new_consumer", lambda settings: consumer)
        task = asyncio.create_task(made.mirror.run(all_partitions=False))
        try:
            yield made
        finally:
            task.cancel()
            await asyncio.wait([task])


async def test_log_that_ends_with_the_mark_of_a_transaction_is_caught_up_with() -> None:
    async with mirrored({0: [b"a", b"b", MARK]}, 0) as on:
        await on.caught_up()
        assert on.keys.held == {0: [b"a", b"b"]}


async def test_log_of_marks_alone_is_caught_up_with() -> None:
    async with mirrored({0: [MARK, MARK, MARK]}, 0) as on:
        await on.caught_up()
        assert on.mirror.positions == {0: 3}


async def test_position_passes_a_mark_that_comes_after_the_mirror_has_caught_up() -> None:
    async with mirrored({0: [b"a"]}, 0) as on:
        await on.caught_up()
        on.consumer.logs[0] += [b"b", MARK]
        await on.until(lambda: on.mirror.positions[0] == 3)


async def test_mark_at_the_end_is_no_lag() -> None:
    async with mirrored({0: [b"a", MARK]}, 0) as on:
        await on.caught_up()
        assert on.mirror.end_offsets == {0: 2}
        assert on.mirror.lag == 0


async def test_not_caught_up_before_the_last_record_is_applied() -> None:
    async with mirrored({0: [b"a", b"b", b"c", b"d", b"e", MARK]}, 0) as on:
        await on.until(lambda: bool(on.keys.held))
        assert not on.mirror.caught_up.is_set()
        await on.caught_up()
        assert on.keys.held == {0: [b"a", b"b", b"c", b"d", b"e"]}


async def test_partition_taken_away_and_given_back_at_once_is_read_again() -> None:
    async with mirrored({0: [b"a", b"b"]}, 0) as on:
        await on.caught_up()
        on.rebalance()
        on.rebalance(0)
        assert not on.mirror.caught_up.is_set()
        await on.caught_up()
        assert on.keys.held == {0: [b"a", b"b"]}


async def test_partition_that_stays_is_not_read_again_when_another_comes_back() -> None:
    async with mirrored({0: [b"a", b"b"], 1: [b"c", b"d"]}, 0, 1) as on:
        await on.caught_up()
        on.rebalance(1)
        on.rebalance(0, 1)
        await on.caught_up()
        assert on.keys.held == {0: [b"a", b"b"], 1: [b"c", b"d"]}


async def test_assignment_that_is_replaced_while_offsets_are_asked_for_does_not_count_as_caught_up() -> None:
    async with mirrored({0: [b"a"], 1: [b"b"], 2: [b"c", b"d", b"e"]}, 0, 1) as on:
        await on.caught_up()
        on.consumer.asking.clear()
        on.consumer.go_on.clear()
        on.rebalance(0)
        await asyncio.wait_for(on.consumer.asking.wait(), 10)
        on.rebalance(0, 2)
        on.consumer.go_on.set()
        await on.caught_up()
        assert on.keys.held == {0: [b"a"], 2: [b"c", b"d", b"e"]}


REBALANCES = st.lists(st.tuples(st.sets(st.integers(0, 2)), st.integers(0, 12)), max_size=12)
"""The partitions of each assignment, and how many turns of the loop pass before the next one."""


@settings(max_examples=200, deadline=None)
@given(rebalances=REBALANCES)
@example(rebalances=[({0, 1}, 12), ({0}, 1), ({0, 2}, 3)])
def test_whatever_is_caught_up_with_was_applied_once_and_in_order(rebalances: list[tuple[set[int], int]]) -> None:
    logs: dict[int, list[bytes | None]] = {0: [b"a", b"b", b"c", MARK], 1: [b"d", MARK, b"e", b"f"], 2: [b"g"]}

    async def scenario() -> None:
        async with mirrored(logs) as on:
            for partitions, turns in [*rebalances, ({0, 1}, 0)]:
                on.rebalance(*partitions)
                for _ in range(turns):
                    await asyncio.sleep(0)
                    if on.mirror.caught_up.is_set():
                        assert on.keys.held == whole(*partitions)
            await on.caught_up()
            assert on.keys.held == whole(0, 1)

    def whole(*partitions: int) -> dict[int, list[bytes | None]]:
        return {p: [key for key in logs[p] if key is not MARK] for p in partitions}

    asyncio.run(scenario())
