"""The item-stats records and one worker's side of the topic, with a topic held in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import msgpack  # type: ignore[import-untyped]
import numpy as np
import pytest
import pytest_asyncio

from models.counters import CLICKS, Absolute, Checkpoint, CountersConfig, ItemCounters, TouchBatch
from models.errors import RecordError
from models.events import Action
from models.item_index import ItemIndex
from streams.decode import partition_of
from streams.item_stats import (
    CHECKPOINT_KEY,
    ItemStats,
    decode_checkpoint,
    decode_item,
    encode_checkpoint,
    encode_items,
)
from streams.sender import Delivered, Outbox, Sender
from streams.settings import Settings
from streams.state_thread import StateThread
from streams.topics import TopicNames

T = 1_700_000_000_000
EPOCH = 77


@dataclass
class Written:
    """A record as a mirror hands it on."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()


class MemorySender(Sender):
    """Keeps what is sent, in order."""

    def __init__(self) -> None:
        self.log: list[Written] = []

    async def send(self, outbox: Outbox) -> list[Delivered]:
        delivered = []
        for (topic, partition), records in outbox.records.items():
            delivered.append(Delivered(topic, partition, len(self.log), len(records)))
            for key, value, headers in records:
                self.log.append(Written(topic, partition, len(self.log), T, key, value, headers))
        return delivered


@dataclass
class Side:
    """One worker."""

    stats: ItemStats
    counters: ItemCounters
    sender: MemorySender
    may_write: list[bool] = field(default_factory=lambda: [True])

    def click(self, *items: str, first_offset: int = 0, partition: int = 0) -> None:
        batch = TouchBatch()
        for offset, item in enumerate(items, first_offset):
            event = Action(event_id=f"e{offset}", event_time=T, user_id=f"u{offset}", item_id=item, action="click")
            batch.add_event(event, offset, T, self.counters.config)
        self.counters.add(partition, batch)

    def clicks(self, item: str) -> float:
        return float(self.counters.totals(self.counters.index.rows([item]))[0, CLICKS])


@pytest_asyncio.fixture
async def state() -> AsyncIterator[StateThread]:
    made = StateThread()
    yield made
    made.close()


def side(state: StateThread, *, epoch: int = EPOCH, **config: float) -> Side:
    settings = Settings(counters=CountersConfig(**config))
    counters = ItemCounters(ItemIndex(), settings.counters)
    sender = MemorySender()
    may_write = [True]
    stats = ItemStats(settings, TopicNames.of(settings), counters, sender, state, epoch, may_write=lambda: may_write[0])
    return Side(stats, counters, sender, may_write)


def test_item_record_round_trips() -> None:
    index = ItemIndex()
    index.add("Ärtikel")
    values = np.arange(16, dtype=np.float64).reshape(1, 4, 4) / 7
    totals, offset = np.array([[5, 2, 3_500]]), np.array([41])
    state = Absolute(np.array([0], np.int32), values, totals, offset, np.array([T]), np.array([T - 5]))
    [(key, value)] = encode_items(index, state, EPOCH, 9)
    record = decode_item(value)
    assert key.decode() == "Ärtikel"
    assert (record.epoch, record.writer, record.last_offset) == (EPOCH, 9, 41)
    assert (record.ref_ms, record.first_ms) == (T, T - 5)
    assert (record.totals, record.values) == ([5, 2, 3_500], values.reshape(-1).tolist())


@pytest.mark.parametrize("checkpoint", [Checkpoint(), Checkpoint(100, 40, T)])
def test_checkpoint_record_round_trips(checkpoint: Checkpoint) -> None:
    record = decode_checkpoint(encode_checkpoint(checkpoint, EPOCH, 9))
    assert (record.checkpoint, record.epoch, record.writer) == (checkpoint, EPOCH, 9)


