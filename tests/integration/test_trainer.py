"""The trainer as a user runs it, on a real Kafka: records of a simulated worker in, roles and bundles out."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import pytest_asyncio

from models import bundle as bundles
from models.encoder import EncoderConfig, item_text
from models.events import Item
from models.examples import FeaturesRecord, LabelsRecord, encode, raw_slates
from models.hashing import hash64
from models.log_odds import hand_set_log_odds
from models.manifest import OffsetRange
from models.pointer import Pointers, newest, plan_candidate
from models.ranking import RankingConfig
from models.registry import Registry
from streams import topics
from streams.kafka_clients import client_options
from streams.sender import Headers, Outbox
from streams.settings import Settings
from streams.topic_io import TopicWriter
from streams.topics import TopicNames
from tests.integration.conftest import (
    REPOSITORY,
    SettingsWith,
    delete_topics,
    environment,
    read_topic,
    wait_until,
)
from tests.models.bundles import features_record
from trainer.announce import Announcer
from trainer.connection import Connection, Topics
from trainer.dataset import F32, ItemFacts, read_examples
from trainer.learner import FinetuneLearner
from trainer.progress import silent
from trainer.spool import Spool
from trainer.training_config import TrainingConfig
from trainer.window import WindowReader

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

JSON: Headers = (("content-type", b"application/json"),)
THEMES = {
    "space": "astronauts on a space station near Mars and a distant galaxy",
    "food": "a chef cooks bread and noodles in a restaurant kitchen",
    "war": "soldiers march into a battle of the western front",
    "love": "two strangers fall in love before a wedding",
}
ITEMS = [Item(item_id=f"{theme}-{i}", title=f"{text}, part {i}") for theme, text in THEMES.items() for i in range(8)]
SHOWN = 6
USERS = 80
TRAINER = {
    "MIN_IMPRESSIONS": "300",
    "MIN_CLICKS": "50",
    "TENSORBOARD": "false",
    "PREPARE_TIMEOUT_SECONDS": "10",
    "PORT": "0",
    "LOG_FORMAT": "json",
    "GATE__MIN_IMPRESSIONS": "300",
    "GATE__MIN_USERS": "40",
    "GATE__MAX_AUC_FALL": "0.3",
    "GATE__COOL_DOWN_MINUTES": "0",
    "GATE__MIN_SHADOW_IMPRESSIONS": "100",
    "TRAINING__EPOCHS": "3",
    "TRAINING__BATCH_IMPRESSIONS": "32",
    "TRAINING__HIDDEN": "[16]",
}


class SimulatedWorker:
    """Writes what a worker would: examples scored by the versions that have a role, and its status."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.names = TopicNames.of(settings)
        self.registry = Registry(settings.models)
        self._folder = folder
        self._learner = FinetuneLearner(TrainingConfig(), EncoderConfig(), folder / "worker-encodings")
        self._facts = ItemFacts({hash64(i.item_id): item_text(i) for i in ITEMS}, {})
        self._random = np.random.default_rng(5)
        self._recent: dict[int, list[int]] = {}
        self._count = 0
        self._time_ms = 1_790_000_000_000

    async def publish_items(self) -> None:
        """Put the catalogue on its topic."""
        outbox = Outbox()
        async with TopicWriter(self.settings, self.names.items) as writer:
            for item in ITEMS:
                writer.add(outbox, self.names.items, item.item_id.encode(), msgspec.json.encode(item), JSON)
            await writer.send(outbox)

    async def pointers(self) -> Pointers:
        """Return the roles."""
        records = await read_topic(self.settings, self.names.models)
        return newest({r.key: r.value for r in records if r.value is not None}, self.settings.models.name)

    async def serve(self, impressions: int, *, wish: float = 1.0) -> None:
        """Show so many slates and label them; users click what they like with ``wish`` 1, anything with 0.

        With −1 they click what they did not like before.
        """
        made = [self._impression(wish) for _ in range(impressions)]
        roles = (await self.pointers()).roles
        live = roles["live"].version if "live" in roles else "bootstrap-0"
        versions = dict.fromkeys([live, *(pointer.version for pointer in roles.values())])
        scores = {version: await asyncio.to_thread(self._scores, version, [f for f, _ in made]) for version in versions}
        outbox = Outbox()
        async with TopicWriter(self.settings, self.names.features, self.names.labels) as writer:
            for place, (features, labels) in enumerate(made):
                logged = [(version, of[place].astype("<f4").tobytes()) for version, of in scores.items()]
                record = msgspec.structs.replace(features, scores=logged, model_version=live)
                writer.add(outbox, self.names.features, record.user_id.encode(), encode(record))
                writer.add(outbox, self.names.labels, record.user_id.encode(), encode(labels))
            await writer.send(outbox)

    async def say_prepared(self, pointers: Pointers) -> None:
        """Say on model-status, now, that every version with a role is prepared."""
        roles = pointers.roles
        prepared = [{"role": r, "version": p.version, "generation": p.generation} for r, p in roles.items()]
        live = {"version": "bootstrap-0", "generation": 0, "space_id": "s"}
        status = {
            "worker_id": "w",
            "time_ms": now_ms(),
            "group": "g",
            "live": live,
            "prepared": prepared,
            "refused": [],
        }
        outbox = Outbox()
        async with TopicWriter(self.settings, self.names.model_status) as writer:
            writer.add(outbox, self.names.model_status, b"w", msgspec.json.encode(status))
            await writer.send(outbox)

    def _scores(self, version: str, records: Sequence[FeaturesRecord]) -> list[F32]:
        if version == "bootstrap-0":
            raw = raw_slates(records)
            return list(hand_set_log_odds(raw, RankingConfig()))
        folder = self.registry.fetch(version, self._folder / "worker-bundles")
        return self._learner.score(bundles.load(folder), records, self._facts)

    def _impression(self, wish: float) -> tuple[FeaturesRecord, LabelsRecord]:
        self._count += 1
        self._time_ms += 1_000
        user = int(self._random.integers(USERS))
        shown = self._random.permutation(len(ITEMS))[:SHOWN]
        likes = np.array([ITEMS[i].item_id.startswith(list(THEMES)[user % 4]) for i in shown])
        chance = np.where(likes if wish >= 0 else ~likes, 0.6, 0.06) if wish else np.full(SHOWN, 0.2)
        clicked = np.flatnonzero(self._random.random(SHOWN) < chance)
        recent = self._recent.setdefault(user, [])
        state = features_record([ITEMS[i].item_id for i in shown], [ITEMS[i].item_id for i in recent])
        features = msgspec.structs.replace(
            state,
            impression_id=self._count,
            user_id=f"user-{user}",
            time_ms=self._time_ms,
            counters=bytes(2 * SHOWN * 16),
            sims=bytes(4 * SHOWN),
            policy="model",
        )
        # Tastes are learned from what was liked, whatever is clicked now.
        recent[:] = [int(i) for i in [*shown[likes], *recent]][:6]
        labels = LabelsRecord(
            impression_id=self._count,
            user_id=features.user_id,
            time_ms=self._time_ms,
            closed_ms=self._time_ms,
            revision=0,
            flags=0,
            clicked=clicked.astype("<u2").tobytes(),
            refused=b"",
            actions=bytes([1] * len(clicked)),
        )
        return features, labels


