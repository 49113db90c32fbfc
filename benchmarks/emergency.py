"""An emergency block: from its sending to the first slate without the item, under load, everything switched on.

Both ways are measured: the item's record with ``is_hidden``, which every worker mirrors, and ``blocked_items`` in the
settings file, which a worker looks at once a second. The item is each time the one that stands in most slates. A probe
names it as candidate every few milliseconds, so that there is a slate to look at; all other slates are looked at too.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import msgspec

from benchmarks.everything import SETUP, SURFACE
from benchmarks.freshness import send_events
from benchmarks.processes import BenchmarkError
from benchmarks.results import CpuAccount, Figure, percentile
from benchmarks.stage import Bench, Stage, stage
from benchmarks.world import SURFACE as SURFACE_NAME
from benchmarks.world import Keyed
from models.events import Recommendation, Request
from streams.settings import Settings, render_toml
from streams.topic_io import open_topic

LOADED_ITEMS: Final = 2_000
PROBE_SECONDS: Final = 0.01
PROBING_USERS: Final = 24
LEAD_SECONDS: Final = 0.3
"""Before each block, and up to as much again: a block comes at any moment."""
AFTERMATH_SECONDS: Final = 0.3
LIMIT_SECONDS: Final = 120.0
SEED: Final = 7


@dataclass(frozen=True, slots=True)
class Seen:
    """A slate on its topic: broker time, number of the block whose probe asked for it (-1: none), and its items."""

    at_ms: int
    block: int
    items: frozenset[str]


@dataclass(slots=True)
class Block:
    """A block that was sent."""

    number: int
    item_id: str
    sent_ms: int


@dataclass(slots=True)
class Watch:
    """All slates since the start, as they come."""

    made: Stage
    slates: list[Seen] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Read slates until cancelled."""
        decoder = msgspec.json.Decoder(Recommendation)
        topic = self.made.names.recommendations
        async with open_topic(self.made.settings, topic) as tail:
            async for record in tail.read(await tail.end_offsets()):
                slate = decoder.decode(record.value)
                items = frozenset(item.item_id for item in slate.items)
                self.slates.append(Seen(record.timestamp, _number(slate.request_id), items))
                self.news.set()

    async def has_seen(self, wanted: Callable[[Seen], bool], what: str) -> None:
        """Return when there is a slate that is wanted. Raises BenchmarkError when there is none in time."""
        deadline = time.monotonic() + LIMIT_SECONDS
        seen = 0
        while True:
            fresh, seen = self.slates[seen:], len(self.slates)
            if any(map(wanted, fresh)):
                return
            self.news.clear()
            try:
                await asyncio.wait_for(self.news.wait(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise BenchmarkError(f"no slate {what} within {LIMIT_SECONDS:.0f} s") from None


@dataclass(slots=True)
class _Probe:
    """Asks for slates of few named candidates, the item to be blocked among them."""

    made: Stage
    block: int = -1
    item_id: str = ""
    asked: int = 0
    named: set[str] = field(default_factory=set)
    """Every item so far."""

    def turn_to(self, item_id: str) -> None:
        """Ask for another item from now on, which is the next block's."""
        self.block, self.item_id = self.block + 1, item_id
        self.named.add(item_id)

    async def run(self) -> None:
        """Ask until cancelled."""
        sending: set[asyncio.Task[object]] = set()
        while True:
            if self.item_id:
                record = self._request()
                task: asyncio.Task[object] = asyncio.create_task(self.made.send(self.made.names.events, [record]))
                sending.add(task)
                task.add_done_callback(sending.discard)
            await asyncio.sleep(PROBE_SECONDS)

    def _request(self) -> Keyed:
        self.asked += 1
        user = f"probing-{self.asked % PROBING_USERS}"
        request = Request(
            event_id=f"probe-event-{self.asked}",
            event_time=_now_ms(),
            user_id=user,
            request_id=f"probe-{self.block}-{self.asked}",
            surface=SURFACE_NAME,
            candidates=[self.item_id, *(f"item-{i}" for i in range(1_000, 1_004))],
        )
        return Keyed(user.encode(), msgspec.json.encode(request))


async def run(bench: Bench) -> None:
    """Block items by either way, and by record behind a bulk load of the catalogue."""
    account = CpuAccount()
    async with stage(bench, "emergency-block", users=bench.sizes.users, setup=SETUP) as made:
        await made.worker()
        watch, probe = Watch(made), _Probe(made)
        beside = [asyncio.create_task(watch.run()), asyncio.create_task(probe.run())]
        try:
            await send_events(made, bench.sizes.warm_up_seconds)
            by_file = _FileBlocks(made)
            for name, n, block in (
                ("by the item's record", bench.sizes.blocks, _by_record),
                (f"by record, behind {LOADED_ITEMS:,} new items", bench.sizes.blocks_behind_loads, _behind_load),
                ("by the settings file", bench.sizes.blocks, by_file.block),
            ):
                blocks: list[Block] = []
                work = asyncio.create_task(_blocks(made, watch, probe, n, block, blocks))
                await send_events(made, float("inf"), until=work)
                report(bench, watch, blocks, f"emergency block {name}{SETUP.title}")
        finally:
            for task in beside:
                task.cancel()
    bench.report.beside["emergency block"] = account.describe()


async def _blocks(
    made: Stage,
    watch: Watch,
    probe: _Probe,
    n: int,
    block: Callable[[Stage, str], Awaitable[None]],
    done: list[Block],
) -> None:
    """Block ``n`` items, one after the other, at any moment; into ``done``."""
    phase = random.Random(SEED)
    for _ in range(n):
        item_id = _most_shown(watch, probe.named)
        probe.turn_to(item_id)
        this = Block(probe.block, item_id, 0)
        await asyncio.sleep(LEAD_SECONDS * (1 + phase.random()))
        await watch.has_seen(partial(_is_with, block=this), f"with {item_id}, which is not blocked,")
        this.sent_ms = _now_ms()
        done.append(this)
        await block(made, item_id)
        await watch.has_seen(partial(_is_without, block=this), f"without {item_id}, which is blocked,")
        await asyncio.sleep(AFTERMATH_SECONDS)


def _most_shown(watch: Watch, taken: set[str]) -> str:
    """Return the item that stands in most of the last slates that nobody named candidates for."""
    pinned = set(SURFACE["rules"]["pinned"])
    shown = Counter(item for s in watch.slates[-2_000:] if s.block < 0 for item in s.items)
    ours = (item for item, _ in shown.most_common() if item.startswith("item-"))
    found = next((item for item in ours if item not in taken | pinned), None)
    if found is None:
        raise BenchmarkError("no slate has an item that could be blocked")
    return found


async def _by_record(made: Stage, item_id: str) -> None:
    """Publish the item's record with is_hidden, as an operator does."""
    item = made.bench.world.items[int(item_id.removeprefix("item-"))]
    await made.publish_items([(item_id, msgspec.structs.replace(item, is_hidden=True))])


async def _behind_load(made: Stage, item_id: str) -> None:
    """Publish new items and, behind them, the block."""
    new = made.bench.world.new_items(LOADED_ITEMS, f"load-{item_id}")
    await made.publish_items([(item.item_id, item) for item in new])
    await _by_record(made, item_id)


@dataclass(slots=True)
class _FileBlocks:
    """Blocks items in the worker's settings file, each in addition to those before."""

    made: Stage
    blocked: list[str] = field(default_factory=list)

    async def block(self, made: Stage, item_id: str) -> None:
        """Put the file into place with one more item."""
        self.blocked.append(item_id)
        values = made.settings.model_dump()
        rules: dict[str, Any] = values["recommender"]["surfaces"][SURFACE_NAME]["rules"]
        rules["blocked_items"] = [*rules["blocked_items"], *self.blocked]
        file = made.folder / "millstream.toml"
        aside = file.with_suffix(".part")
        aside.write_text(render_toml(Settings(**values)), "utf-8")
        aside.replace(file)


def report(bench: Bench, watch: Watch, blocks: list[Block], name: str) -> None:
    """Add the figures of blocks, of each of which a probe got a slate without the item."""
    took, until, late, shown = [], [], 0, 0
    for block in blocks:
        first = min(s.at_ms for s in watch.slates if _is_without(s, block))
        still = [s.at_ms for s in watch.slates if s.at_ms >= block.sent_ms and block.item_id in s.items]
        took.append(float(first - block.sent_ms))
        until.append(float(max(still, default=block.sent_ms) - block.sent_ms))
        late += sum(at_ms > first for at_ms in still)
        shown += sum(s.block < 0 and s.at_ms < block.sent_ms and block.item_id in s.items for s in watch.slates)
    note = (
        f"from the send to the first slate without the item; {len(blocks)} blocks, max {max(took):.0f} ms; the last "
        f"slate with it was p50 {percentile(until, 0.5):.0f}, max {max(until):.0f} ms after the send"
    )
    figures = bench.report.figures
    figures.append(Figure(f"{name}, p50", percentile(took, 0.5), "ms", details={"took_ms": took, "until_ms": until}))
    figures.append(Figure(f"{name}, p99", percentile(took, 0.99), "ms", note=note))
    note = f"of {len(watch.slates):,} slates that were looked at; before their blocks, {shown:,} had the items"
    figures.append(Figure(f"{name}, slates with it after one without", late, "slates", at_most=0, note=note))


def _is_with(slate: Seen, block: Block) -> bool:
    return slate.block == block.number and block.item_id in slate.items


def _is_without(slate: Seen, block: Block) -> bool:
    return slate.block == block.number and slate.at_ms >= block.sent_ms and block.item_id not in slate.items


def _number(request_id: str | None) -> int:
    """Return the number of the block whose probe a request was, -1 for any other slate."""
    return int(request_id.split("-")[1]) if request_id and request_id.startswith("probe-") else -1


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
