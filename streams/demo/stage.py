"""What the demo needs around its users: Kafka, topics of its own, a catalogue, a worker; and taking it down again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import psutil
from aiokafka.errors import KafkaError
from prometheus_client.parser import text_string_to_metric_families

from models.errors import BrokerUnavailable, DemoError
from models.recommender import SurfaceConfig
from streams import broker, topics
from streams.demo.catalogue import Film
from streams.demo.learning import WINDOW_SECONDS, TrainerProcess, learning_settings, trainer_section
from streams.exit_codes import ExitCode
from streams.kafka_clients import bootstrap_servers, new_admin
from streams.sender import Outbox
from streams.settings import CONFIG_FILE_VARIABLE, Settings, render_toml
from streams.topic_io import TopicWriter
from streams.topics import TopicNames

FOLDER: Final = Path(".millstream/demo")
PARTITIONS: Final = 4
SLATE_ITEMS: Final = 10
ALL_FILMS_SECONDS: Final = 60.0
"""How long all films are waited for; then enough of them are enough."""
START_SECONDS: Final = 300.0
"""How long the worker may take until its first films are searchable: the first start may load an encoder."""
STOP_SECONDS: Final = 20.0
SCRAPE_SECONDS: Final = 0.5
LOG_LINES: Final = 8
JSON: Final = (("content-type", b"application/json"),)

Say = Callable[[str], None]


@dataclass(slots=True)
class WorkerMetrics:
    """What the worker says about itself; updated while it runs."""

    searchable: int = 0
    ready: bool = False
    slates: int = 0
    freshness_buckets: list[tuple[float, float]] = field(default_factory=list)
    """(upper bound in seconds, slates up to it)."""

    def freshness_bound_ms(self, share: float) -> float | None:
        """Return the bound of the first bucket that holds the quantile; None without slates."""
        total = max((count for _, count in self.freshness_buckets), default=0.0)
        if not total:
            return None
        return next(bound * 1000 for bound, count in self.freshness_buckets if count >= share * total)

    def read(self, text: str) -> None:
        """Take the values of a scrape in Prometheus' text format."""
        buckets: list[tuple[float, float]] = []
        slates = 0.0
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "millstream_index_items":
                    self.searchable = int(sample.value)
                elif sample.name == "millstream_slates_total":
                    slates += sample.value
                elif sample.name == "millstream_freshness_seconds_bucket":
                    buckets.append((float(sample.labels["le"]), sample.value))
        self.slates = int(slates)
        self.freshness_buckets = sorted(buckets)


def demo_settings(
    base: Settings, run_id: str, folder: Path, port: int, window_seconds: int = WINDOW_SECONDS
) -> Settings:
    """Return ``base`` with topics, consumer group, registry, data folder and port of this run alone.

    ``window_seconds``: attribution window, short enough for a bundle to be learned within the run.
    """
    surface = base.recommender.default_surface
    own = base.model_copy(
        update={
            "topics": base.topics.model_copy(
                update={"prefix": run_id, "partitions": PARTITIONS, "recommendations_retention_hours": 1.0}
            ),
            "worker": base.worker.model_copy(
                update={
                    "group": run_id,
                    "data_folder": folder / "worker",
                    "host": broker.HOST,
                    "port": port,
                    "log_format": "console",
                }
            ),
            "recommender": base.recommender.model_copy(
                update={"surfaces": {surface: SurfaceConfig(k=SLATE_ITEMS, candidates=200)}}
            ),
        }
    )
    return learning_settings(own, folder, window_seconds)


