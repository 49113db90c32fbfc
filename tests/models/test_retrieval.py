from __future__ import annotations

import threading

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import retrieval
from models.errors import SettingsError
from models.retrieval import RetrievalConfig, VectorIndex, exact_search

EXACT = RetrievalConfig(exact_below=10**9)
GRAPH = RetrievalConfig(exact_below=1, rebuild_minimum=64, rebuild_fraction=0.2)
NEVER_AGAIN = RetrievalConfig(exact_below=1, rebuild_minimum=512, rebuild_fraction=1.0)
"""The graph is built once, over the first 512 items; what comes then stays beside it."""

Floats = npt.NDArray[np.float32]


def vectors_of(n: int, seed: int = 0, dim: int = 16) -> Floats:
    raw = np.random.default_rng(seed).standard_normal((n, dim))
    return np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), np.float32)


def rows_of(*rows: int) -> npt.NDArray[np.int32]:
    return np.array(rows, np.int32)


def graph_of(n: int, config: RetrievalConfig = NEVER_AGAIN) -> tuple[VectorIndex, Floats]:
    index, vectors = VectorIndex(16, config), vectors_of(n)
    index.add(np.arange(n, dtype=np.int32), vectors)
    index.settle()
    assert not index.is_exact
    return index, vectors


def test_best_rows_come_first() -> None:
    index = VectorIndex(2, EXACT)
    index.add(rows_of(7, 3, 9), np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32))
    rows, scores = index.search(np.array([[1, 0]], np.float32), 3)
    assert rows.tolist() == [[7, 9, 3]]
    assert scores[0].tolist() == pytest.approx([1, 0.6, 0])


def test_result_is_padded_where_fewer_items_are_there() -> None:
    index = VectorIndex(2, EXACT)
    index.add(rows_of(4), np.array([[1, 0]], np.float32))
    rows, scores = index.search(np.array([[1, 0], [0, 1]], np.float32), 3)
    assert rows.tolist() == [[4, -1, -1], [4, -1, -1]]
    assert scores[0].tolist() == [1, -np.inf, -np.inf]


def test_empty_index_finds_nothing() -> None:
    rows, _ = VectorIndex(2, GRAPH).search(np.array([[1, 0]], np.float32), 2)
    assert rows.tolist() == [[-1, -1]]


def test_no_query_is_no_result() -> None:
    rows, scores = graph_of(600)[0].search(np.zeros((0, 16), np.float32), 5)
    assert rows.shape == scores.shape == (0, 5)


def test_last_vector_of_a_repeated_row_wins() -> None:
    index = VectorIndex(2, EXACT)
    index.add(rows_of(1, 1), np.array([[1, 0], [0, 1]], np.float32))
    _, scores = index.search(np.array([[0, 1]], np.float32), 1)
    assert len(index) == 1
    assert scores.tolist() == [[1]]


def test_vectors_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="2 dimensions"):
        VectorIndex(2, EXACT).add(rows_of(1), np.ones((1, 3), np.float32))


def test_graph_finds_an_item_that_came_after_it_was_built() -> None:
    index, _ = graph_of(600)
    new = vectors_of(1, seed=9)
    index.add(rows_of(5_000), new)
    assert index.search(new, 1)[0].tolist() == [[5_000]]


def test_graph_does_not_find_a_removed_item() -> None:
    index, vectors = graph_of(600)
    index.remove(rows_of(17))
    rows, _ = index.search(vectors[17:18], 50)
    assert 17 not in rows
    assert -1 not in rows
    assert len(index) == 599


def test_item_that_is_removed_and_added_again_is_found_once() -> None:
    index, vectors = graph_of(600)
    index.remove(rows_of(17))
    index.add(rows_of(17), vectors[17:18])
    rows, _ = index.search(vectors[17:18], 50)
    assert (rows == 17).sum() == 1
    assert rows[0, 0] == 17


