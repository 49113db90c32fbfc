"""`millstream models` on real Kafka: with workers that only read pointers and say what they hold, and a real one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiokafka import AIOKafkaProducer

from models.errors import BundleError, SettingsError
from models.manifest import BOOTSTRAP_VERSION
from models.pointer import Pointer, PointerGuard, newest, plan_candidate, plan_promotion
from models.registry import Registry
from models.signing import PrivateKey
from streams import model_tools
from streams.kafka_clients import new_producer
from streams.model_status import LiveModel, PreparedModel, RefusedModel, WorkerStatus
from streams.settings import Settings
from streams.topics import TopicNames
from tests.integration.announcer import Announcer, bundle_contents
from tests.integration.conftest import REPOSITORY, SettingsWith, environment, read_topic, wait_until
from tests.integration.workers import now_ms, world
from tests.models.bundles import TIME_MS, write

pytestmark = pytest.mark.integration

SAID: dict[str, Any] = {"at_ms": TIME_MS, "by": "test", "why": "test"}


class SmallWorker:
    """Follows pointers as a worker does, without a bundle: it refuses ``refuses`` and never prepares ``ignores``."""

    def __init__(
        self, settings: Settings, worker_id: str, folder: Path, *, refuses: str = "", ignores: str = ""
    ) -> None:
        self._settings = settings
        self._names = TopicNames.of(settings)
        self._guard = PointerGuard(folder / worker_id, settings.models.name, settings.models.trusted())
        self._refuses, self._ignores = refuses, ignores
        self.status = WorkerStatus(worker_id, 0, "group", LiveModel(BOOTSTRAP_VERSION, 0, "space"), [], [])
        self.spoken = False

    async def run(self, producer: AIOKafkaProducer) -> None:
        while True:
            for record in await read_topic(self._settings, self._names.models):
                try:
                    self._follow(self._guard.accept(record.key, record.value))
                except BundleError as error:
                    if error.reason != "old-generation":
                        self.status.refused.append(RefusedModel("", "", 0, error.reason, error.detail))
            self.status.time_ms = now_ms()
            value = msgspec.json.encode(self.status)
            await producer.send_and_wait(self._names.model_status, value, key=self.status.worker_id.encode())
            self.spoken = True
            await asyncio.sleep(0.1)

    def _follow(self, pointer: Pointer | None) -> None:
        if pointer is None:
            return
        self.status.prepared = [p for p in self.status.prepared if p.role != pointer.role]
        if pointer.version and pointer.version == self._refuses:
            self.status.refused = [
                RefusedModel(pointer.role, pointer.version, pointer.generation, "canary", "its canary is off by 3")
            ]
        elif pointer.role == "live":
            self.status.live = LiveModel(pointer.version, pointer.generation, "space")
        elif pointer.version not in ("", self._ignores):
            self.status.prepared.append(PreparedModel(pointer.role, pointer.version, pointer.generation))


@asynccontextmanager
async def workers(settings: Settings, *made: SmallWorker) -> AsyncIterator[None]:
    """Run workers, from when the broker holds the first words of each."""
    producer = new_producer(settings)
    await producer.start()
    tasks = [asyncio.create_task(worker.run(producer)) for worker in made]
    try:
        await wait_until(lambda: all(worker.spoken for worker in made), 30, "every worker has spoken")
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await producer.stop()


def publish(settings: Settings, tmp_path: Path, *versions: str, **given: Any) -> None:
    for version in versions:
        write(tmp_path / "made", version, **given)
        Registry(settings.models).publish(tmp_path / "made" / version)


async def roles(settings: Settings) -> dict[str, str]:
    records = await read_topic(settings, TopicNames.of(settings).models)
    found = newest({r.key: r.value for r in records if r.value is not None}, settings.models.name)
    return {role: pointer.version for role, pointer in found.roles.items()}


async def promote(settings: Settings, version: str, *, timeout_seconds: float = 30.0, now: bool = False) -> list[str]:
    said: list[str] = []
    await model_tools.promote(
        settings, version, timeout_seconds=timeout_seconds, now=now, why="a test", say=said.append
    )
    return said


async def command(settings: Settings, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``millstream models`` as its own process."""
    return await asyncio.to_thread(
        subprocess.run,
        [sys.executable, str(REPOSITORY / "millstream.py"), "models", *arguments],
        env=environment(settings, folder / "command"),
        capture_output=True,
        text=True,
        timeout=120,
    )


async def test_a_promotion_waits_until_every_worker_has_prepared_the_version(
    settings: Settings, tmp_path: Path
) -> None:
    publish(settings, tmp_path, "v1")
    one, two = SmallWorker(settings, "one", tmp_path), SmallWorker(settings, "two", tmp_path)
    async with workers(settings, one, two):
        said = await promote(settings, "v1")
        rows, _ = await model_tools.listing(settings)
    assert said[1:] == ["prepared by all 2 workers", "v1 is live, generation 2; 2 of 2 workers serve it"]
    assert {row.version: (row.roles, row.serving) for row in rows} == {
        "v1": (["live"], 2),
        BOOTSTRAP_VERSION: (["previous"], 0),
    }


