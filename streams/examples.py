"""Features records: for every impression, what was known just before it, as raw state.

Runs in the state thread, after the rows of a micro-batch and before its counts: an item's counters must not hold a
click that is in the same batch. What fails here costs the record or its scores, never the event.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import structlog

from models.catalogue import Catalogue
from models.counters import ItemCounters
from models.events import ImpressedItem, Impression
from models.examples import EXTERNAL, LAGGED, MODEL, RANDOMISED, REPLAYED, FeaturesRecord, encode, state_fields
from models.features import F32, FeatureConfig, RawSlates, encode_sims
from models.features import encode as encode_columns
from models.hashing import hash64, impression_id
from models.live_features import IndexedVectors, raw_from_state, sims_of
from models.log_odds import PART_ITEMS
from models.serving import ServingModel
from models.user_batch import rows_at, whole
from models.user_row import ROW, Rows, empty_rows
from models.user_state import Outcome, UserReader
from streams.decode import Decoded
from streams.metrics import Metrics
from streams.settings import Settings

log = structlog.get_logger(__name__)

CELLS: Final = PART_ITEMS
"""Slates are padded to the longest of a group; a group has at most this many places."""


@dataclass(slots=True)
class Shown:
    """Impressions of one micro-batch, each with its user's row before it and what it did there; side by side."""

    events: list[Decoded] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    """Arrays of rows, which together are as many as the events."""

    def add(
        self, events: Sequence[Decoded], outcomes: npt.NDArray[np.int8], before: Rows, at: npt.NDArray[np.intp]
    ) -> None:
        """Add the impressions ``at`` of ``events``, as models.user_state.apply returns them."""
        kept = np.array([Outcome(outcomes[i]) is not Outcome.DUPLICATE for i in at.tolist()], np.bool_)
        self.events += [events[i] for i in at[kept].tolist()]
        self.outcomes += [Outcome(outcomes[i]) for i in at[kept].tolist()]
        self.rows.append(rows_at(before, kept))

    def all_rows(self) -> Rows:
        """Return the rows of all events in one array."""
        if not self.rows:
            return empty_rows(0)
        joined: Rows = np.concatenate([whole(rows) for rows in self.rows]).view(ROW)
        return joined


@dataclass(frozen=True, slots=True)
class SentFeatures:
    """A features record to send."""

    partition: int
    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class _Slate:
    """One impression with its items, each once."""

    event: Decoded
    impression: Impression
    outcome: Outcome
    items: list[ImpressedItem]
    hashes: list[int]


