"""One log through Kafka and a worker, and through the replay without either: the same rows, features and scores.

The worker takes one event in each micro-batch from one partition, so that it counts every event before it reads for the
next: what the replay does with every log. No two events but retries share a millisecond, because the replay sees only
what happened strictly earlier and the worker what stands before. What the topic decides differs and is named: the epoch
of a row's guard, the ids of impressions, when they were processed. So does the generation of a row, on the worker that
of the pointer to its bundle. All else is compared to the last bit.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from models.bundle import BundleContents, ItemEncodings
from models.ctr import CtrConfig, CtrScorer
from models.encoder import content_hash
from models.events import ImpressedItem, Impression, Item
from models.examples import FeaturesRecord, decode_features, label_values
from models.hashing import hash64
from models.logs import LogEvent
from models.logs.jsonl import JsonlLog
from models.user_row import Rows, decode_rows, empty_rows
from models.user_value import guard_of, row_of
from streams import item_vectors
from streams.importer import Importer, ImportOptions
from streams.sender import Outbox
from streams.topic_io import TopicWriter
from tests.integration.announcer import Announcer, bundle_contents
from tests.integration.conftest import read_topic, settings_maker
from tests.integration.label_oracle import sent_labels
from tests.integration.workers import BASE_DIM, World, encoder_id, world
from tests.models.bundles import scorer_parts
from trainer.log_examples import LogConfig, LogExamples, Reads, catalogue_of, log_examples
from trainer.scoring import ItemTable, score

pytestmark = pytest.mark.integration

F32 = npt.NDArray[np.float32]

START_MS = 1_556_668_800_000
"""1 May 2019: long before any clock that the worker may look at."""
MINUTE_MS = 60_000
DAY_MS = 1_440 * MINUTE_MS
USERS, ITEMS, EVENTS = 12, 30, 300
NOT_OF_THE_ROW = frozenset({"epoch", "generation"})
"""Fields of a row that the id of the topic decides, and the pointer to the bundle."""
NOT_OF_THE_LOG = frozenset({"impression_id", "broker_ms", "processed_ms", "scores", "model_version"})
"""Fields of a features record that tell where and when it was made, and by which model it was scored."""


def items() -> list[dict[str, Any]]:
    """Return the catalogue: by turns with a text, with a text and an embedding, with an embedding, with neither."""
    found: list[dict[str, Any]] = []
    for n in range(ITEMS):
        item: dict[str, Any] = {"item_id": f"item-{n}"}
        if n % 4 < 2:
            item["title"] = f"title of {n}"
        if n % 4 in (1, 2):
            item["embedding"] = [float(n % 5), 1.0, -0.5 * n]
        if n % 3:
            item["published_at"] = START_MS - n * 7 * MINUTE_MS
        found.append(item)
    return found


def events() -> list[dict[str, Any]]:
    """Return the log: impressions, actions on what was shown or not, requests, and clients' retries, over some days."""
    rng = random.Random(4)
    shown: dict[str, dict[str, Any]] = {}
    made: list[dict[str, Any]] = []
    now_ms = START_MS
    while len(made) < EVENTS:
        # Mostly within minutes, at times hours later: windows close, vectors and counts decay.
        now_ms += rng.choice((1_001, 7_919, 61_003, 61_003, 600_011, 3 * 3_600_017))
        if made and rng.random() < 0.06:
            made.append(made[-1])
            continue
        # Often the one who was just seen: then the click falls into the attribution window.
        user = made[-1]["user_id"] if made and rng.random() < 0.5 else f"user-{rng.randrange(USERS)}"
        event: dict[str, Any] = {"event_id": f"e{len(made)}", "event_time": now_ms, "user_id": user}
        kind = rng.random()
        if kind < 0.5 or user not in shown:
            names = [f"item-{n}" for n in rng.sample(range(ITEMS), rng.randint(2, 8))]
            if rng.random() < 0.2:
                names.append(f"unknown-{rng.randrange(3)}")
            event |= {"type": "impression", "items": [{"item_id": name} for name in names]}
            if rng.random() < 0.7:
                event["items"] = [one | {"position": at} for at, one in enumerate(event["items"], 1)]
            if rng.random() < 0.2:
                event["items"][0]["propensity"] = 0.25
            if rng.random() < 0.5:
                event |= {"request_id": f"r{len(made)}", "session_id": "s", "context": {"device": "phone"}}
            event |= {"surface": rng.choice(("home", "article", "elsewhere"))} if rng.random() < 0.5 else {}
            shown[user] = event
        elif kind < 0.95:
            last = shown[user]
            item = rng.choice(last["items"])["item_id"] if rng.random() < 0.8 else f"item-{rng.randrange(ITEMS)}"
            action = rng.choice(["click"] * 6 + ["like", "hide", "dislike", "share", "purchase", "rating", "dwell"])
            event |= {"type": "action", "item_id": item, "action": action}
            event |= {"value": float(rng.randint(1, 5))} if action == "rating" else {}
            event |= {"value": float(rng.randint(5, 90))} if action == "dwell" else {}
            event |= {"request_id": last["request_id"]} if "request_id" in last and rng.random() < 0.5 else {}
        else:
            event |= {"type": "request", "request_id": f"q{len(made)}"}
        made.append(event)
    return made


