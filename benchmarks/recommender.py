"""Slates per second of ``Recommender.recommend``, on one core, with the time of each stage.

By hand, with a CTR model, and each of them with everything switched on: boosts, filters, maximal marginal
relevance, debias, more sources, slots for new items.

    python -m benchmarks.recommender [--items 50000] [--batch 64] [--batches 40] [--exact]

Items lie in 400 clusters of a 64-dimensional space, as news of one topic do. Users have clicked ten items of one
cluster and been shown 15; every other one clicked half of them days ago in another cluster, so that the short-term
and the long-term vector ask for different things. The CTR model has random weights: its scores mean nothing, its cost
does.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter, defaultdict

# Before NumPy, torch or faiss is imported: the figure is that of one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks.bundles import head, random_tensors
from benchmarks.everything import SURFACE
from models.bootstrap import Space
from models.catalogue import Catalogue
from models.co_clicks import CoClicks
from models.counters import CountersConfig, ItemCounters, TouchBatch
from models.ctr import CtrScorer
from models.events import Action, ImpressedItem, Impression, Item
from models.features import FeatureConfig
from models.hashing import hash64
from models.item_index import ItemIndex
from models.recommender import Recommender, RecommenderConfig, SlateRequest, SurfaceConfig
from models.retrieval import RetrievalConfig, VectorIndex
from models.serving import ServingModel
from models.user_state import Rows, UserEvent, UserReader, UserStateConfig, apply, empty_rows, user_event

DIM = 64
CLUSTERS = 400
NOW_MS = 1_700_000_000_000
CLICKS_A_USER = 10
ALL = "all"
SPACE = "benchmark"
"""One for all: rows of another space are made anew from their recent items when they are read."""


def build(items: int, users: int, exact: bool) -> tuple[Recommender, Rows, Catalogue, VectorIndex]:
    """Return a recommender over a catalogue of random clusters, with the rows of its users, and what it reads."""
    random = np.random.default_rng(0)
    index = ItemIndex()
    catalogue = Catalogue(index, DIM)
    centres = random.normal(size=(CLUSTERS, DIM)).astype(np.float32)
    for i in range(items):
        row = catalogue.upsert(
            Item(
                item_id=f"item-{i}", title=f"The title of item {i}", categories=[f"c{i % 40}"], published_at=NOW_MS - i
            )
        )
        catalogue.set_vector(row, centres[i % CLUSTERS] + random.normal(size=DIM).astype(np.float32))
    vectors = VectorIndex(DIM, RetrievalConfig(exact_below=10**9) if exact else RetrievalConfig())
    vectors.add(np.arange(items, dtype=np.int32), catalogue.vectors[:items])
    vectors.settle()

    counters = ItemCounters(index, CountersConfig())
    counters.own(0)
    state = UserStateConfig()
    batch, events = TouchBatch(), list[UserEvent]()
    offset = 0
    for n in range(CLICKS_A_USER + 1):
        for user in range(users):
            offset += 1
            returning = user % 2 == 1 and n < CLICKS_A_USER // 2
            at_ms = NOW_MS - (CLICKS_A_USER + 1 - n) * 60_000 - returning * 5 * 86_400_000
            cluster = (user * 7 + returning * 31) % CLUSTERS
            near = [f"item-{cluster + CLUSTERS * int(random.integers(items // CLUSTERS))}" for _ in range(15)]
            ids = {"event_id": f"e{offset}", "user_id": f"u{user}", "event_time": at_ms}
            event: Action | Impression = (
                Action(item_id=near[0], action="click", **ids)  # type: ignore[arg-type]
                if n < CLICKS_A_USER
                else Impression(items=[ImpressedItem(i) for i in dict.fromkeys(near)], **ids)  # type: ignore[arg-type]
            )
            events.append(user_event(event, user, offset, at_ms, state, ["default"]))
            batch.add_event(event, offset, at_ms, counters.config)
    counters.add(0, batch)
    rows, _ = apply(empty_rows(users), events, catalogue, state, epoch=1, space_id=hash64(SPACE), generation=1)
    surfaces = {"default": SurfaceConfig(), ALL: SurfaceConfig.model_validate(SURFACE)}
    config = RecommenderConfig(surfaces=surfaces)
    co_clicks = CoClicks(config.co_clicks, index)
    co_clicks.learn(co_clicks.steps_of_rows(rows))
    users_reader = UserReader(state, catalogue, hash64(SPACE))
    recommender = Recommender(config, catalogue, counters, vectors, users=users_reader, co_clicks=co_clicks)
    return recommender, rows, catalogue, vectors


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--exact", action="store_true", help="exact search in place of the graph")
    args = parser.parse_args()
    users = args.batch * 8
    recommender, rows, catalogue, vectors = build(args.items, users, args.exact)

    started = time.perf_counter()
    recommender.refresh(NOW_MS)
    print(f"refresh of the popular items: {(time.perf_counter() - started) * 1e3:.1f} ms")

    print(f"{args.items} items, batches of {args.batch}, 20 of 200 candidates in a slate")
    measure("score set by hand", recommender, rows, args.batch, args.batches)
    measure("score set by hand, everything on", recommender, rows, args.batch, args.batches, ALL)
    recommender.use(model(catalogue, vectors))
    measure("CTR model", recommender, rows, args.batch, args.batches)
    measure("CTR model, everything on", recommender, rows, args.batch, args.batches, ALL)


def model(catalogue: Catalogue, vectors: VectorIndex) -> ServingModel:
    """Return a version with a CTR model of the shape that a training makes and random weights over the same items."""
    config = head(DIM)
    return ServingModel(
        version="benchmark",
        generation=1,
        space=Space(SPACE, "none", np.eye(DIM, dtype=np.float32)),
        scorer=CtrScorer(config, random_tensors(config, 1)),
        features=FeatureConfig(),
        vectors=catalogue.space_vectors,
        vector_index=vectors,
    )


def measure(
    name: str, recommender: Recommender, rows: Rows, batch: int, batches: int, surface: str = "default"
) -> None:
    """Print the figures of one way to score."""
    users = len(rows)
    stages: defaultdict[str, list[float]] = defaultdict(list)
    last = 0.0

    def on_stage(name: str) -> None:
        nonlocal last
        now = time.process_time()
        stages[name].append(now - last)
        last = now

    recommender.on_stage = on_stage
    walls = []
    for n in range(batches + 3):
        people = ((np.arange(batch) + n * batch) % users).tolist()
        requests = [SlateRequest(f"u{i}", i, surface=surface, slot_seed=i) for i in people]
        started = time.perf_counter()
        last = begun = time.process_time()
        slates = recommender.recommend(rows, requests, NOW_MS + n)
        stages["all"].append(time.process_time() - begun)
        walls.append(time.perf_counter() - started)
    print(f"\n{name}:")
    shown = [item for slate in slates for item in slate.items]
    print(f"sources: {Counter(i.source for i in shown)}, reasons: {Counter(i.reason.kind for i in shown)}")
    print("CPU time, which a busy machine stretches least:")
    for stage, seconds in stages.items():
        print(f"  {stage:<10} {np.median(seconds[3:]) * 1e3:7.2f} ms")
    print(f"  {batch / float(np.median(stages['all'][3:])):.0f} slates/s and core")
    wall = float(np.median(walls[3:]))
    print(f"wall time: {wall * 1e3:.2f} ms, {batch / wall:.0f} slates/s")


if __name__ == "__main__":
    main()