def test_changed_item_is_found_at_its_new_place_only() -> None:
    index, vectors = graph_of(600)
    index.update(rows_of(17), -vectors[17:18])
    assert index.search(-vectors[17:18], 1)[0].tolist() == [[17]]
    assert 17 not in index.search(vectors[17:18], 50)[0]


def test_search_asks_for_more_where_everything_near_is_removed() -> None:
    centre = vectors_of(1, seed=3)
    near = centre + 0.01 * vectors_of(60, seed=4)
    index = VectorIndex(16, NEVER_AGAIN)
    index.add(np.arange(600, dtype=np.int32), np.concatenate([near, vectors_of(540, seed=5)]).astype(np.float32))
    index.settle()
    index.remove(np.arange(60, dtype=np.int32))
    rows, _ = index.search(centre, 10)
    assert (rows >= 60).all()


def test_changes_during_a_build_are_replayed_on_the_new_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = vectors_of(600)
    index = VectorIndex(16, NEVER_AGAIN)
    build = retrieval._build

    def build_while_the_index_changes(*args: object) -> object:
        built = build(*args)  # type: ignore[arg-type]
        changed.wait(10)
        return built

    changed = threading.Event()
    monkeypatch.setattr(retrieval, "_build", build_while_the_index_changes)
    index.add(np.arange(600, dtype=np.int32), vectors)
    assert index.is_building
    index.remove(rows_of(1))
    index.update(rows_of(2), -vectors[2:3])
    index.add(rows_of(900), vectors_of(1, seed=11))
    assert index.search(vectors[3:4], 1)[0].tolist() == [[3]]  # answers while the build is under way
    changed.set()
    index.settle()
    assert not index.is_exact
    assert len(index) == 600
    assert 1 not in index.search(vectors[1:2], 50)[0]
    assert index.search(-vectors[2:3], 1)[0].tolist() == [[2]]
    assert index.search(vectors_of(1, seed=11), 1)[0].tolist() == [[900]]


def test_failed_build_leaves_an_index_that_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(retrieval, "_build", fail)
    index, vectors = VectorIndex(16, GRAPH), vectors_of(600)
    index.add(np.arange(600, dtype=np.int32), vectors)
    index.settle()
    assert isinstance(index.build_error, MemoryError)
    assert index.search(vectors[5:6], 1)[0].tolist() == [[5]]


def test_new_graph_is_built_when_too_much_has_changed() -> None:
    index, vectors = graph_of(1_000, GRAPH)
    assert index.builds == 1
    index.remove(np.arange(300, dtype=np.int32))
    index.settle()
    assert index.builds == 2
    assert index.recall(vectors[300:400], 10) > 0.95


def test_index_that_shrinks_far_below_the_limit_is_exact_again() -> None:
    index, vectors = graph_of(600, RetrievalConfig(exact_below=500, rebuild_minimum=500))
    index.remove(np.arange(500, dtype=np.int32))
    assert index.is_exact
    assert index.search(vectors[550:551], 1)[0].tolist() == [[550]]


def test_snapshot_that_gives_a_limited_number_of_neighbours_still_skips_the_dead() -> None:
    vectors = vectors_of(300)
    flat = faiss.IndexFlatIP(16)
    flat.add(vectors)
    snapshot = retrieval._Snapshot(flat, np.arange(300, dtype=np.int32), most=40)
    order = exact_search(vectors[:1], snapshot.rows, vectors, 300)[0][0]
    snapshot.kill(order[:20])
    rows, scores = snapshot.search(vectors[:1], 30)
    assert rows[0].tolist() == [*order[20:40].tolist(), *[-1] * 10]
    assert np.isneginf(scores[0, 20:]).all()


def test_row_that_is_killed_twice_counts_once() -> None:
    index, _ = graph_of(600)
    index.remove(rows_of(5, 5))
    index.remove(rows_of(5))
    assert len(index) == 599


def test_recall_of_the_graph_against_exact_search_is_high() -> None:
    index, vectors = graph_of(3_000)
    assert index.recall(vectors[:200], 20) >= 0.95