async def test_a_version_that_a_worker_refuses_is_not_promoted_and_is_no_candidate_any_more(
    settings: Settings, tmp_path: Path
) -> None:
    publish(settings, tmp_path, "v1", "v2")
    one, two = SmallWorker(settings, "one", tmp_path), SmallWorker(settings, "two", tmp_path, refuses="v2")
    async with workers(settings, one, two):
        await promote(settings, "v1")
        with pytest.raises(BundleError, match="worker two: its canary is off by 3"):
            await promote(settings, "v2")
    assert await roles(settings) == {"live": "v1", "previous": BOOTSTRAP_VERSION}


async def test_a_version_that_no_worker_prepares_in_time_is_not_promoted(settings: Settings, tmp_path: Path) -> None:
    publish(settings, tmp_path, "v1")
    async with workers(settings, SmallWorker(settings, "one", tmp_path, ignores="v1")):
        with pytest.raises(BundleError, match="not-prepared"):
            await promote(settings, "v1", timeout_seconds=0.5)
    assert await roles(settings) == {}


async def test_a_worker_that_does_not_come_to_an_end_holds_the_others_back_only_until_the_time_out(
    settings: Settings, tmp_path: Path
) -> None:
    publish(settings, tmp_path, "v1")
    one, two = SmallWorker(settings, "one", tmp_path), SmallWorker(settings, "two", tmp_path, ignores="v1")
    async with workers(settings, one, two):
        said = await promote(settings, "v1", timeout_seconds=2.0)
    assert "prepared by 1 of 2 workers; going on without two" in said
    assert (await roles(settings))["live"] == "v1"


async def test_a_worker_that_was_silent_for_long_is_not_waited_for(settings: Settings, tmp_path: Path) -> None:
    publish(settings, tmp_path, "v1")
    gone = WorkerStatus("gone", now_ms() - 3_600_000, "group", LiveModel(BOOTSTRAP_VERSION, 0, "space"), [], [])
    producer = new_producer(settings)
    await producer.start()
    await producer.send_and_wait(TopicNames.of(settings).model_status, msgspec.json.encode(gone), key=b"gone")
    await producer.stop()
    said = await promote(settings, "v1")
    assert "no worker lives now; the next one that starts will take it" in said


async def test_now_leaves_the_first_phase_out(settings: Settings, tmp_path: Path) -> None:
    publish(settings, tmp_path, "v1")
    await promote(settings, "v1", now=True)
    records = await read_topic(settings, TopicNames.of(settings).models)
    assert [json.loads(r.value)["role"] for r in records] == ["live", "previous"]


async def test_a_version_that_is_not_published_is_not_announced(settings: Settings) -> None:
    with pytest.raises(BundleError, match="not-in-registry"):
        await promote(settings, "v9")
    assert await read_topic(settings, TopicNames.of(settings).models) == []


async def test_a_rollback_brings_the_previous_version_back_and_is_written_down(
    settings: Settings, tmp_path: Path
) -> None:
    publish(settings, tmp_path, "v1", "v2")
    for version in ("v1", "v2"):
        await promote(settings, version, now=True)
    await model_tools.rollback(settings, timeout_seconds=5, why="worse", say=lambda _: None)
    assert await roles(settings) == {"live": "v1"}
    told = [(d["decision"], d["why"], d["live"]) for d in model_tools.show(settings, "v2")["decisions"]]
    assert told == [("promoted", "a test", "v2"), ("rolled back", "worse", "v1")]


async def test_a_rollback_without_a_previous_version_announces_nothing(settings: Settings) -> None:
    with pytest.raises(BundleError, match="no-previous"):
        await model_tools.rollback(settings, timeout_seconds=5, why="", say=lambda _: None)
    assert await read_topic(settings, TopicNames.of(settings).models) == []


async def test_an_operator_can_go_back_to_the_bootstrap_by_name(settings: Settings, tmp_path: Path) -> None:
    publish(settings, tmp_path, "v1")
    await promote(settings, "v1", now=True)
    await promote(settings, BOOTSTRAP_VERSION, now=True)
    assert await roles(settings) == {"live": BOOTSTRAP_VERSION, "previous": "v1"}


async def send(settings: Settings, pointers: Sequence[Pointer]) -> None:
    producer = new_producer(settings)
    await producer.start()
    for pointer in pointers:
        await producer.send_and_wait(TopicNames.of(settings).models, pointer.encode(), key=pointer.key)
    await producer.stop()


async def test_of_two_who_announce_at_the_same_moment_the_operators_word_stands_under_a_higher_generation(
    settings: Settings, tmp_path: Path
) -> None:
    publish(settings, tmp_path, "v1", "v2")
    nothing = (await model_tools.situation(settings)).pointers
    await send(settings, plan_promotion(nothing, "v2", "b" * 64, **SAID))
    sha256 = Registry(settings.models).manifest_sha256("v1")
    late = plan_promotion(nothing, "v1", sha256, **SAID)
    sent, found = await model_tools._announce(settings, late, None)
    guard = PointerGuard(tmp_path / "guard", settings.models.name)
    taken = []
    for record in await read_topic(settings, TopicNames.of(settings).models):
        with contextlib.suppress(BundleError):
            taken.append(guard.accept(record.key, record.value))
    assert sent[0].generation > 2
    assert found.pointers.version("live") == "v1"
    assert [p.version for p in taken if p is not None and p.role == "live"] == ["v2", "v1"]


