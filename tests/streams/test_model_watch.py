"""What a worker makes of pointers, with a real registry, guard and state thread, and no broker."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from models.bootstrap import Space
from models.bundle import ItemEncodings
from models.catalogue import Catalogue
from models.encoder import content_hash
from models.encoder_delta import EncoderDelta
from models.errors import RegistryError
from models.events import Item
from models.hashing import hash64
from models.item_index import ItemIndex
from models.manifest import BOOTSTRAP_VERSION
from models.pointer import GUARD_FILE, Pointer, Role
from models.registry import Registry
from models.retrieval import VectorIndex
from models.serving import ServingModel
from streams import item_vectors, model_status, model_watch
from streams.catalogue_mirror import CatalogueState
from streams.model_metrics import ModelMetrics
from streams.model_slot import ModelSlot
from streams.model_status import WorkerStatus, kept_worker_id
from streams.model_watch import ModelWatch
from streams.settings import Settings
from streams.state_thread import StateThread
from tests.integration.conftest import wait_until
from tests.models.bundles import BASE_DIM, DIM, contents, write

NOW = 1_700_000_000_000
ENCODER = "encoder-test"
PROJECTION = np.random.default_rng(0).normal(size=(BASE_DIM, DIM)).astype(np.float32)
SPACE = Space("bootstrap-space", ENCODER, PROJECTION)
TURNED = PROJECTION[:, ::-1].copy()


@dataclass
class Raw:
    key: bytes | None
    value: bytes | None
    topic: str = "t"
    partition: int = 0
    offset: int = 0
    timestamp: int = 0
    headers: Any = ()


class FilledMirror:
    """A catalogue mirror that has read its topics."""

    def __init__(self, state: CatalogueState) -> None:
        self.state = state

    async def caught_up(self) -> None:
        """Return at once."""

    async def add_encoder(self, encoder_id: str, base_dim: int) -> None:
        """Find nothing on the topic."""
        self.state.add_encoder(encoder_id, base_dim)
        self.state.end_backfill(encoder_id)


class FickleRegistry(Registry):
    """A registry that fails and hangs as it is told."""

    failures = 0
    hangs_at: str | None = None
    free = threading.Event()
    fetched: list[str]

    def fetch(self, version: str, into: Path, *, manifest_sha256: str | None = None) -> Path:
        """Fetch, fail or hang."""
        self.fetched.append(version)
        if self.failures:
            self.failures -= 1
            raise RegistryError("the network is away; nothing was changed")
        if version == self.hangs_at:
            self.free.wait(20)
        return super().fetch(version, into, manifest_sha256=manifest_sha256)


@dataclass
class Scene:
    """A watch and everything around it."""

    settings: Settings
    watch: ModelWatch
    slot: ModelSlot
    state: CatalogueState
    registry: FickleRegistry
    made: Path
    switches: list[tuple[str, int, list[str]]] = field(default_factory=list)
    fails_at: str | None = None
    offsets: Iterator[int] = field(default_factory=itertools.count)

    async def switch(self, live: ServingModel, shadows: list[ServingModel], arms: Mapping[str, ServingModel]) -> None:
        """Note a switch."""
        if live.version == self.fails_at:
            raise RuntimeError("cannot be used")
        self.switches.append((live.version, live.generation, [m.version for m in shadows]))

    def publish(self, version: str, **given: Any) -> str:
        """Publish a small bundle in the bootstrap's space unless ``given`` says otherwise."""
        fields = {"space_id": SPACE.space_id, "projection": PROJECTION, "encoder_id": ENCODER, **given}
        write(self.made, version, **fields)
        self.registry.publish(self.made / version)
        return self.registry.manifest_sha256(version)

    def announce(self, role: Role, version: str, generation: int, sha256: str | None = None) -> None:
        """Put a pointer on the topic."""
        if sha256 is None and version and version != BOOTSTRAP_VERSION:
            sha256 = self.registry.manifest_sha256(version)
        pointer = Pointer("default", role, version, sha256 or "", generation, NOW, "test", "a test")
        self.watch._on_records([Raw(pointer.key, pointer.encode(), offset=next(self.offsets))])

    async def until_live(self, version: str, generation: int) -> None:
        await wait_until(lambda: (self.slot.version, self.slot.generation) == (version, generation), 10, "it is live")

    async def until_refused(self, role: str, reason: str) -> None:
        await wait_until(
            lambda: role in self.watch.refused and self.watch.refused[role].reason == reason, 10, f"{reason} is told"
        )

    async def until_in_shadow(self, *versions: str) -> None:
        def are() -> bool:
            return {m.version for m in self.slot.shadows()} == set(versions)

        await wait_until(are, 10, f"{versions} are in shadow")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(model_watch, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(model_watch, "ENCODING_POLL_SECONDS", 0.01)
    FickleRegistry.free.clear()
    yield
    FickleRegistry.free.set()


def item_record(item_id: str) -> Raw:
    return Raw(item_id.encode(), msgspec.json.encode({"item_id": item_id, "title": "a title"}))


def vector_record(item_id: str, encoder_id: str) -> Raw:
    base = np.random.default_rng(hash64(item_id) % 1_000).normal(size=BASE_DIM).astype(np.float32)
    hashed = content_hash(Item(item_id=item_id, title="a title"))
    return Raw(item_vectors.key(encoder_id, item_id), item_vectors.value(hashed, base))


@asynccontextmanager
async def scene(folder: Path, *, follow: bool = True, **models: Any) -> AsyncIterator[Scene]:
    settings = Settings(
        worker={"data_folder": folder / "data"},
        models={"url": str(folder / "registry"), "cache_folder": folder / "cache", **models},
    )
    catalogue = Catalogue(ItemIndex(), DIM)
    state = CatalogueState(catalogue, VectorIndex(DIM), SPACE)
    state.apply_items([item_record(name) for name in "abc"], NOW)
    state.apply_vectors([vector_record(name, ENCODER) for name in "abc"], NOW)
    live = ServingModel(BOOTSTRAP_VERSION, 0, SPACE, None, None, catalogue.space_vectors, state.index)
    slot = ModelSlot(catalogue.index, catalogue, SPACE, live)
    thread = StateThread()
    made: list[Scene] = []

    async def switch(live: ServingModel, shadows: list[ServingModel], arms: Mapping[str, ServingModel]) -> None:
        await made[0].switch(live, shadows, arms)

    metrics = ModelMetrics(CollectorRegistry())
    watch = ModelWatch(settings, slot, FilledMirror(state), thread, metrics, switch)  # type: ignore[arg-type]
    registry = watch._registry = FickleRegistry(settings.models)
    registry.fetched = []
    made.append(Scene(settings, watch, slot, state, registry, folder / "made"))
    watch.mirror.caught_up.set()
    task = asyncio.create_task(watch._follow()) if follow else None
    try:
        yield made[0]
        assert task is None or not task.done() or task.result() is None
    finally:
        FickleRegistry.free.set()
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        thread.close()


async def test_candidate_is_prepared_in_shadow_and_made_live_by_one_switch_without_another_fetch(
    tmp_path: Path,
) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1")
        on.announce("candidate", "v1", 1)
        await on.until_in_shadow("v1")
        on.announce("live", "v1", 2)
        on.announce("previous", BOOTSTRAP_VERSION, 3)
        on.announce("candidate", "", 4)
        await on.until_live("v1", 2)
        await on.until_in_shadow(BOOTSTRAP_VERSION)
        assert on.registry.fetched == ["v1"]
        assert on.switches[0] == (BOOTSTRAP_VERSION, 0, ["v1"])
        assert on.switches[-1] == ("v1", 2, [BOOTSTRAP_VERSION])


async def test_two_versions_of_one_space_share_vectors_and_index(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        before = on.slot.live
        on.publish("v1", seed=1)
        on.announce("live", "v1", 1)
        await on.until_live("v1", 1)
        assert on.slot.live.vectors is before.vectors
        assert on.slot.live.vector_index is before.vector_index
        assert on.slot.live.scorer is not None


async def test_version_of_another_space_has_vectors_of_its_own_over_the_same_items(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        before = on.slot.live.vectors.vectors[:3].copy()
        on.publish("v1", space_id="turned", projection=TURNED)
        on.announce("live", "v1", 1)
        await on.until_live("v1", 1)
        assert on.slot.live.vectors.vectors[:3] == pytest.approx(before[:, ::-1])
        assert len(on.slot.live.vector_index) == 3


async def test_item_that_comes_after_the_preparation_is_in_every_space(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1", space_id="turned", projection=TURNED)
        on.announce("candidate", "v1", 1)
        await on.until_in_shadow("v1")
        on.state.apply_items([item_record("d")], NOW)
        on.state.apply_vectors([vector_record("d", ENCODER)], NOW)
        candidate = on.slot.candidate
        assert candidate is not None
        assert candidate.vectors.vectors[3] == pytest.approx(on.slot.live.vectors.vectors[3][::-1])
        assert len(candidate.vector_index) == len(on.slot.live.vector_index) == 4


async def test_rollback_to_a_held_version_does_not_wait_for_a_fetch_that_hangs(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        for number, version in enumerate(("v1", "v2")):
            on.publish(version, seed=number)
            on.announce("live", version, 10 + number)
            await on.until_live(version, 10 + number)
        on.announce("previous", "v1", 12)
        await on.until_in_shadow("v1")
        on.publish("v3", seed=3)
        on.registry.hangs_at = "v3"
        on.announce("candidate", "v3", 13)
        await wait_until(lambda: "v3" in on.registry.fetched, 10, "the fetch has begun")
        on.announce("live", "v1", 14)
        await on.until_live("v1", 14)
        assert not on.registry.free.is_set()


async def test_live_version_is_prepared_before_a_candidate_whose_fetch_hangs(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1")
        on.publish("v2", seed=2)
        on.registry.hangs_at = "v1"
        on.announce("candidate", "v1", 1)
        await wait_until(lambda: "v1" in on.registry.fetched, 10, "the fetch has begun")
        on.announce("live", "v2", 2)
        await on.until_live("v2", 2)
        on.registry.free.set()
        await on.until_in_shadow("v1")


async def test_registry_that_is_not_reached_is_asked_again_and_nothing_is_refused(tmp_path: Path) -> None:
    async with scene(tmp_path, start_wait_seconds=30.0) as on:
        on.publish("v1")
        on.registry.failures = 2
        on.announce("live", "v1", 1)
        await on.until_live("v1", 1)
        assert on.registry.fetched == ["v1", "v1", "v1"]
        assert on.watch.refused == {}


async def test_start_waits_for_a_registry_that_comes_back_in_time(tmp_path: Path) -> None:
    async with scene(tmp_path, follow=False, start_wait_seconds=30.0) as on:
        on.publish("v1")
        on.registry.failures = 2
        on.announce("live", "v1", 1)
        task = asyncio.create_task(on.watch._follow())
        await asyncio.wait_for(on.watch.decided.wait(), 10)
        assert on.slot.version == "v1"
        task.cancel()


async def test_start_goes_on_without_a_registry_that_does_not_come_back_and_follows_it_later(tmp_path: Path) -> None:
    async with scene(tmp_path, follow=False, start_wait_seconds=0.0) as on:
        on.publish("v1")
        on.registry.failures = 5
        on.announce("live", "v1", 1)
        task = asyncio.create_task(on.watch._follow())
        await asyncio.wait_for(on.watch.decided.wait(), 10)
        assert on.slot.version == BOOTSTRAP_VERSION
        await on.until_live("v1", 1)
        task.cancel()


async def test_start_does_not_wait_for_a_candidate_whose_fetch_hangs(tmp_path: Path) -> None:
    async with scene(tmp_path, follow=False) as on:
        on.publish("v1")
        on.publish("v2", seed=2)
        on.registry.hangs_at = "v2"
        on.announce("candidate", "v2", 1)
        on.announce("live", "v1", 2)
        task = asyncio.create_task(on.watch._follow())
        await asyncio.wait_for(on.watch.decided.wait(), 10)
        assert on.slot.version == "v1"
        assert not on.registry.free.is_set()
        task.cancel()


async def test_start_does_not_wait_for_ever_for_a_live_bundle_whose_fetch_hangs(tmp_path: Path) -> None:
    async with scene(tmp_path, follow=False, start_wait_seconds=0.0, fetch_timeout_seconds=0.05) as on:
        on.publish("v1")
        on.registry.hangs_at = "v1"
        on.announce("live", "v1", 1)
        task = asyncio.create_task(on.watch._follow())
        await asyncio.wait_for(on.watch.decided.wait(), 10)
        assert on.slot.version == BOOTSTRAP_VERSION
        on.registry.free.set()
        await on.until_live("v1", 1)
        task.cancel()


async def test_bundle_that_was_refused_is_not_tried_again_before_another_pointer_names_it(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1")
        file = tmp_path / "registry" / "default" / "v1" / "ctr.safetensors"
        sound = file.read_bytes()
        file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        on.announce("live", "v1", 1)
        await on.until_refused("live", "wrong-hash")
        on.announce("candidate", "v1", 2)
        await on.until_refused("candidate", "wrong-hash")
        assert on.registry.fetched == ["v1", "v1"]
        assert on.slot.version == BOOTSTRAP_VERSION
        file.write_bytes(sound)
        on.announce("live", "v1", 3)
        await on.until_live("v1", 3)
        assert "live" not in on.watch.refused


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"projection": PROJECTION + 1}, "space-changed"),
        ({"space_id": "wide", "dim": 8, "projection": np.ones((BASE_DIM, 8), np.float32)}, "wrong-dimension"),
    ],
)
async def test_space_that_cannot_stand_beside_the_others_is_refused(
    tmp_path: Path, given: dict[str, Any], reason: str
) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1", **given)
        on.announce("live", "v1", 1)
        await on.until_refused("live", reason)
        assert on.slot.version == BOOTSTRAP_VERSION


async def test_older_generations_on_the_topic_are_history_at_a_start_and_announcements_later(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        for generation in (1, 2):
            on.publish(f"v{generation}", seed=generation)
            on.announce("live", f"v{generation}", generation)
            await on.until_live(f"v{generation}", generation)
    async with scene(tmp_path, follow=False) as again:
        for generation in (1, 2):
            again.announce("live", f"v{generation}", generation)
        task = asyncio.create_task(again.watch._follow())
        await again.until_live("v2", 2)
        assert again.watch.refused == {}
        again.announce("live", "v1", 1)
        await again.until_refused("live", "old-generation")
        assert again.slot.version == "v2"
        task.cancel()


async def test_old_pointer_announced_again_does_not_keep_a_restart_from_the_newest(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        for generation in (1, 2):
            on.publish(f"v{generation}", seed=generation)
            on.announce("live", f"v{generation}", generation)
            await on.until_live(f"v{generation}", generation)
    async with scene(tmp_path, follow=False) as again:
        for generation in (1, 2, 1):
            again.announce("live", f"v{generation}", generation)
        task = asyncio.create_task(again.watch._follow())
        await again.until_live("v2", 2)
        await again.until_refused("live", "old-generation")
        task.cancel()


async def test_guard_that_cannot_be_read_refuses_every_pointer(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / GUARD_FILE).write_text("no guard")
    async with scene(tmp_path) as on:
        on.publish("v1")
        on.announce("live", "v1", 1)
        await on.until_refused("live", "guard-unreadable")
        await asyncio.wait_for(on.watch.decided.wait(), 10)
        assert on.slot.version == BOOTSTRAP_VERSION


async def test_switch_that_fails_keeps_the_old_version_and_says_so(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1")
        on.fails_at = "v1"
        on.announce("live", "v1", 1)
        await on.until_refused("live", "switch-failed")
        assert on.slot.version == BOOTSTRAP_VERSION
        on.publish("v2", seed=2)
        on.announce("live", "v2", 2)
        await on.until_live("v2", 2)


async def test_what_fails_in_our_own_code_is_a_refusal_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async with scene(tmp_path) as on:
        on.publish("v1", space_id="turned", projection=TURNED)
        monkeypatch.setattr("models.item_space.ItemSpace.build", broken)
        on.announce("live", "v1", 1)
        await on.until_refused("live", "preparation-failed")
        assert on.slot.version == BOOTSTRAP_VERSION
        assert on.state._building == []


async def test_version_without_a_role_is_freed_with_its_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_watch, "KEEP_SECONDS", 0.0)
    async with scene(tmp_path) as on:
        on.publish("v1", space_id="turned", projection=TURNED)
        on.announce("candidate", "v1", 1)
        await on.until_in_shadow("v1")
        assert on.state.spaces.keys() == {SPACE.space_id, "turned"}
        on.announce("candidate", "", 2)
        await on.until_in_shadow()
        await wait_until(lambda: on.state.spaces.keys() == {SPACE.space_id}, 10, "the space is freed")


async def test_version_is_kept_a_while_for_the_role_that_is_on_its_way(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1", space_id="turned", projection=TURNED)
        on.announce("live", "v1", 1)
        await on.until_live("v1", 1)
        assert SPACE.space_id in on.state.spaces
        on.announce("previous", BOOTSTRAP_VERSION, 2)
        await on.until_in_shadow(BOOTSTRAP_VERSION)
        assert on.slot.previous is not None
        assert on.slot.previous.vectors is on.state.spaces[SPACE.space_id].vectors


async def test_live_role_that_is_taken_away_is_the_bootstraps_under_its_generation(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1", space_id="turned", projection=TURNED)
        on.announce("live", "v1", 1)
        await on.until_live("v1", 1)
        on.announce("live", "", 2)
        await on.until_live(BOOTSTRAP_VERSION, 2)


async def test_nothing_is_scored_in_shadow_where_the_settings_say_so(tmp_path: Path) -> None:
    async with scene(tmp_path, shadow=False) as on:
        on.publish("v1")
        on.announce("candidate", "v1", 1)
        await on.until_in_shadow("v1")
        assert on.switches == [(BOOTSTRAP_VERSION, 0, [])]


async def test_bundle_with_an_encoder_waits_for_the_items_that_it_does_not_bring(tmp_path: Path) -> None:
    delta = EncoderDelta({"base_encoder_id": ENCODER}, {"layer.weight": np.ones((2, 2), np.float32)})
    title = content_hash(Item(item_id="a", title="a title"))
    brought = ItemEncodings(
        np.array([hash64(name) for name in ("a", "b", "later")], np.uint64),
        np.array([title] * 3, np.uint64),
        np.random.default_rng(5).normal(size=(3, BASE_DIM)).astype(np.float16),
    )
    async with scene(tmp_path) as on:
        await asyncio.wait_for(on.watch.decided.wait(), 10)
        on.publish(
            "v1", space_id="own", projection=TURNED, encoder=delta, encoder_id=delta.encoder_id, encodings=brought
        )
        on.announce("candidate", "v1", 1)
        await wait_until(lambda: "own" in on.state.spaces, 10, "the space is built")
        assert len(on.state.spaces["own"].index) == 2
        assert on.slot.candidate is None
        on.state.apply_vectors([vector_record("c", delta.encoder_id)], NOW)
        await on.until_in_shadow("v1")
        on.state.apply_items([item_record("later")], NOW)
        assert len(on.state.spaces["own"].index) == 4
        assert len(on.slot.live.vector_index) == 3


async def test_status_says_what_is_served_prepared_and_refused(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1")
        on.announce("candidate", "v1", 1)
        await on.until_in_shadow("v1")
        on.announce("live", "v1", 1, sha256="0" * 64)
        await on.until_refused("live", "wrong-hash")
        status = msgspec.to_builtins(WorkerStatus.of("me", "a-group", on.slot, on.watch, NOW))
        [refused] = status.pop("refused")
        assert status == {
            "worker_id": "me",
            "time_ms": NOW,
            "group": "a-group",
            "live": {"version": BOOTSTRAP_VERSION, "generation": 0, "space_id": SPACE.space_id},
            "prepared": [{"role": "candidate", "version": "v1", "generation": 1}],
            "arms": [],
        }
        assert (refused["role"], refused["version"], refused["reason"]) == ("live", "v1", "wrong-hash")


def test_worker_keeps_its_id_over_a_restart(tmp_path: Path) -> None:
    assert kept_worker_id(tmp_path / "one") == kept_worker_id(tmp_path / "one")
    assert kept_worker_id(tmp_path / "one") != kept_worker_id(tmp_path / "two")


def test_contents_of_these_tests_are_bundles_of_this_space() -> None:
    assert contents(space_id=SPACE.space_id, projection=PROJECTION, encoder_id=ENCODER).space.same_as(SPACE)


class DeafProducer:
    """A producer whose broker never answers."""

    async def send_and_wait(self, topic: str, key: bytes, value: bytes | None) -> None:
        """Wait for ever."""
        await asyncio.Event().wait()


async def test_goodbye_does_not_wait_for_a_broker_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_status, "SEND_SECONDS", 0.01)
    async with scene(tmp_path) as on:
        writer = model_status.StatusWriter(on.settings, on.slot, on.watch, DeafProducer())
        await asyncio.wait_for(writer.say_goodbye(), 10)
