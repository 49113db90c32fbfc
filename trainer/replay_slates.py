"""The slates that we would have sent: made by the recommender at sampled impressions of a log, and what they are worth.

Before each sampled impression the catalogue holds what was published or shown before it, and a slate is made from all
of that with the rows and counters of this moment. A click that the log has on an item that we would not have shown says
nothing against our slate, so recall compares modes, delays and sources; it is no click rate.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

import numpy as np
import numpy.typing as npt

from models.bootstrap import Space
from models.candidates import (
    POPULAR,
    POPULAR_CONTEXT,
    SOURCES,
    Quotas,
    Refusal,
    co_clicked,
    listed,
    merge,
    popular_items,
    search_tastes,
)
from models.catalogue import NOT_GIVEN_MS, Catalogue
from models.context_lists import ContextLists
from models.counters import ItemCounters
from models.ctr import CtrScorer
from models.evaluation import coverage, gini
from models.events import Item
from models.features import FeatureConfig
from models.hashing import hash64
from models.live_features import own_tastes
from models.logs import LogReader
from models.ranking import I32, TASTES, past_of
from models.recommender import Recommender, RecommenderConfig, SlateRequest
from models.retrieval import RetrievalConfig, VectorIndex
from models.serving import ServingModel
from models.trending import Lists
from models.user_state import Rows, UserReader, UserStateConfig
from trainer.log_examples import Reads, catalogue_of
from trainer.replay_log import Survey
from trainer.scoring import ItemTable

I64 = npt.NDArray[np.int64]

WIDTH: Final = 200
"""Candidates of a source, and of the mix."""
HEAD_SHARE: Final = 0.2
"""The most clicked items of the log; the others are its tail."""
MIX: Final = "mix"
_EXACT: Final = 100_000_000
"""Search is exact in a replay: a graph would be built aside, at times that no seed fixes."""


@dataclass(frozen=True, slots=True)
class SlateMeasures:
    """Of the slates of one mode at one delay; NaN where the log gives no figure."""

    impressions: int
    k: int
    recall: float
    """Share of an impression's clicked items that our slate of ``k`` holds, mean over impressions."""
    source_recall: dict[str, float]
    """The same of 200 candidates of each source, and of the mix of them that is scored."""
    source_recall_first: dict[str, float]
    """The same of the first ``k`` candidates of each source, in its own order: what ranking has to beat."""
    source_only: dict[str, float]
    """Share of the clicks that no other source's candidates hold."""
    coverage: float
    """Share of the catalogue that appears in any slate."""
    gini: float
    """Of how often each item of the catalogue stands in a slate: 0 all alike, 1 one item only."""
    tail_share: float
    """Share of the places that items beyond the most clicked fifth of the log hold."""
    novelty: float
    """Mean of −log2 of an item's share of all clicks of the log, bits."""
    intra_list_diversity: float
    """1 − mean cosine of the pairs of a slate; NaN without vectors."""


@dataclass(frozen=True, slots=True)
class Served:
    """A model that makes slates from an event time on."""

    from_ms: int
    scorer: CtrScorer
    features: FeatureConfig


def whole_catalogue(reader: LogReader, survey: Survey, table: ItemTable) -> Catalogue:
    """Return a catalogue of all items of a log: those that it describes, then those that it only shows."""
    named: set[str] = set()

    def items() -> Iterable[Item]:
        for item in reader.items():
            named.add(item.item_id)
            yield item

    shown = (Item(item_id=item) for item in survey.first_shown_ms if item not in named)
    return catalogue_of(chain(items(), shown), table)


class Shelf:
    """What of a catalogue may be shown, as time goes on: an item from its publication or its first impression on."""

    def __init__(self, catalogue: Catalogue, first_shown_ms: Mapping[str, int]) -> None:
        rows = np.flatnonzero(catalogue.in_catalogue).astype(np.int32)
        never = np.iinfo(np.int64).max
        since = np.full(catalogue.capacity, never, np.int64)
        published = catalogue.published_at_ms[rows]
        since[rows] = np.where(published == NOT_GIVEN_MS, never, published)
        shown = catalogue.index.rows(list(first_shown_ms))
        times = np.fromiter(first_shown_ms.values(), np.int64, len(first_shown_ms))
        inside = (shown >= 0) & (shown < catalogue.capacity)
        np.minimum.at(since, shown[inside], times[inside])
        order = rows[np.argsort(since[rows], kind="stable")]
        self._rows, self._since = order, since[order]
        self._catalogue = catalogue
        self._open = 0
        self.index = VectorIndex(catalogue.dim, RetrievalConfig(exact_below=_EXACT))
        catalogue.in_catalogue[rows] = False

    def open_before(self, time_ms: int) -> None:
        """Put out what came before ``time_ms``."""
        end = int(np.searchsorted(self._since, time_ms))
        if end <= self._open:
            return
        rows = self._rows[self._open : end]
        self._catalogue.in_catalogue[rows] = True
        has = rows[self._catalogue.has_vector[rows]]
        self.index.add(has, np.ascontiguousarray(self._catalogue.vectors[has]))
        self._open = end

    def __len__(self) -> int:
        """Return how many items are out."""
        return self._open


