"""Nearest items by vector: an index that takes additions, changes and removals while it serves.

Exact search below a size; above it an HNSW graph over a snapshot (Malkov and Yashunin 2016) beside a small exact
segment with everything newer. Changed and removed items are tombstones in the graph; a new graph is built aside when
the dead and the newer ones are too many. Legend of shapes: D = dimensions, n = any number, k = neighbours asked for.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

Rows = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


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


class VectorIndex:
    """Rows of the catalogue by inner product with a query.

    All calls come from one thread (the worker's executor). A build runs in a thread of its own on a copy; its result
    is taken over inside the next call, by one assignment.
    """

    def __init__(self, dim: int, config: RetrievalConfig | None = None) -> None:
        self.dim = dim
        self.config = config or RetrievalConfig()
        self._vectors = np.zeros((0, dim), np.float32)
        self._rows = np.zeros(0, np.int32)

    def __len__(self) -> int:
        """Items that a search can find."""
        return int(self._rows.shape[0])

    def add(self, rows: Rows, vectors: Floats) -> None:
        """Add or change items: rows int32 [n] with vectors float32 [n, D]. The last of a repeated row wins."""
        self.remove(rows)
        last = {int(r): i for i, r in enumerate(rows)}
        keep = list(last.values())
        self._rows = np.concatenate([self._rows, np.asarray(rows, np.int32)[keep]])
        self._vectors = np.concatenate([self._vectors, np.asarray(vectors, np.float32)[keep]])

    def update(self, rows: Rows, vectors: Floats) -> None:
        """The same as ``add``: a row that is there is changed, another one added."""
        self.add(rows, vectors)

    def remove(self, rows: Rows) -> None:
        """Take items out; rows that are not there are ignored."""
        keep = ~np.isin(self._rows, rows)
        self._rows, self._vectors = self._rows[keep], self._vectors[keep]

    def search(self, queries: Floats, k: int) -> tuple[Rows, Floats]:
        """Return the ``k`` best rows of each query, best first: rows int32 [n, k], scores float32 [n, k].

        Padded with row -1 and score -inf where fewer are there.
        """
        n = queries.shape[0]
        rows = np.full((n, k), -1, np.int32)
        scores = np.full((n, k), -np.inf, np.float32)
        take = min(k, len(self))
        if take:
            all_scores = queries.astype(np.float32) @ self._vectors.T
            best = np.argsort(-all_scores, axis=1, kind="stable")[:, :take]
            rows[:, :take] = self._rows[best]
            scores[:, :take] = np.take_along_axis(all_scores, best, 1)
        return rows, scores
