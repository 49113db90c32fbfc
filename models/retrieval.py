"""Nearest items by vector: an index that takes additions, changes and removals while it serves.

Exact search below a size; above it an HNSW graph over a snapshot (Malkov and Yashunin 2016) beside a small exact
segment with everything newer. Changed and removed items are tombstones in the graph; a new graph is built aside when
the dead and the newer ones are too many. Legend of shapes: D = dimensions, n = any number, k = neighbours asked for.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterable
from typing import Any, Final, Literal

import faiss
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from models.columns import at_columns
from models.errors import SettingsError

Rows = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

_DOUBLINGS: Final = 4
"""How often a search that met tombstones only asks the graph for twice as many."""
_GPU_MOST: Final = 2_048
"""Neighbours that faiss on a GPU gives at most."""
_BUILD_CHUNK: Final = 1_024
_BUILD_NICENESS: Final = 10
_behind: Final[set[int]] = set()
"""Processors of threads that build; none: those that they were started on."""
_RECALL_CHUNK: Final = 10_000
"""Items that one step of a comparison with exact search looks at: 2 to 4 ms for 16 queries."""


class RetrievalConfig(BaseModel):
    """How the vector index searches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    exact_below: int = Field(
        30_000, ge=0, description="Items below which search is exact; above, an HNSW graph answers."
    )
    hnsw_neighbours: int = Field(24, ge=4, le=128, description="Links of an item in the graph (HNSW's M).")
    hnsw_build_width: int = Field(80, ge=8, le=1_000, description="Candidates kept while building (efConstruction).")
    hnsw_search_width: int = Field(160, ge=8, le=4_000, description="Candidates kept while searching (efSearch).")
    rebuild_fraction: float = Field(
        0.1, gt=0, le=1, description="A new graph is built aside when this fraction is dead or newer than the graph."
    )
    rebuild_minimum: int = Field(
        2_000, ge=1, description="Dead and newer items below which no new graph is built, whatever their fraction."
    )
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="cuda: exact search on a GPU in place of the graph (needs the faiss-gpu build)."
    )
    threads: int = Field(1, ge=1, le=64, description="Threads of one search and of one build.")


