"""One micro-batch: messages in, everything that must be written out. Runs in the state thread, sends nothing.

Order: decode, rows (bisecting around an event that our code fails on), counters, slates. The caller sends what was
decided, awaits every delivery, then puts the rows into the table and acknowledges; meanwhile the next batch may be
prepared, on the rows that are on their way (``streams.delivery``).
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import structlog

from models.catalogue import Catalogue
from models.co_clicks import CoClicks, Steps
from models.context_lists import ContextLists
from models.context_popularity import ContextPopularity
from models.counters import ItemCounters
from models.errors import RecordError
from models.events import Action, Impression, Recommendation, Request, Trigger
from models.exploration import draw_seed, is_randomised
from models.hashing import recommendation_id
from models.recommender import Recommender, Slate, SlateRequest
from models.serving import ServingModel
from models.user_events import surface_names
from models.user_row import Rows, decode_rows, encode_rows
from models.user_state import Outcome, apply, user_event
from models.user_value import row_of, split_value
from streams.decode import Decoded, Message, decode
from streams.examples import FeaturesWriter, SentFeatures, Shown
from streams.item_stats import count
from streams.labels import Closings, LabelsWriter
from streams.metrics import Metrics
from streams.settings import Settings

log = structlog.get_logger(__name__)

Vector = npt.NDArray[np.float32]
RowKey = tuple[int, bytes]
"""(partition, user_id bytes)."""


@dataclass(slots=True)
class Refused:
    """A message for the dead letters."""

    message: Message
    error: RecordError
    traceback: str | None = None


@dataclass(slots=True)
class TextVectors:
    """Encoded texts that a batch needs, by text; a missing one was not encoded in time."""

    vectors: Mapping[str, Vector] = field(default_factory=dict)

    def get(self, text: str | None) -> Vector | None:
        """Return the vector of a text, None without one."""
        return self.vectors.get(text) if text else None


@dataclass(slots=True)
class SentSlate:
    """A slate to send, and when its trigger was written."""

    partition: int
    key: bytes
    record: Recommendation
    broker_ms: int
    kind: str


@dataclass(slots=True)
class Prepared:
    """What a micro-batch decided. Nothing of it is in the table yet."""

    rows: dict[RowKey, bytes] = field(default_factory=dict)
    """The table's new values: rows, and behind them what stays open of impressions."""
    slates: list[SentSlate] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    outcomes: list[tuple[str, str]] = field(default_factory=list)
    """(event type, outcome) for the metrics."""
    unknown_items: int = 0
    suppressed: int = 0
    visibility_version: int = 0
    """The catalogue's when the slates were made."""
    steps: list[Steps] = field(default_factory=list)
    """What users did first on which items, where a surface has the source co_click."""
    shown: Shown = field(default_factory=Shown)
    """Impressions, with their rows before them."""
    features: list[SentFeatures] = field(default_factory=list)
    closings: Closings = field(default_factory=Closings)
    """Labels, and when the next ones are due."""


_OUTCOMES: Final = {int(outcome): (outcome, outcome.name.lower()) for outcome in Outcome}
"""Each outcome and its name in the metrics, by number: to ask the enumeration costs more than the rest of the loop."""

RowReader = Callable[[int, bytes], bytes | None]
ProfileReader = Callable[[int, str], str | None]


def decode_batch(
    messages: Sequence[Message],
    settings: Settings,
    is_known: Callable[[int, bytes], bool],
    is_refused: Callable[[int, int], bool],
) -> tuple[list[Decoded], list[Refused]]:
    """Decode a batch; returns accepted events in order and the refused messages."""
    accepted: list[Decoded] = []
    refused: list[Refused] = []
    for message in messages:
        try:
            if is_refused(message.partition, message.offset):
                raise RecordError(
                    "fatal-event",
                    "the worker died on this event again and again; it was not processed. Its user's row is as before",
                )
            known = message.key is not None and is_known(message.partition, message.key)
            accepted.append(decode(message, settings.events, settings.topics.partitions, is_known=known))
        except RecordError as error:
            cause = error.__cause__
            trace = "".join(traceback.format_exception(cause)) if cause is not None else None
            refused.append(Refused(message, error, trace))
    return accepted, refused