class FeaturesWriter:
    """Makes the features records of a worker. All calls come from the state thread."""

    def __init__(
        self, settings: Settings, catalogue: Catalogue, counters: ItemCounters, metrics: Metrics, epoch: int
    ) -> None:
        self._settings = settings
        self._catalogue = catalogue
        self._counters = counters
        self._metrics = metrics
        self._epoch = epoch
        self._models: list[tuple[ServingModel, UserReader]] = []

    def use(self, live: ServingModel, shadows: Sequence[ServingModel] = ()) -> None:
        """Have state read in the space of ``live`` from now on, and scores of it and the shadows written."""
        models = {model.version: model for model in (live, *shadows)}
        self._models = [(model, self._reader(model)) for model in models.values()]

    def reconfigure(self, settings: Settings) -> None:
        """Use other settings from now on."""
        self._settings = settings

    def records(self, shown: Shown, now_ms: int) -> list[SentFeatures]:
        """Return the records of impressions, in their order; one that our code fails on has none."""
        if not shown.events or not self._models or not self._settings.examples.enabled:
            return []
        slates = [_slate(event, outcome) for event, outcome in zip(shown.events, shown.outcomes, strict=True)]
        rows = shown.all_rows()
        found: dict[int, SentFeatures] = {}
        for group in _groups([len(slate.hashes) for slate in slates]):
            self._group([slates[i] for i in group], rows_at(rows, np.array(group)), now_ms, group, found)
        sent = [found[i] for i in sorted(found)]
        self._metrics.features.inc(len(sent))
        self._metrics.features_bytes.inc(sum(len(record.value) for record in sent))
        return sent

    def _group(
        self, slates: list[_Slate], rows: Rows, now_ms: int, places: list[int], found: dict[int, SentFeatures]
    ) -> None:
        """Add the records of one group to ``found``; where our code fails, one at a time."""
        try:
            records = self._encoded(slates, rows, now_ms)
        except Exception:
            self._metrics.processing_errors.labels("features").inc()
            if len(slates) > 1:
                for i in range(len(slates)):
                    self._group(slates[i : i + 1], rows[i : i + 1], now_ms, places[i : i + 1], found)
                return
            event = slates[0].event
            log.exception("features_failed", partition=event.partition, offset=event.offset)
            return
        for place, slate, value in zip(places, slates, records, strict=True):
            found[place] = SentFeatures(slate.event.partition, slate.event.key, value)

    def _encoded(self, slates: list[_Slate], rows: Rows, now_ms: int) -> list[bytes]:
        live, reader = self._models[0]
        sizes = np.array([len(slate.hashes) for slate in slates])
        valid = np.arange(sizes.max()) < sizes[:, None]
        items = np.zeros(valid.shape, np.uint64)
        items[valid] = [item for slate in slates for item in slate.hashes]
        item_rows = np.full(valid.shape, -1, np.int32)
        item_rows[valid] = self._catalogue.index.rows([item.item_id for slate in slates for item in slate.items])
        times_ms = np.array([slate.event.time_ms for slate in slates], np.int64)
        ranking = self._settings.recommender.ranking
        raw = raw_from_state(
            rows,
            item_rows,
            times_ms,
            self._catalogue,
            self._counters,
            reader,
            ranking,
            vectors=live.vectors,
            valid=valid,
            items=items,
        )
        raw.positions[valid] = [item.position or 0 for slate in slates for item in slate.items]
        scores = self._scores(raw, rows, item_rows)
        flags = [
            self._lagged(slate.event, now_ms, knows_more) | self._replayed(slate, item_rows[i])
            for i, (slate, knows_more) in enumerate(zip(slates, _know_later_actions(rows, times_ms), strict=True))
        ]
        self._metrics.features_lagged.inc(sum(bool(flag & LAGGED) for flag in flags))
        return [
            encode(
                self._record(
                    slate,
                    raw,
                    i,
                    [(version, values[i, : len(slate.hashes)].astype("<f4").tobytes()) for version, values in scores],
                    now_ms,
                    flags[i],
                )
            )
            for i, slate in enumerate(slates)
        ]

    def _record(
        self,
        slate: _Slate,
        raw: RawSlates,
        place: int,
        scores: list[tuple[str, bytes]],
        now_ms: int,
        flags: int,
    ) -> FeaturesRecord:
        event, impression, live = slate.event, slate.impression, self._models[0][0]
        propensities = [item.propensity for item in slate.items]
        given = any(p is not None for p in propensities)
        return FeaturesRecord(
            impression_id=impression_id(self._epoch, event.partition, event.offset),
            user_id=impression.user_id,
            partition=event.partition,
            offset=event.offset,
            time_ms=event.time_ms,
            broker_ms=event.broker_ms,
            processed_ms=now_ms,
            flags=flags,
            surface=impression.surface or self._settings.recommender.default_surface,
            request_id=impression.request_id,
            experiment=impression.experiment,
            policy=policy_of(impression),
            session_id=impression.session_id,
            context=impression.context,
            space_id=live.space_id,
            propensities=np.array([np.nan if p is None else p for p in propensities], "<f4").tobytes()
            if given
            else b"",
            scores=scores,
            model_version=live.version,
            **state_fields(raw, place),
        )

    def _lagged(self, event: Decoded, now_ms: int, knows_later_action: bool) -> int:
        """Return LAGGED where the counters or the row (``knows_later_action``) have seen what came after the event."""
        is_trusted = self._settings.events.clock.policy == "trusted"
        # What a client held back for hours is as late as what lay on the topic; an import's times are all long ago.
        since_ms = event.broker_ms if is_trusted else min(event.broker_ms, event.time_ms)
        late = now_ms - since_ms > self._settings.examples.max_lag_seconds * 1000
        return LAGGED if late or knows_later_action else 0

    def _replayed(self, slate: _Slate, item_rows: npt.NDArray[np.int32]) -> int:
        """Return REPLAYED where the row or the counters hold the event itself, or what came after it in its log.

        Counters are published beside the batch in work: after a crash they may be ahead of the rows.
        """
        event = slate.event
        counted = self._counters.last_offsets(event.partition, item_rows)
        held = slate.outcome is Outcome.REPLAYED or bool((counted >= event.offset).any())
        return REPLAYED if held else 0

    def _scores(
        self, raw: RawSlates, rows: Rows, item_rows: npt.NDArray[np.int32]
    ) -> list[tuple[str, npt.NDArray[np.float32]]]:
        """Return the log-odds [S, C] of each model; one that fails has none."""
        if not self._settings.examples.with_scores:
            return []
        ranking = self._settings.recommender.ranking
        recent_rows: npt.NDArray[np.int32] = self._catalogue.index.rows_by_hash(
            raw.recent_items.ravel().tolist(), raw.recent_items.size
        ).reshape(raw.recent_items.shape)
        live = self._models[0][0]
        # Versions that were trained on from one another encode alike: columns are made once, but those of a space.
        encoded: dict[FeatureConfig, F32] = {}
        scores = []
        for model, reader in self._models:
            try:
                own, features = raw, model.features
                x = encoded.get(features) if features is not None else None
                if model.space_id != live.space_id:
                    own = replace(raw, sims=sims_of(rows, item_rows, raw.time_ms, model.vectors, reader, ranking))
                    x = encode_sims(x, own) if x is not None else None
                elif x is None and features is not None:
                    x = encoded[features] = encode_columns(raw, features)
                log_odds = model.log_odds(own, item_rows, recent_rows, ranking, x=x)
                if not np.isfinite(log_odds[raw.valid]).all():
                    raise FloatingPointError(f"model {model.version} gave log-odds that are not finite")
                scores.append((model.version, log_odds))
            except Exception:
                self._metrics.processing_errors.labels("shadow").inc()
                log.exception("example_scores_failed", model=model.version, impressions=len(rows))
        return scores

    def _reader(self, model: ServingModel) -> UserReader:
        source = IndexedVectors(self._catalogue.index, model.vectors)
        return UserReader(self._settings.user_state, source, model.space_hash, model.carry)