class _Dense:
    """Vectors side by side without holes, searched exactly. A removal moves the last one into the hole."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self._vectors: Floats = np.zeros((256, dim), np.float32)
        self._rows: Rows = np.zeros(256, np.int32)
        self._place: dict[int, int] = {}

    @property
    def rows(self) -> Rows:
        return self._rows[: self.count]

    @property
    def vectors(self) -> Floats:
        return self._vectors[: self.count]

    def put(self, rows: Rows, vectors: Floats) -> None:
        """Add or replace; rows are distinct."""
        needed = self.count + len(rows)
        if needed > len(self._rows):
            capacity = max(needed, 2 * len(self._rows))
            self._vectors = np.concatenate([self.vectors, np.zeros((capacity - self.count, vectors.shape[1]), "f4")])
            self._rows = np.concatenate([self.rows, np.zeros(capacity - self.count, np.int32)])
        places = np.empty(len(rows), np.int64)
        for i, row in enumerate(rows.tolist()):
            place = self._place.setdefault(row, self.count)
            places[i] = place
            self.count += place == self.count
        self._rows[places] = rows
        self._vectors[places] = vectors

    def remove(self, rows: Rows) -> None:
        """Remove rows; those that are not here are ignored."""
        for row in rows.tolist():
            place = self._place.pop(row, None)
            if place is None:
                continue
            self.count -= 1
            if place != self.count:
                self._rows[place] = moved = self._rows[self.count]
                self._vectors[place] = self._vectors[self.count]
                self._place[int(moved)] = place

    def search(self, queries: Floats, k: int) -> tuple[Rows, Floats]:
        return exact_search(queries, self.rows, self.vectors, k)


class _Snapshot:
    """A faiss index over a fixed set of items, some of which have died since. Over-fetches past the dead ones."""

    def __init__(self, index: Any, rows: Rows, most: int) -> None:
        self.index = index
        self.rows = rows
        self.alive = np.ones(len(rows), np.bool_)
        self.dead = 0
        self._most = min(most, len(rows))
        self._place = np.full(int(rows.max(initial=-1)) + 1, -1, np.int64)
        self._place[rows] = np.arange(len(rows))

    @property
    def live(self) -> int:
        return len(self.rows) - self.dead

    def kill(self, rows: Rows) -> None:
        """Mark rows dead; those that are not here are ignored."""
        inside = rows[(rows >= 0) & (rows < len(self._place))]
        places = np.unique(self._place[inside])
        places = places[(places >= 0) & self.alive[places]]
        self.alive[places] = False
        self.dead += len(places)

    def alive_items(self) -> tuple[Rows, Floats]:
        """Return copies of what is alive: rows [n], vectors [n, D]."""
        vectors = np.asarray(self.index.reconstruct_n(0, len(self.rows)), np.float32)
        return self.rows[self.alive], vectors[self.alive]

    def search(self, queries: Floats, k: int) -> tuple[Rows, Floats]:
        # Tombstones are spread like the items, as a rule; where they lie together, the loop asks for more.
        fetch = min(self._most, k if not self.dead else k + 8 + 2 * k * self.dead // len(self.rows))
        found_scores, places = self.index.search(queries, fetch)
        good = self._are_alive(places)
        # As a rule, all that was found is alive, and as many as asked for.
        if fetch >= k and np.count_nonzero(good) == good.size:
            return self.rows.take(places[:, :k]), found_scores[:, :k]
        rows = np.full((len(queries), k), -1, np.int32)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        open_queries = np.arange(len(queries))
        for doubling in range(_DOUBLINGS + 1):
            if doubling:
                found_scores, places = self.index.search(queries[open_queries], fetch)
                good = self._are_alive(places)
            order = np.argsort((~good).view(np.uint8), axis=1, kind="stable")[:, :k]
            chosen = at_columns(good, order)
            width = order.shape[1]
            rows[open_queries, :width] = np.where(chosen, self.rows[at_columns(places, order)], -1)
            scores[open_queries, :width] = np.where(chosen, at_columns(found_scores, order), -np.inf)
            open_queries = open_queries[good.sum(1) < min(k, self.live)]
            if not len(open_queries) or fetch >= self._most:
                break
            fetch = min(self._most, 2 * fetch)
        return rows, scores

    def _are_alive(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which found places hold a living item, bool of their shape; -1 is none."""
        good = places >= 0
        if self.dead:
            good &= self.alive[places]
        return good


class RecallCheck:
    """Compares what a search found with the exact best of the same moment, a few thousand items at a time.

    The graph's vectors never change; which of them were alive is remembered from the beginning.
    """

    def __init__(
        self, queries: Floats, found: Rows, newer_rows: Rows, newer_scores: Floats, snapshot: _Snapshot | None
    ) -> None:
        """``found`` int32 [n, k]: by the search; ``newer_…`` [n, k]: exact, of the items that the graph has not."""
        self._queries = queries
        self._found = found
        self._rows = newer_rows
        self._scores = newer_scores
        self._snapshot = snapshot
        self._alive = snapshot.alive.copy() if snapshot is not None else np.zeros(0, np.bool_)
        self._next = 0

    def step(self) -> float | None:
        """Look at the next items; returns the share of the exact best that was found when all are done, else None."""
        if self._snapshot is None:
            return 1.0
        start, end = self._next, min(self._next + _RECALL_CHUNK, len(self._alive))
        if start < end:
            vectors = np.asarray(self._snapshot.index.reconstruct_n(start, end - start), np.float32)
            alive = self._alive[start:end]
            rows, scores = exact_search(
                self._queries, self._snapshot.rows[start:end][alive], vectors[alive], self._found.shape[1]
            )
            self._rows, self._scores = best_of([self._rows, rows], [self._scores, scores], self._found.shape[1])
        self._next = end
        if end < len(self._alive):
            return None
        hits = sum(len(np.intersect1d(t[t >= 0], f)) for t, f in zip(self._rows, self._found, strict=True))
        return hits / max(1, int((self._rows >= 0).sum()))


