"""What the log says must have happened: rows, counts and slates computed one event at a time, and the comparison."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiokafka import ConsumerRecord

from models.catalogue import Catalogue
from models.counters import WEIGHT_UNIT, ItemCounters
from models.errors import RecordError
from models.events import Action, Event, Request
from models.hashing import hash64, recommendation_id
from models.item_index import ItemIndex
from models.joiner import JoinContext
from models.retrieval import RetrievalConfig, VectorIndex
from models.user_batch import read_vectors
from models.user_events import surface_names
from models.user_row import ROW, decode_rows, empty_rows
from models.user_state import Outcome, apply, user_event
from models.user_value import guard_of, row_of
from streams.catalogue_mirror import CatalogueState
from streams.dead_letters import Letter
from streams.decode import decode
from streams.item_stats import CHECKPOINT_KEY, ItemRecord, batches, decode_item
from streams.model_slot import BOOTSTRAP_VERSION
from streams.topic_ids import epoch, topic_ids
from tests.integration.conftest import read_topic
from tests.integration.label_oracle import Labels, context_of, label_differences
from tests.integration.workers import WorkerProcess, World, now_ms

VECTOR_TOLERANCE = 5e-3
UserKey = tuple[int, bytes]
"""(partition, key)."""
Places = frozenset[tuple[int, int]]
"""(partition, offset) of events."""
NOWHERE: Places = frozenset()
NO_FIELDS: frozenset[str] = frozenset()
GENERATION = frozenset({"generation"})
"""Fields of a row that a swap of bundles within one space changes."""
SPACE = GENERATION | {"space_id", "vectors", "vector_time_ms", "unclicked"}
"""Fields of a row that a swap into another space changes."""
BOOTSTRAP_ONLY: frozenset[str] = frozenset({BOOTSTRAP_VERSION})


@dataclass
class Expected:
    """What must stand on the topics when the whole log is processed."""

    rows: dict[UserKey, Any] = field(default_factory=dict)
    totals: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    actions: list[tuple[int, int, str]] = field(default_factory=list)
    """(partition, offset, user id) of each action that is no client's retry."""
    requests: list[tuple[int, int, str]] = field(default_factory=list)
    refused: dict[tuple[int, int], str] = field(default_factory=dict)
    """Reason by (partition, offset)."""
    labels: Labels = field(default_factory=Labels)
    accepted: int = 0


@dataclass
class _Message:
    topic: str
    partition: int
    offset: int
    timestamp: float
    key: bytes | None
    value: bytes | None
    headers: Any

    @classmethod
    def of(cls, r: ConsumerRecord) -> _Message:
        return cls(r.topic, r.partition, r.offset, r.timestamp / 1000, r.key, r.value, r.headers)


async def expected(
    world: World, *, refuse: Places = NOWHERE, fatal: Places = NOWHERE, before: Expected | None = None
) -> Expected:
    """Compute from the events topic what must have happened.

    ``refuse``: events that must touch no row, though they count; ``fatal``: events that must touch nothing;
    ``before``: what an events topic made that was deleted since.
    """
    settings = world.settings
    catalogue = await _catalogue(world)
    topic_epoch = epoch((await topic_ids(settings, [world.names.events]))[world.names.events])
    counters = ItemCounters(ItemIndex(), settings.counters)
    for partition in range(settings.topics.partitions):
        counters.own(partition)
    default = settings.recommender.default_surface
    surfaces = surface_names(default, settings.recommender.surfaces, settings.user_state)
    context = _join_context(world)
    found = Expected(rows=dict(before.rows), labels=before.labels.copy()) if before else Expected()
    for record in await read_topic(settings, world.names.events):
        key, place = (record.partition, record.key or b""), (record.partition, record.offset)
        if place in fatal:
            found.refused[place] = "fatal-event"
            continue
        try:
            decoded = decode(
                _Message.of(record), settings.events, settings.topics.partitions, is_known=key in found.rows
            )
        except RecordError as error:
            found.refused[place] = error.reason
            continue
        found.accepted += 1
        counters.add(record.partition, batches([decoded], settings.counters)[record.partition])
        if place in refuse:
            found.refused[place] = "processing-error"
            continue
        event = user_event(decoded.event, 0, decoded.offset, decoded.time_ms, settings.user_state, surfaces)
        held = found.rows.get(key, empty_rows(1))
        rows, outcomes = apply(
            held,
            [event],
            catalogue,
            settings.user_state,
            epoch=topic_epoch,
            space_id=hash64(world.space().space_id),
            generation=0,
            surfaces=surfaces,
        )
        found.rows[key] = rows
        outcome, clock_ms = Outcome(outcomes[0]), int(held["last_time_ms"][0])
        found.labels.apply(key, event, outcome, clock_ms, topic_epoch, context)
        _note_trigger(found, decoded.event, record, Outcome(outcomes[0]))
    totals = counters.totals(np.arange(len(counters.index)))
    totals[:, 2] *= WEIGHT_UNIT
    for row, (impressions, clicks, weights) in enumerate(np.rint(totals).astype(int).tolist()):
        item_id = counters.index.item_id(row)
        old = before.totals.get(item_id, (0, 0, 0)) if before else (0, 0, 0)
        found.totals[item_id] = (old[0] + impressions, old[1] + clicks, old[2] + weights)
    for item_id in before.totals if before else ():
        found.totals.setdefault(item_id, before.totals[item_id])  # type: ignore[union-attr]
    return found


