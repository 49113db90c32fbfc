"""States + catalogue + counters → slates, batched: the one call that everything uses.

Axes as in models/ranking.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from models import plans, user_state
from models.batch import Batch, Offer
from models.candidates import (
    FRESH,
    GIVEN,
    POPULAR,
    Pool,
    Quotas,
    Refusal,
    Source,
    co_clicked,
    first_of_each,
    lengths,
    listed,
    no_popular,
    pin,
    pinned_first,
    popular_items,
    search_tastes,
    take_turns,
)
from models.catalogue import Catalogue
from models.co_clicks import CoClicks
from models.context_lists import BatchLeanings, ContextLists
from models.counters import CLICKS, ItemCounters
from models.diversity import debiased, diverse
from models.events import ExplorationDraw, RecommendedItem
from models.exploration import RANDOMISED, draw_slates
from models.fallback import hidden_hashes, items_wanted, popular_slates
from models.fresh_slots import FreshPool, draw_slots
from models.live_features import IndexedVectors, raw_from_state
from models.log_odds import probability, trusted_log_odds
from models.newest import NewestFirst
from models.plans import Plans
from models.ranking import (
    F32,
    I32,
    LONG_TERM,
    PROFILE,
    QUERY,
    SHORT_TERM,
    TASTES,
    UNWANTED_PENALTY,
    Bools,
    Features,
    Past,
    RankingConfig,
    UserReader,
    UserRows,
    among,
    clip_ctr,
    counts_of,
    is_in,
    past_of,
    scale_tastes,
    score,
    similarity,
    top_k,
    unit,
    wish_log_odds,
)
from models.reasons import Winners, assemble, looked_at, nearest_liked
from models.retrieval import VectorIndex
from models.serving import Scored, ServingModel
from models.slates import Slate as Slate
from models.slates import SlateRequest as SlateRequest
from models.surfaces import Plan
from models.surfaces import RecommenderConfig as RecommenderConfig
from models.surfaces import SurfaceConfig as SurfaceConfig
from models.trending import Lists


class Recommender:
    """Makes slates from user rows. Reads catalogue, counters and index; never writes to them.

    All calls come from one thread. ``on_stage`` is called with the name of each stage when it is done (retrieve,
    gather, score, assemble), for metrics and benchmarks.
    """

    def __init__(
        self,
        config: RecommenderConfig,
        catalogue: Catalogue,
        counters: ItemCounters,
        vector_index: VectorIndex,
        users: UserReader | None = None,
        on_stage: Callable[[str], None] | None = None,
        co_clicks: CoClicks | None = None,
    ) -> None:
        self.config = config
        self._catalogue = catalogue
        self._counters = counters
        self._vector_index = vector_index
        self._model: ServingModel | None = None
        self._arms: dict[str, tuple[ServingModel, UserReader | None]] = {}
        """By version: models of arms, each with what reads user rows in its space where that is not the live one."""
        self._users = users if users is not None else user_state
        self.on_stage = on_stage or _no_stage
        self.co_clicks = co_clicks
        """What the source co_click reads; None: that source finds nothing."""
        self.contexts: ContextLists | None = None
        """What is popular by context; None: that is not counted."""
        self._plans = Plans(config)
        self._fresh: dict[int, FreshPool] = {}
        self._lists: Lists | None = None
        self._newest: NewestFirst | None = None
        """Of the last refresh: what all lists are made of until the next one."""
        self._popular = no_popular()
        self._refreshed_at_ms: int | None = None
        self.fallbacks_without_past = 0
        """Calls of ``fallback`` that could not even read what the users hid."""

    def use(self, model: ServingModel, arms: Mapping[str, ServingModel] | None = None) -> None:
        """Serve with another model from the next call on: its vectors, its index, its scorer.

        ``arms``: by version, the models that score for arms which name them; retrieval is in the live space for all.
        An arm whose version is not here is served by ``model``.
        """
        self._catalogue.use(model.vectors)
        self._vector_index = model.vector_index
        if isinstance(self._users, user_state.UserReader):
            self._users = replace(self._users, space_id=model.space_hash, carry=model.carry)
        self._model = model
        self._arms = {version: (arm, self._reader(arm, model)) for version, arm in (arms or {}).items()}

    def _reader(self, arm: ServingModel, live: ServingModel) -> UserReader | None:
        if arm.space_id == live.space_id:
            return None
        if not isinstance(self._users, user_state.UserReader):
            raise TypeError("user rows are read without a space: no arm can have a model of another one")
        vectors = IndexedVectors(self._catalogue.index, arm.vectors)
        return replace(self._users, vectors=vectors, space_id=arm.space_hash, carry=arm.carry)

    def reconfigure(self, config: RecommenderConfig) -> None:
        """Make slates by other settings from the next call on; what was made by the old ones is forgotten."""
        self.config = config
        self._plans = Plans(config)
        self._refreshed_at_ms = None
        self._fresh.clear()
        self._lists = None

    def refresh(self, now_ms: int) -> None:
        """Renew what is popular and what is new, at most once in ``refresh_seconds``; cheap when it is not due."""
        last_ms = self._refreshed_at_ms
        if last_ms is not None and 0 <= now_ms - last_ms < self.config.refresh_seconds * 1000:
            return
        self._newest = NewestFirst(self._catalogue, now_ms)
        self._popular = popular_items(
            self._catalogue,
            self._counters,
            self.config.popular_items,
            now_ms,
            self.config.popularity_half_life_index,
            self._newest,
        )
        self._refreshed_at_ms = now_ms
        if self.contexts is not None:
            self.contexts.forget()
        self._fresh.clear()
        self._lists = None

    def recommend(self, rows: UserRows, requests: Sequence[SlateRequest], now_ms: int) -> list[Slate]:
        """Return one slate for each request, in their order. ``rows``: the user rows that the requests point into.

        A slate has fewer than k items only where fewer may be shown. A request gets the same slate alone and in any
        batch.
        """
        numbers = [self._plans.number_of(request.surface, request.arm) for request in requests]
        surfaces = [self._plans.surface(request.surface, request.arm) for request in requests]
        ks = [items_wanted(request, surface) for request, surface in zip(requests, surfaces, strict=True)]
        groups: dict[tuple[int, bool, int], list[int]] = {}
        for i, request in enumerate(requests):
            given = request.candidates is not None
            shared = self._plans.alike(numbers[i], plans.together)
            groups.setdefault((shared, given, 0 if given else _width(surfaces[i], ks[i])), []).append(i)
        slates: dict[int, Slate] = {}
        for (shared, given, width), members in groups.items():
            wanted = [requests[i] for i in members]
            places = [r.row for r in wanted]
            # Indexed, records are copied field by field; those of all, in their order, need no copy.
            states = rows if len(places) == len(rows) and places == list(range(len(rows))) else rows.take(places)
            model, _ = self._scorer(self._plans[shared])
            wanted_items = np.array([ks[i] for i in members], np.int64)
            batch = Batch(wanted, [numbers[i] for i in members], states, given, width, now_ms, wanted_items)
            made, drawn = self._rank(batch)
            version = model.version if model is not None else None
            for i, items, exploration in zip(members, made, drawn, strict=True):
                experiment = self._experiment(requests[i]) if requests[i].draw_seed is None else RANDOMISED
                slates[i] = Slate(items, False, self._surface_name(requests[i]), experiment, exploration, version)
        return [slates[i] for i in range(len(requests))]

    def fallback(self, rows: UserRows, requests: Sequence[SlateRequest], now_ms: int) -> list[Slate]:
        """Return degraded slates, from the list of popular items alone, for when ``recommend`` fails.

        Items that the user hid are left out where the row can be read. See models/fallback.py.
        """
        try:
            hidden = hidden_hashes(self._users, rows, requests)
        except Exception:
            # Whatever broke `recommend` may break this too; a slate without this rule is better than none.
            self.fallbacks_without_past += 1
            hidden = [frozenset()] * len(requests)
        slates = popular_slates(requests, hidden, self._popular, self._catalogue, self.config, now_ms)
        return [
            Slate(items, True, self._surface_name(request), self._experiment(request))
            for request, items in zip(requests, slates, strict=True)
        ]

    def _scorer(self, plan: Plan) -> tuple[ServingModel | None, UserReader]:
        """Return the model that scores by a plan, and what reads user rows in its space."""
        model, reader = self._arms.get(plan.bundle, (self._model, None))
        return model, reader or self._users

    def _experiment(self, request: SlateRequest) -> str | None:
        # A degraded slate too: an arm is judged by what its users got, whatever went wrong.
        return None if request.arm is None else self.config.experiment.label(request.arm)

    def _surface_name(self, request: SlateRequest) -> str:
        return request.surface or self.config.default_surface

    def _rank(self, batch: Batch) -> tuple[list[list[RecommendedItem]], list[ExplorationDraw | None]]:
        """Return the items of each slate, and what was drawn for its slots of new items.

        A stage runs once for all requests whose plans agree in what it reads.
        """
        plan = self._plans[batch.numbers[0]]
        tastes, active = self._tastes(batch, plan.ranking)
        past = past_of(self._users, batch.states, self._catalogue.index, batch.now_ms, plan.ranking)
        offers = self._offers(batch, past)
        pool = self._given(batch, offers) if batch.given else self._retrieved(batch, offers, tastes, active, past)
        self.on_stage("retrieve")
        scored = self._score(batch, pool, tastes, past, offers)
        scores, columns, counts = self._order(batch, scored.scores, pool, past)
        for offer in offers:
            if offer.pinned.size:
                at = offer.part.at
                front, counted = columns[at], counts[at]
                pinned_first(front, counted, pool.rows[at], offer.pinned)
                columns[at] = front
        propensities = draw_slates(batch.requests, pool.rows, past.unwanted, self._catalogue.index, columns, counts)
        explorations: list[ExplorationDraw | None] = [None] * len(batch.requests)
        for offer in offers:
            if offer.drawn is not None:
                if propensities is None:
                    propensities = np.full(columns.shape, np.nan, np.float32)
                offer.place(pool.rows, columns, counts, batch.ks, propensities)
                for b, place in enumerate(offer.part.members):
                    explorations[place] = offer.drawn.log(b)
        self.on_stage("score")
        winners = self._winners(pool, scored, scores, columns, counts, past, active)
        winners.propensities = propensities
        languages = [self._plans[number].reason_language for number in batch.numbers]
        items = assemble(winners, self._catalogue, languages)
        self.on_stage("assemble")
        return items, explorations

    def _offers(self, batch: Batch, past: Past) -> list[Offer]:
        """Return the parts of a batch by what decides which candidates there are."""
        offers = []
        for part in self._plans.parts(batch.numbers, plans.offer):
            wanted = [batch.requests[place] for place in part.members]
            unwanted = None if batch.given else past.unwanted[part.at]
            offers.append(
                Offer(
                    part,
                    wanted,
                    Refusal(self._catalogue, wanted, unwanted, batch.now_ms, part.plan.rules),
                    self._leanings(wanted, part.plan, batch.now_ms),
                )
            )
        return offers

    def _retrieved(self, batch: Batch, offers: Sequence[Offer], tastes: F32, active: Bools, past: Past) -> Pool:
        """Return what is found for each request, and put into ``offers`` what is pinned and drawn."""
        width, size = batch.width, len(batch.requests)
        found = search_tastes(self._vector_index, tastes, active, max(1, 3 * width // 4))
        pools = []
        for offer in offers:
            at, plan = offer.part.at, offer.part.plan
            own = active[at]
            others = self._others(plan.quotas, past.liked[at], width, batch.now_ms)
            popular = self._popular.rows
            if offer.leanings is not None:
                popular = offer.leanings.popular(own, self._popular)
                others += offer.leanings.sources(own, plan.quotas, width)
            offer.pinned = self._pinned(offer)
            new = self._fresh_pool(self._plans.alike(offer.part.number, plans.newcomers), batch.now_ms)
            turns = take_turns(found[at], own, popular, width, plan.quotas, others)
            newcomers = new.rows[None].repeat(len(offer.requests), axis=0)
            refused, not_pinned, not_new = offer.refuse.each(turns.rows, offer.pinned, newcomers)
            pool = first_of_each(turns, refused, width)
            self._complete(pool, batch, offer, tastes[at], own)
            pin(pool, offer.pinned, not_pinned)
            # A randomised user's slate is drawn whole instead.
            seeds = [request.slot_seed if request.draw_seed is None else None for request in offer.requests]
            offer.drawn = draw_slots(new, plan.fresh_slots, seeds, ~not_new, batch.ks[at].tolist())
            if offer.drawn is not None:
                pin(pool, offer.drawn.rows, offer.drawn.rows < 0, FRESH)
            pools.append(pool)
        if len(pools) == 1:
            return pools[0]
        whole = Pool(np.empty((size, width), np.int32), np.empty((size, width), np.int8))
        for offer, pool in zip(offers, pools, strict=True):
            whole.rows[offer.part.at], whole.sources[offer.part.at] = pool.rows, pool.sources
        return whole

    def _others(self, quotas: Quotas, liked: I32, width: int, now_ms: int) -> list[Source]:
        """Return the sources that the quotas turn on beside searches and popular items."""
        found: list[Source] = []
        if quotas.has_lists:
            if self._lists is None:
                self._lists = Lists.build(self._catalogue, self._counters, now_ms, self._newest)
            found = listed(self._lists, quotas, self._catalogue, liked, width)
        if quotas.co_click and self.co_clicks is not None:
            found.append(co_clicked(self.co_clicks, quotas, liked, width, now_ms))
        return found

    def _leanings(self, requests: Sequence[SlateRequest], plan: Plan, now_ms: int) -> BatchLeanings | None:
        if self.contexts is None or not plan.quotas.popular_context or not any(r.context for r in requests):
            return None
        return self.contexts.of([r.context for r in requests], self._popular, self.config, now_ms)

    def _fresh_pool(self, number: int, now_ms: int) -> FreshPool:
        """Return the new items that the slots of a plan are drawn from; none where it keeps no slots."""
        pool = self._fresh.get(number)
        if pool is None:
            plan, pool = self._plans[number], FreshPool.empty()
            if plan.fresh_slots.slots:
                pinned = self._catalogue.index.rows(plan.rules.pinned)

                def refused(rows: I32) -> Bools:
                    return plan.rules.refused(self._catalogue, rows, now_ms) | among(rows, pinned)

                pool = FreshPool.build(self._catalogue, self._counters, plan.fresh_slots, now_ms, self._newest, refused)
            self._fresh[number] = pool
        return pool

    def _pinned(self, offer: Offer) -> I32:
        """Return the rows of the pinned items of each request, int32 [B, P], -1 for those that are not known."""
        rows = self._catalogue.index.rows(list(dict.fromkeys(offer.part.plan.rules.pinned)))
        return rows[None].repeat(len(offer.requests), axis=0)

    def _adjust(self, scores: F32, rows: I32, plan: Plan, batch: Batch) -> F32:
        """Return the scores [B, C] after debias and boosts; the very same where neither is on."""
        if plan.diversity.popularity_debias and scores.size:
            index = self.config.popularity_half_life_index
            clicks = self._counters.decayed(np.maximum(rows, 0), batch.now_ms, index, CLICKS)
            scores = debiased(scores, clicks, plan.diversity)
        if plan.rules.boosts:
            scores = scores + plan.rules.boost(self._catalogue, rows, batch.now_ms)
        return scores

    def _order(
        self, batch: Batch, given_scores: F32, pool: Pool, past: Past
    ) -> tuple[F32, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the scores after debias and boosts [B, C], the columns of each slate, int64 [B, K], and counts [B]."""
        scores = np.empty_like(given_scores)
        columns = np.zeros((len(scores), int(min(batch.ks.max(initial=0), pool.rows.shape[1]))), np.int64)
        counts = np.zeros(len(scores), np.int64)
        for part in self._plans.parts(batch.numbers, plans.order):
            at, diversity = part.at, part.plan.diversity
            rows, ks, own = pool.rows[at], batch.ks[at], self._adjust(given_scores[at], pool.rows[at], part.plan, batch)
            if batch.given:
                own = np.asarray(own - is_in(rows, past.unwanted[at]) * UNWANTED_PENALTY, np.float32)
            if diversity.reorders:
                vectors = pool.vectors_in(self._catalogue.space_vectors)[at]
                categories = self._catalogue.category_codes(rows)
                chosen, counted = diverse(own, rows, rows >= 0, vectors, categories, ks, diversity)
            else:
                chosen, counted = top_k(own, rows, rows >= 0, int(ks.max(initial=0)))
                counted = np.minimum(counted, ks)
            scores[at], counts[at] = own, counted
            columns[at, : chosen.shape[1]] = chosen
        return scores, columns, counts

    def _tastes(self, batch: Batch, ranking: RankingConfig) -> tuple[F32, Bools]:
        """Return what each request is after, float32 [B, V, D], and which kinds there are, bool [B, V].

        A query counts whenever there is one; a profile only where the user has no vector of their own.
        """
        short, long, has = self._users.user_vectors(batch.states, batch.now_ms)
        tastes = np.zeros((len(batch.requests), len(TASTES), self._catalogue.dim), np.float32)
        own = tastes[:, : LONG_TERM + 1]
        own[:, SHORT_TERM], own[:, LONG_TERM] = short, long
        own[:] = scale_tastes(own, ranking.full_norm)
        weak = lengths(own) < ranking.least_evidence
        weak |= ~has[:, None]
        if np.count_nonzero(weak):
            own[weak] = 0.0
        for b, request in enumerate(batch.requests):
            if request.query_vector is not None:
                tastes[b, QUERY] = unit(request.query_vector)
            if request.profile_vector is not None and not np.count_nonzero(own[b]):
                tastes[b, PROFILE] = unit(request.profile_vector)
        finite = np.isfinite(tastes)
        if np.count_nonzero(finite) < finite.size:
            tastes[~finite.all(axis=2)] = 0.0
        return tastes, np.logical_or.reduce(tastes, axis=2)

    def _given(self, batch: Batch, offers: Sequence[Offer]) -> Pool:
        """Return the candidates that the requests name, each once, servable ones only."""
        lists = [self._catalogue.index.rows(list(dict.fromkeys(r.candidates or ()))) for r in batch.requests]
        rows = np.full((len(lists), max(len(found) for found in lists)), -1, np.int32)
        for b, found in enumerate(lists):
            rows[b, : len(found)] = found
        for offer in offers:
            at = offer.part.at
            rows[at] = np.where(offer.refuse(rows[at]), np.int32(-1), rows[at])
        return Pool(rows, np.full(rows.shape, GIVEN, np.int8))

    def _complete(self, pool: Pool, batch: Batch, offer: Offer, tastes: F32, active: Bools) -> None:
        """Fill, in place, the candidates of requests that would get a short slate, from the whole catalogue.

        Needed under a narrow filter, or where a user has used up what the sources know.
        """
        starved = (np.add.reduce(pool.valid, axis=1) < batch.ks[offer.part.at]).nonzero()[0]
        if not len(starved):
            return
        servable = self._catalogue.servable_rows(batch.now_ms)
        for b in starved.tolist():
            ranking = self._plans[batch.numbers[offer.part.members[b]]].ranking
            rows = servable[~offer.refuse.one(servable, b)]
            parts = self._catalogue.vectors[rows] @ (tastes[b] * ranking.taste_weights()[:, None]).T
            worth = parts.sum(axis=1) + ranking.popularity_weight * self._popular.strength_of(rows)
            best = np.lexsort((rows, -worth))[: pool.rows.shape[1]]
            rows, parts = rows[best], parts[best]
            kept = dict(zip(pool.rows[b].tolist(), pool.sources[b].tolist(), strict=True))
            source = (
                np.where(active[b], parts, -np.inf).argmax(axis=1) if active[b].any() else np.full(len(rows), POPULAR)
            )
            pool.rows[b] = -1
            pool.rows[b, : len(rows)] = rows
            pool.sources[b, : len(rows)] = [
                kept.get(row, code) for row, code in zip(rows.tolist(), source.tolist(), strict=True)
            ]

    def _score(self, batch: Batch, pool: Pool, tastes: F32, past: Past, offers: Sequence[Offer]) -> Scored:
        """Return the score of each candidate and its CTR, float32 [B, C]: by hand, or by the CTR model of the plan.

        A model's score is its log-odds, as far as they are believed where nobody named the candidates, with what it
        does not know (query, profile, context) added; its CTR is the sigmoid of the log-odds alone. Raises ModelError
        where one is not finite.
        """
        model, reader = self._scorer(self._plans[batch.numbers[0]])
        popularity, lift = self._by_context(pool, offers)
        parts = self._plans.parts(batch.numbers, plans.weights)
        scores = np.empty(pool.rows.shape, np.float32)
        if model is None or model.scorer is None:
            features = self._gather(pool, tastes, past, batch.now_ms)
            if popularity is not None:
                features.popularity = popularity
            self.on_stage("gather")
            for part in parts:
                scores[part.at] = score(features.take(part.at), part.plan.ranking)
                if lift is not None:
                    scores[part.at] += np.float32(part.plan.ranking.ctr_weight) * lift[part.at]
            return Scored(scores, features.ctr)
        # The settings of all, not of an arm: features must be those that the examples have.
        usual = self.config.ranking
        reads_alike = reader is self._users and parts[0].plan.ranking.reading == usual.reading
        raw = raw_from_state(
            batch.states,
            pool.rows,
            np.full(len(scores), batch.now_ms, np.int64),
            self._catalogue,
            self._counters,
            reader,
            usual,
            vectors=model.vectors,
            item_vectors=pool.vectors_in(model.vectors),
            past=past,
            tastes=tastes[:, : LONG_TERM + 1] if reads_alike else None,
        )
        self.on_stage("gather")
        attention = np.empty((*pool.rows.shape, past.recent.shape[1]), np.float32)
        log_odds = model.log_odds(raw, pool.rows, past.recent, usual, attention, pool.vectors_in(model.vectors))
        for part in parts:
            at, ranking = part.at, part.plan.ranking
            believed = log_odds[at]
            # Named candidates were chosen: the order among what is shown is what the model learned.
            if not batch.given and ranking.half_trust_exposure:
                own = raw if len(parts) == 1 else raw.take(at)
                believed = trusted_log_odds(believed, own, ranking, model.features)
            scores[at] = believed + wish_log_odds(self._catalogue.vectors, pool.rows[at], tastes[at], ranking)
            if lift is not None:
                scores[at] += np.float32(ranking.context_log_odds) * lift[at]
        return Scored(scores, clip_ctr(probability(log_odds)), attention)

    def _by_context(self, pool: Pool, offers: Sequence[Offer]) -> tuple[F32 | None, F32 | None]:
        """Return how popular candidates are in their requests' contexts and their lift, [B, C]; None: as for all."""
        leanings = [offer.leanings for offer in offers if offer.leanings is not None]
        if not leanings:
            return None, None
        if len(offers) == 1:
            return leanings[0].read(pool.rows, self._popular)
        popularity, lift = self._popular.strength_of(pool.rows), np.zeros(pool.rows.shape, np.float32)
        for offer in offers:
            if offer.leanings is not None:
                at = offer.part.at
                popularity[at], lift[at] = offer.leanings.read(pool.rows[at], self._popular)
        return popularity, lift

    def _gather(self, pool: Pool, tastes: F32, past: Past, now_ms: int) -> Features:
        rows = np.maximum(pool.rows, 0)
        if not rows.size:
            nothing = np.zeros(rows.shape, np.float32)
            return Features(np.zeros((*rows.shape, len(TASTES)), np.float32), nothing, nothing, nothing)
        return Features(
            similarity=similarity(pool.vectors_in(self._catalogue.space_vectors), tastes),
            ctr=clip_ctr(self._counters.smoothed_ctr(rows, now_ms, self.config.popularity_half_life_index)),
            popularity=self._popular.strength_of(rows),
            shown_counts=counts_of(rows, past.shown, past.shown_counts),
        )

    def _winners(
        self,
        pool: Pool,
        scored: Scored,
        scores: F32,
        columns: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        past: Past,
        active: Bools,
    ) -> Winners:
        # One index into all requests: found faster than a pair of them, seven times.
        chosen = columns + (np.arange(len(columns)) * pool.rows.shape[1])[:, None]
        rows = pool.rows.take(chosen)
        vectors = pool.vectors_in(self._catalogue.space_vectors).reshape(-1, self._catalogue.dim).take(chosen, axis=0)
        liked_vectors, known = self._catalogue.vectors_of(past.liked)
        least = self.config.reason_similarity
        if scored.attention is None:
            near = nearest_liked(vectors, liked_vectors, known, least)
        else:
            weights = scored.attention.reshape(-1, scored.attention.shape[2]).take(chosen, axis=0)
            near = looked_at(weights, vectors, liked_vectors, known, least)
        of_liked = np.maximum(near, 0) + (np.arange(len(rows)) * past.liked.shape[1])[:, None, None]
        return Winners(
            rows=rows,
            counts=counts,
            sources=pool.sources.take(chosen),
            scores=scores.take(chosen),
            ctr=scored.ctr.take(chosen),
            trending=self._popular.is_trending(rows),
            named=np.where(near >= 0, past.liked.take(of_liked), np.int32(-1)),
            actions=past.actions.take(of_liked[:, :, 0]),
            asked=np.where(active[:, QUERY], QUERY, np.where(active[:, PROFILE], PROFILE, -1)).astype(np.int8),
        )


def _width(surface: SurfaceConfig, k: int) -> int:
    """Candidates to score: as the surface says, doubled until a long slate still has twice as many to choose from.

    Steps of two keep requests of different k in few groups.
    """
    width = surface.candidates
    while width < 2 * k:
        width *= 2
    return width


def _no_stage(_: str) -> None:
    """Do nothing when a stage is done."""