def worker_environment(settings: Settings, config_file: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment in which a worker runs with ``settings`` and nothing else.

    The environment goes before a settings file: a variable left in it could send the demo to the real topics. Only
    the password stays there, since the file shows it masked.
    """
    kept = {name: value for name, value in environment.items() if not name.startswith("MILLSTREAM_")}
    kept[CONFIG_FILE_VARIABLE] = str(config_file)
    if settings.kafka.sasl_password is not None:
        kept["MILLSTREAM_KAFKA__SASL_PASSWORD"] = settings.kafka.sasl_password.get_secret_value()
    return kept


class Stage:
    """Sets up and takes down. Call ``down`` always, also after a failed or cancelled ``up``."""

    def __init__(self, base: Settings, say: Say, window_seconds: int = WINDOW_SECONDS) -> None:
        self.run_id = f"demo-{uuid.uuid4().hex[:8]}"
        self.folder = FOLDER.absolute() / self.run_id
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder.parent / "demo.log"
        self.worker_log = self.folder.parent / "worker.log"
        self.settings = demo_settings(base, self.run_id, self.folder, broker.free_ports(1)[0], window_seconds)
        self.trainer = TrainerProcess(self.folder.parent)
        self.metrics = WorkerMetrics()
        self._say = say
        self._own_kafka = False
        self._has_topics = False
        self._worker: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None
        self._family: dict[int, psutil.Process] = {}

    async def up(self, films: Sequence[Film], enough: int) -> None:
        """Start everything; returns when all films are searchable, or after a while ``enough`` of them.

        A film that the worker cannot compare yet is scored otherwise by the trainer, which has its text. Raises
        BrokerUnavailable, LayoutError, DeliveryError or DemoError.
        """
        await self._start_kafka()
        self._say(f"creating topics {self.run_id}.*")
        self._has_topics = True
        await topics.create(self.settings)
        self._say("starting a worker, its encoder process and a trainer")
        await self._start_worker()
        self._say(f"loading {len(films)} films")
        await self._load(films)
        self._say("waiting for the worker to join its group and for the films to be encoded")
        await self._until_searchable(len(films), enough)

    def worker_problem(self) -> str | None:
        """Return why the worker no longer runs, None while it does."""
        if self._worker is None or self._worker.returncode is None:
            return None
        code = self._worker.returncode
        why = f"{code}, {ExitCode(code).name.lower()}" if code in ExitCode._value2member_map_ else str(code)
        how = f"with exit code {why}" if code >= 0 else f"by signal {-code}"
        return f"the worker ended {how}; its log ends with:\n{self._last_words()}"

    async def down(self) -> None:
        """End the processes and all that they started, delete the topics, stop Kafka if it was started here."""
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.gather(self.trainer.stop(), self._stop_worker())
        if self._has_topics:
            await self._delete_topics()
        if self._own_kafka:
            await asyncio.to_thread(broker.stop, self.settings)
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _start_kafka(self) -> None:
        found = await broker.status(self.settings)
        if found.own and not found.running:
            self._say("starting Apache Kafka (the first start here fetches its jars)")
            # Before the start: a start that is interrupted half-way must be undone as well.
            self._own_kafka = True
        starting = asyncio.create_task(broker.start(self.settings))
        try:
            found = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # Cancelled half-way, a thread of it could start Kafka after it was stopped here.
            await asyncio.wait([starting])
            raise
        if not found.ready:
            raise BrokerUnavailable(f"Kafka at {bootstrap_servers(self.settings)} does not answer; nothing was started")
        # The worker must find this cluster, not look for one.
        kafka = self.settings.kafka.model_copy(update={"bootstrap_servers": bootstrap_servers(self.settings)})
        self._say(f"Kafka is ready at {kafka.bootstrap_servers}")
        self._worker_settings = self.settings.model_copy(update={"kafka": kafka})

    async def _start_worker(self) -> None:
        config_file = self.folder / "millstream.toml"
        config_file.write_text(render_toml(self._worker_settings) + trainer_section(self.folder), "utf-8")
        environment = worker_environment(self._worker_settings, config_file, os.environ)
        with self.worker_log.open("wb") as log_file:
            self._worker = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "streams.demo.worker_process",
                str(os.getpid()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                env=environment,
                # Ctrl-C in the terminal reaches the demo alone, which then ends things in order.
                start_new_session=True,
            )
        self._watching = asyncio.create_task(self._watch())
        await self.trainer.start(environment)

    async def _load(self, films: Sequence[Film]) -> None:
        topic = TopicNames.of(self.settings).items
        async with TopicWriter(self.settings, topic) as writer:
            outbox = Outbox()
            for film in films:
                writer.add(outbox, topic, film.item_id.encode(), msgspec.json.encode(film.item()), JSON)
            await writer.send(outbox)

    async def _until_searchable(self, everything: int, enough: int) -> None:
        began = time.monotonic()
        deadline = began + START_SECONDS
        while True:
            wanted = everything if time.monotonic() - began < ALL_FILMS_SECONDS else enough
            if self.metrics.ready and self.metrics.searchable >= wanted:
                return
            problem = self.worker_problem()
            if problem:
                raise DemoError(problem)
            if time.monotonic() > deadline:
                raise DemoError(
                    f"after {START_SECONDS:.0f} s the worker is {'' if self.metrics.ready else 'not '}ready and "
                    f"{self.metrics.searchable} films are searchable, {enough} are needed; its log ends with:\n"
                    f"{self._last_words()}"
                )
            await asyncio.sleep(SCRAPE_SECONDS / 2)

    async def _watch(self) -> None:
        address = f"http://{broker.HOST}:{self.settings.worker.port}"
        while True:
            # Refused while the worker starts or is started again: then the last values stand.
            with contextlib.suppress(OSError):
                self.metrics.read(await asyncio.to_thread(_get, f"{address}/metrics"))
                self.metrics.ready = await asyncio.to_thread(_is_ok, f"{address}/ready")
            self._know_family()
            await asyncio.sleep(SCRAPE_SECONDS)

    def _know_family(self) -> None:
        """Note the supervisor's children while it lives: killed, it could no longer be asked for them."""
        if self._worker is not None and self._worker.returncode is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                supervisor = psutil.Process(self._worker.pid)
                self._family |= {p.pid: p for p in (supervisor, *supervisor.children(recursive=True))}

    async def _stop_worker(self) -> None:
        worker = self._worker
        if worker is None:
            return
        self._know_family()
        family = list(self._family.values())
        if worker.returncode is None:
            worker.send_signal(signal.SIGTERM)
        _, left = await asyncio.to_thread(psutil.wait_procs, family, STOP_SECONDS)
        for process in left:
            # A pid that was given anew meanwhile is another process to psutil, and is not touched.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        await asyncio.to_thread(psutil.wait_procs, left, STOP_SECONDS)
        await worker.wait()

    async def _delete_topics(self) -> None:
        names = set(TopicNames.of(self.settings).all())
        try:
            admin = new_admin(self.settings)
            try:
                await admin.start()
                present = names & set(await admin.list_topics())
                if present:
                    await admin.delete_topics(sorted(present))
            finally:
                await admin.close()
        except (KafkaError, OSError, BrokerUnavailable) as error:
            self._say(f"the topics {self.run_id}.* could not be deleted ({error!r}); delete them by hand")

    def _last_words(self) -> str:
        try:
            lines = self.worker_log.read_text("utf-8", "replace").splitlines()[-LOG_LINES:]
        except FileNotFoundError:
            return "(no log)"
        return "\n".join(f"  {line}" for line in lines)


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=2.0) as answer:
        return str(answer.read().decode())


def _is_ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False
