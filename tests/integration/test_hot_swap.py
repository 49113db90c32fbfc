"""Bundles swapped under load on real Kafka: nothing lost, nothing applied twice, nothing unsound taken."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.bundle import BundleContents
from models.hashing import hash64
from models.manifest import BOOTSTRAP_VERSION
from models.pointer import Pointer
from models.signing import PrivateKey
from models.user_batch import read_vectors
from models.user_row import decode_rows
from models.user_value import row_of
from streams import item_vectors
from tests.integration.announcer import Announcer, bundle_contents, ctr_of, damage
from tests.integration.conftest import SettingsWith, read_topic, wait_until
from tests.integration.oracle import GENERATION, SPACE, assert_exact, changelog_rows
from tests.integration.traffic import load, traffic
from tests.integration.workers import BASE_DIM, Record, WorkerProcess, World, encoder_id, now_ms, record, world

pytestmark = pytest.mark.integration

SWAPS = 10


def versions(*numbers: int) -> frozenset[str]:
    return frozenset({BOOTSTRAP_VERSION, *(f"v{number}" for number in numbers)})


def strange_slates(slates: list[Any], spaces: dict[str, str]) -> list[str]:
    """Return in words which slates do not name the version that made them: its CTR and its space say which it was."""
    found = []
    for slate in slates:
        version = slate["model_version"]
        if spaces[version] != slate["space_id"]:
            found.append(f"{version} names the space {slate['space_id']}")
        if version == BOOTSTRAP_VERSION or slate["degraded"]:
            continue
        off = [item["ctr"] for item in slate["items"] if abs(item["ctr"] - ctr_of(int(version[1:]))) > 1e-5]
        if off:
            found.append(f"{version} states {off[:3]}, not {ctr_of(int(version[1:]))}")
    return found


async def test_ten_swaps_under_load_lose_nothing_and_every_slate_names_its_version(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path, models={"status_interval_seconds": 1.0}) as on:
        first, second = on.worker("first"), on.worker("second")
        await first.wait_ready()
        await second.wait_ready()
        announcer = Announcer(on, tmp_path / "made")
        spaces = {BOOTSTRAP_VERSION: on.space().space_id}
        for half, new_space in enumerate((False, True)):
            async with load(on, seed=1 + half):
                for number in range(1 + half * SWAPS // 2, 1 + (half + 1) * SWAPS // 2):
                    made = bundle_contents(on, number, new_space=new_space)
                    spaces[made.version] = made.space_id
                    await announcer.swap(made, workers=2)
            apart_from = SPACE if new_space else GENERATION
            await assert_exact(on, versions=frozenset(spaces), apart_from=apart_from)

        slates = await on.slates()
        assert {slate["model_version"] for slate in slates} >= versions(*range(1, SWAPS))
        assert not strange_slates(slates, spaces)
        await on.publish([click("newcomer", "item-3")])
        await on.wait_committed()
        assert await taste_of(on, "newcomer") == pytest.approx(await vector_of(on, made, "item-3"), abs=2e-3)

        generation = (await announcer.pointers()).roles["live"].generation
        for worker in (first, second):
            assert await worker.metric("millstream_model_swap_seconds_count") == SWAPS
            assert await worker.metric("millstream_model_generation", role="live") == generation
            assert await worker.metric("millstream_model_refused_total") == 0


def click(user: str, item: str) -> Record:
    """Return a click on an item that was not shown: one step from nothing towards the item's vector."""
    event = {"type": "action", "event_id": f"{user}-{item}", "user_id": user, "item_id": item, "action": "click"}
    return record({**event, "event_time": now_ms()})


async def taste_of(on: World, user: str) -> list[float]:
    """Return the direction of a user's short-term vector."""
    rows, _ = await changelog_rows(on)
    [row] = [row for (_, name), row in rows.items() if name == user.encode()]
    vector = read_vectors(decode_rows([row_of(row)]))[0, 0]
    return [float(x) for x in vector / np.linalg.norm(vector)]