async def test_with_keys_every_pointer_is_signed_and_a_worker_that_trusts_the_key_follows_them(
    settings: Settings, tmp_path: Path
) -> None:
    key = PrivateKey.generate()
    key.write(tmp_path / "private.pem")
    signing = settings.models.model_copy(
        update={"public_key": key.public.text, "private_key_file": tmp_path / "private.pem"}
    )
    settings = settings.model_copy(update={"models": signing})
    publish(settings, tmp_path, "v1", private_key=key)
    worker = SmallWorker(settings, "one", tmp_path)
    async with workers(settings, worker):
        await promote(settings, "v1")
        await model_tools.rollback(settings, timeout_seconds=5, why="", say=lambda _: None)
    assert (worker.status.live.version, worker.status.refused) == (BOOTSTRAP_VERSION, [])


async def test_with_a_public_key_and_no_private_one_nothing_is_announced(settings: Settings, tmp_path: Path) -> None:
    publish(settings, tmp_path, "v1")
    trusting = settings.models.model_copy(update={"public_key": PrivateKey.generate().public.text})
    with pytest.raises(SettingsError, match="private_key_file"):
        await promote(settings.model_copy(update={"models": trusting}), "v1")
    assert await read_topic(settings, TopicNames.of(settings).models) == []


async def test_gc_keeps_the_newest_those_with_a_role_those_served_and_their_parents(
    settings: Settings, tmp_path: Path
) -> None:
    for number in range(8):
        parent = f"v{number - 1}" if number else None
        publish(settings, tmp_path, f"v{number}", created_ms=TIME_MS + number, parent=parent)
    served = SmallWorker(settings, "one", tmp_path)
    served.status.live = LiveModel("v0", 1, "space")
    async with workers(settings, served):
        await send(settings, plan_candidate((await model_tools.situation(settings)).pointers, "v5", "b" * 64, **SAID))
        would = await model_tools.collect(settings, keep=1, dry_run=True)
        done = await model_tools.collect(settings, keep=1, dry_run=False)
    assert would.removed == done.removed == ["v1", "v2", "v3", "v6"]
    assert Registry(settings.models).versions() == done.kept == ["v0", "v4", "v5", "v7"]


async def test_the_commands_tell_a_person_and_a_script_what_happened(settings: Settings, tmp_path: Path) -> None:
    publish(settings, tmp_path, "v1")
    promoted = await command(settings, tmp_path, "promote", "v1", "--now", "--why", "first")
    listed = await command(settings, tmp_path, "list", "--json")
    shown = await command(settings, tmp_path, "show", "v1")
    again = await command(settings, tmp_path, "promote", "v1")
    assert (promoted.returncode, again.returncode) == (0, 1), promoted.stderr
    assert "v1 is live, generation 1; 0 of 0 workers serve it" in promoted.stdout
    assert "already-live" in again.stderr
    assert {row["version"]: row["roles"] for row in map(json.loads, listed.stdout.splitlines())} == {
        "v1": ["live"],
        BOOTSTRAP_VERSION: ["previous"],
    }
    assert "features/0: offsets 10 to 30" in shown.stdout
    assert '"why":"first"' in shown.stdout


async def test_verify_names_the_version_that_is_not_sound_and_exits_with_1(settings: Settings, tmp_path: Path) -> None:
    publish(settings, tmp_path, "v1", "v2")
    file = Path(settings.models.url) / settings.models.name / "v2" / "ctr.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    both = await command(settings, tmp_path, "verify")
    one = await command(settings, tmp_path, "verify", str(tmp_path / "made" / "v1"))
    assert (both.returncode, one.returncode) == (1, 0)
    assert [line.split(":")[:3] for line in both.stdout.splitlines()] == [
        ["v1", " sound"],
        ["v2", " refused", " wrong-hash"],
    ]


async def test_a_real_worker_takes_a_promotion_and_a_rollback_of_the_command(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path, models={"status_interval_seconds": 1.0}) as on:
        await on.ready_worker()
        announcer = Announcer(on, tmp_path / "made")
        announcer.publish(bundle_contents(on, 1, new_space=True))
        promoted = await command(on.settings, tmp_path, "promote", "v1", "--timeout", "60")
        back = await command(on.settings, tmp_path, "rollback", "--timeout", "60")
    assert (promoted.returncode, back.returncode) == (0, 0), promoted.stderr + back.stderr
    assert "prepared by all 1 workers" in promoted.stdout
    assert "v1 is live, generation 2; 1 of 1 workers serve it" in promoted.stdout
    assert "bootstrap-0 is live, generation 5; 1 of 1 workers serve it" in back.stdout