class VectorIndex:
    """Rows of the catalogue by inner product with a query.

    All calls come from one thread (the worker's executor). Only a build runs in a thread of its own, on a copy; its
    result is taken over inside a later call, by one assignment, and what changed meanwhile is replayed on it.
    """

    def __init__(self, dim: int, config: RetrievalConfig | None = None) -> None:
        self.dim = dim
        self.config = config or RetrievalConfig()
        self.builds = 0
        """Graphs built and taken over so far."""
        self.build_error: Exception | None = None
        """Why the last build failed, if it did; search goes on without it, slower."""
        if self.config.device == "cuda" and not _gpu_ready():
            raise SettingsError(
                "retrieval.device is cuda, but this faiss finds no GPU: install the extra 'gpu' instead of 'cpu', "
                "or set retrieval.device = cpu"
            )
        self._dense = _Dense(dim)
        self._snapshot: _Snapshot | None = None
        self._builder: threading.Thread | None = None
        self._built: _Snapshot | None = None
        self._changed: set[int] = set()
        self._stop = threading.Event()
        self._retry_at = 0

    def __len__(self) -> int:
        """Items that a search can find."""
        return self._dense.count + (self._snapshot.live if self._snapshot else 0)

    @property
    def is_exact(self) -> bool:
        """Whether every item is searched exactly now."""
        return self._snapshot is None

    @property
    def is_building(self) -> bool:
        """Whether a build is under way or waits to be taken over."""
        return self._builder is not None

    def add(self, rows: Rows, vectors: Floats) -> None:
        """Add or change items: rows int32 [n] with vectors float32 [n, D]. The last of a repeated row wins."""
        rows = np.asarray(rows, np.int32)
        vectors = np.asarray(vectors, np.float32)
        if vectors.shape != (len(rows), self.dim):
            raise ValueError(f"vectors of shape {vectors.shape} for {len(rows)} rows of {self.dim} dimensions")
        last = {row: i for i, row in enumerate(rows.tolist())}
        if len(last) < len(rows):
            keep = list(last.values())
            rows, vectors = rows[keep], vectors[keep]
        if self._snapshot is not None:
            self._snapshot.kill(rows)
        self._dense.put(rows, vectors)
        self._note(rows)

    def update(self, rows: Rows, vectors: Floats) -> None:
        """The same as ``add``: a row that is there is changed, another one added."""
        self.add(rows, vectors)

    def remove(self, rows: Rows) -> None:
        """Take items out; rows that are not there are ignored."""
        rows = np.asarray(rows, np.int32)
        if self._snapshot is not None:
            self._snapshot.kill(rows)
        self._dense.remove(rows)
        self._note(rows)

    def search(self, queries: Floats, k: int) -> tuple[Rows, Floats]:
        """Return the ``k`` best rows of each query, best first: rows int32 [n, k], scores float32 [n, k].

        queries: float32 [n, D]. Padded with row -1 and score -inf where fewer are found.
        """
        self._maintain()
        queries = np.ascontiguousarray(queries, np.float32)
        faiss.omp_set_num_threads(self.config.threads)
        if self._snapshot is None:
            return self._dense.search(queries, k)
        rows, scores = self._snapshot.search(queries, k)
        if self._dense.count:
            newer_rows, newer_scores = self._dense.search(queries, k)
            rows, scores = best_of([rows, newer_rows], [scores, newer_scores], k)
        return rows, scores

    def recall(self, queries: Floats, k: int = 100) -> float:
        """Return which part of the exact ``k`` best of each query [n, D] a search finds, from 0 to 1.

        Costs an exact search of everything where a graph answers, nothing where none does.
        """
        check = self.check_recall(queries, k)
        while (found := check.step()) is None:
            pass
        return found

    def check_recall(self, queries: Floats, k: int = 100) -> RecallCheck:
        """Begin to compare a search of this moment with an exact one, see ``recall``; items may change meanwhile."""
        queries = np.ascontiguousarray(queries, np.float32)
        found, _ = self.search(queries, k)
        return RecallCheck(queries, found, *self._dense.search(queries, k), self._snapshot)

    def take_over(self) -> None:
        """Take over a build that is done, if one is; search does the same."""
        self._maintain()

    def settle(self) -> None:
        """Wait for a build under way and take it over: for start-up, tests and benchmarks."""
        while self._builder is not None:
            self._builder.join()
            self._maintain()

    def close(self) -> None:
        """End a build under way; the index still searches."""
        self._stop.set()
        if self._builder is not None:
            self._builder.join()
            self._builder = None
            self._built = None

    def _note(self, rows: Rows) -> None:
        if self._builder is not None:
            self._changed.update(rows.tolist())
        self._maintain()

    def _maintain(self) -> None:
        if self._builder is not None:
            if self._builder.is_alive():
                return
            self._builder = None
            if self._built is not None:
                self._take_over(self._built)
        live = len(self)
        pending = self._dense.count + (self._snapshot.dead if self._snapshot else 0)
        if self._snapshot is not None and live < self.config.exact_below // 2:
            self._dense.put(*self._snapshot.alive_items())
            self._snapshot = None
        elif (
            live >= max(1, self.config.exact_below)
            and not self._stop.is_set()
            and pending >= max(self.config.rebuild_minimum, self.config.rebuild_fraction * live, self._retry_at)
        ):
            self._start_build(pending)

    def _all_items(self) -> tuple[Rows, Floats]:
        rows, vectors = self._dense.rows.copy(), self._dense.vectors.copy()
        if self._snapshot is None:
            return rows, vectors
        old_rows, old_vectors = self._snapshot.alive_items()
        return np.concatenate([old_rows, rows]), np.concatenate([old_vectors, vectors])

    def _start_build(self, pending: int) -> None:
        rows, vectors = self._all_items()
        self._changed = set()
        self._retry_at = pending + self.config.rebuild_minimum  # in force only if this build fails

        def build() -> None:
            try:
                self._built = _build(rows, vectors, self.config, self._stop)
            except Exception as error:
                self.build_error = error

        self._builder = threading.Thread(target=build, name="index-build", daemon=True)
        self._builder.start()

    def _take_over(self, built: _Snapshot) -> None:
        self._built = None
        changed = np.fromiter(self._changed, np.int32, len(self._changed))
        built.kill(changed)
        keep = np.isin(self._dense.rows, changed)
        newer = _Dense(self.dim)
        newer.put(self._dense.rows[keep], self._dense.vectors[keep])
        self._dense, self._snapshot = newer, built
        self._changed = set()
        self._retry_at = 0
        self.build_error = None
        self.builds += 1


