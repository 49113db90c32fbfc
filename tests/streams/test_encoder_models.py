"""Which encoders the encoder process loads and drops, by what the ``models`` topic says."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from models.bundle import ItemEncodings
from models.encoder_delta import EncoderDelta
from models.errors import EncoderError, RegistryError
from models.hashing import hash64
from models.pointer import Pointer, Role
from models.registry import Registry
from models.signing import PrivateKey
from streams import encoder_models
from streams.encoder_models import Brought, EncoderModels, lanes_of
from streams.settings import Settings
from tests.models.bundles import BASE_DIM, write

BASE = "base@1/mean64"


@dataclass
class Sent:
    """A record of ``models``."""

    key: bytes | None
    value: bytes | None
    topic: str = "models"
    partition: int = 0
    offset: int = 0
    timestamp: int = 0
    headers: Sequence[tuple[str, bytes]] = ()


class FakeEncoder:
    """An encoder with nothing but an id."""

    def __init__(self, encoder_id: str) -> None:
        self.encoder_id = encoder_id

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return np.zeros((len(texts), BASE_DIM), np.float32)


class Stage:
    """A registry with bundles, and the pointers to them."""

    def __init__(self, folder: Path, private_key: PrivateKey | None = None, **models: object) -> None:
        self.folder = folder
        self.settings = Settings(
            models={"url": str(folder / "registry"), "cache_folder": folder / "cache", **models},
            worker={"data_folder": folder / "worker"},
        )
        self.registry = Registry(self.settings.models)
        self.private_key = private_key
        self.loads: list[str] = []
        self.refusals: list[str] = []
        self.generation = 0
        self.base = FakeEncoder(BASE)

    def delta(self, number: float, base: str = BASE) -> EncoderDelta:
        return EncoderDelta({"base_encoder_id": base}, {"w": np.full((1, 2), number, np.float32)})

    def publish(self, version: str, delta: EncoderDelta | None, known: dict[str, int] | None = None) -> None:
        """Publish a bundle whose encodings are those of ``known`` items by content hash."""
        encodings = None
        if known is not None:
            items = np.array([hash64(item) for item in known], np.uint64)
            base = np.zeros((len(known), BASE_DIM), np.float16)
            encodings = ItemEncodings(items, np.array(list(known.values()), np.uint64), base)
        encoder_id = delta.encoder_id if delta else BASE
        write(self.folder, version, self.private_key, encoder=delta, encoder_id=encoder_id, encodings=encodings)
        self.registry.publish(self.folder / version)

    def pointer(self, role: Role, version: str) -> Sent:
        self.generation += 1
        sha256 = self.registry.manifest_sha256(version) if version not in ("", "bootstrap-0") else ""
        pointer = Pointer("default", role, version, sha256, self.generation, 1, "test", "a test")
        pointer = pointer.signed(self.private_key)
        return Sent(pointer.key, pointer.encode())

    def load(self, folder: Path) -> FakeEncoder:
        delta = EncoderDelta.load(folder)
        self.loads.append(delta.encoder_id)
        return FakeEncoder(delta.encoder_id)

    @asynccontextmanager
    async def following(
        self, *records: Sent, load: Callable[[Path], FakeEncoder] | None = None
    ) -> AsyncIterator[EncoderModels]:
        """Follow with ``records`` on the topic at the start."""
        models = EncoderModels(self.settings, self.base, load or self.load, self.refusals.append)
        models.apply(records)
        models.mirror.caught_up.set()
        task = asyncio.create_task(models.follow())
        try:
            yield models
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def until(models: EncoderModels, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            models.changed.clear()
            await models.changed.wait()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


async def test_without_a_bundle_there_is_the_settings_encoder_alone(stage: Stage) -> None:
    async with stage.following() as models:
        await until(models, lambda: models.named() is not None)
        assert set(models.encoders) == models.named() == {BASE}
        assert models.rank(BASE) == 0
        assert not lanes_of(models)


async def test_the_encoder_of_each_role_is_loaded_and_ranked_live_first(stage: Stage) -> None:
    one, two = stage.delta(1), stage.delta(2)
    stage.publish("v1", one)
    stage.publish("v2", two)
    async with stage.following(stage.pointer("candidate", "v2"), stage.pointer("live", "v1")) as models:
        await until(models, lambda: len(models.encoders) == 3)
        assert stage.loads == [one.encoder_id, two.encoder_id]
        assert [models.rank(e) for e in (one.encoder_id, two.encoder_id, BASE)] == [0, 1, 4]
        assert models.named() == {BASE, one.encoder_id, two.encoder_id}


async def test_two_versions_of_one_encoder_load_it_once(stage: Stage) -> None:
    one = stage.delta(1)
    stage.publish("v1", one)
    stage.publish("v2", one)
    async with stage.following(stage.pointer("live", "v1"), stage.pointer("candidate", "v2")) as models:
        await until(models, lambda: len(models.bundles_of(one.encoder_id)) == 2)
        assert stage.loads == [one.encoder_id]


async def test_a_bundle_without_a_delta_loads_nothing(stage: Stage) -> None:
    stage.publish("v1", None)
    async with stage.following(stage.pointer("live", "v1")) as models:
        await until(models, lambda: models.named() == {BASE})
        assert stage.loads == []
        assert models.rank(BASE) == 0


async def test_an_encoder_that_no_role_names_any_more_is_freed(stage: Stage) -> None:
    one = stage.delta(1)
    stage.publish("v1", one)
    stage.publish("v2", None)
    async with stage.following(stage.pointer("live", "v1")) as models:
        await until(models, lambda: len(models.encoders) == 2)
        held = weakref.ref(models.encoders[one.encoder_id])
        models.apply([stage.pointer("live", "v2"), stage.pointer("previous", "v1")])
        await until(models, lambda: models.rank(one.encoder_id) == 2)
        assert held() is not None
        models.apply([stage.pointer("previous", "")])
        await until(models, lambda: set(models.encoders) == {BASE})
        gc.collect()
        assert held() is None
        assert models.named() == {BASE}


async def test_a_promotion_that_comes_record_by_record_loads_no_encoder_twice(stage: Stage) -> None:
    one, two = stage.delta(1), stage.delta(2)
    stage.publish("v1", one)
    stage.publish("v2", two)
    async with stage.following(stage.pointer("live", "v1"), stage.pointer("candidate", "v2")) as models:
        await until(models, lambda: len(models.encoders) == 3)
        models.apply([stage.pointer("live", "v2")])
        await asyncio.sleep(0)
        models.apply([stage.pointer("previous", "v1")])
        await asyncio.sleep(0)
        models.apply([stage.pointer("candidate", "")])
        await until(models, lambda: (models.rank(two.encoder_id), models.rank(one.encoder_id)) == (0, 2))
        assert stage.loads == [one.encoder_id, two.encoder_id]


async def test_back_on_the_bootstrap_its_items_go_first_again(stage: Stage) -> None:
    one = stage.delta(1)
    stage.publish("v1", one)
    async with stage.following(stage.pointer("live", "v1")) as models:
        await until(models, lambda: models.rank(BASE) == 4)
        models.apply([stage.pointer("live", "bootstrap-0"), stage.pointer("previous", "v1")])
        await until(models, lambda: models.rank(BASE) == 0)
        assert models.rank(one.encoder_id) == 2


async def test_a_delta_of_another_base_is_refused_and_the_rest_goes_on(stage: Stage) -> None:
    one, foreign = stage.delta(1), stage.delta(2, base="other@1/mean64")

    def load(folder: Path) -> FakeEncoder:
        if EncoderDelta.load(folder).base_encoder_id != BASE:
            raise EncoderError("the delta was trained from another encoder")
        return stage.load(folder)

    stage.publish("v1", one)
    stage.publish("v2", foreign)
    async with stage.following(stage.pointer("candidate", "v2"), stage.pointer("live", "v1"), load=load) as models:
        await until(models, lambda: one.encoder_id in models.encoders)
        assert await _eventually(lambda: stage.refusals == ["encoder"])
        assert set(models.encoders) == {BASE, one.encoder_id}


async def test_a_bundle_of_another_encoder_without_its_delta_is_refused(stage: Stage) -> None:
    write(stage.folder, "v1", encoder_id="another@1/mean64")
    stage.registry.publish(stage.folder / "v1")
    async with stage.following(stage.pointer("live", "v1")):
        assert await _eventually(lambda: stage.refusals == ["encoder"])


async def test_while_a_bundle_is_not_known_nothing_counts_as_unneeded(stage: Stage) -> None:
    stage.publish("v1", stage.delta(1))
    pointer = stage.pointer("live", "v1")
    (stage.folder / "registry" / "default" / "v1" / "space.safetensors").write_bytes(b"damaged")
    async with stage.following(pointer) as models:
        assert await _eventually(lambda: bool(stage.refusals))
        assert models.named() is None


async def test_a_model_of_another_name_keeps_all_encodings(stage: Stage) -> None:
    stage.publish("v1", stage.delta(1))
    other = Pointer("other", "live", "v9", "0" * 64, 1, 1, "test", "a test")
    async with stage.following(stage.pointer("live", "v1"), Sent(other.key, other.encode())) as models:
        await until(models, lambda: len(models.encoders) == 2)
        assert models.named() is None
        models.apply([Sent(other.key, None)])
        await until(models, lambda: models.named() is not None)


async def test_an_error_that_nobody_thought_of_costs_that_encoder_alone(stage: Stage) -> None:
    def load(folder: Path) -> FakeEncoder:
        raise MemoryError("no room for weights")

    stage.publish("v1", stage.delta(1))
    stage.publish("v2", None)
    async with stage.following(stage.pointer("live", "v1"), stage.pointer("previous", "v2"), load=load) as models:
        await until(models, lambda: bool(models.bundles_of(BASE)))
        assert stage.refusals == ["unexpected"]


async def test_an_unsigned_pointer_loads_nothing_where_a_key_is_configured(tmp_path: Path) -> None:
    key = PrivateKey.generate()
    stage = Stage(tmp_path, key, public_key=key.public.text)
    one = stage.delta(1)
    stage.publish("v1", one)
    signed = stage.pointer("live", "v1")
    stage.private_key = None
    unsigned = stage.pointer("candidate", "v1")
    async with stage.following(unsigned, signed) as models:
        await until(models, lambda: one.encoder_id in models.encoders)
        assert stage.refusals == ["unsigned"]
        assert models.rank(one.encoder_id) == 0


async def test_an_old_pointer_announced_again_does_not_keep_a_restart_from_the_newest_encoder(stage: Stage) -> None:
    one, two = stage.delta(1), stage.delta(2)
    stage.publish("v1", one)
    stage.publish("v2", two)
    old, new = stage.pointer("live", "v1"), stage.pointer("live", "v2")
    async with stage.following(old, new) as models:
        await until(models, lambda: two.encoder_id in models.encoders)
    async with stage.following(old, new, old) as models:
        await until(models, lambda: two.encoder_id in models.encoders)
        assert models.named() == {BASE, two.encoder_id}
        assert stage.refusals == ["old-generation"]


async def test_a_registry_that_is_away_is_asked_again(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    one = stage.delta(1)
    stage.publish("v1", one)
    failures = 2
    fetch = Registry.fetch

    def flaky(self: Registry, version: str, into: Path, *, manifest_sha256: str | None = None) -> Path:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise RegistryError("the registry is away")
        return fetch(self, version, into, manifest_sha256=manifest_sha256)

    monkeypatch.setattr(Registry, "fetch", flaky)
    monkeypatch.setattr("streams.encoder_models.RETRY_SECONDS", 0.01)
    async with stage.following(stage.pointer("live", "v1")) as models:
        await until(models, lambda: one.encoder_id in models.encoders)
    assert failures < 0
    assert stage.refusals == []


async def test_a_fetch_that_hangs_stands_before_no_other_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, fetch_timeout_seconds=0.5)
    one, two = stage.delta(1), stage.delta(2)
    stage.publish("v1", one)
    stage.publish("v2", two)
    free = threading.Event()
    fetch = Registry.fetch

    def hanging(self: Registry, version: str, into: Path, *, manifest_sha256: str | None = None) -> Path:
        if version == "v1":
            free.wait(30)
        return fetch(self, version, into, manifest_sha256=manifest_sha256)

    monkeypatch.setattr(Registry, "fetch", hanging)
    try:
        async with stage.following(stage.pointer("live", "v1"), stage.pointer("candidate", "v2")) as models:
            await until(models, lambda: two.encoder_id in models.encoders)
            assert stage.refusals == []
    finally:
        free.set()


async def test_what_every_bundle_of_an_encoder_brings_needs_no_encoding(stage: Stage) -> None:
    one = stage.delta(1)
    stage.publish("v1", one, {"a": 11, "b": 22})
    stage.publish("v2", one, {"a": 11})
    async with stage.following(stage.pointer("live", "v1")) as models:
        await until(models, lambda: one.encoder_id in models.encoders)
        assert models.is_brought(one.encoder_id, "a", 11)
        assert models.is_brought(one.encoder_id, "b", 22)
        assert not models.is_brought(one.encoder_id, "b", 23), "its text has changed since"
        assert not models.is_brought(one.encoder_id, "c", 33)
        models.apply([stage.pointer("candidate", "v2")])
        await until(models, lambda: len(models.bundles_of(one.encoder_id)) == 2)
        assert models.is_brought(one.encoder_id, "a", 11)
        assert not models.is_brought(one.encoder_id, "b", 22), "the candidate alone would lack it"


def test_pairs_are_found_in_any_order() -> None:
    names = [f"item-{n}" for n in range(50)]
    brought = Brought.of(np.array([hash64(n) for n in names], np.uint64), np.arange(50, dtype=np.uint64))
    assert all(brought.has(name, place) for place, name in enumerate(names))
    assert not brought.has("item-50", 50)
    assert not Brought.of(np.zeros(0, np.uint64), np.zeros(0, np.uint64)).has("item-1", 1)


async def _eventually(condition: Callable[[], bool]) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - a refusal sets no event
                await asyncio.sleep(0.01)
    return condition()


async def test_the_encoder_of_a_bundle_that_an_arm_names_is_loaded_after_those_of_roles(stage: Stage) -> None:
    one, two = stage.delta(1), stage.delta(2)
    stage.publish("v1", one)
    stage.publish("v2", two)
    async with stage.following(stage.pointer("previous", "v2")) as models:
        models.name_arms(["v1"])
        await until(models, lambda: len(models.encoders) == 3)
        assert stage.loads == [two.encoder_id, one.encoder_id]
        assert [models.rank(e) for e in (two.encoder_id, one.encoder_id)] == [2, 3]
        assert lanes_of(models)[one.encoder_id] == {("v1", "")}
        assert models.named() == {BASE, one.encoder_id, two.encoder_id}


async def test_the_encoder_of_a_bundle_that_no_arm_names_any_more_is_dropped(stage: Stage) -> None:
    stage.publish("v1", stage.delta(1))
    async with stage.following() as models:
        models.name_arms(["v1"])
        await until(models, lambda: len(models.encoders) == 2)
        models.name_arms([])
        await until(models, lambda: set(models.encoders) == {BASE})
        assert models.named() == {BASE}


async def test_a_bundle_of_an_arm_that_is_published_later_has_its_encoder_loaded_then(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_models, "RETRY_SECONDS", 0.01)
    stage.publish("v0", None)
    async with stage.following() as models:
        models.name_arms(["v1"])
        await until(models, lambda: models.named() is None)
        stage.publish("v1", stage.delta(1))
        await until(models, lambda: len(models.encoders) == 2)
        assert stage.refusals == []


async def test_an_unsigned_bundle_of_an_arm_loads_no_encoder(tmp_path: Path) -> None:
    stage = Stage(tmp_path, public_key=PrivateKey.generate().public.text)
    stage.publish("v1", stage.delta(1))
    async with stage.following() as models:
        models.name_arms(["v1"])
        await asyncio.wait_for(_until_refused(stage), 20)
        assert stage.refusals == ["unsigned"]
        assert set(models.encoders) == {BASE}


async def _until_refused(stage: Stage) -> None:
    while not stage.refusals:  # noqa: ASYNC110 - a refusal is no event here
        await asyncio.sleep(0.01)
