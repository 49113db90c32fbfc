"""The models of a replay: one trained on what was known when the scored part began, and those that came after it.

Known means: the impression's label was closed. It closes when its attribution window is over, and what closes it
arrives a feedback delay later; nothing younger is learned from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from models.bootstrap import SPACE_DIM, Space
from models.bundle import ItemEncodings
from models.ctr import CtrScorer
from models.encoder import EncoderConfig, TextEncoder
from models.encoder_delta import EncoderDelta
from models.errors import ReplayError, TrainingError
from models.examples import FeaturesRecord
from models.user_events import UserStateConfig
from trainer.batches import LEAST_IMPRESSIONS
from trainer.finetune import StartingPoint, Trained, TrainingSet, train
from trainer.fit import Progress
from trainer.log_examples import LogExamples, thinned
from trainer.replay_recipe import HEADS_AVERAGED
from trainer.scoring import ItemTable, score
from trainer.soup import train_soup
from trainer.space_learning import with_features
from trainer.training_config import TrainingConfig

F32 = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

NO_TEXTS: Final = "no-texts"
AGAIN_EPOCHS_SHARE: Final = 0.25
"""Of the epochs of the first training, at half its rate: a model that goes on needs less than one that begins."""
COPIES_OF_A_CLICK: Final = 4
"""Times that a click is compared, each with other unclicked items, where slates are thinned."""


class NoEncoder(TextEncoder):
    """The encoder of a log without texts: it has an id, and nothing is ever encoded with it."""

    def __init__(self) -> None:
        self.encoder_id = NO_TEXTS
        self.dim = SPACE_DIM


@dataclass(slots=True)
class ItemVectors:
    """Where the items of a replay lie: their texts in the bootstrap space of an encoder, and what they bring."""

    space: Space = field(default_factory=lambda: Space(NO_TEXTS, NO_TEXTS, np.eye(SPACE_DIM, dtype=np.float32)))
    texts: dict[int, str] = field(default_factory=dict)
    """By hash64 of the item id."""
    encodings: ItemEncodings = field(
        default_factory=lambda: ItemEncodings(
            np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros((0, SPACE_DIM), np.float16)
        )
    )
    encoder: EncoderConfig | None = None
    """What made them; None: there are no texts."""
    cache: Path | None = None
    """Where the encodings are kept for the trainings."""
    embeddings: dict[int, list[float]] = field(default_factory=dict)
    """Vectors that items bring themselves, by hash64 of the item id."""
    delta: EncoderDelta | None = None
    """What learning from histories changed of the encoder."""
    scorer: CtrScorer | None = None
    """What was learned with the space from histories; None: the space is as the encoder has it."""

    @property
    def has_vectors(self) -> bool:
        """Whether any item has one."""
        return bool(len(self.encodings.items) or self.embeddings)

    def table(self) -> ItemTable:
        """Return the items' vectors, found by hash."""
        return ItemTable(self.space, self.encodings, self.embeddings)

    def load_encoder(self) -> TextEncoder:
        """Return the encoder. Raises EncoderError where it is not there any more."""
        return NoEncoder() if self.encoder is None else TextEncoder.load(self.encoder)


@dataclass(frozen=True, slots=True)
class Schedule:
    """When models of a replay are trained, and on what."""

    start_ms: int
    """When the scored part begins."""
    delay_ms: int
    window_ms: int
    """Attribution window: how long after an impression its label is open."""
    warm_up_share: float
    """Of the impressions before the scored part, the first, which are not trained on: counters were still empty."""
    unclicked_weight: float = 1.0
    seed: int = 0

    @classmethod
    def of(
        cls,
        start_ms: int,
        delay_seconds: float,
        user_state: UserStateConfig,
        warm_up_share: float,
        unclicked_weight: float = 1.0,
        seed: int = 0,
    ) -> Schedule:
        """Return the schedule at a delay; the longest of the attribution windows holds for all surfaces."""
        seconds = max([user_state.attribution_window_seconds, *user_state.attribution_windows_seconds.values()])
        return cls(start_ms, round(delay_seconds * 1000), seconds * 1000, warm_up_share, unclicked_weight, seed)

    def closed(self, records: Sequence[FeaturesRecord], until_ms: int) -> Bools:
        """Return which impressions [I] have a label that was closed and had arrived by ``until_ms``."""
        times_ms = np.array([record.time_ms for record in records], np.int64)
        return times_ms + self.window_ms + self.delay_ms <= until_ms

    def trainings(self, every_ms: int, last_ms: int) -> list[int]:
        """Return when models are trained again until ``last_ms``, the start left out; none where ``every_ms`` is 0."""
        return list(range(self.start_ms + every_ms, last_ms + 1, every_ms)) if every_ms > 0 else []


