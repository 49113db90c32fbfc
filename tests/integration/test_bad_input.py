"""Bad records on a real broker: each becomes a dead letter with its reason, and the good ones around it all count."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import msgspec
import pytest

from models.user_row import recent
from streams.sender import Headers, Outbox
from streams.topic_io import TopicWriter, partition_of
from tests.integration.conftest import PARTITIONS, settings_maker
from tests.integration.oracle import Scene, look
from tests.integration.traffic import traffic
from tests.integration.workers import World, now_ms, record, world

pytestmark = pytest.mark.integration

DAY_MS = 86_400_000
LIMIT_BYTES = 1_000_000
KEY = b"bad-user"


class Bad(NamedTuple):
    """A record that must be refused."""

    reason: str
    value: bytes | None
    key: bytes | None = KEY
    headers: Headers = ()
    partition: int | None = None


def click(**changes: Any) -> dict[str, Any]:
    """Return a good click with some fields changed; None leaves a field out."""
    event = {
        "type": "action",
        "event_id": f"e-{sorted(changes)}",
        "event_time": now_ms(),
        "user_id": KEY.decode(),
        "item_id": "item-1",
        "action": "click",
    }
    return {name: value for name, value in (event | changes).items() if value is not None}


def as_json(**changes: Any) -> bytes:
    """Return a click as JSON."""
    return msgspec.json.encode(click(**changes))


def as_msgpack(**changes: Any) -> bytes:
    """Return a click as MessagePack, where NaN, infinite and huge values have a form."""
    return msgspec.msgpack.encode(click(**changes))


def padded(length: int, user_id: str) -> bytes:
    """Return a click of exactly ``length`` bytes: a field that nobody knows fills it up."""
    empty = as_json(user_id=user_id, filling="")
    return as_json(user_id=user_id, filling="x" * (length - len(empty)))


WRONG_PARTITION = (partition_of(KEY, PARTITIONS) + 1) % PARTITIONS
BAD: dict[str, Bad] = {
    "half a JSON text": Bad("malformed", as_json()[:-9]),
    "bytes of no format": Bad("malformed", b"\xc1\xc1\xc1\xc1"),
    "an empty value": Bad("malformed", b""),
    "a null value": Bad("null-value", None),
    "JSON that says it is MessagePack": Bad("invalid", as_json(), headers=[("content-type", b"application/msgpack")]),
    "a JSON list": Bad("invalid", b"[1,2,3]"),
    "a JSON null": Bad("invalid", b"null"),
    "no type": Bad("invalid", as_json(type=None)),
    "a type that nobody knows": Bad("invalid", as_json(type="purge")),
    "no user id": Bad("invalid", as_json(user_id=None)),
    "no event id": Bad("invalid", as_json(event_id=None)),
    "an empty item id": Bad("invalid", as_json(item_id="")),
    "a null in a field": Bad("invalid", as_json().replace(b'"item-1"', b"null")),
    "a number for an id": Bad("invalid", as_json(item_id=7)),
    "a word for a time": Bad("invalid", as_json(event_time="yesterday")),
    "a time without a zone": Bad("invalid", as_json(event_time="2024-05-01T12:00:00")),
    "an action that nobody knows": Bad("invalid", as_json(action="stare")),
    "NaN in JSON": Bad("malformed", as_json(value=1.5).replace(b"1.5", b"NaN")),
    "NaN in MessagePack": Bad("invalid", as_msgpack(value=float("nan"))),
    "an infinite number": Bad("invalid", as_msgpack(value=float("inf"))),
    "a number beyond floats": Bad("invalid", as_json(value=1.5).replace(b"1.5", b"1e400")),
    "a huge integer": Bad("invalid", as_json(event_time=1).replace(b":1,", b":" + b"9" * 5_000 + b",")),
    "a huge integer in MessagePack": Bad("invalid", as_msgpack(event_time=2**64 - 1)),
    "invalid UTF-8 in JSON": Bad("malformed", as_json().replace(b"item-1", b"item-\xff")),
    "invalid UTF-8 in MessagePack": Bad("malformed", as_msgpack().replace(b"item-1", b"item-\xff")),
    "half a surrogate pair": Bad("malformed", as_json().replace(b"item-1", b"\\ud800")),
    "nesting without end": Bad("malformed", b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "nesting without end in MessagePack": Bad("malformed", b"\x81\xa1a" + b"\x91" * 200_000 + b"\xc0"),
    "an impression of 10,000 items": Bad(
        "invalid", as_json(type="impression", items=[{"item_id": f"item-{i}"} for i in range(10_000)])
    ),
    "an impression of none": Bad("invalid", as_json(type="impression", items=[])),
    "one byte too many": Bad("too-large", padded(LIMIT_BYTES + 1, KEY.decode())),
    "a key that is not the user id": Bad("key-mismatch", as_json(), key=b"somebody-else"),
    "no key": Bad("key-mismatch", as_json(), key=None, partition=0),
    "a partition that murmur2 does not give": Bad("wrong-partition", as_json(), partition=WRONG_PARTITION),
    "a clock of 1970": Bad("event-time-absurd", as_json(event_time=1)),
    "a clock two days ahead": Bad("event-time-absurd", as_json(event_time=now_ms() + 2 * DAY_MS)),
}


async def send(on: World, records: list[Bad]) -> None:
    """Send records in order, each as it is."""
    outbox = Outbox()
    async with TopicWriter(on.settings, on.names.events) as writer:
        for bad in records:
            partition = partition_of(bad.key or b"", PARTITIONS) if bad.partition is None else bad.partition
            outbox.add(on.names.events, partition, bad.key, bad.value, bad.headers)
        await writer.send(outbox)


def good(user_id: str, value: bytes, headers: Headers = ()) -> Bad:
    """Return a record that must be accepted."""
    return Bad("", value, key=user_id.encode(), headers=headers)


async def play(on: World) -> Scene:
    """Mix the bad records with good ones, let a worker process them, and look."""
    between = [Bad("", value, key=key) for key, value in traffic(on, 6 * len(BAD), 20)]
    mixed: list[Bad] = []
    for number, bad in enumerate(BAD.values()):
        mixed += [*between[6 * number : 6 * number + 6], bad]
    mixed += [
        good("user-at-the-limit", padded(LIMIT_BYTES, "user-at-the-limit")),
        good("user-of-a-new-item", as_json(user_id="user-of-a-new-item", item_id="not-known-yet")),
        good("user-ü-ж-🙂", as_msgpack(user_id="user-ü-ж-🙂")),
        good("user-with-odd-headers", as_json(user_id="user-with-odd-headers"), [("content-type", None), ("", b"")]),  # type: ignore[list-item]
    ]
    worker = await on.ready_worker()
    await send(on, mixed)
    return await look(on, worker)


@pytest.fixture(scope="module")
def scene(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The scenario under the default clock policy, played once."""
    folder = tmp_path_factory.mktemp("bad-input")

    async def scenario() -> Scene:
        async with world(settings_maker(folder, lambda: kafka), folder) as on:
            return await play(on)

    return asyncio.run(scenario())


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_becomes_a_dead_letter_with_its_reason_and_its_bytes(scene: Scene, name: str) -> None:
    bad = BAD[name]
    found = [x.reason for x in scene.letters if (x.key, x.value) == (bad.key, bad.value)]
    assert found == [bad.reason]


