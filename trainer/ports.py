"""Everything outside that a round touches, as a round sees it: the Kafka, the training and the clock behind it vary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from models.bundle import Bundle, BundleContents
from models.examples import FeaturesRecord
from models.manifest import OffsetRange, Window
from models.pointer import Pointer, Pointers
from models.registry import Registry
from models.sampling import LoneAction
from models.signing import PrivateKey, PublicKey
from trainer.announce import WorkerStatus
from trainer.dataset import F32, Examples, ItemFacts
from trainer.metrics import TrainerMetrics
from trainer.progress import Show
from trainer.spool import Spool
from trainer.window import Stopping


class Source(Protocol):
    """Where records and item texts come from."""

    def read(self, since_ms: int) -> list[OffsetRange]:
        """Spool everything of this broker time and later; return the ranges."""

    def actions(self, since_ms: int) -> tuple[list[OffsetRange], list[LoneAction]]:
        """Return the ranges of the events of this broker time and later, and the actions among them."""

    def items(self) -> ItemFacts:
        """Return what is known of the items."""

    def labels_end(self) -> int:
        """Return the sum of the end offsets of ``labels``."""


class Board(Protocol):
    """Where roles are announced."""

    def pointers(self) -> Pointers:
        """Return the roles as they are now."""

    def statuses(self) -> list[WorkerStatus]:
        """Return what each worker said last."""

    def announce(self, planned: Sequence[Pointer]) -> None:
        """Send pointers in their order."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a bundle is called and where it comes from."""

    name: str
    version: str
    created_ms: int
    window: Window


@dataclass(frozen=True, slots=True)
class Learned:
    """What a training made."""

    contents: BundleContents
    losses: Sequence[float]
    auc: float
    """On the held-back slice; NaN where it cannot be told."""
    auc_before: float
    """Of what it started from, on the same slice; NaN where it cannot be told."""
    improved: bool = True
    """False: no epoch was better on the held-back slice than the parent."""


class Learner(Protocol):
    """How is learned, and how a bundle scores."""

    def train(
        self, identity: Identity, examples: Examples, items: ItemFacts, parent: Bundle | None, show: Show
    ) -> Learned:
        """Learn from impressions in time order, starting from ``parent``, None meaning the bootstrap."""

    def score(self, bundle: Bundle, records: Sequence[FeaturesRecord], items: ItemFacts) -> list[F32]:
        """Return calibrated log-odds for each record, float32 [K]."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Everything outside that a round touches."""

    source: Source
    board: Board
    registry: Registry
    learner: Learner
    spool: Spool
    metrics: TrainerMetrics
    show: Show
    now_ms: Callable[[], int]
    sleep: Callable[[float], None]
    stopping: Stopping


@dataclass(frozen=True, slots=True)
class Names:
    """What the round must know of the outside by name."""

    features_topic: str
    labels_topic: str
    bundle_cache: Path
    cache_bundles: int
    status_interval_seconds: float
    public_key: PublicKey | None = None
    private_key: PrivateKey | None = None