def _join_context(world: World) -> JoinContext:
    settings = world.settings
    served = settings.recommender.surfaces
    return context_of(settings, surface_names(settings.recommender.default_surface, served, settings.user_state))


def _note_trigger(found: Expected, event: Event, record: ConsumerRecord, outcome: Outcome) -> None:
    if outcome is Outcome.DUPLICATE:
        return
    if isinstance(event, Action):
        found.actions.append((record.partition, record.offset, event.user_id))
    elif isinstance(event, Request):
        found.requests.append((record.partition, record.offset, event.user_id))


async def _catalogue(world: World) -> Any:
    space = world.space()
    state = CatalogueState(Catalogue(ItemIndex(), space.dim), VectorIndex(space.dim, RetrievalConfig()), space)
    assert not state.apply_items(await read_topic(world.settings, world.names.items), now_ms())
    assert not state.apply_vectors(await read_topic(world.settings, world.names.item_vectors), now_ms())
    return state.catalogue


async def changelog_rows(world: World) -> tuple[dict[UserKey, bytes], dict[UserKey, bytes]]:
    """Return the rows on the changelog by user: those with the highest guard, and those written last."""
    highest: dict[UserKey, bytes] = {}
    last: dict[UserKey, bytes] = {}
    now = epoch((await topic_ids(world.settings, [world.names.events]))[world.names.events])

    def guard(row: bytes) -> tuple[bool, int]:
        """A row that has seen the present log is newer than one that has not."""
        return guard_of(row)[0] == now, guard_of(row)[1]

    for record in await read_topic(world.settings, world.names.user_table_changelog):
        key = (record.partition, record.key)
        last[key] = record.value
        if key not in highest or guard(record.value) >= guard(highest[key]):
            highest[key] = record.value
    return highest, last


def row_differences(
    want: dict[UserKey, Any], have: dict[UserKey, bytes], apart_from: frozenset[str] = NO_FIELDS
) -> list[str]:
    """Return in words how rows differ: integers exactly, vectors to VECTOR_TOLERANCE; nothing where they agree.

    ``apart_from``: fields that are not compared, see GENERATION and SPACE.
    """
    found = [f"{key}: no row" for key in want.keys() - have.keys()]
    found += [f"{key}: a row that the log does not make" for key in have.keys() - want.keys()]
    for key in sorted(want.keys() & have.keys()):
        expected_row, row = want[key], decode_rows([row_of(have[key])])
        for name in ROW.names or ():
            if name in ("norms", "vectors") or name in apart_from:
                continue
            if expected_row[name].tobytes() != row[name].tobytes():
                found.append(f"{key}: {name} is {row[name][0]}, must be {expected_row[name][0]}")
        apart = float(np.abs(read_vectors(expected_row) - read_vectors(row)).max())
        if "vectors" not in apart_from and not apart <= VECTOR_TOLERANCE:
            found.append(f"{key}: vectors are {apart} apart")
    return found


async def item_totals(world: World) -> dict[str, tuple[int, int, int]]:
    """Return what item-stats says: per item the totals of the newest record of each partition, summed."""
    newest: dict[tuple[int, bytes], ItemRecord] = {}
    for record in await read_topic(world.settings, world.names.item_stats):
        if record.key != CHECKPOINT_KEY:
            newest[(record.partition, record.key)] = decode_item(record.value)
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for (_, key), item in newest.items():
        for kind, total in enumerate(item.totals):
            sums[key.decode()][kind] += total
    return {item_id: (t[0], t[1], t[2]) for item_id, t in sums.items()}