def test_recall_is_that_of_the_moment_at_which_its_check_began_whatever_changes_between_its_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retrieval, "_RECALL_CHUNK", 400)
    narrow = NEVER_AGAIN.model_copy(update={"hnsw_neighbours": 4, "hnsw_build_width": 8, "hnsw_search_width": 8})
    index, vectors = graph_of(1_000, narrow)
    index.add(np.arange(1_000, 1_050, dtype=np.int32), vectors_of(50, seed=3))
    everything = np.concatenate([vectors, vectors_of(50, seed=3)])
    queries = everything[990:1_010]
    found = index.search(queries, 50)[0]
    best = exact_search(queries, np.arange(1_050, dtype=np.int32), everything, 50)[0]
    expected = np.mean([len(np.intersect1d(t, f)) / 50 for t, f in zip(best, found, strict=True)])
    check = index.check_recall(queries, 50)
    steps = [check.step()]
    index.remove(best[:, :10].reshape(-1))
    index.add(np.arange(2_000, 2_100, dtype=np.int32), everything[900:1_000] * 2)
    steps += [check.step(), check.step()]
    assert steps[:2] == [None, None]
    assert expected < 0.95
    assert steps[2] == pytest.approx(expected)


def test_recall_of_exact_search_is_one() -> None:
    index = VectorIndex(16, EXACT)
    index.add(np.arange(500, dtype=np.int32), vectors_of(500))
    assert index.recall(vectors_of(50, seed=2), 20) == 1.0


def test_recall_counts_what_a_narrow_search_misses() -> None:
    narrow = RetrievalConfig(exact_below=1, hnsw_neighbours=4, hnsw_build_width=8, hnsw_search_width=8)
    index, vectors = graph_of(4_000, narrow)
    assert index.recall(vectors[:100], 50) < 0.9


def test_closed_index_builds_no_more_but_searches() -> None:
    index, vectors = graph_of(600)
    index.close()
    index.add(np.arange(600, 2_000, dtype=np.int32), vectors_of(1_400, seed=8))
    assert not index.is_building
    assert index.search(vectors[5:6], 1)[0].tolist() == [[5]]


@pytest.mark.skipif(retrieval._gpu_ready(), reason="this machine has a GPU that faiss can use")
def test_cuda_without_a_gpu_build_is_refused_with_the_way_out() -> None:
    with pytest.raises(SettingsError, match=r"retrieval\.device = cpu"):
        VectorIndex(4, RetrievalConfig(device="cuda"))


CHANGES = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "search"]), st.lists(st.integers(0, 40), min_size=1, max_size=20)),
    max_size=25,
)


@settings(deadline=None, max_examples=40)
@given(CHANGES, st.sampled_from([EXACT, RetrievalConfig(exact_below=8, rebuild_minimum=4, rebuild_fraction=0.3)]))
def test_any_order_of_changes_leaves_exactly_the_items_that_were_added_last(
    changes: list[tuple[str, list[int]]], config: RetrievalConfig
) -> None:
    index = VectorIndex(4, config)
    expected: dict[int, Floats] = {}
    for number, (change, rows) in enumerate(changes):
        if change == "add":
            vectors = vectors_of(len(rows), seed=number, dim=4)
            index.add(np.array(rows, np.int32), vectors)
            expected.update(zip(rows, vectors, strict=True))
        elif change == "remove":
            index.remove(np.array(rows, np.int32))
            for row in rows:
                expected.pop(row, None)
        else:
            index.search(vectors_of(2, seed=number, dim=4), 3)
    index.settle()
    found, scores = index.search(np.array([[1, 0, 0, 0]], np.float32), 64)
    there = found[0][found[0] >= 0].tolist()
    assert len(index) == len(expected)
    assert sorted(there) == sorted(expected)
    for row, score in zip(there, scores[0].tolist(), strict=False):
        assert score == pytest.approx(float(expected[row][0]), abs=1e-5)