class Learner:
    """Trains on the examples of one pass over a log, one model after another."""

    def __init__(
        self, examples: LogExamples, items: ItemVectors, schedule: Schedule, config: TrainingConfig, show: Progress
    ) -> None:
        self._schedule, self._items, self._show = schedule, items, show
        self._config = config.model_copy(update={"seed": schedule.seed})
        self._encoder = items.load_encoder()
        self._table = items.table()
        early = np.array([record.time_ms < schedule.start_ms for record in examples.records], np.bool_)
        left_out = int(early.sum() * schedule.warm_up_share)
        keep = np.ones(len(early), np.bool_)
        keep[np.flatnonzero(early)[:left_out]] = False
        self._examples = examples.part(keep)
        self.known_at_start = 0
        """Impressions that ``first`` learned from."""

    def first(self) -> Trained:
        """Return the model of the start. Raises ReplayError where there is too little to learn from."""
        known = self._known(self._schedule.start_ms)
        self.known_at_start = len(known.records)
        if len(known.records) < LEAST_IMPRESSIONS:
            raise ReplayError(
                f"{len(known.records)} impressions have a label that was closed and had arrived when the scored part "
                f"began, at least {LEAST_IMPRESSIONS} are needed: give an earlier part of the log as a path too, or a "
                "shorter --feedback-delay"
            )
        try:
            return self._train(known, None)
        except TrainingError as error:
            raise ReplayError(f"nothing could be trained on what came before the scored part: {error}") from error

    def again(self, parent: Trained, at_ms: int) -> Trained:
        """Return a model that learned from all that was known at ``at_ms`` too, or ``parent`` where it cannot."""
        try:
            return self._train(self._known(at_ms), parent)
        except TrainingError:
            # A worker keeps the model that it has, too.
            return parent

    def scores(self, model: Trained, records: Sequence[FeaturesRecord]) -> list[F32]:
        """Return the log-odds of each impression's items, float32 [K] each, by the code that serves."""
        return score(model.scorer, model.features, self._table, records)

    def _known(self, until_ms: int) -> LogExamples:
        return self._examples.part(self._schedule.closed(self._examples.records, until_ms))

    def _train(self, known: LogExamples, parent: Trained | None) -> Trained:
        items = self._items
        config = self._config if parent is None else again(self._config)
        start = StartingPoint(items.space, self._encoder, items.delta, items.scorer)
        if parent is not None:
            start = replace(start, scorer=parent.scorer, features=parent.features)
        if items.scorer is None:
            chosen = self._chosen(known, self._schedule)
            return train(chosen, start, config, cache_folder=items.cache, on_progress=self._show)
        # Each with a draw of its own, where slates are thinned.
        seeds = range(self._schedule.seed, self._schedule.seed + HEADS_AVERAGED)
        sets = [self._chosen(known, replace(self._schedule, seed=seed)) for seed in seeds]
        if parent is None:
            start = with_features(start, sets[0])
        return train_soup(sets, start, config, self._table, cache_folder=items.cache, on_progress=self._show)

    def _chosen(self, known: LogExamples, schedule: Schedule) -> TrainingSet:
        alike = like_the_scored(known, schedule, self._unclicked())
        return TrainingSet(alike.records, alike.labels, self._items.texts, embeddings=self._items.embeddings)

    def _unclicked(self) -> int:
        """Return how many unclicked items the scored part kept for a click, the median over its impressions."""
        return unclicked_per_click(
            [
                labels
                for record, labels in zip(self._examples.records, self._examples.labels, strict=True)
                if record.time_ms >= self._schedule.start_ms
            ]
        )


def again(config: TrainingConfig) -> TrainingConfig:
    """Return how a model goes on that was trained with ``config``."""
    epochs = max(1, round(config.epochs * AGAIN_EPOCHS_SHARE))
    return config.model_copy(update={"epochs": epochs, "learning_rate": config.learning_rate / 2})


def unclicked_per_click(labels: Sequence[F32]) -> int:
    """Return the median of unclicked items for each clicked one, at least 1, over impressions that have both."""
    ratios = [(len(y) - float(y.sum())) / float(y.sum()) for y in labels if 0 < float(y.sum()) < len(y)]
    return max(1, round(float(np.median(ratios)))) if ratios else 1


def like_the_scored(known: LogExamples, schedule: Schedule, unclicked: int) -> LogExamples:
    """Return examples as those of the scored part look, where that kept some of the unclicked items only.

    What is compared within a slate is then compared alike. Each unclicked item stands for ``unclicked_weight``.
    """
    if schedule.unclicked_weight <= 1:
        return known
    whole = np.array([record.time_ms < schedule.start_ms for record in known.records], np.bool_)
    made = thinned(known.part(whole), unclicked, COPIES_OF_A_CLICK, schedule.seed)
    late = known.part(~whole)
    rate = 1 / schedule.unclicked_weight
    records = [msgspec.structs.replace(r, negative_rate=rate) for r in (*made.records, *late.records)]
    return replace(made, records=records, labels=[*made.labels, *late.labels])


def stretches(times_ms: Sequence[int], trainings_ms: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield for impressions in the order of time which training's model scores them: its number, and their places.

    Number 0 is the model of the start; number n that of ``trainings_ms[n - 1]``, from that time on.
    """
    edges = np.searchsorted(np.asarray(times_ms, np.int64), np.asarray(trainings_ms, np.int64)).tolist()
    for number, (first, end) in enumerate(zip([0, *edges], [*edges, len(times_ms)], strict=True)):
        if end > first:
            yield number, slice(first, end)
