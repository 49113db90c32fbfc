"""A world for rounds without Kafka and without training: records in memory, a real registry, models of chosen skill."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from models.bundle import Bundle
from models.errors import BrokerUnavailable, RegistryError
from models.examples import FeaturesRecord, LabelsRecord, encode
from models.manifest import Manifest, OffsetRange
from models.pointer import Pointer, Pointers
from models.registry import Registry, RegistryConfig
from models.sampling import LoneAction
from tests.models.bundles import contents, features_record
from trainer.announce import VersionStatus, WorkerStatus
from trainer.dataset import F32, Examples, ItemFacts
from trainer.metrics import TrainerMetrics
from trainer.ports import Identity, Learned, Names, Ports
from trainer.progress import Show, silent
from trainer.promotion import GateConfig
from trainer.round import Round, RoundResult
from trainer.settings import TrainerConfig
from trainer.spool import Spool, SpooledRecord

FEATURES, LABELS = "features", "labels"
ITEMS = ["a", "b", "c", "d", "e"]
START_MS = 1_790_000_000_000
GATE = GateConfig(min_impressions=200, min_users=30, min_shadow_impressions=20, cool_down_minutes=1.0, resamples=300)


def log_odds(skill: float, version: str, impression_id: int, labels: F32) -> F32:
    """Return what a model of this skill says: 0 knows nothing, 3 nearly everything; the same each time it is asked."""
    random = np.random.default_rng([zlib.crc32(version.encode()), impression_id])
    return np.asarray(-1.5 + skill * (labels - 0.3) + random.standard_normal(len(labels)) * 0.5, np.float32)


@dataclass
class World:
    """Everything that a round touches. ``before_call`` is called with the name of each call to the outside."""

    folder: Path
    now_ms: int = START_MS
    skill: dict[str, float] = field(default_factory=lambda: {"bootstrap-0": 0.3})
    next_skill: float = 1.0
    next_auc: tuple[float, float] = (0.7, 0.6)
    losses: tuple[float, ...] = (0.5, 0.4)
    improved: bool = True
    statuses: list[WorkerStatus] = field(default_factory=list)
    stopping: bool = False
    before_call: Callable[[str], None] = lambda _: None
    on_sleep: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.config = TrainerConfig(
            data_folder=self.folder / "trainer",
            min_impressions=100,
            min_clicks=20,
            gate=GATE,
            prepare_timeout_seconds=5.0,
            tensorboard=False,
        )
        self.registry = FaultyRegistry(
            RegistryConfig(url=str(self.folder / "registry"), cache_folder=self.folder / "cache"), self
        )
        self.topic: list[Pointer] = []
        self.records: dict[str, list[SpooledRecord]] = {FEATURES: [], LABELS: []}
        self.truth: dict[int, F32] = {}
        self.scored: list[str] = []
        self.metrics = TrainerMetrics()
        self.actions: list[LoneAction] = []
        self.facts = ItemFacts({}, {})

    # --- what happens -----------------------------------------------------------------------------------------------

    def impressions(
        self,
        count: int,
        *,
        users: int = 60,
        live: str = "bootstrap-0",
        shadows: Sequence[str] = (),
        clicks: float = 0.2,
    ) -> None:
        """Let users look at so many slates, one a second, scored by these versions, and label them."""
        random = np.random.default_rng(len(self.truth))
        for _ in range(count):
            self.now_ms += 1_000
            impression_id = len(self.truth) + 1
            labels = (random.random(len(ITEMS)) < clicks).astype(np.float32)
            self.truth[impression_id] = labels
            scores = [
                (version, log_odds(self.skill[version], version, impression_id, labels).astype("<f4").tobytes())
                for version in (live, *shadows)
            ]
            state = msgspec.structs.replace(
                features_record(ITEMS, impression_id=impression_id),
                user_id=f"user-{random.integers(users)}",
                time_ms=self.now_ms,
                scores=scores,
                model_version=live,
                policy="randomised" if impression_id % 20 == 0 else "model",
            )
            self.put(state, labels_record(impression_id, np.flatnonzero(labels).tolist()))

    def put(self, *records: FeaturesRecord | LabelsRecord) -> None:
        """Put records on their topics."""
        for record in records:
            topic = self.records[FEATURES if isinstance(record, FeaturesRecord) else LABELS]
            topic.append(SpooledRecord(len(topic), self.now_ms, encode(record)))

    def workers_have(self, *versions: str, count: int = 1) -> None:
        """Let so many workers say that they have prepared these versions."""
        prepared = [VersionStatus(version) for version in versions]
        self.statuses = [WorkerStatus(f"worker-{i}", self.now_ms, prepared=prepared) for i in range(count)]

    # --- rounds -----------------------------------------------------------------------------------------------------

    def round(self) -> RoundResult:
        """Make a round as a new process would."""
        self.now_ms += 1
        spool = Spool(self.config.data_folder / "spool")
        ports = Ports(
            source=FakeSource(self, spool),
            board=FakeBoard(self),
            registry=self.registry,
            learner=FakeLearner(self),
            spool=spool,
            metrics=self.metrics,
            show=silent,
            now_ms=lambda: self.now_ms,
            sleep=self._sleep,
            stopping=lambda: self.stopping,
        )
        names = Names(FEATURES, LABELS, self.folder / "cache", 4, 10.0)
        return Round(self.config, names, ports).run()

    def role(self, role: Any) -> str | None:
        """Return the version that has a role."""
        return self.pointers().version(role)

    def pointers(self) -> Pointers:
        """Return the roles."""
        return Pointers.of("default", self.topic)

    def _sleep(self, seconds: float) -> None:
        self.now_ms += math.ceil(seconds * 1000)
        self.on_sleep()


class FakeSource:
    """Records of the world, spooled as the real source spools them."""

    def __init__(self, world: World, spool: Spool) -> None:
        self._world, self._spool = world, spool

    def read(self, since_ms: int) -> list[OffsetRange]:
        """Spool what is missing."""
        self._world.before_call("source.read")
        ranges = [OffsetRange(topic, 0, 0, len(records)) for topic, records in self._world.records.items()]
        for gap in (gap for r in ranges for gap in self._spool.missing(r)):
            self._spool.write(gap, self._world.records[gap.topic][gap.start : gap.end])
        return ranges

    def actions(self, since_ms: int) -> tuple[list[OffsetRange], list[LoneAction]]:
        """Return the world's actions."""
        return [OffsetRange("events", 0, 0, len(self._world.actions))], self._world.actions

    def items(self) -> ItemFacts:
        """Return what the world knows of items: the learner here asks for nothing."""
        return self._world.facts

    def labels_end(self) -> int:
        """Return the number of labels."""
        self._world.before_call("source.labels_end")
        return len(self._world.records[LABELS])


