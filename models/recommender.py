"""States + catalogue + counters → slates, batched: the one call that everything uses.

Axes as in models/ranking.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from models import user_state
from models.candidates import (
    FRESH,
    GIVEN,
    POPULAR,
    SOURCES,
    Pool,
    Quotas,
    Refusal,
    Source,
    co_clicked,
    first_of_each,
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
from models.columns import at_columns
from models.context_lists import BatchLeanings, ContextLists
from models.counters import CLICKS, ItemCounters
from models.diversity import debiased, diverse
from models.events import MAX_K, Reason, RecommendedItem
from models.exploration import RANDOMISED, draw
from models.fresh_slots import Drawn, FreshPool, draw_slots, place
from models.hashing import hash64
from models.live_features import IndexedVectors, raw_from_state
from models.log_odds import probability, trusted_log_odds
from models.newest import NewestFirst
from models.ranking import (
    F32,
    LONG_TERM,
    PROFILE,
    QUERY,
    SHORT_TERM,
    TASTES,
    UNWANTED_ACTIONS,
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
from models.reason_texts import TEXTS
from models.reasons import NEW, TRENDING, Winners, assemble, looked_at, nearest_liked
from models.retrieval import VectorIndex
from models.rules import plainly_servable
from models.serving import Scored, ServingModel
from models.slates import Slate as Slate
from models.slates import SlateRequest as SlateRequest
from models.surfaces import Plan
from models.surfaces import RecommenderConfig as RecommenderConfig
from models.surfaces import SurfaceConfig as SurfaceConfig
from models.trending import Lists
from models.user_row import ACTION_MASK, NEGATIVE


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
        self._plans: list[Plan] = []
        self._numbers: dict[tuple[str | None, str | None], int] = {}
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
        self._plans.clear()
        self._numbers.clear()
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
        groups: dict[tuple[int, bool, int], list[int]] = {}
        for i, request in enumerate(requests):
            given = request.candidates is not None
            plan = self._plan_number(request)
            groups.setdefault((plan, given, 0 if given else self._width(request)), []).append(i)
        slates: dict[int, Slate] = {}
        for (plan, given, width), members in groups.items():
            batch = [requests[i] for i in members]
            states = rows[np.array([r.row for r in batch], np.int64)]
            model, _ = self._scorer(self._plans[plan])
            made, drawn = self._rank(states, batch, plan, given, width, now_ms)
            for b, (i, items) in enumerate(zip(members, made, strict=True)):
                experiment = self._experiment(requests[i]) if requests[i].draw_seed is None else RANDOMISED
                exploration = drawn.log(b) if drawn is not None else None
                version = model.version if model is not None else None
                slates[i] = Slate(items, False, self._surface_name(requests[i]), experiment, exploration, version)
        return [slates[i] for i in range(len(requests))]

    def fallback(self, rows: UserRows, requests: Sequence[SlateRequest], now_ms: int) -> list[Slate]:
        """Return degraded slates, from the list of popular items alone, for when ``recommend`` fails.

        Shares no code with ``recommend``: no vectors, no index, no counters, plain Python. Items that the user hid
        are left out where the row can be read. A slate may be shorter than k under a narrow filter.
        """
        hidden = self._hidden_hashes(rows, requests)
        popular = self._popular.rows.tolist()
        place = {row: i for i, row in enumerate(popular)}
        slates = []
        for request, hashes in zip(requests, hidden, strict=True):
            pool = popular
            if request.candidates is not None:
                asked = {self._catalogue.index.row(item_id) for item_id in request.candidates}
                pool = sorted(asked, key=lambda row: (place.get(row, len(popular)), row))
            k = self._k(request)
            excluded = frozenset(request.exclude)
            rules = self.config.surface(request.surface, request.arm).rules
            items: list[RecommendedItem] = []
            for row in pool:
                if len(items) == k:
                    break
                if not plainly_servable(self._catalogue, row, now_ms, request.filters, rules):
                    continue
                item_id = self._catalogue.index.item_id(row)
                if item_id in excluded or (hashes and hash64(item_id) in hashes):
                    continue
                items.append(self._plain_item(item_id, row, place.get(row), len(items) + 1, request))
            slates.append(Slate(items, True, self._surface_name(request), self._experiment(request)))
        return slates

    def _k(self, request: SlateRequest) -> int:
        k = request.k if request.k is not None else self.config.surface(request.surface, request.arm).k
        return max(0, min(k, MAX_K))

    def _width(self, request: SlateRequest) -> int:
        """Candidates to score: as the surface says, doubled until a long slate still has twice as many to choose from.

        Steps of two keep requests of different k in few groups.
        """
        width = self.config.surface(request.surface, request.arm).candidates
        while width < 2 * self._k(request):
            width *= 2
        return width

    def _plan_number(self, request: SlateRequest) -> int:
        """Return the number of the plan of a request: surfaces that do the same are served together."""
        key = request.surface if request.surface in self.config.surfaces else None, request.arm
        number = self._numbers.get(key)
        if number is None:
            plan = self.config.plan(*key)
            if plan not in self._plans:
                self._plans.append(plan)
            number = self._numbers[key] = self._plans.index(plan)
        return number

    def _scorer(self, plan: Plan) -> tuple[ServingModel | None, UserReader]:
        """Return the model that scores by a plan, and what reads user rows in its space."""
        model, reader = self._arms.get(plan.bundle, (self._model, None))
        return model, reader or self._users

    def _experiment(self, request: SlateRequest) -> str | None:
        # A degraded slate too: an arm is judged by what its users got, whatever went wrong.
        return None if request.arm is None else self.config.experiment.label(request.arm)

    def _surface_name(self, request: SlateRequest) -> str:
        return request.surface or self.config.default_surface

    def _rank(
        self, states: UserRows, batch: Sequence[SlateRequest], number: int, given: bool, width: int, now_ms: int
    ) -> tuple[list[list[RecommendedItem]], Drawn | None]:
        """Return the items of one group of requests: all with given candidates, or all retrieved at one width.

        And what was drawn for slots of new items. ``number``: of their plan.
        """
        plan = self._plans[number]
        ranking = plan.ranking
        ks = np.array([self._k(r) for r in batch], np.int64)
        tastes, active = self._tastes(states, batch, ranking, now_ms)
        past = past_of(self._users, states, self._catalogue.index, now_ms, ranking)
        leanings = self._leanings(batch, plan, now_ms)
        refuse = Refusal(self._catalogue, batch, None if given else past.unwanted, now_ms, plan.rules)
        pinned, fresh = None, None
        if given:
            pool = self._given(batch, refuse)
        else:
            pinned = self._pinned(batch, plan)
            new = self._fresh_pool(number, now_ms)
            found = search_tastes(self._vector_index, tastes, active, max(1, 3 * width // 4))
            others = self._others(plan.quotas, past, width, now_ms)
            popular = self._popular.rows
            if leanings is not None:
                popular = leanings.popular(active, self._popular)
                others += leanings.sources(active, plan.quotas, width)
            turns = take_turns(found, active, popular, width, plan.quotas, others)
            refused, not_pinned, not_new = refuse.each(
                turns.rows, pinned, np.broadcast_to(new.rows, (len(batch), len(new.rows)))
            )
            pool = first_of_each(turns, refused, width)
            self._complete(pool, ks, tastes, active, refuse, plan, now_ms)
            pin(pool, pinned, not_pinned)
            # A randomised user's slate is drawn whole instead.
            seeds = [request.slot_seed if request.draw_seed is None else None for request in batch]
            fresh = draw_slots(new, plan.fresh_slots, seeds, ~not_new, ks.tolist())
            if fresh is not None:
                pin(pool, fresh.rows, fresh.rows < 0, FRESH)
        self.on_stage("retrieve")
        scored = self._score(states, pool, tastes, past, plan, given, now_ms, leanings)
        scores = self._adjust(scored.scores, pool, plan, now_ms)
        if given:
            scores -= is_in(pool.rows, past.unwanted) * UNWANTED_PENALTY
        columns, counts = self._order(scores, pool, ks, plan)
        if pinned is not None and pinned.size:
            pinned_first(columns, counts, pool, pinned)
        propensities = self._draw(batch, pool, past, columns, counts)
        if fresh is not None:
            if propensities is None:
                propensities = np.full(columns.shape, np.nan, np.float32)
            place(fresh, pool.rows, columns, counts, ks, propensities)
        self.on_stage("score")
        winners = self._winners(pool, scored, scores, columns, counts, past, active)
        winners.propensities = propensities
        items = assemble(winners, self._catalogue, plan.reason_language)
        self.on_stage("assemble")
        return items, fresh

    def _others(self, quotas: Quotas, past: Past, width: int, now_ms: int) -> list[Source]:
        """Return the sources that the quotas turn on beside searches and popular items."""
        found: list[Source] = []
        if quotas.has_lists:
            if self._lists is None:
                self._lists = Lists.build(self._catalogue, self._counters, now_ms, self._newest)
            found = listed(self._lists, quotas, self._catalogue, past.liked, width)
        if quotas.co_click and self.co_clicks is not None:
            found.append(co_clicked(self.co_clicks, quotas, past.liked, width, now_ms))
        return found

    def _leanings(self, batch: Sequence[SlateRequest], plan: Plan, now_ms: int) -> BatchLeanings | None:
        if self.contexts is None or not plan.quotas.popular_context or not any(r.context for r in batch):
            return None
        return self.contexts.of([r.context for r in batch], self._popular, self.config, now_ms)

    def _fresh_pool(self, number: int, now_ms: int) -> FreshPool:
        """Return the new items that the slots of a plan are drawn from; none where it keeps no slots."""
        pool = self._fresh.get(number)
        if pool is None:
            plan, pool = self._plans[number], FreshPool.empty()
            if plan.fresh_slots.slots:
                pinned = self._catalogue.index.rows(plan.rules.pinned)

                def refused(rows: npt.NDArray[np.int32]) -> Bools:
                    return plan.rules.refused(self._catalogue, rows, now_ms) | among(rows, pinned)

                pool = FreshPool.build(self._catalogue, self._counters, plan.fresh_slots, now_ms, self._newest, refused)
            self._fresh[number] = pool
        return pool

    def _pinned(self, batch: Sequence[SlateRequest], plan: Plan) -> npt.NDArray[np.int32]:
        """Return the rows of the pinned items of each request, int32 [B, P], -1 for those that are not known."""
        rows = self._catalogue.index.rows(list(dict.fromkeys(plan.rules.pinned)))
        return np.repeat(rows[None], len(batch), axis=0)

    def _adjust(self, scores: F32, pool: Pool, plan: Plan, now_ms: int) -> F32:
        """Return the scores [B, C] after debias and boosts; the very same where neither is on."""
        if plan.diversity.popularity_debias and scores.size:
            rows = np.maximum(pool.rows, 0)
            clicks = self._counters.decayed(rows, now_ms, self.config.popularity_half_life_index, CLICKS)
            scores = debiased(scores, clicks, plan.diversity)
        if plan.rules.boosts:
            scores = scores + plan.rules.boost(self._catalogue, pool.rows, now_ms)
        return scores

    def _order(
        self, scores: F32, pool: Pool, ks: npt.NDArray[np.int64], plan: Plan
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the columns of each slate, int64 [B, K], and how many count, int64 [B]."""
        if plan.diversity.reorders:
            vectors, _ = self._catalogue.vectors_of(pool.rows)
            categories = self._catalogue.category_codes(pool.rows)
            return diverse(scores, pool.rows, pool.valid, vectors, categories, ks, plan.diversity)
        columns, counts = top_k(scores, pool.rows, pool.valid, int(ks.max(initial=0)))
        return columns, np.minimum(counts, ks)

    def _tastes(
        self, states: UserRows, batch: Sequence[SlateRequest], ranking: RankingConfig, now_ms: int
    ) -> tuple[F32, Bools]:
        """Return what each request is after, float32 [B, V, D], and which kinds there are, bool [B, V].

        A query counts whenever there is one; a profile only where the user has no vector of their own.
        """
        short, long, has = self._users.user_vectors(states, now_ms)
        tastes = np.zeros((len(batch), len(TASTES), self._catalogue.dim), np.float32)
        tastes[:, SHORT_TERM] = scale_tastes(short, ranking.full_norm)
        tastes[:, LONG_TERM] = scale_tastes(long, ranking.full_norm)
        tastes[~has] = 0.0
        own = tastes[:, : LONG_TERM + 1]
        own[np.linalg.norm(own, axis=2) < ranking.least_evidence] = 0.0
        has = (own != 0).any(axis=(1, 2))
        for b, request in enumerate(batch):
            if request.query_vector is not None:
                tastes[b, QUERY] = unit(request.query_vector)
            if request.profile_vector is not None and not has[b]:
                tastes[b, PROFILE] = unit(request.profile_vector)
        tastes[~np.isfinite(tastes).all(axis=2)] = 0.0
        return tastes, np.any(tastes != 0, axis=2)

    def _given(self, batch: Sequence[SlateRequest], refuse: Refusal) -> Pool:
        """Return the candidates that the requests name, each once, servable ones only."""
        lists = [self._catalogue.index.rows(list(dict.fromkeys(r.candidates or ()))) for r in batch]
        rows = np.full((len(batch), max(len(found) for found in lists)), -1, np.int32)
        for b, found in enumerate(lists):
            rows[b, : len(found)] = found
        rows[refuse(rows)] = -1
        return Pool(rows, np.full(rows.shape, GIVEN, np.int8))

    def _complete(
        self,
        pool: Pool,
        ks: npt.NDArray[np.int64],
        tastes: F32,
        active: Bools,
        refuse: Refusal,
        plan: Plan,
        now_ms: int,
    ) -> None:
        """Fill, in place, the candidates of requests that would get a short slate, from the whole catalogue.

        Needed under a narrow filter, or where a user has used up what the sources know.
        """
        starved = np.flatnonzero(pool.valid.sum(axis=1) < ks)
        if not len(starved):
            return
        servable = self._catalogue.servable_rows(now_ms)
        ranking = plan.ranking
        weights = ranking.taste_weights()
        for b in starved.tolist():
            rows = servable[~refuse.one(servable, b)]
            parts = self._catalogue.vectors[rows] @ (tastes[b] * weights[:, None]).T
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

    def _score(
        self,
        states: UserRows,
        pool: Pool,
        tastes: F32,
        past: Past,
        plan: Plan,
        given: bool,
        now_ms: int,
        leanings: BatchLeanings | None,
    ) -> Scored:
        """Return the score of each candidate and its CTR, float32 [B, C]: by hand, or by the CTR model of the plan.

        A model's score is its log-odds, as far as they are believed where nobody named the candidates, with what it
        does not know (query, profile, context) added; its CTR is the sigmoid of the log-odds alone. Raises ModelError
        where one is not finite.
        """
        ranking, (model, reader) = plan.ranking, self._scorer(plan)
        popularity, lift = leanings.read(pool.rows, self._popular) if leanings is not None else (None, None)
        if model is None or model.scorer is None:
            features = self._gather(pool, tastes, past, now_ms)
            if popularity is not None:
                features.popularity = popularity
            self.on_stage("gather")
            scores = score(features, ranking)
            if lift is not None:
                scores += np.float32(ranking.ctr_weight) * lift
            return Scored(scores, features.ctr)
        times_ms = np.full(len(states), now_ms, np.int64)
        # The settings of all, not of an arm: features must be those that the examples have.
        usual = self.config.ranking
        own = tastes[:, : LONG_TERM + 1] if reader is self._users and ranking.reads_tastes_as(usual) else None
        raw = raw_from_state(
            states,
            pool.rows,
            times_ms,
            self._catalogue,
            self._counters,
            reader,
            usual,
            vectors=model.vectors,
            past=past,
            tastes=own,
        )
        self.on_stage("gather")
        log_odds = model.log_odds(raw, pool.rows, past.recent, ranking)
        # Named candidates were chosen: the order among what is shown is what the model learned.
        believed = log_odds if given else trusted_log_odds(log_odds, raw, ranking, model.features)
        scores = believed + wish_log_odds(self._catalogue.vectors, pool.rows, tastes, ranking)
        if lift is not None:
            scores += np.float32(ranking.context_log_odds) * lift
        return Scored(scores, clip_ctr(probability(log_odds)), lambda rows: model.attention(raw, rows, past.recent))

    def _gather(self, pool: Pool, tastes: F32, past: Past, now_ms: int) -> Features:
        rows = np.maximum(pool.rows, 0)
        if not rows.size:
            nothing = np.zeros(rows.shape, np.float32)
            return Features(np.zeros((*rows.shape, len(TASTES)), np.float32), nothing, nothing, nothing)
        return Features(
            similarity=similarity(self._catalogue.vectors[rows], tastes),
            ctr=clip_ctr(self._counters.smoothed_ctr(rows, now_ms, self.config.popularity_half_life_index)),
            popularity=self._popular.strength_of(rows),
            shown_counts=counts_of(rows, past.shown, past.shown_counts),
        )

    def _draw(
        self,
        batch: Sequence[SlateRequest],
        pool: Pool,
        past: Past,
        columns: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
    ) -> F32 | None:
        """Replace, in place, the columns [B, K] of randomised users by drawn ones, as many as they have.

        Returns the propensities [B, K], NaN where nothing was drawn, or None where nobody is randomised. What the
        user's past rules out comes last, and only where the request itself named it.
        """
        randomised = [(b, request.draw_seed) for b, request in enumerate(batch) if request.draw_seed is not None]
        if not randomised:
            return None
        propensities = np.full(columns.shape, np.nan, np.float32)
        item_id = self._catalogue.index.item_id
        for b, seed in randomised:
            valid = pool.rows[b] >= 0
            unwanted = is_in(pool.rows[b : b + 1], past.unwanted[b : b + 1])[0]
            hashes = np.array([hash64(item_id(row)) if row >= 0 else 0 for row in pool.rows[b].tolist()], np.uint64)
            chosen, chances = draw(seed, hashes, valid & ~unwanted, valid & unwanted, int(counts[b]))
            columns[b, : len(chosen)] = chosen
            propensities[b, : len(chosen)] = chances
        return propensities

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
        rows = at_columns(pool.rows, columns)
        vectors, _ = self._catalogue.vectors_of(rows)
        liked_vectors, known = self._catalogue.vectors_of(past.liked)
        weights, least = scored.attention(rows), self.config.reason_similarity
        if weights is None:
            near = nearest_liked(vectors, liked_vectors, known, least)
        else:
            near = looked_at(weights, vectors, liked_vectors, known, least)
        each, place = np.arange(len(rows))[:, None, None], np.maximum(near, 0)
        return Winners(
            rows=rows,
            counts=counts,
            sources=at_columns(pool.sources, columns),
            scores=at_columns(scores, columns),
            ctr=at_columns(scored.ctr, columns),
            trending=self._popular.is_trending(rows),
            named=np.where(near >= 0, past.liked[each, place], -1).astype(np.int32),
            actions=past.actions[each[:, 0], place[:, :, 0]],
            asked=np.where(active[:, QUERY], QUERY, np.where(active[:, PROFILE], PROFILE, -1)).astype(np.int8),
        )

    def _hidden_hashes(self, rows: UserRows, requests: Sequence[SlateRequest]) -> list[frozenset[int]]:
        """Return for each request the hashes of items that its user hid or disliked, as far as the rows can be read."""
        try:
            hashes, codes, _ = self._users.recent(rows)
            return [
                frozenset(
                    h
                    for h, c in zip(hashes[r.row].tolist(), codes[r.row].tolist(), strict=True)
                    if c & ACTION_MASK in UNWANTED_ACTIONS or c & NEGATIVE
                )
                for r in requests
            ]
        except Exception:
            # Whatever broke `recommend` may break this too; a slate without this rule is better than none.
            self.fallbacks_without_past += 1
            return [frozenset()] * len(requests)

    def _plain_item(
        self, item_id: str, row: int, place: int | None, position: int, request: SlateRequest
    ) -> RecommendedItem:
        popular = self._popular
        source = SOURCES[POPULAR] if request.candidates is None else SOURCES[GIVEN]
        texts = TEXTS[self.config.surface(request.surface, request.arm).reason_language]
        clicked = place is not None and place < popular.counted
        return RecommendedItem(
            item_id=item_id,
            position=position,
            score=float(popular.strength[row]) if place is not None else 0.0,
            ctr=float(popular.ctr[place]) if place is not None else self.config.fallback_ctr,
            source=source,
            propensity=None,
            reason=Reason(TRENDING, texts.trending) if clicked else Reason(NEW, texts.newest),
        )


def _no_stage(_: str) -> None:
    """Do nothing when a stage is done."""