async def vector_of(on: World, made: BundleContents, item: str) -> list[float]:
    """Return an item's vector in a bundle's space."""
    key = item_vectors.key(encoder_id(), item)
    [value] = [r.value for r in await read_topic(on.settings, on.names.item_vectors) if r.key == key]
    return [float(x) for x in made.space.vectors(item_vectors.decode(value, BASE_DIM).vector[None])[0]]


async def test_what_is_unsound_is_refused_by_both_workers_with_the_reason_and_the_old_bundle_serves_on(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    key, stranger = PrivateKey.generate(), PrivateKey.generate()
    models = {"status_interval_seconds": 1.0, "public_key": key.public.text}
    async with world(settings_with, tmp_path, models=models) as on:
        first, second = on.worker("first"), on.worker("second")
        await first.wait_ready()
        await second.wait_ready()
        announcer = Announcer(on, tmp_path / "made", key)
        spaces = {f"v{n}": f"space-v{n}" for n in range(1, 9)} | {BOOTSTRAP_VERSION: on.space().space_id}
        async with load(on, seed=1):
            old = await announcer.swap(bundle_contents(on, 1, new_space=True), workers=2)
            live = await announcer.swap(bundle_contents(on, 2, new_space=True), workers=2)

            corrupt = announcer.publish(bundle_contents(on, 3, new_space=True))
            damage(on, "v3", "space.safetensors")
            await announcer.announce_candidate("v3", corrupt)
            refused = await announcer.wait_refused("wrong-hash", workers=2)
            assert {(r["role"], r["version"]) for r in refused} == {("candidate", "v3")}

            sound = announcer.publish(bundle_contents(on, 4, new_space=True))
            unsigned = Pointer(on.settings.models.name, "live", "v4", sound, live + 100, now_ms(), "mallory", "mine")
            await announcer.send_by(None, [unsigned])
            await announcer.wait_refused("unsigned", workers=2)
            await announcer.send_by(stranger, [unsigned])
            await announcer.wait_refused("wrong-signature", workers=2)

            # Not a replay of the older pointer itself: a properly signed one with its generation.
            stale = Pointer(on.settings.models.name, "live", "v1", sound, old, now_ms(), "mallory", "a replay")
            await announcer.send([stale])
            await announcer.wait_refused("old-generation", workers=2)

            worse = bundle_contents(on, 5, new_space=True)
            missed = replace(worse.canary, expected=np.zeros(2, np.float32))
            announced = announcer.publish(replace(worse, canary=missed))
            await announcer.announce_candidate("v5", announced)
            await announcer.wait_refused("canary", workers=2)

            claims = bundle_contents(on, 6, new_space=True, space_id="space-v2")
            await announcer.announce_candidate("v6", announcer.publish(claims))
            await announcer.wait_refused("space-changed", workers=2)

            for status in (await announcer.statuses()).values():
                assert status["live"] == {"version": "v2", "generation": live, "space_id": "space-v2"}
            for worker in (first, second):
                assert await worker.is_ready()
                assert await worker.metric("millstream_model_refused_total", reason="canary") == 1

            # The topic's newest live pointer is the stale one now: a decider counts on from what it knows.
            back = Pointer(
                on.settings.models.name,
                "live",
                "v1",
                await sha256_of(announcer, "v1"),
                live + 200,
                now_ms(),
                "test",
                "a rollback",
            )
            await announcer.send([back])
            await announcer.wait_live("v1", live + 200, workers=2)
        await assert_exact(on, versions=frozenset(spaces), apart_from=SPACE)
        assert not strange_slates(slates := await on.slates(), spaces)
        assert {slate["model_version"] for slate in slates} <= versions(1, 2)


async def sha256_of(announcer: Announcer, version: str) -> str:
    return await asyncio.to_thread(announcer.registry.manifest_sha256, version)


async def test_a_worker_killed_in_the_middle_of_a_swap_and_one_that_starts_late_come_up_on_the_live_version(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path, models={"status_interval_seconds": 1.0}) as on:
        first, second = on.worker("first"), on.worker("second")
        await first.wait_ready()
        await second.wait_ready()
        announcer = Announcer(on, tmp_path / "made")
        spaces = {f"v{n}": f"space-v{n}" for n in range(1, 4)} | {BOOTSTRAP_VERSION: on.space().space_id}
        async with load(on, seed=1):
            await announcer.swap(bundle_contents(on, 1, new_space=True), workers=2)
            sha256 = announcer.publish(bundle_contents(on, 2, new_space=True))
            generation = await announcer.announce_live("v2", sha256)
            await wait_until(lambda: '"version": "v2"' in second.log, 30, "the second has read the pointer")
            second.kill()
            await announcer.wait_live("v2", generation, workers=1)
            second.start()
            third = on.worker("third")
            for worker in (second, third):
                await worker.wait_ready()
                assert await served_by(worker) == "v2"
            await announcer.wait_live("v2", generation, workers=3)
            assert '"model_live"' in third.log
            assert third.log.index('"model_live"') < third.log.index('"event": "ready"')
        await assert_exact(on, versions=frozenset(spaces), apart_from=SPACE)
        assert not strange_slates(await on.slates(), spaces)


async def served_by(worker: WorkerProcess) -> str:
    """Return the version that a worker's metrics name."""
    for version in ("v1", "v2", "v3", BOOTSTRAP_VERSION):
        if await worker.metric("millstream_build_info", model_version=version):
            return version
    return "none"


async def test_a_worker_that_cannot_have_the_live_bundle_starts_on_the_bootstrap_says_so_and_follows_later(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    models = {"status_interval_seconds": 1.0, "start_wait_seconds": 1.0}
    async with world(settings_with, tmp_path, models=models) as on:
        announcer = Announcer(on, tmp_path / "made")
        announced = announcer.publish(bundle_contents(on, 1, new_space=True))
        damage(on, "v1", "ctr.safetensors")
        await announcer.announce_live("v1", announced)
        only = await on.ready_worker("only")
        assert await served_by(only) == BOOTSTRAP_VERSION
        assert "live_bundle_missing" in only.log
        [refused] = await announcer.wait_refused("wrong-hash", workers=1)
        assert (refused["role"], refused["version"]) == ("live", "v1")

        sound = announcer.publish(bundle_contents(on, 2, new_space=True))
        await announcer.wait_live("v2", await announcer.announce_live("v2", sound), workers=1)
        await on.publish(traffic(on, 100, 10, seed=1))
        await assert_exact(on, versions=frozenset({"v2"}), apart_from=SPACE)


async def test_a_worker_that_lags_behind_serves_the_rows_of_a_newer_space_but_does_not_rewrite_them(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path, models={"status_interval_seconds": 1.0}) as on:
        announcer = Announcer(on, tmp_path / "made")
        ahead = await on.ready_worker("ahead")
        generation = await announcer.swap(bundle_contents(on, 1, new_space=True), workers=1)
        await on.publish(traffic(on, 300, 20, seed=1))
        await on.wait_committed()
        written, _ = await changelog_rows(on)
        assert {space_of(row) for row in written.values()} == {(hash64("space-v1"), generation)}
        ahead.kill()

        # The bundle is gone for whoever starts now: it serves on the bootstrap, generation 0.
        damage(on, "v1", "space.safetensors")
        remove_cache(on)
        behind = await on.ready_worker("behind")
        assert await served_by(behind) == BOOTSTRAP_VERSION
        await on.publish(traffic(on, 300, 20, seed=2))
        await on.wait_committed()
        touched, _ = await changelog_rows(on)
        assert touched.keys() == written.keys()
        assert all(touched[key] != written[key] for key in written), "every user had another event"
        assert {space_of(row) for row in touched.values()} == {(hash64("space-v1"), generation)}
        assert [vectors_of(touched[key]) for key in written] == [vectors_of(written[key]) for key in written]
        behind.kill()


def space_of(row: bytes) -> tuple[int, int]:
    decoded = decode_rows([row_of(row)])
    return int(decoded["space_id"][0]), int(decoded["generation"][0])


def vectors_of(row: bytes) -> bytes:
    """Return the directions of a row's vectors: time makes them shorter in whatever space."""
    return bytes(decode_rows([row_of(row)])["vectors"].tobytes())


def remove_cache(on: World) -> None:
    shutil.rmtree(on.settings.models.cache_folder)