class Pipeline:
    """Turns decoded events into rows, counter changes and slates. All calls come from the state thread."""

    def __init__(
        self,
        settings: Settings,
        catalogue: Catalogue,
        counters: ItemCounters,
        recommender: Recommender,
        metrics: Metrics,
        *,
        epoch: int,
        space_id: int,
        generation: int,
        model_version: str,
        space_name: str,
    ) -> None:
        self._settings = settings
        self._catalogue = catalogue
        self._counters = counters
        self._recommender = recommender
        self._metrics = metrics
        self._epoch = epoch
        self._space_id = space_id
        self._generation = generation
        self._model_version = model_version
        self._space_name = space_name
        default = settings.recommender.default_surface
        self._carry: tuple[int, Vector] | None = None
        self.live: ServingModel | None = None
        """The model in use; None: the one that the arguments name, as it was made."""
        self.shadows: list[ServingModel] = []
        """Models that are scored on live examples beside the one in use."""
        self._features = FeaturesWriter(settings, catalogue, counters, metrics, epoch)
        self._has_drawn_slots = settings.recommender.draws_slots
        self._stage_seconds = {"retrieve": 0.0, "rank": 0.0}
        self._stage_began = 0.0
        recommender.on_stage = self._on_stage
        self.co_clicks: CoClicks | None = None
        """What users act on after what; None where no surface has that source."""
        self._keep_co_clicks(settings)
        self.contexts = ContextPopularity(
            settings.recommender, settings.counters, settings.user_state, self._catalogue.index
        )
        """What users act on by the values of context keys; without keys it costs nothing."""
        recommender.contexts = ContextLists(self.contexts, catalogue, counters)
        # The first is that of events which name none.
        self._surfaces = surface_names(default, settings.recommender.surfaces, settings.user_state)
        self.labels = LabelsWriter(settings, epoch, self._surfaces)

    def use(
        self, live: ServingModel, shadows: Sequence[ServingModel], arms: Mapping[str, ServingModel] | None = None
    ) -> None:
        """Serve with ``live`` from the next batch on; between two batches, in the state thread.

        ``arms``: by version, the models that score for arms of the experiment which name them.
        """
        self._recommender.use(live, arms)
        self._space_id = live.space_hash
        self._generation = live.generation
        self._model_version = live.version
        self._space_name = live.space_id
        self._carry = live.carry
        self.live = live
        self.shadows = list(shadows)
        self._features.use(live, shadows)

    def reconfigure(self, settings: Settings) -> None:
        """Make slates by other settings from the next batch on; the surfaces are the same. In the state thread."""
        self._settings = settings
        self.contexts.reconfigure(settings.recommender)
        self._recommender.reconfigure(settings.recommender)
        self._features.reconfigure(settings)
        self._has_drawn_slots = settings.recommender.draws_slots
        self._keep_co_clicks(settings)

    def _keep_co_clicks(self, settings: Settings) -> None:
        """Have pairs to learn where a surface wants them: those held, unless they are kept in another way now."""
        wanted = settings.recommender
        if not wanted.uses_co_clicks:
            self.co_clicks = None
        elif self.co_clicks is None or self.co_clicks.config != wanted.co_clicks:
            self.co_clicks = CoClicks(wanted.co_clicks, self._catalogue.index)
        self._recommender.co_clicks = self.co_clicks

    def prepare(
        self,
        accepted: Sequence[Decoded],
        read_row: RowReader,
        read_profile: ProfileReader,
        texts: TextVectors,
        now_ms: int,
    ) -> Prepared:
        """Process accepted events in order; nothing is changed but counters and pairs, which apply no event twice."""
        prepared = Prepared()
        started = time.perf_counter()
        done: list[tuple[Decoded, Outcome]] = []
        self._update(list(accepted), read_row, prepared, done)
        if self.co_clicks is not None:
            for steps in prepared.steps:
                self.co_clicks.learn(steps, now_ms)
        updated = time.perf_counter()
        # Before the counts of this batch: an example must not know what came after its impression.
        prepared.features = self._features.records(prepared.shown, now_ms)
        if prepared.features:
            self._metrics.stage.labels("features").observe(time.perf_counter() - updated)
        counting = time.perf_counter()
        count(self._counters, accepted)
        if self.contexts.keys:
            for d in accepted:
                self.contexts.add(d.partition, d.offset, d.event, min(d.time_ms, d.broker_ms))
        self._metrics.stage.labels("update").observe(updated - started + time.perf_counter() - counting)
        self._slates(done, read_row, read_profile, texts, now_ms, prepared)
        return prepared

    def drop_hidden(self, prepared: Prepared, now_ms: int) -> None:
        """Take items out of made slates that were hidden or removed since; positions close up."""
        if prepared.visibility_version == self._catalogue.visibility_version:
            return
        for slate in prepared.slates:
            rows = self._catalogue.index.rows([item.item_id for item in slate.record.items])
            keep = self._catalogue.servable(rows, now_ms).tolist()
            slate.record.items = [item for item, kept in zip(slate.record.items, keep, strict=True) if kept]
            for position, item in enumerate(slate.record.items, start=1):
                item.position = position

    def _update(
        self,
        span: list[Decoded],
        read_row: RowReader,
        prepared: Prepared,
        done: list[tuple[Decoded, Outcome]],
    ) -> None:
        """Update rows for ``span``; where our code fails, halve the span until one event is left."""
        if not span:
            return
        try:
            rows, outcomes, before, impressions, closings, steps = self._new_rows(span, read_row, prepared.rows)
        except Exception as error:
            if len(span) > 1:
                middle = len(span) // 2
                self._update(span[:middle], read_row, prepared, done)
                self._update(span[middle:], read_row, prepared, done)
                return
            self._metrics.processing_errors.labels("update").inc()
            only = span[0]
            log.exception("event_failed", partition=only.partition, offset=only.offset)
            prepared.refused.append(
                Refused(only.message, RecordError("processing-error", repr(error)), traceback.format_exc())
            )
            return
        prepared.rows.update(rows)
        prepared.closings.add(closings)
        if len(impressions):
            prepared.shown.add(span, outcomes, before, impressions)
        if steps is not None:
            prepared.steps.append(steps)
        for decoded, number in zip(span, outcomes.tolist(), strict=True):
            outcome, name = _OUTCOMES[number]
            done.append((decoded, outcome))
            prepared.outcomes.append((decoded.kind, name))
            if isinstance(decoded.event, Action) and not self._catalogue.knows(decoded.event.item_id):
                prepared.unknown_items += 1

    def _new_rows(
        self, span: Sequence[Decoded], read_row: RowReader, overlay: Mapping[RowKey, bytes]
    ) -> tuple[dict[RowKey, bytes], npt.NDArray[np.int8], Rows, npt.NDArray[np.intp], Closings, Steps | None]:
        """Return values after ``span``, what each event did, rows before its impressions, their places, labels, steps.

        Raises RowError for a value that cannot be read.
        """
        places: dict[RowKey, int] = {}
        held_rows: list[bytes | None] = []
        blocks: list[bytes] = []
        events = []
        config, surfaces = self._settings.user_state, self._surfaces
        for decoded in span:
            row_key = (decoded.partition, decoded.key)
            place = places.get(row_key)
            if place is None:
                place = places[row_key] = len(blocks)
                held = overlay.get(row_key)
                row, block = split_value(held if held is not None else read_row(*row_key))
                held_rows.append(row)
                blocks.append(block)
            events.append(user_event(decoded.event, place, decoded.offset, decoded.time_ms, config, surfaces))
        old = decode_rows(held_rows)
        rows, outcomes, before, impressions = apply(
            old,
            events,
            self._catalogue,
            config,
            epoch=self._epoch,
            space_id=self._space_id,
            generation=self._generation,
            surfaces=surfaces,
            carry=self._carry,
            keep_before=True,
        )
        values, closings = self.labels.values(
            list(places),
            encode_rows(rows),
            blocks,
            old["last_time_ms"].tolist(),
            rows["offset"].tolist(),
            events,
            outcomes.tolist(),
            overlay,
        )
        steps = self.co_clicks.steps_of(old, events, outcomes) if self.co_clicks is not None else None
        return values, outcomes, before, impressions, closings, steps

    def _slates(
        self,
        done: Sequence[tuple[Decoded, Outcome]],
        read_row: RowReader,
        read_profile: ProfileReader,
        texts: TextVectors,
        now_ms: int,
        prepared: Prepared,
    ) -> None:
        triggers = self._triggers(done, now_ms, prepared)
        prepared.visibility_version = self._catalogue.visibility_version
        if not triggers:
            return
        self._stage_seconds = {"retrieve": 0.0, "rank": 0.0}
        self._stage_began = time.perf_counter()
        self._recommender.refresh(now_ms)
        places: dict[RowKey, int] = {}
        values: list[bytes | None] = []
        requests: list[SlateRequest] = []
        for decoded in triggers:
            row_key = (decoded.partition, decoded.key)
            if row_key not in places:
                places[row_key] = len(values)
                values.append(row_of(prepared.rows[row_key]))
            event = decoded.event
            profile = texts.get(read_profile(decoded.partition, event.user_id))
            if isinstance(event, Request):
                request = SlateRequest.of(event, places[row_key], texts.get(event.query), profile)
                if event.query and request.query_vector is None:
                    self._metrics.slates_degraded.labels("query-not-encoded").inc()
            else:
                request = SlateRequest(event.user_id, places[row_key], event.surface, profile_vector=profile)
            if self.contexts.keys:
                request.context = self.contexts.values_of(event)
            request.arm = self._settings.recommender.experiment.arm_of(event.user_id)
            # By broker time: a slate that is made again draws the same.
            randomised = is_randomised(event.user_id, decoded.broker_ms, self._settings.exploration)
            if randomised or self._has_drawn_slots:
                topic, offset = decoded.message.topic, decoded.offset
                seed = draw_seed(topic, decoded.partition, offset, event.user_id)
                request.draw_seed, request.slot_seed = (seed, None) if randomised else (None, seed)
            requests.append(request)
        slates = self._recommend(values, requests, now_ms)
        for decoded, request, slate in zip(triggers, requests, slates, strict=True):
            missing_query = request.request is not None and bool(request.request.query) and request.query_vector is None
            prepared.slates.append(self._sent(decoded, slate, now_ms, degraded=slate.degraded or missing_query))
        self._on_stage("assemble")
        for stage, seconds in self._stage_seconds.items():
            self._metrics.stage.labels(stage).observe(seconds)

    def _on_stage(self, name: str) -> None:
        now = time.perf_counter()
        self._stage_seconds["retrieve" if name == "retrieve" else "rank"] += now - self._stage_began
        self._stage_began = now

    def _triggers(self, done: Sequence[tuple[Decoded, Outcome]], now_ms: int, prepared: Prepared) -> list[Decoded]:
        """Return the events that get a slate: every request, and a user's last action of the batch."""
        oldest_ms = now_ms - self._settings.worker.max_trigger_age_seconds * 1000
        requests: list[Decoded] = []
        actions: dict[RowKey, Decoded] = {}
        for decoded, outcome in done:
            if isinstance(decoded.event, Impression) or outcome is Outcome.DUPLICATE:
                continue
            if decoded.broker_ms < oldest_ms:
                prepared.suppressed += 1
            elif isinstance(decoded.event, Request):
                requests.append(decoded)
            else:
                actions[(decoded.partition, decoded.key)] = decoded
        return requests + list(actions.values())

    def _recommend(self, values: Sequence[bytes | None], requests: Sequence[SlateRequest], now_ms: int) -> list[Slate]:
        """Rank; where our code fails, each arm apart, then each request, and the fallback for those that fail again."""
        rows = decode_rows(values)
        ranked = self._ranked(rows, requests, now_ms)
        if ranked is not None:
            return ranked
        # A bundle that one arm tries out must not cost all others their batch.
        arms: dict[str | None, list[int]] = {}
        for place, request in enumerate(requests):
            arms.setdefault(request.arm, []).append(place)
        slates: dict[int, Slate] = {}
        for places in arms.values() if len(arms) > 1 else ():
            ranked = self._ranked(rows, [requests[place] for place in places], now_ms)
            slates.update(zip(places, ranked or (), strict=ranked is not None))
        return [
            slates[place] if place in slates else self._alone(rows, request, now_ms)
            for place, request in enumerate(requests)
        ]

    def _ranked(self, rows: npt.NDArray[np.void], requests: Sequence[SlateRequest], now_ms: int) -> list[Slate] | None:
        """Return the slates of requests, None where our code fails."""
        try:
            return self._recommender.recommend(rows, requests, now_ms)
        except Exception:
            self._metrics.processing_errors.labels("rank").inc()
            log.exception("ranking_failed", requests=len(requests), arms=sorted({r.arm or "" for r in requests}))
            return None

    def _alone(self, rows: npt.NDArray[np.void], request: SlateRequest, now_ms: int) -> Slate:
        try:
            return self._recommender.recommend(rows, [request], now_ms)[0]
        except Exception:
            self._metrics.slates_degraded.labels("ranking-error").inc()
            return self._fallback(rows, request, now_ms)

    def _fallback(self, rows: npt.NDArray[np.void], request: SlateRequest, now_ms: int) -> Slate:
        try:
            return self._recommender.fallback(rows, [request], now_ms)[0]
        except Exception:
            self._metrics.processing_errors.labels("fallback").inc()
            log.exception("fallback_failed")
            surface = request.surface or self._settings.recommender.default_surface
            return Slate(items=[], degraded=True, surface=surface)

    def _sent(self, decoded: Decoded, slate: Slate, now_ms: int, *, degraded: bool) -> SentSlate:
        event = decoded.event
        topic = decoded.message.topic
        record = Recommendation(
            recommendation_id=recommendation_id(topic, decoded.partition, decoded.offset, event.user_id),
            user_id=event.user_id,
            request_id=event.request_id if isinstance(event, Request) else None,
            generated_at=now_ms,
            expires_at=now_ms + int(self._settings.worker.slate_lifetime_seconds * 1000),
            surface=slate.surface,
            degraded=degraded,
            trigger=Trigger(event.event_id, topic, decoded.partition, decoded.offset),
            model_version=slate.model_version or self._model_version,
            space_id=self._space_name,
            experiment=slate.experiment,
            exploration=slate.exploration,
            items=slate.items,
        )
        return SentSlate(decoded.partition, decoded.key, record, decoded.broker_ms, decoded.kind)
