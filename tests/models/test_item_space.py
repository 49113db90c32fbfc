"""Encodings and spaces without a broker: what a build aside and what came meanwhile make of the same records."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.bootstrap import Space
from models.catalogue import Catalogue, SpaceVectors
from models.encoder import content_hash
from models.events import Item
from models.hashing import hash64
from models.item_index import ItemIndex
from models.item_space import BaseEncodings, ItemSpace
from models.retrieval import RetrievalConfig, VectorIndex

NOW = 1_700_000_000_000
ENCODER = "an-encoder@1/mean64"
EAST, NORTH = np.eye(4, dtype=np.float16)[:2]
ROW = np.zeros(1, np.int32)


def space(**given: object) -> Space:
    return Space("a-space", ENCODER, np.eye(4, dtype=np.float32), **given)  # type: ignore[arg-type]


def item_space(catalogue: Catalogue, encodings: BaseEncodings, lies_in: Space | None = None) -> ItemSpace:
    return ItemSpace(lies_in or space(), encodings, catalogue, SpaceVectors(4), VectorIndex(4))


def one_item() -> tuple[Catalogue, BaseEncodings]:
    catalogue = Catalogue(ItemIndex(), 4)
    catalogue.upsert(Item(item_id="a", title="a title"))
    return catalogue, BaseEncodings(ENCODER, 4)


def found(items: ItemSpace) -> list[int]:
    rows, _ = items.index.search(np.ones((1, 4), np.float32), 50)
    return sorted(row for row in rows[0].tolist() if row >= 0)


def test_residual_moves_the_vector_of_its_item_alone() -> None:
    moved = space(
        residual_items=np.array([hash64("b"), hash64("a")], np.uint64),
        residuals=np.array([[0, 0, 9, 0], [0, 1, 0, 0]], np.float32),
    )
    items = np.array([hash64("a"), hash64("c")], np.uint64)
    vectors = moved.item_vectors(np.array([EAST, EAST]), items)
    assert vectors[0].tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 0, 0])
    assert vectors[1].tolist() == EAST.tolist()


def test_item_without_an_encoding_has_no_vector_whatever_its_residual() -> None:
    residual = space(residual_items=np.array([hash64("a")], np.uint64), residuals=np.ones((1, 4), np.float32))
    assert not residual.item_vectors(np.zeros((1, 4), np.float32), np.array([hash64("a")], np.uint64)).any()


def test_residuals_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="residuals"):
        space(residual_items=np.array([1], np.uint64), residuals=np.ones((1, 3), np.float32))


def test_spaces_are_the_same_by_what_they_do_and_not_by_their_ids() -> None:
    other = Space("another-id", ENCODER, np.eye(4, dtype=np.float32))
    residual = space(residual_items=np.array([1], np.uint64), residuals=np.ones((1, 4), np.float32))
    assert space().same_as(other)
    assert not space().same_as(residual)
    assert not space().same_as(Space("a-space", ENCODER, 2 * np.eye(4, dtype=np.float32)))
    assert not space().same_as(Space("a-space", "another-encoder", np.eye(4, dtype=np.float32)))


def test_catalogue_answers_in_the_space_that_it_was_told_to_use() -> None:
    catalogue, _ = one_item()
    catalogue.set_vector(0, EAST)
    other = SpaceVectors(4, capacity=1)
    other.set(0, NORTH, 0)
    catalogue.use(other)
    assert catalogue.vectors_of(ROW)[0].tolist() == [NORTH.tolist()]
    assert catalogue.needs_encoding(0)


def test_vectors_that_are_used_grow_with_the_catalogue() -> None:
    catalogue, _ = one_item()
    catalogue.use(SpaceVectors(4, capacity=1))
    for n in range(3_000):
        catalogue.upsert(Item(item_id=f"i{n}", title="t"))
    assert catalogue.vectors[3_000].tolist() == [0, 0, 0, 0]


def test_encoding_that_a_bundle_brings_gives_way_to_one_from_the_topic() -> None:
    encodings = BaseEncodings(ENCODER, 4)
    encodings.set(0, NORTH, 7)
    assert encodings.bring(ROW, np.array([1], np.uint64), np.array([8], np.uint64), EAST[None]) == []
    assert encodings.take(ROW)[0].tolist() == [NORTH.tolist()]


def test_encoding_that_a_bundle_brings_for_an_item_not_known_yet_waits_for_it() -> None:
    encodings = BaseEncodings(ENCODER, 4)
    unknown = np.array([-1], np.int32)
    assert encodings.bring(unknown, np.array([hash64("a")], np.uint64), np.array([8], np.uint64), EAST[None]) == []
    assert not encodings.welcome(0, "b")
    assert encodings.welcome(0, "a")
    assert encodings.take(ROW)[0].tolist() == [EAST.tolist()]
    assert not encodings.welcome(0, "a")


def test_encoding_taken_away_while_older_ones_are_read_again_is_not_brought_back_by_a_bundle() -> None:
    encodings = BaseEncodings(ENCODER, 4)
    encodings.seen = set()
    encodings.set(0, None, 0)
    assert encodings.bring(ROW, np.array([1], np.uint64), np.array([8], np.uint64), EAST[None]) == []


def test_space_of_another_encoder_is_refused() -> None:
    catalogue, _ = one_item()
    with pytest.raises(ValueError, match="another"):
        item_space(catalogue, BaseEncodings("another", 4))


def test_build_ends_when_it_is_told_to_stop() -> None:
    catalogue, encodings = one_item()
    stop = threading.Event()
    stop.set()
    assert not item_space(catalogue, encodings).build({}, NOW, stop)


def test_build_that_fails_raises_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("models.retrieval._build", no_room)
    catalogue, encodings = one_item()
    for n in range(100):
        row = catalogue.upsert(Item(item_id=f"i{n}", title="t"))
        encodings.set(row, EAST, 1)
    items = ItemSpace(
        space(),
        encodings,
        catalogue,
        SpaceVectors(4),
        VectorIndex(4, RetrievalConfig(exact_below=10, rebuild_minimum=1, hnsw_neighbours=4)),
    )
    with pytest.raises(MemoryError):
        items.build({}, NOW, threading.Event())


STEPS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(["encode", "encode-north", "take-away", "hide", "show", "remove"])),
    max_size=30,
)


@given(STEPS, STEPS, st.integers(1, 4))
def test_space_built_aside_and_caught_up_is_the_one_that_followed_every_change(
    before: list[tuple[int, str]], meanwhile: list[tuple[int, str]], most: int
) -> None:
    catalogue, encodings = Catalogue(ItemIndex(), 4), BaseEncodings(ENCODER, 4)
    follows = item_space(catalogue, encodings)

    def change(number: int, what: str) -> int:
        row = catalogue.index.add(f"item-{number}")
        if what.startswith("encode"):
            encodings.set(row, NORTH if what == "encode-north" else EAST, content_hash(Item(item_id="a", title=what)))
        elif what == "take-away":
            encodings.set(row, None, 0)
        elif what == "remove":
            catalogue.remove(f"item-{number}")
        else:
            catalogue.upsert(Item(item_id=f"item-{number}", title="t", is_hidden=what == "hide"))
        rows = np.array([row], np.int32)
        follows.refresh(rows, {})
        follows.reindex(rows, NOW)
        return row

    for number, what in before:
        change(number, what)
    built = item_space(catalogue, encodings)
    assert built.build({}, NOW, threading.Event())
    built.changed.update(change(number, what) for number, what in meanwhile)
    while not built.catch_up({}, NOW, most):
        pass
    rows = np.arange(len(catalogue.index), dtype=np.int32)
    assert found(built) == found(follows)
    assert built.vectors.of(rows)[0].tolist() == follows.vectors.of(rows)[0].tolist()
    assert built.vectors.of(rows)[1].tolist() == follows.vectors.of(rows)[1].tolist()