def slate_differences(
    world: World, want: Expected, slates: list[Any], versions: frozenset[str] = BOOTSTRAP_ONLY
) -> list[str]:
    """Return in words which triggers have no slate, and which slates are not recognisable by their ids.

    A slate covers the actions of its user in its micro-batch, so its trigger is less than a batch behind each.
    """
    topic = world.names.events
    batch = world.settings.worker.batch_max_events
    found = []
    triggers: dict[tuple[int, str], set[int]] = defaultdict(set)
    for slate in slates:
        trigger = slate["trigger"]
        right = recommendation_id(topic, trigger["partition"], trigger["offset"], slate["user_id"])
        if slate["recommendation_id"] != right or trigger["topic"] != topic:
            found.append(f"the slate of {trigger} has the id {slate['recommendation_id']}, not {right}")
        if slate["model_version"] not in versions:
            found.append(f"the slate of {trigger} was made by {slate['model_version']}")
        triggers[(trigger["partition"], slate["user_id"])].add(trigger["offset"])
    for partition, offset, user_id in want.actions:
        if not any(offset <= trigger < offset + batch for trigger in triggers[(partition, user_id)]):
            found.append(f"no slate for the action of {user_id} at {partition}/{offset}")
    for partition, offset, user_id in want.requests:
        if offset not in triggers[(partition, user_id)]:
            found.append(f"no slate for the request of {user_id} at {partition}/{offset}")
    return found


async def differences(
    world: World,
    want: Expected,
    *,
    versions: frozenset[str] = BOOTSTRAP_ONLY,
    apart_from: frozenset[str] = NO_FIELDS,
) -> list[str]:
    """Return in words all differences between the topics and what the log says; nothing where all is as it must be."""
    highest, last = await changelog_rows(world)
    found = row_differences(want.rows, highest, apart_from)
    found += [f"{key}: the last record is not the owner's" for key in highest if last[key] != highest[key]]
    found += slate_differences(world, want, await world.slates(), versions)
    found += await label_differences(world, want.labels, _join_context(world))
    ends = {p: end for p, end in (await world.end_offsets(world.names.events)).items() if end}
    committed = await world.committed()
    for partition, end in ends.items():
        if committed.get(partition) != end:
            found.append(f"partition {partition}: committed {committed.get(partition)}, end {end}")
    letters = {(x.source_partition, x.source_offset): x.reason for x in await world.letters()}
    if letters != want.refused:
        found.append(f"dead letters {letters}, must be {want.refused}")
    totals = await item_totals(world)
    for item_id in sorted(want.totals.keys() | totals.keys()):
        if totals.get(item_id, (0, 0, 0)) != want.totals.get(item_id, (0, 0, 0)):
            found.append(f"{item_id}: totals {totals.get(item_id)}, must be {want.totals.get(item_id)}")
    return found


async def lasting_differences(world: World, want: Expected, **swaps: frozenset[str]) -> list[str]:
    """Return the differences that are left after a while: counters are published a moment after the commit."""
    deadline = time.monotonic() + 15
    while True:
        found = await differences(world, want, **swaps)
        if not found or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.5)


async def assert_exact(
    world: World, *, fatal: Places = NOWHERE, before: Expected | None = None, **swaps: frozenset[str]
) -> None:
    """Fail unless rows, counts, slates, letters and offsets are those that the log makes.

    ``swaps``: where bundles were swapped, ``versions`` that slates may name and ``apart_from`` as of row_differences.
    """
    await world.wait_committed()
    found = await lasting_differences(world, await expected(world, fatal=fatal, before=before), **swaps)
    assert not found, f"{len(found)} differences:\n" + "\n".join(found[:40])


@dataclass
class Scene:
    """What stood on the topics when a scenario was over."""

    letters: list[Letter]
    differences: list[str]
    rows: dict[bytes, Any]
    """Row by user id, shape [1]."""
    slates: list[Any]
    metrics: dict[str, float]
    exit_code: int | None
    """Of the worker; None where it still ran, under the process id that it began with."""


async def look(world: World, worker: WorkerProcess, *, refuse: Places = NOWHERE) -> Scene:
    """Wait until everything is processed and published, and return what stands on the topics."""
    await world.wait_committed(40)
    found = await lasting_differences(world, await expected(world, refuse=refuse))
    rows, _ = await changelog_rows(world)
    return Scene(
        letters=await world.letters(),
        differences=found,
        rows={key: decode_rows([row_of(row)]) for (_, key), row in rows.items()},
        slates=await world.slates(),
        metrics={
            "dead_letters": await worker.metric("millstream_dead_letters_total", topic="events"),
            "degraded": await worker.metric("millstream_slates_degraded_total", cause="ranking-error"),
            "update_errors": await worker.metric("millstream_processing_errors_total", stage="update"),
            "rank_errors": await worker.metric("millstream_processing_errors_total", stage="rank"),
            "recovered": await worker.metric("millstream_recovered_rows_total"),
        },
        exit_code=worker.returncode,
    )