def test_nothing_else_is_refused_and_the_metric_counts_them(scene: Scene) -> None:
    assert (len(scene.letters), scene.metrics["dead_letters"]) == (len(BAD), len(BAD))


def test_the_worker_that_met_them_goes_on(scene: Scene) -> None:
    assert scene.exit_code is None


def test_good_events_around_bad_ones_all_count(scene: Scene) -> None:
    assert scene.differences == []


def test_a_record_at_the_size_limit_is_accepted(scene: Scene) -> None:
    assert scene.rows[b"user-at-the-limit"]["clicks"] == [1]


def test_an_action_on_an_item_that_is_not_known_yet_is_kept_in_the_ring(scene: Scene) -> None:
    row = scene.rows[b"user-of-a-new-item"]
    hashes, _, _ = recent(row)
    assert (row["clicks"][0], int((hashes != 0).sum())) == (1, 1)


def test_a_bad_user_has_no_row(scene: Scene) -> None:
    assert KEY not in scene.rows


@pytest.mark.parametrize("user", ["user-ü-ж-🙂", "user-with-odd-headers"])
def test_odd_but_valid_records_are_accepted(scene: Scene, user: str) -> None:
    assert scene.rows[user.encode()]["clicks"] == [1]


@pytest.fixture(scope="module")
def trusted_scene(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """An import of old logs: the same worker under the policy "trusted"."""
    folder = tmp_path_factory.mktemp("trusted")

    async def scenario() -> Scene:
        events = {"clock": {"policy": "trusted"}}
        async with world(settings_maker(folder, lambda: kafka), folder, events=events) as on:
            worker = await on.ready_worker()
            await on.publish(
                [
                    record(click(event_id="old", user_id="old-user", event_time=1_000)),
                    record(click(event_id="ahead", user_id="fast-user", event_time=now_ms() + 2 * DAY_MS)),
                    record(click(event_id="now", user_id="old-user")),
                ]
            )
            return await look(on, worker)

    return asyncio.run(scenario())


def test_a_trusted_clock_of_1970_is_taken_as_it_is(trusted_scene: Scene) -> None:
    assert trusted_scene.rows[b"old-user"]["clicks"] == [2]
    assert trusted_scene.differences == []


def test_a_clock_two_days_ahead_is_refused_under_the_trusted_policy_too(trusted_scene: Scene) -> None:
    assert [(x.key, x.reason) for x in trusted_scene.letters] == [(b"fast-user", "event-time-absurd")]