def _know_later_actions(rows: Rows, times_ms: npt.NDArray[np.int64]) -> list[bool]:
    """Tell which rows [S] hold an action that came before the impression in the log, but is later than ``times_ms``.

    It may be the very click on that impression: the row's recent items and tastes would tell the label.
    """
    acted_s = rows["recent"]["time_s"].max(axis=1).astype(np.int64)
    # A ring keeps whole seconds: within the impression's own second the row's last time decides.
    later: list[bool] = ((acted_s >= times_ms // 1000) & (rows["last_time_ms"] > times_ms)).tolist()
    return later


def policy_of(impression: Impression) -> str:
    """Return who made the slate that was shown, as an example names it."""
    if impression.experiment == RANDOMISED:
        return RANDOMISED
    if impression.request_id is None:
        return EXTERNAL
    return impression.experiment or MODEL


def _slate(event: Decoded, outcome: Outcome) -> _Slate:
    impression = event.event
    if not isinstance(impression, Impression):
        raise TypeError(f"a {event.kind} at {event.partition}:{event.offset} is no impression")
    by_hash: dict[int, ImpressedItem] = {}
    for item in impression.items:
        by_hash.setdefault(hash64(item.item_id), item)
    return _Slate(event, impression, outcome, list(by_hash.values()), list(by_hash))


def _groups(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Cut slates of the given sizes into groups of like size, each of at most CELLS places when padded."""
    group: list[int] = []
    for place in sorted(range(len(sizes)), key=sizes.__getitem__):
        if group and (len(group) + 1) * sizes[place] > CELLS:
            yield group
            group = []
        group.append(place)
    if group:
        yield group
