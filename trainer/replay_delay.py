"""One feedback delay of a replay: its passes over the log, its models, and a row of figures for each mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from models.catalogue import Catalogue
from models.evaluation import Interval
from models.examples import FeaturesRecord
from models.hashing import hash64
from trainer.finetune import Trained
from trainer.log_examples import LogConfig, LogExamples, Reads, log_examples
from trainer.replay_log import Source, Survey
from trainer.replay_measures import Measures, Ranked, difference
from trainer.replay_models import ItemVectors, Learner, Schedule, stretches
from trainer.replay_recipe import head_recipe
from trainer.replay_settings import Mode, ReplayConfig
from trainer.replay_slates import Served, SlateMaker, SlateMeasures, sample, whole_catalogue

F32 = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Show = Callable[[str, int, int | None], None]
"""Called with what is being done, how much of it is done, and of how much (None: not known)."""
Models = Sequence[tuple[int, Trained]]
"""Each with the event time from which it scores, rising."""

NEW_ITEM: Final = 20
"""An item that was shown fewer times before is new."""
NEW_USER: Final = 3
"""A user with fewer actions before is new."""
_TICKS_SECONDS: Final = (3_600, 60)
_LEAST_FOR_TICKS: Final = 100
_FROM_THE_START: Final = -(2**62)


@dataclass(frozen=True, slots=True)
class ModeResult:
    """One row: a mode at a delay."""

    mode: Mode
    feedback_delay_seconds: float
    measures: Measures
    over_frozen: Interval | None
    """Its AUC less that of ``frozen`` at the same delay, paired; None for ``frozen``, or without it."""
    models: int
    """How many models made its scores, one after another; a training that could not be done leaves the one before."""
    trained_on: int
    """Impressions whose labels were known when the scored part began, the first ones left out."""
    slates: SlateMeasures | None


@dataclass(slots=True)
class _Scored:
    """Scored impressions in the order of time, with what was known at each; ``places`` [I] in the survey."""

    records: list[FeaturesRecord]
    labels: list[F32]
    places: npt.NDArray[np.int64]


def tick_seconds(survey: Survey, config: ReplayConfig) -> float:
    """Return how finely the log tells times apart: where it has whole hours, events of one hour have no order."""
    if config.tick_seconds is not None:
        return config.tick_seconds
    if len(survey.times_ms) >= _LEAST_FOR_TICKS:
        for seconds in _TICKS_SECONDS:
            if not (survey.times_ms % (seconds * 1000)).any():
                return float(seconds)
    return 0.001


class Delay:
    """One delay; ``run`` gives its rows, in the order of the modes."""

    def __init__(
        self,
        source: Source,
        survey: Survey,
        items: ItemVectors,
        config: ReplayConfig,
        delay_seconds: float,
        show: Show,
    ) -> None:
        self._source, self._survey, self._items, self._config = source, survey, items, config
        self._seconds, self._show = delay_seconds, show
        self._table = items.table()
        self._schedule = Schedule.of(
            survey.start_ms,
            delay_seconds,
            config.user_state,
            config.warm_up_share,
            config.unclicked_weight,
            config.seed,
        )
        self._learner: Learner
        self._steps = 0

    def run(self) -> list[ModeResult]:
        """Read the log for each state that is wanted, train, score and measure.

        Raises ReplayError where there is nothing to learn from, EncoderError, and LogFormatError as the reader does.
        """
        wanted = self._config.wanted
        seen = self.examples("reading, live", False)
        scored = self._scored(seen)
        recipe = head_recipe(self._items.scorer is not None, thinned=self._config.unclicked_weight > 1)
        self._learner = Learner(seen, self._items, self._schedule, recipe, self._training)
        models = self._models(scored, "retrained" in wanted)
        clicked = self._clicked(scored)
        used: dict[Mode, Models] = {"frozen": models[:1], "live": models[:1], "retrained": models}
        going: dict[Mode, Models] = {mode: used[mode] for mode in wanted if mode != "frozen"}
        slates: dict[Mode, SlateMeasures] = {}
        states: dict[Mode, _Scored] = dict.fromkeys(going, scored)
        if "frozen" in wanted:
            seen, made = self._slates_pass("reading, frozen", True, {"frozen": models[:1]}, clicked)
            states["frozen"] = self._like(scored, seen)
            slates |= made
        if going and clicked:
            slates |= self._slates_pass("slates, live", False, going, clicked)[1]
        rows, base = list[ModeResult](), None
        for mode in wanted:
            ranked = self._rank(states[mode], used[mode])
            base = ranked if mode == "frozen" else base
            rows.append(self._row(mode, ranked, base, len(used[mode]), slates.get(mode), scored))
            self._show("measuring", len(rows), len(wanted))
        return rows

    def examples(
        self,
        step: str,
        frozen: bool,
        on_reads: Callable[[Reads], None] | None = None,
        cut_at: frozenset[int] = frozenset(),
        catalogue: Catalogue | None = None,
    ) -> LogExamples:
        """Let the log go through the core once."""
        config, survey = self._config, self._survey
        reader = self._source.open()
        return log_examples(
            reader,
            whole_catalogue(reader, survey, self._table) if catalogue is None else catalogue,
            self._items.space.space_id,
            LogConfig(
                tick_seconds=tick_seconds(survey, config),
                feedback_delay_seconds=self._seconds,
                # What had arrived by the start counts, not what had happened.
                frozen_from_ms=survey.start_ms - self._schedule.delay_ms if frozen else None,
                unclicked_weight=config.unclicked_weight,
                thinned_from_ms=survey.start_ms if config.unclicked_weight > 1 else None,
                user_state=config.user_state,
                counters=config.counters,
                ranking=config.recommender.ranking,
                co_clicks=None if on_reads is None else config.recommender.co_clicks,
                contexts=None if on_reads is None else config.recommender,
                joiner=config.joiner,
                surfaces=(config.recommender.default_surface, *config.recommender.surfaces),
            ),
            lambda events: self._show(step, events, survey.events),
            on_reads,
            cut_at,
        )

    def _slates_pass(
        self, step: str, frozen: bool, models: Mapping[Mode, Models], clicked: Mapping[int, list[str]]
    ) -> tuple[LogExamples, dict[Mode, SlateMeasures]]:
        """Let the log go through once more, and make slates at the impressions of ``clicked``."""
        if not clicked:
            return self.examples(step, frozen), {}
        catalogue = whole_catalogue(self._source.open(), self._survey, self._table)
        maker = SlateMaker(
            catalogue,
            self._survey,
            self._items.space,
            self._config.recommender,
            self._config.user_state,
            {mode: [Served(t, m.scorer, m.features) for t, m in own] for mode, own in models.items()},
            clicked,
            self._config.k,
        )

        def on_reads(reads: Reads) -> None:
            for i, offset in enumerate(reads.offsets):
                if offset in clicked:
                    maker.take(reads, i)

        seen = self.examples(step, frozen, on_reads, frozenset(clicked), catalogue)
        return seen, {mode: maker.measures(mode) for mode in models}

    def _models(self, scored: _Scored, again: bool) -> Models:
        models = [(_FROM_THE_START, self._learner.first())]
        every_ms = round(self._config.retrain_every_seconds * 1000) if again else 0
        last_ms = scored.records[-1].time_ms if scored.records else 0
        for at_ms in self._schedule.trainings(every_ms, last_ms):
            model = self._learner.again(models[-1][1], at_ms)
            if model is not models[-1][1]:
                models.append((at_ms, model))
        return models

    def _training(self, step: str, done: int, total: int | None) -> None:
        # One line for all models: how many epochs the next one takes is not known.
        self._steps += 1
        self._show("training", self._steps, None)

    def _scored(self, examples: LogExamples) -> _Scored:
        """Return the impressions that count and have a label."""
        offsets = np.array([record.offset for record in examples.records], np.int64)
        chosen = np.flatnonzero(np.isin(offsets, self._survey.offsets))
        return _Scored(
            [examples.records[i] for i in chosen.tolist()],
            [examples.labels[i] for i in chosen.tolist()],
            np.searchsorted(self._survey.offsets, offsets[chosen]),
        )

    def _like(self, scored: _Scored, examples: LogExamples) -> _Scored:
        """Return the same impressions with the state that they have among ``examples``."""
        by_offset = {record.offset: record for record in examples.records}
        return _Scored([by_offset[record.offset] for record in scored.records], scored.labels, scored.places)

    def _clicked(self, scored: _Scored) -> dict[int, list[str]]:
        """Return what was clicked at the impressions where slates are made, by place in the log."""
        has = np.array([bool((labels > 0).any()) for labels in scored.labels], np.bool_)
        offsets = sample(self._survey.offsets[scored.places[has]], self._config.slates)
        wanted = set(offsets.tolist())
        names = {hash64(item): item for item in self._survey.first_shown_ms} if wanted else {}
        return {
            record.offset: [names[item] for item in np.frombuffer(record.items, "<u8")[labels > 0].tolist()]
            for record, labels in zip(scored.records, scored.labels, strict=True)
            if record.offset in wanted
        }

    def _rank(self, scored: _Scored, models: Models) -> Ranked:
        times_ms = [record.time_ms for record in scored.records]
        log_odds: list[F32] = []
        for number, part in stretches(times_ms, [at_ms for at_ms, _ in models[1:]]):
            log_odds += self._learner.scores(models[number][1], scored.records[part])
        return Ranked(log_odds, scored.labels, [record.user_id for record in scored.records])

    def _row(
        self,
        mode: Mode,
        ranked: Ranked,
        base: Ranked | None,
        models: int,
        slates: SlateMeasures | None,
        scored: _Scored,
    ) -> ModeResult:
        seed = self._config.seed
        gain = None
        if base is not None and mode != "frozen":
            gain = difference(ranked.aucs(), base.aucs(), ranked.users, seed)
        measures = ranked.measures(self._slices(scored), self._config.unclicked_weight, seed)
        return ModeResult(mode, self._seconds, measures, gain, models, self._learner.known_at_start, slates)

    def _slices(self, scored: _Scored) -> dict[str, Bools]:
        """Return which impressions are of a new item (one that was clicked), of a new user, of neither."""
        survey = self._survey
        new_item = np.zeros(len(scored.places), np.bool_)
        for i, (place, labels) in enumerate(zip(scored.places.tolist(), scored.labels, strict=True)):
            before = survey.shown_before[survey.starts[place] : survey.starts[place + 1]]
            new_item[i] = bool((before[labels > 0] < NEW_ITEM).any())
        new_user = survey.actions_before[scored.places] < NEW_USER
        return {"new_item": new_item, "new_user": new_user, "warm": ~new_item & ~new_user}