def test_checkpoint_key_is_no_text_and_so_no_item_id() -> None:
    with pytest.raises(UnicodeDecodeError):
        CHECKPOINT_KEY.decode("utf-8")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "malformed"),
        (b"\xc1", "malformed"),
        (msgpack.packb({"a": 1}), "malformed"),
        (msgpack.packb([1, 1, 1, 0, 0, [0, 0, 0], [0.0] * 12]), "invalid"),
        (msgpack.packb([2, 1, 1, 0, 0, 0, [0, 0, 0], [0.0] * 15]), "malformed"),
        (msgpack.packb([2, 1, 1, 0, 0, 0, [0, 0, "x"], [0.0] * 16]), "malformed"),
        (msgpack.packb([2, 1, 1, 0, 0, 0, [0, 0, 0], [float("nan")] * 16]), "invalid"),
        (msgpack.packb([2, 1, 1, -5, 0, 0, [0, 0, 0], [0.0] * 16]), "invalid"),
    ],
)
def test_item_record_that_is_none_is_refused(value: bytes, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        decode_item(value)
    assert caught.value.reason == reason


async def test_published_items_read_the_same_on_another_worker(state: StateThread) -> None:
    owner, reader = side(state), side(state)
    owner.counters.own(0)
    owner.click("a", "b", "a")
    await owner.stats.publish()
    reader.counters.row_for("z")  # rows differ between workers
    await reader.stats.apply(owner.sender.log)
    assert (reader.clicks("a"), reader.clicks("b")) == (2, 1)


async def test_second_publication_without_changes_sends_nothing(state: StateThread) -> None:
    owner = side(state)
    owner.counters.own(0)
    owner.click("a")
    assert await owner.stats.publish() == 2  # the item and the checkpoint behind it
    assert await owner.stats.publish(everything=True) == 0


async def test_checkpoint_stands_behind_the_items_that_it_speaks_of(state: StateThread) -> None:
    owner = side(state)
    owner.counters.own(0)
    owner.click("a", "b")
    await owner.stats.publish()
    keys = [written.key for written in owner.sender.log]
    assert keys == [b"a", b"b", CHECKPOINT_KEY]
    assert decode_checkpoint(owner.sender.log[-1].value or b"").checkpoint.offset == 2


async def test_rate_cap_lets_the_hottest_through_and_one_that_waits_longest(state: StateThread) -> None:
    owner = side(state, publish_max_records_per_second=10)
    owner.counters.own(0)
    cold = [f"cold{i}" for i in range(30)]
    owner.click(*cold, *["hot"] * 5)
    await owner.stats.publish()
    keys = {written.key for written in owner.sender.log}
    assert b"hot" in keys
    assert b"cold0" in keys
    assert owner.stats.backlog == 21
    assert decode_checkpoint(owner.sender.log[-1].value or b"").checkpoint.offset < 30


async def test_orderly_stop_publishes_everything_above_the_rate_cap_too(state: StateThread) -> None:
    owner = side(state, publish_max_records_per_second=10)
    owner.counters.own(0)
    owner.click(*[f"i{n}" for n in range(50)])
    assert await owner.stats.publish(everything=True) == 51


async def test_nothing_is_written_by_a_process_that_lost_its_partitions(state: StateThread) -> None:
    owner = side(state)
    owner.counters.own(0)
    owner.click("a")
    owner.may_write[0] = False
    assert await owner.stats.publish() == 0
    owner.may_write[0] = True
    assert await owner.stats.publish() == 2


async def test_loss_of_partitions_during_a_publication_puts_its_items_back(state: StateThread) -> None:
    owner = side(state)
    owner.counters.own(0)
    owner.click("a")
    answers = iter([True, False, True, True])
    owner.stats._may_write = lambda: next(answers)
    assert await owner.stats.publish() == 0
    assert await owner.stats.publish() == 2


async def test_released_partition_is_not_published(state: StateThread) -> None:
    owner = side(state)
    owner.counters.own(0)
    owner.counters.own(1)
    owner.click("a", partition=0)
    owner.click("b", partition=1)
    await owner.stats.keep_only([1])
    await owner.stats.publish()
    assert {written.partition for written in owner.sender.log} == {1}


async def test_records_of_an_owned_partition_do_not_change_it(state: StateThread) -> None:
    owner, late = side(state), side(state)
    for worker in (owner, late):
        worker.counters.own(0)
    late.click("a", "a", "a")
    owner.click("a")
    await late.stats.publish()
    await owner.stats.apply(late.sender.log)
    assert owner.clicks("a") == 1


async def test_what_the_next_owner_publishes_before_the_old_one_lets_go_is_not_lost_to_it(state: StateThread) -> None:
    old, new = side(state), side(state)
    for worker in (old, new):
        worker.counters.own(0)
    old.click("a")
    new.click("a", "a", "b")
    await new.stats.publish()
    new.click("a", first_offset=3)
    await new.stats.publish()
    # Newest first: what is kept is what contains most, not what came last.
    for written in reversed(new.sender.log):
        await old.stats.apply([written])
    assert (old.clicks("a"), old.clicks("b")) == (1, 0)
    await old.stats.release([0])
    assert (old.clicks("a"), old.clicks("b")) == (3, 1)
    assert old.counters.grand_total(CLICKS, 0, T) == pytest.approx(4)

    old.counters.own(0, Checkpoint(4, 0, T))
    old.click("b", first_offset=4)
    await old.stats.release([0])
    assert (old.clicks("a"), old.clicks("b")) == (3, 2)


@pytest.mark.parametrize("behind_the_owners_own", [False, True])
async def test_late_writer_makes_the_owner_publish_item_and_checkpoint_again(
    state: StateThread, behind_the_owners_own: bool
) -> None:
    owner, late = side(state), side(state)
    for worker in (owner, late):
        worker.counters.own(0)
    owner.click("a", "a", "a")
    late.click("a")
    await owner.stats.publish()
    await late.stats.publish()
    await owner.stats.apply([*(owner.sender.log if behind_the_owners_own else []), *late.sender.log])
    sent = len(owner.sender.log)
    await owner.stats.publish()
    assert [written.key for written in owner.sender.log[sent:]] == [b"a", CHECKPOINT_KEY]


async def test_own_records_coming_back_cause_no_publication(state: StateThread) -> None:
    owner = side(state)
    owner.counters.own(0)
    owner.click("a")
    await owner.stats.publish()
    owner.click("b", first_offset=1)
    await owner.stats.publish()
    await owner.stats.apply(owner.sender.log)
    assert owner.counters.dirty(0)[0].tolist() == []


async def test_counts_of_a_log_that_was_created_again_are_kept_and_its_offsets_start_anew(state: StateThread) -> None:
    before, after = side(state), side(state, epoch=EPOCH + 1)
    before.counters.own(0)
    before.click(*["a"] * 5)
    await before.stats.publish()
    await after.stats.apply(before.sender.log)
    assert after.stats._begin(0) == 0
    after.click("a")
    assert after.clicks("a") == 6


async def test_record_that_cannot_be_read_is_counted_and_the_others_are_applied(state: StateThread) -> None:
    owner, reader = side(state), side(state)
    owner.counters.own(0)
    owner.click("a")
    await owner.stats.publish()
    broken = Written("t", 0, 0, T, b"x", b"not a record")
    await reader.stats.apply([broken, *owner.sender.log])
    assert (reader.stats.refused_records, reader.clicks("a")) == (1, 1)


async def test_recount_leaves_out_what_live_processing_refuses(state: StateThread) -> None:
    worker = side(state)
    partitions = 12
    user = next(u for u in map(str, range(1_000)) if partition_of(u.encode(), partitions) == 0)
    good = f'{{"type":"action","event_id":"e","event_time":{T},"user_id":"{user}","item_id":"a","action":"click"}}'
    wrong_partition = good.replace(f'"user_id":"{user}"', '"user_id":"elsewhere"')
    assert partition_of(b"elsewhere", partitions) != 0
    log = [
        Written("events", 0, 0, T, user.encode(), b"{"),
        Written("events", 0, 1, T, b"another", good.encode()),
        Written("events", 0, 2, T, b"elsewhere", wrong_partition.encode()),
        Written("events", 0, 3, T + 40 * 86_400_000, user.encode(), good.encode()),
        Written("events", 0, 4, T, user.encode(), good.encode()),
    ]
    worker.counters.own(0)
    worker.stats.recount(log, set())
    assert worker.clicks("a") == 1
    assert worker.counters.next_offset(0) == 5
