"""Vector index: time of a search and recall, beside exact search. Run: python -m benchmarks.index [items] [dim]"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from models.retrieval import RetrievalConfig, VectorIndex

Floats = npt.NDArray[np.float32]
BATCH = 64
K = 100
TOPICS = 1_000


def unit(x: npt.NDArray[np.floating]) -> Floats:
    """Return rows scaled to unit norm, float32."""
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def clustered(n: int, dim: int, rng: np.random.Generator) -> Floats:
    """Return unit vectors around topics, as texts lie, float32 [n, dim]."""
    centres = rng.standard_normal((TOPICS, dim))
    return unit(centres[rng.integers(0, TOPICS, n)] + 0.7 * rng.standard_normal((n, dim)))


def uniform(n: int, dim: int, rng: np.random.Generator) -> Floats:
    """Return unit vectors without any structure, the hardest case of a graph, float32 [n, dim]."""
    return unit(rng.standard_normal((n, dim)))


def milliseconds_per_query(index: VectorIndex, queries: Floats, repeats: int = 5) -> float:
    """Return the median time of one query in a batch of BATCH."""
    times = []
    for _ in range(repeats):
        for start in range(0, len(queries), BATCH):
            batch = queries[start : start + BATCH]
            began = time.perf_counter()
            index.search(batch, K)
            times.append((time.perf_counter() - began) / len(batch))
    return float(np.median(times) * 1e3)


def measure(name: str, make: Callable[[int, int, np.random.Generator], Floats], n: int, dim: int) -> None:
    """Print one line per way of searching."""
    rng = np.random.default_rng(7)
    vectors = make(n + 512, dim, rng)
    items, queries = vectors[:n], vectors[n:]
    rows = np.arange(n, dtype=np.int32)
    exact = VectorIndex(dim, RetrievalConfig(exact_below=n + 10**9))
    exact.add(rows, items)
    print(f"{name}, exact: {milliseconds_per_query(exact, queries):.3f} ms/query, recall@{K} 1.000")
    graph = VectorIndex(dim, RetrievalConfig(exact_below=1, rebuild_minimum=n // 2))
    began = time.perf_counter()
    graph.add(rows, items)
    graph.settle()
    built = time.perf_counter() - began
    print(
        f"{name}, graph: {milliseconds_per_query(graph, queries):.3f} ms/query, "
        f"recall@{K} {graph.recall(queries, K):.3f}, built in {built:.1f} s"
    )
    changed = rng.choice(rows, n // 20, replace=False)
    graph.remove(changed[: n // 40])
    began = time.perf_counter()
    for start in range(n // 40, n // 20, 64):
        part = changed[start : start + 64]
        graph.add(part, items[rng.integers(0, n, len(part))])
    per_change = (time.perf_counter() - began) / (n // 40) * 1e6
    print(
        f"{name}, graph with 2.5 % removed and 2.5 % changed: {milliseconds_per_query(graph, queries):.3f} ms/query, "
        f"recall@{K} {graph.recall(queries, K):.3f}, a change {per_change:.1f} us"
    )
    graph.close()


def main() -> None:
    """Print the figures for clustered and for uniform vectors."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    dim = int(sys.argv[2]) if len(sys.argv) > 2 else 64
    print(f"{n} items, {dim} dimensions, batches of {BATCH}, k = {K}")
    measure("clustered", clustered, n, dim)
    measure("uniform", uniform, n, dim)


if __name__ == "__main__":
    main()