class TrainerRuns:
    """Runs ``millstream trainer`` in processes of their own."""

    def __init__(self, worker: SimulatedWorker, folder: Path) -> None:
        self._worker, settings = worker, worker.settings
        self.data_folder = folder / "trainer"
        given = {f"MILLSTREAM_TRAINER__{name}": value for name, value in TRAINER.items()}
        self._environment = {
            **environment(settings, folder / "trainer-settings"),
            **given,
            "MILLSTREAM_TRAINER__DATA_FOLDER": str(self.data_folder),
            "HF_HUB_OFFLINE": "1",
        }
        self._folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start one; its output goes to files."""
        command = [sys.executable, "-m", "millstream", "trainer", *arguments]
        with (self._folder / "trainer.out").open("wb") as out, (self._folder / "trainer.log").open("ab") as log:
            process = subprocess.Popen(command, env=self._environment, stdout=out, stderr=log, cwd=REPOSITORY)
        self.started.append(process)
        return process

    async def once(self) -> list[str]:
        """Make one round and return the outcomes that it said."""
        pointers = await self._worker.pointers()
        process = self.start("--once")

        async def ended() -> bool:
            await self._worker.say_prepared(pointers)
            return process.poll() is not None

        await wait_until(ended, 240, "the round ends", every_seconds=1.0)
        code = process.poll()
        assert code == 0, f"exit status {code}\n{self.log[-6000:]}"
        return [line.split(":")[0] for line in (self._folder / "trainer.out").read_text().splitlines()]

    @property
    def log(self) -> str:
        """What they wrote on standard error."""
        return (self._folder / "trainer.log").read_text("utf-8", "replace")


def now_ms() -> int:
    import time

    return time.time_ns() // 1_000_000


@pytest_asyncio.fixture
async def worker(settings_with: SettingsWith, tmp_path: Path) -> AsyncIterator[SimulatedWorker]:
    """A simulated worker on topics of its own, the catalogue there."""
    models = {"url": str(tmp_path / "registry"), "cache_folder": tmp_path / "bundles"}
    settings = settings_with(models=models)
    await topics.create(settings)
    made = SimulatedWorker(settings, tmp_path)
    await made.publish_items()
    yield made
    await delete_topics(settings)


@pytest.fixture
def runs(worker: SimulatedWorker, tmp_path: Path) -> Any:
    """The trainer of that worker's topics; what still runs afterwards is killed."""
    made = TrainerRuns(worker, tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
            process.wait(30)


async def test_a_planted_taste_is_learned_promoted_held_against_noise_and_rolled_back_when_it_turns(
    worker: SimulatedWorker, runs: TrainerRuns
) -> None:
    await worker.serve(1_500)
    assert await runs.once() == ["candidate"]
    first = (await worker.pointers()).version("candidate")
    assert first is not None

    await worker.serve(400)
    assert await runs.once() == ["promoted", "candidate"]
    roles = await worker.pointers()
    assert (roles.version("live"), roles.version("previous")) == (first, "bootstrap-0")
    second = roles.version("candidate")
    assert second is not None

    await worker.serve(400, wish=0.0)
    assert "promoted" not in await runs.once()
    assert (await worker.pointers()).version("live") == first
    assert worker.registry.decisions(second)[0]["outcome"] == "refuse"

    await worker.serve(600, wish=-1.0)
    assert "rolled-back" in await runs.once()
    assert (await worker.pointers()).version("live") == "bootstrap-0"


async def test_a_trainer_that_is_killed_leaves_no_half_bundle_and_the_next_one_goes_on(
    worker: SimulatedWorker, runs: TrainerRuns
) -> None:
    await worker.serve(600)
    process = runs.start("--once")
    await wait_until(lambda: "window_read" in runs.log or process.poll() is not None, 120, "it trains")
    process.send_signal(signal.SIGKILL)
    assert await asyncio.to_thread(process.wait, 30) == -signal.SIGKILL
    assert (worker.registry.versions(), (await worker.pointers()).roles) == ([], {})

    assert await runs.once() == ["candidate"]
    [version] = worker.registry.versions()
    assert (await worker.pointers()).version("candidate") == version


async def test_sigterm_ends_the_trainer_with_status_0_and_a_second_trainer_waits_for_its_turn(
    worker: SimulatedWorker, runs: TrainerRuns
) -> None:
    await worker.serve(600)
    process = runs.start()
    await wait_until(lambda: "window_read" in runs.log or process.poll() is not None, 120, "it trains")
    other = runs.start("--once")
    assert await asyncio.to_thread(other.wait, 60) == 1
    assert "another trainer works in" in runs.log
    os.kill(process.pid, signal.SIGTERM)
    assert await asyncio.to_thread(process.wait, 120) == 0


async def test_the_window_of_a_bundle_is_built_again_from_its_offsets(
    worker: SimulatedWorker, runs: TrainerRuns, tmp_path: Path
) -> None:
    await worker.serve(600)
    await runs.once()
    [version] = worker.registry.versions()
    window = worker.registry.manifest(version).window
    await worker.serve(100)

    def rebuild() -> list[int]:
        spool = Spool(tmp_path / "another-spool")
        with asyncio.Runner() as runner:
            reader = WindowReader(connection(worker), spool, runner, silent, lambda: False)
            reader.restore(window.ranges)
        found = read_examples(spool, window.ranges, worker.names.features, worker.names.labels, 10_000)
        assert found.window(window.ranges) == window
        return [e.features.impression_id for e in found.impressions]

    first = read_examples(
        Spool(runs.data_folder / "spool"), window.ranges, worker.names.features, worker.names.labels, 10_000
    )
    assert await asyncio.to_thread(rebuild) == [e.features.impression_id for e in first.impressions]
    assert window.impressions == 600


async def test_of_two_deciders_the_one_that_comes_later_loses_and_the_first_word_stands(
    worker: SimulatedWorker,
) -> None:
    def decide() -> str:
        from models.errors import TrainingError

        with asyncio.Runner() as runner:
            one, two = (Announcer(connection(worker), "default", None, runner, lambda: False) for _ in range(2))
            seen = one.pointers()
            one.announce(plan_candidate(seen, "version-of-one", "0" * 64, at_ms=1, by="one", why="t"))
            with pytest.raises(TrainingError, match="another-decider"):
                two.announce(plan_candidate(seen, "version-of-two", "0" * 64, at_ms=1, by="two", why="t"))
            return one.pointers().version("candidate") or ""

    assert await asyncio.to_thread(decide) == "version-of-one"


async def test_records_of_an_aborted_transaction_are_not_spooled(worker: SimulatedWorker, tmp_path: Path) -> None:
    from streams.kafka_clients import new_producer

    producer = new_producer(worker.settings, transactional_id=f"{worker.settings.topics.prefix}-t")
    await producer.start()
    await producer.begin_transaction()
    await producer.send_and_wait(worker.names.labels, b"aborted", partition=0)
    await producer.abort_transaction()
    await producer.stop()
    spool = Spool(tmp_path / "spool")

    def read() -> list[OffsetRange]:
        with asyncio.Runner() as runner:
            return WindowReader(connection(worker), spool, runner, silent, lambda: False).read(0)

    ranges = await asyncio.to_thread(read)
    labels = next(r for r in ranges if (r.topic, r.partition) == (worker.names.labels, 0))
    assert labels.end == 2
    assert list(spool.read(labels)) == []


def connection(worker: SimulatedWorker) -> Connection:
    """Return what the command line hands to the trainer."""
    names = worker.names
    found = Topics(names.features, names.labels, names.items, names.events, names.models, names.model_status)
    return Connection(client_options(worker.settings), found, 10.0)