class Popularity:
    """How popular the items of a log are over all of it: the same yardstick at all delays."""

    def __init__(self, clicks: Mapping[str, int], shown: Iterable[str]) -> None:
        self._clicks = clicks
        items = sorted(set(shown) | set(clicks), key=lambda item: (-clicks.get(item, 0), item))
        self._head = set(items[: round(len(items) * HEAD_SHARE)])
        self._total = sum(clicks.values()) + len(items)

    def bits(self, item: str) -> float:
        """Return −log2 of the item's share of the clicks, one more click for every item."""
        return float(-np.log2((self._clicks.get(item, 0) + 1) / max(self._total, 1)))

    def is_tail(self, item: str) -> bool:
        """Return whether the item is beyond the most clicked fifth."""
        return item not in self._head


@dataclass(slots=True)
class _Tally:
    recalls: list[float] = field(default_factory=list)
    shown: Counter[int] = field(default_factory=Counter)
    tail: int = 0
    bits: float = 0.0
    likeness: list[float] = field(default_factory=list)


class SlateMaker:
    """Makes slates at sampled impressions of one pass over a log, for one or two modes that share its state."""

    def __init__(
        self,
        catalogue: Catalogue,
        survey: Survey,
        space: Space,
        config: RecommenderConfig,
        user_state: UserStateConfig,
        models: Mapping[str, Sequence[Served]],
        clicked: Mapping[int, Sequence[str]],
        k: int,
    ) -> None:
        """``models``: of each mode, by rising time. ``clicked``: items by the place of the impression in the log."""
        self._catalogue, self._space, self._config, self._k = catalogue, space, config, k
        self._shelf = Shelf(catalogue, survey.first_shown_ms)
        self._popularity = Popularity(survey.clicks, survey.first_shown_ms)
        self._users = UserReader(user_state, catalogue, hash64(space.space_id))
        self._models, self._clicked = models, clicked
        self._recommender: Recommender | None = None
        self._tallies = {mode: _Tally() for mode in models}
        self._source_found: defaultdict[str, list[float]] = defaultdict(list)
        self._source_first: defaultdict[str, list[float]] = defaultdict(list)
        self._source_only: defaultdict[str, float] = defaultdict(float)
        self._clicks = 0

    def take(self, reads: Reads, at: int) -> None:
        """Make the slates of the impression at a place of ``reads``, all state being as it is before it."""
        clicked, time_ms = self._clicked[reads.offsets[at]], int(reads.times_ms[at])
        row, shown, counters = reads.rows[at : at + 1], reads.impression(at), reads.counters
        self._shelf.open_before(time_ms)
        if self._recommender is None:
            self._recommender = Recommender(
                self._config, self._catalogue, counters, self._shelf.index, users=self._users, co_clicks=reads.co_clicks
            )
            if reads.contexts is not None:
                self._recommender.contexts = ContextLists(reads.contexts, self._catalogue, counters)
        recommender = self._recommender
        recommender.refresh(time_ms)
        context = reads.contexts.values_of(shown) if reads.contexts is not None else ()
        request = SlateRequest(user_id=shown.user_id, row=0, k=self._k, context=context)
        for mode, models in self._models.items():
            recommender.use(self._serving(models, time_ms))
            (slate,) = recommender.recommend(row, [request], time_ms)
            self._count(self._tallies[mode], [item.item_id for item in slate.items], clicked)
        self._count_sources(row, counters, request, time_ms, clicked)

    def measures(self, mode: str) -> SlateMeasures:
        """Return what the slates of a mode are worth so far."""
        tally = self._tallies[mode]
        places = tally.shown.total()
        exposures = np.zeros(max(len(self._shelf), len(tally.shown)), np.int64)
        exposures[: len(tally.shown)] = list(tally.shown.values())
        return SlateMeasures(
            impressions=len(tally.recalls),
            k=self._k,
            recall=_mean(tally.recalls),
            source_recall={name: _mean(found) for name, found in self._source_found.items()},
            source_recall_first={name: _mean(found) for name, found in self._source_first.items()},
            source_only={name: self._source_only[name] / max(self._clicks, 1) for name in self._source_found},
            coverage=coverage(list(tally.shown), len(self._shelf)),
            gini=gini(exposures),
            tail_share=tally.tail / places if places else float("nan"),
            novelty=tally.bits / places if places else float("nan"),
            intra_list_diversity=1 - _mean(tally.likeness),
        )

    def _serving(self, models: Sequence[Served], time_ms: int) -> ServingModel:
        model = next(m for m in reversed(models) if m.from_ms <= time_ms)
        version = f"replay-{model.from_ms}"
        vectors, index = self._catalogue.space_vectors, self._shelf.index
        return ServingModel(version, 1, self._space, model.scorer, model.features, vectors, index)

    def _count(self, tally: _Tally, slate: Sequence[str], clicked: Sequence[str]) -> None:
        tally.recalls.append(len(set(slate) & set(clicked)) / len(clicked))
        rows = self._catalogue.index.rows(slate)
        tally.shown.update(rows.tolist())
        tally.tail += sum(self._popularity.is_tail(item) for item in slate)
        tally.bits += sum(self._popularity.bits(item) for item in slate)
        vectors, known = self._catalogue.vectors_of(rows)
        vectors = vectors[known]
        if len(vectors) > 1:
            pairs = np.triu_indices(len(vectors), 1)
            tally.likeness.append(float((vectors @ vectors.T)[pairs].mean()))

    def _count_sources(
        self, row: Rows, counters: ItemCounters, request: SlateRequest, time_ms: int, clicked: Sequence[str]
    ) -> None:
        wanted = set(self._catalogue.index.rows(clicked).tolist())
        found = self._candidates(row, counters, request, time_ms)
        self._clicks += len(wanted)
        for name, rows in found.items():
            self._source_found[name].append(len(wanted & set(rows)) / len(wanted))
            self._source_first[name].append(len(wanted & set(rows[: self._k])) / len(wanted))
        single = {name: set(rows) for name, rows in found.items() if name != MIX}
        held = Counter(row for rows in single.values() for row in rows & wanted)
        for name, own in single.items():
            self._source_only[name] += sum(held[row] == 1 for row in own & wanted)

    def _candidates(
        self, row: Rows, counters: ItemCounters, request: SlateRequest, time_ms: int
    ) -> dict[str, list[int]]:
        """Return the rows of each source's candidates, and of the mix that the default surface takes, best first."""
        catalogue, config = self._catalogue, self._config
        plan = config.plan(None)
        past = past_of(self._users, row, catalogue.index, time_ms, plan.ranking)
        refuse = Refusal(catalogue, [request], past.unwanted, time_ms, plan.rules)
        tastes = np.zeros((1, len(TASTES), catalogue.dim), np.float32)
        own = own_tastes(row, np.array([time_ms], np.int64), self._users, plan.ranking)
        tastes[:, : own.shape[1]] = own
        active = np.any(tastes != 0, axis=2)
        near = search_tastes(self._shelf.index, tastes, active, WIDTH)
        popular = popular_items(catalogue, counters, config.popular_items, time_ms, config.popularity_half_life_index)
        lists = Lists.build(catalogue, counters, time_ms)
        whole = Quotas(trending=1, trending_category=1, fresh=1, co_click=1, popular_context=1)
        every = listed(lists, whole, catalogue, past.liked, WIDTH)
        others = listed(lists, plan.quotas, catalogue, past.liked, WIDTH)
        co_clicks = self._recommender.co_clicks if self._recommender is not None else None
        if co_clicks is not None:
            every.append(co_clicked(co_clicks, whole, past.liked, WIDTH, time_ms))
            if plan.quotas.co_click:
                others.append(co_clicked(co_clicks, plan.quotas, past.liked, WIDTH, time_ms))
        contexts = self._recommender.contexts if self._recommender is not None else None
        shared = popular.rows
        leanings = contexts.of([request.context], popular, config, time_ms) if contexts is not None else None
        if leanings is not None:
            every += leanings.sources(np.ones_like(active), whole, WIDTH)
            if plan.quotas.popular_context:
                shared = leanings.popular(active, popular)
                others += leanings.sources(active, plan.quotas, WIDTH)
        alone: list[tuple[int, I32]] = [(taste, near[:, taste]) for taste in range(own.shape[1])]
        alone += [(POPULAR, popular.rows[None]), *((code, rows) for code, rows, _ in every)]
        found = {SOURCES[code]: _allowed(rows, refuse) for code, rows in alone}
        if contexts is not None:
            # A context that says nothing finds nothing.
            found.setdefault(SOURCES[POPULAR_CONTEXT], [])
        pool = merge(near[:, :, : 3 * WIDTH // 4], active, shared, WIDTH, refuse, plan.quotas, others)
        return {MIX: pool.rows[pool.valid].tolist()} | found


def sample(offsets: I64, wanted: int) -> I64:
    """Return at most ``wanted`` of the offsets, evenly spaced."""
    if wanted <= 0 or not len(offsets):
        return offsets[:0]
    if len(offsets) <= wanted:
        return offsets
    return offsets[np.linspace(0, len(offsets) - 1, wanted).round().astype(np.int64)]


def _allowed(rows: I32, refuse: Refusal) -> list[int]:
    kept = rows[~refuse(rows)]
    return list(dict.fromkeys(kept.tolist()))[:WIDTH]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