def write_log(folder: Path) -> Path:
    folder.mkdir()
    for name, records in (("items", items()), ("events", events())):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


class LogAndALookAfter(JsonlLog):
    """The log, and a day later an impression for every user, before which each row is read as the log left it."""

    def events(self) -> Iterator[LogEvent]:
        last_ms, users = 0, dict[str, None]()
        for logged in super().events():
            last_ms, _ = logged.time_ms, users.setdefault(logged.event.user_id)
            yield logged
        at_ms = last_ms + DAY_MS
        for user in users:
            looked = Impression(event_id=user, event_time=at_ms, user_id=user, items=[ImpressedItem("item-0")])
            yield LogEvent(at_ms, looked)


@dataclass
class Side:
    """What one of the two made of the log."""

    final: dict[str, Rows] = field(default_factory=dict)
    """Rows [1] after the log, by user."""
    before: dict[int, Rows] = field(default_factory=dict)
    """Rows [1] just before impressions, by place in the log."""
    records: dict[int, FeaturesRecord] = field(default_factory=dict)
    """By place in the log."""
    labels: dict[int, list[float]] = field(default_factory=dict)
    """By place in the log."""


@dataclass
class Played:
    """Both sides, and the model that was live."""

    worker: Side
    replay: Side
    scores: Callable[[FeaturesRecord], F32]
    """Scores an impression as the trainer does."""


@asynccontextmanager
async def a_worker_took_the_log(
    kafka: str, folder: Path, *, partitions: int, batch_max_events: int
) -> AsyncIterator[tuple[World, Path]]:
    """Topics on which a worker processed all of the log; and where the log is."""
    sections: dict[str, Any] = {
        "topics": {"partitions": partitions},
        "worker": {"batch_max_events": batch_max_events},
        "events": {"clock": {"policy": "trusted"}},
        "examples": {"max_lag_seconds": 600.0},
        "recommender": {"default_surface": "home", "surfaces": {"home": {}, "article": {}}},
        "user_state": {"base_rates": {"home": 0.2}, "attribution_windows_seconds": {"article": 60}},
    }
    async with world(settings_maker(folder, lambda: kafka), folder, items=0, **sections) as on:
        on.item_ids += [item["item_id"] for item in items()]
        log = write_log(folder / "log")
        await through_kafka(on, log, folder)
        yield on, log