class FakeBoard:
    """The models topic as a list."""

    def __init__(self, world: World) -> None:
        self._world = world

    def pointers(self) -> Pointers:
        """Return the roles."""
        self._world.before_call("board.pointers")
        return self._world.pointers()

    def statuses(self) -> list[WorkerStatus]:
        """Return what the world's workers say."""
        self._world.before_call("board.statuses")
        return self._world.statuses

    def announce(self, planned: Sequence[Pointer]) -> None:
        """Append, one at a time: a death may come in between."""
        for pointer in planned:
            self._world.before_call("board.announce")
            self._world.topic.append(pointer)


class FaultyRegistry(Registry):
    """A real registry that the world may let fail."""

    def __init__(self, config: RegistryConfig, world: World) -> None:
        super().__init__(config)
        self._world = world

    def publish(self, folder: Path) -> Manifest:
        """Publish, or fail."""
        self._world.before_call("registry.publish")
        return super().publish(folder)

    def fetch(self, version: str, into: Path, *, manifest_sha256: str | None = None) -> Path:
        """Fetch, or fail."""
        self._world.before_call("registry.fetch")
        return super().fetch(version, into, manifest_sha256=manifest_sha256)

    def record_decision(self, version: str, decision: Any, at_ms: int) -> None:
        """Record, or fail."""
        self._world.before_call("registry.record_decision")
        super().record_decision(version, decision, at_ms)


class FakeLearner:
    """Makes bundles whose scores have the skill that the world says."""

    def __init__(self, world: World) -> None:
        self._world = world

    def train(
        self, identity: Identity, examples: Examples, items: ItemFacts, parent: Bundle | None, show: Show
    ) -> Learned:
        """Return a small bundle."""
        world = self._world
        world.before_call("learner.train")
        world.skill[identity.version] = world.next_skill
        made = contents(
            identity.version,
            name=identity.name,
            created_ms=identity.created_ms,
            window=identity.window,
            parent=parent.version if parent else None,
        )
        return Learned(made, world.losses, *world.next_auc, improved=world.improved)

    def score(self, bundle: Bundle, records: Sequence[FeaturesRecord], items: ItemFacts) -> list[F32]:
        """Return what the world says of the version's skill."""
        world = self._world
        world.scored.append(bundle.version)
        return [
            log_odds(world.skill[bundle.version], bundle.version, r.impression_id, world.truth[r.impression_id])
            for r in records
        ]


def labels_record(impression_id: int, clicked: Sequence[int], **given: Any) -> LabelsRecord:
    """Return the labels of an impression."""
    fields: dict[str, Any] = {
        "impression_id": impression_id,
        "user_id": "ann",
        "time_ms": START_MS,
        "closed_ms": START_MS,
        "revision": 0,
        "flags": 0,
        "clicked": np.array(clicked, "<u2").tobytes(),
        "refused": b"",
        "actions": bytes([1] * len(clicked)),
    }
    return LabelsRecord(**{**fields, **given})


def outside_error(call: str) -> Exception:
    """Return the error that a call to the outside would raise."""
    if call.startswith("registry"):
        return RegistryError("the registry cannot be reached")
    if call == "learner.train":
        return OSError(28, "no space left on device")
    return BrokerUnavailable("Kafka cannot be reached")
