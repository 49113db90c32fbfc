"""What the two topics do to catalogue and index, without a broker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.bootstrap import Space
from models.catalogue import Catalogue
from models.encoder import content_hash
from models.errors import RecordError
from models.events import Item
from models.item_index import ItemIndex
from models.retrieval import VectorIndex
from streams import item_vectors
from streams.catalogue_mirror import CatalogueState

ENCODER = "an-encoder@1/mean64"
NOW = 1_700_000_000_000
EAST = np.array([1, 0, 0, 0], np.float32)
NORTH = np.array([0, 1, 0, 0], np.float32)


@dataclass
class Raw:
    key: bytes | None
    value: bytes | None
    topic: str = "t"
    partition: int = 0
    offset: int = 0
    timestamp: int = 0
    headers: Sequence[tuple[str, bytes]] = ()


def new_state() -> CatalogueState:
    space = Space("a-space", ENCODER, np.eye(4, dtype=np.float32))
    return CatalogueState(Catalogue(ItemIndex(), 4), VectorIndex(4), space)


def item(item_id: str, title: str = "a title", **fields: object) -> Raw:
    return Raw(item_id.encode(), msgspec.json.encode({"item_id": item_id, "title": title, **fields}))


def vector(item_id: str, values: np.ndarray, title: str = "a title", encoder_id: str = ENCODER) -> Raw:
    hashed = content_hash(Item(item_id=item_id, title=title))
    return Raw(item_vectors.key(encoder_id, item_id), item_vectors.value(hashed, values))


def findable(state: CatalogueState) -> list[str]:
    rows, _ = state.index.search(np.ones((1, 4), np.float32), 20)
    return sorted(state.catalogue.index.item_id(r) for r in rows[0].tolist() if r >= 0)


def test_item_is_findable_when_item_and_encoding_are_there() -> None:
    state = new_state()
    state.apply_items([item("a")], NOW)
    assert findable(state) == []
    state.apply_vectors([vector("a", EAST)], NOW)
    assert findable(state) == ["a"]
    assert not state.catalogue.needs_encoding(0)


def test_encoding_that_comes_before_its_item_waits_for_it() -> None:
    state = new_state()
    state.apply_vectors([vector("a", EAST)], NOW)
    assert findable(state) == []
    state.apply_items([item("a")], NOW)
    assert findable(state) == ["a"]


def test_encoding_of_an_older_title_serves_until_the_new_one_is_there() -> None:
    state = new_state()
    state.apply_items([item("a", "new title")], NOW)
    state.apply_vectors([vector("a", EAST, "old title")], NOW)
    assert findable(state) == ["a"]
    assert state.catalogue.needs_encoding(0)


def test_encoding_of_another_encoder_is_passed_over() -> None:
    state = new_state()
    state.apply_items([item("a")], NOW)
    assert state.apply_vectors([vector("a", EAST, encoder_id="another@2/mean64")], NOW) == []
    assert findable(state) == []


@pytest.mark.parametrize("change", [item("a", is_hidden=True), Raw(b"a", None), item("a", expires_at=NOW)])
def test_hidden_removed_or_expired_item_is_not_found(change: Raw) -> None:
    state = new_state()
    state.apply_items([item("a"), item("b")], NOW)
    state.apply_vectors([vector("a", EAST), vector("b", NORTH)], NOW)
    state.apply_items([change], NOW)
    assert findable(state) == ["b"]


def test_item_whose_encoding_was_taken_away_is_not_found() -> None:
    state = new_state()
    state.apply_items([item("a")], NOW)
    state.apply_vectors([vector("a", EAST), Raw(item_vectors.key(ENCODER, "a"), None)], NOW)
    assert findable(state) == []


def test_sweep_takes_out_what_has_expired_since() -> None:
    state = new_state()
    state.apply_items([item("a", expires_at=NOW + 1), item("b")], NOW)
    state.apply_vectors([vector("a", EAST), vector("b", NORTH)], NOW)
    assert state.sweep(NOW) == 0
    assert state.sweep(NOW + 1) == 1
    assert findable(state) == ["b"]
    assert state.sweep(NOW + 2) == 0


def test_embedding_of_the_item_moves_its_vector_also_when_the_encoding_comes_later() -> None:
    first, second = new_state(), new_state()
    record = item("a", embedding=[1.0, -2.0, 0.5])
    first.apply_items([record], NOW)
    first.apply_vectors([vector("a", EAST)], NOW)
    second.apply_vectors([vector("a", EAST)], NOW)
    second.apply_items([record], NOW)
    assert first.catalogue.vectors[0].tolist() == second.catalogue.vectors[0].tolist()
    assert first.catalogue.vectors[0].tolist() != EAST.tolist()


def test_embedding_that_the_next_record_lacks_is_forgotten() -> None:
    state = new_state()
    state.apply_items([item("a", embedding=[1.0, -2.0, 0.5])], NOW)
    state.apply_vectors([vector("a", EAST)], NOW)
    state.apply_items([item("a")], NOW)
    assert state.catalogue.vectors[0].tolist() == EAST.tolist()


def test_bad_records_are_returned_with_their_reason_and_change_nothing() -> None:
    state = new_state()
    refused = state.apply_items([Raw(b"a", b"{"), Raw(b"b", b'{"item_id":"c"}'), Raw(None, b'{"item_id":"d"}')], NOW)
    assert [error.reason for _, error in refused] == ["malformed", "key-mismatch", "key-mismatch"]
    assert len(state.catalogue.index) == 0


def test_encoding_of_a_wrong_size_is_returned_as_refused() -> None:
    state = new_state()
    [(_, error)] = state.apply_vectors([vector("a", np.ones(5, np.float32))], NOW)
    assert error.reason == "invalid"


def test_value_that_is_no_encoding_is_malformed() -> None:
    with pytest.raises(RecordError, match="malformed"):
        item_vectors.decode(b"\xc0nonsense", 4)


def test_item_id_survives_the_key() -> None:
    key = item_vectors.key(ENCODER, "naïve\0id")
    assert item_vectors.item_id_of(key, item_vectors.key_prefix(ENCODER)) == "naïve\0id"


CHANGES = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from(["show", "hide", "remove", "encode", "take-away"])), max_size=12
)


@given(CHANGES, st.integers(1, 5))
def test_findable_items_depend_on_the_last_records_alone_and_not_on_the_batches(
    changes: list[tuple[str, str]], batch: int
) -> None:
    state = new_state()
    shown: dict[str, bool] = {}
    encoded: dict[str, bool] = {}
    for start in range(0, len(changes), batch):
        items, vectors = [], []
        for item_id, change in changes[start : start + batch]:
            if change == "encode":
                vectors.append(vector(item_id, EAST))
                encoded[item_id] = True
            elif change == "take-away":
                vectors.append(Raw(item_vectors.key(ENCODER, item_id), None))
                encoded[item_id] = False
            else:
                items.append(
                    Raw(item_id.encode(), None) if change == "remove" else item(item_id, is_hidden=change == "hide")
                )
                shown[item_id] = change == "show"
        state.apply_items(items, NOW)
        state.apply_vectors(vectors, NOW)
    assert findable(state) == [i for i in "ab" if shown.get(i) and encoded.get(i)]