@pytest.fixture(scope="module")
def played(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """The log, sent through both."""
    folder = tmp_path_factory.mktemp("parity")

    async def scenario() -> Played:
        async with a_worker_took_the_log(kafka, folder, partitions=1, batch_max_events=1) as (on, log):
            live = live_bundle(on)
            brought = {hash64(item["item_id"]): item["embedding"] for item in items() if "embedding" in item}
            table = ItemTable(live.space, exact_encodings(), brought)
            scorer = CtrScorer(CtrConfig.model_validate(live.scorer_config), live.scorer_tensors)

            def scores(record: FeaturesRecord) -> F32:
                # One at a time, as the worker had them: the last bits of a matrix product depend on its size.
                [found] = score(scorer, live.features, table, [record])
                return found

            return Played(await worker_side(on), replay_side(on, log, table), scores)

    return asyncio.run(scenario())


def live_bundle(on: World) -> BundleContents:
    """Return the bundle that the worker serves with: the bootstrap's space, and a model of random weights."""
    config, tensors = scorer_parts(64, seed=2)
    return bundle_contents(on, 1, scorer_config=config, scorer_tensors=tensors)


def exact_encodings() -> ItemEncodings:
    """Return base encodings of the items that have a text, each with a single number that is not zero.

    The last bits of a matrix product depend on how many rows it has, and worker and replay take the items in different
    portions. A product with one summand has no rounding: both hold the very same item vectors.
    """
    texts = [msgspec.convert(item, Item) for item in items() if "title" in item]
    hashes = np.array([hash64(item.item_id) for item in texts], np.uint64)
    contents = np.array([content_hash(item) for item in texts], np.uint64)
    return ItemEncodings(hashes, contents, np.eye(len(texts), BASE_DIM, dtype=np.float16))


async def through_kafka(on: World, log: Path, folder: Path) -> None:
    """Import the log, make the bundle the live one, and let a worker process all of it."""
    announcer = Announcer(on, folder / "made")
    await announcer.announce_live("v1", announcer.publish(live_bundle(on)))
    encodings, outbox, topic = exact_encodings(), Outbox(), on.names.item_vectors
    named = {hash64(name): name for name in on.item_ids}
    async with TopicWriter(on.settings, topic) as writer:
        for item, content, base in zip(encodings.items, encodings.contents, encodings.base, strict=True):
            value = item_vectors.value(int(content), base.astype(np.float32))
            writer.add(outbox, topic, item_vectors.key(encoder_id(), named[int(item)]), value)
        await writer.send(outbox)
    sent = await Importer(on.settings, JsonlLog(log), ImportOptions()).run()
    assert (sent.items, sent.events) == (ITEMS, EVENTS)
    worker = await on.ready_worker()
    await on.wait_committed()
    assert await worker.stop() == 0


async def rows_written(on: World) -> dict[str, list[tuple[int, Rows]]]:
    """Return by user the rows [1] that the worker wrote, oldest first, each with the last offset that it holds."""
    found: dict[str, list[tuple[int, Rows]]] = {}
    for kept in await read_topic(on.settings, on.names.user_table_changelog):
        row = decode_rows([row_of(kept.value)])
        found.setdefault(kept.key.decode(), []).append((guard_of(kept.value)[1], row))
    return found


async def worker_side(on: World) -> Side:
    """Read from the topics what the worker made; offsets are places in the log, there being one partition."""
    side, written = Side(), await rows_written(on)
    side.final = {user: rows[-1][1] for user, rows in written.items()}
    for kept in await read_topic(on.settings, on.names.features):
        record = decode_features(kept.value)
        assert record.offset not in side.records, "processed twice: a part of the log was played again"
        side.records[record.offset] = record
        earlier = [row for at, row in written[record.user_id] if at < record.offset]
        side.before[record.offset] = earlier[-1] if earlier else empty_rows(1)
    places = {record.impression_id: at for at, record in side.records.items()}
    for label in sorted(await sent_labels(on), key=lambda label: label.as_of):
        at = places[label.impression_id]
        side.labels[at] = label_values(label, len(side.records[at])).tolist()
    return side


def replay_side(on: World, log: Path, table: ItemTable) -> Side:
    """Let the log go through the core without Kafka, with the worker's settings and no feedback delay."""
    side, settings = Side(), on.settings

    def on_reads(reads: Reads) -> None:
        for i, offset in enumerate(reads.offsets):
            row = reads.rows[i : i + 1].copy()
            if offset < EVENTS:
                side.before[offset] = row
            else:
                side.final[reads.events[i].event.user_id] = row

    reader = LogAndALookAfter(log)
    made: LogExamples = log_examples(
        reader,
        catalogue_of(reader.items(), table),
        on.space().space_id,
        LogConfig(
            user_state=settings.user_state,
            counters=settings.counters,
            ranking=settings.recommender.ranking,
            joiner=settings.joiner,
            surfaces=(settings.recommender.default_surface, *settings.recommender.surfaces),
        ),
        on_reads=on_reads,
    )
    for record, labels in zip(made.records, made.labels, strict=True):
        if record.offset < EVENTS:
            side.records[record.offset], side.labels[record.offset] = record, labels.tolist()
    return side


def fields_that_differ(one: Rows, other: Rows) -> set[str]:
    """Return the names of the fields of two rows [1] that are not the same to the byte."""
    return {name for name in one.dtype.names or () if one[name].tobytes() != other[name].tobytes()}


def test_every_user_has_the_same_row_after_the_log(played: Played) -> None:
    assert played.worker.final.keys() == played.replay.final.keys() == {f"user-{n}" for n in range(USERS)}
    for user, row in played.worker.final.items():
        assert fields_that_differ(row, played.replay.final[user]) <= NOT_OF_THE_ROW, user


def test_large_batches_of_several_partitions_make_the_same_rows(kafka: str, tmp_path: Path, played: Played) -> None:
    async def scenario() -> dict[str, Rows]:
        async with a_worker_took_the_log(kafka, tmp_path, partitions=4, batch_max_events=256) as (on, _):
            return {user: rows[-1][1] for user, rows in (await rows_written(on)).items()}

    final = asyncio.run(scenario())
    assert final.keys() == played.replay.final.keys()
    for user, row in final.items():
        assert fields_that_differ(row, played.replay.final[user]) <= {"offset"} | NOT_OF_THE_ROW, user


def test_every_impression_found_the_same_row(played: Played) -> None:
    assert len(played.worker.before) > 100
    for at, row in played.worker.before.items():
        assert fields_that_differ(row, played.replay.before[at]) <= NOT_OF_THE_ROW, at


def test_every_impression_has_the_same_features(played: Played) -> None:
    assert played.worker.records.keys() == played.replay.records.keys()
    for at, record in played.worker.records.items():
        other = played.replay.records[at]
        names = [name for name in record.__struct_fields__ if name not in NOT_OF_THE_LOG]
        assert {n for n in names if getattr(record, n) != getattr(other, n)} == set(), at


def test_every_impression_has_the_same_label(played: Played) -> None:
    assert played.worker.labels
    for at, labels in played.worker.labels.items():
        assert labels == played.replay.labels[at], at


def test_the_scores_that_the_worker_logged_are_those_of_its_features_and_of_the_replays(played: Played) -> None:
    for at, record in played.worker.records.items():
        assert record.model_version == "v1"
        logged = dict(record.scores)["v1"]
        assert played.scores(record).tobytes() == logged, at
        assert played.scores(played.replay.records[at]).tobytes() == logged, at