def best_of(rows: list[Rows], scores: list[Floats], k: int) -> tuple[Rows, Floats]:
    """Return the ``k`` best of several searches of the same queries [n, …], best first; ties keep their order."""
    all_rows, all_scores = np.concatenate(rows, axis=1), np.concatenate(scores, axis=1)
    best = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
    return at_columns(all_rows, best), at_columns(all_scores, best)


def exact_search(queries: Floats, rows: Rows, vectors: Floats, k: int) -> tuple[Rows, Floats]:
    """Return the ``k`` best of ``rows`` [m] by inner product, as ``VectorIndex.search`` does.

    queries: float32 [n, D], contiguous; vectors: float32 [m, D].
    """
    found = np.full((len(queries), k), -1, np.int32)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    take = min(k, len(rows))
    if take and len(queries):
        best, places = faiss.knn(queries, vectors, take, metric=faiss.METRIC_INNER_PRODUCT)
        found[:, :take] = np.where(places >= 0, rows[places], -1)
        scores[:, :take] = np.where(places >= 0, best, -np.inf)
    return found, scores


def run_behind_on(processors: Iterable[int]) -> None:
    """Have threads that give way run on these processors: for a process that keeps its others to one of them."""
    _behind.clear()
    _behind.update(processors)


def lower_priority() -> None:
    """Give way to other threads from now on: for a thread that builds, which must not stand before a slate.

    It runs on the processors of ``run_behind_on``, wherever the thread that started it has to stay. On Linux, and only
    there, a thread has a priority of its own; the main thread's is never changed.
    """
    if sys.platform == "linux" and threading.current_thread() is not threading.main_thread():
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BUILD_NICENESS)
        if _behind:
            # Where the host took some of them away since, it builds beside the others.
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, _behind)


def _build(rows: Rows, vectors: Floats, config: RetrievalConfig, stop: threading.Event) -> _Snapshot | None:
    lower_priority()
    faiss.omp_set_num_threads(config.threads)
    dim = vectors.shape[1]
    most = len(rows)
    index: Any
    if config.device == "cuda":
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, faiss.IndexFlatIP(dim))
        most = _GPU_MOST
    else:
        index = faiss.IndexHNSWFlat(dim, config.hnsw_neighbours, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = config.hnsw_build_width
        index.hnsw.efSearch = config.hnsw_search_width
    for start in range(0, len(rows), _BUILD_CHUNK):
        if stop.is_set():
            return None
        index.add(np.ascontiguousarray(vectors[start : start + _BUILD_CHUNK]))
    return _Snapshot(index, rows, most)


def _gpu_ready() -> bool:
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
