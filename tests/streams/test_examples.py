"""streams.examples through the pipeline: the record of an impression is the state just before it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from models.bootstrap import Space
from models.catalogue import Catalogue, SpaceVectors
from models.counters import ItemCounters
from models.ctr import CtrScorer
from models.events import Action, Event, ImpressedItem, Impression, Item, Request
from models.examples import LAGGED, REPLAYED, FeaturesRecord, decode_features, raw_slates
from models.features import COLUMNS, FeatureConfig, RawSlates, encode
from models.hashing import hash64, impression_id
from models.item_index import ItemIndex
from models.live_features import raw_from_state
from models.recommender import Recommender
from models.retrieval import VectorIndex
from models.serving import ServingModel
from streams.decode import Decoded
from streams.metrics import Metrics
from streams.pipeline import Pipeline, Prepared, TextVectors
from streams.settings import Settings

NOW_MS = 1_700_000_000_000
DIM = 64
EPOCH = 99


@dataclass
class Message:
    """The part of a message that the pipeline passes on."""

    topic: str = "events"
    partition: int = 0
    offset: int = 0
    timestamp: float = 0.0
    key: bytes | None = b"u"
    value: bytes | None = b""
    headers: Any = ()


def model(version: str, space_id: str, index: ItemIndex, seed: int = 0) -> ServingModel:
    """Return a model with the hand-set score and a random vector for each item."""
    random = np.random.default_rng(seed)
    vectors = SpaceVectors(DIM)
    for row in range(len(index)):
        vectors.set(row, random.normal(size=DIM), 1)
    space = Space(space_id, "encoder", np.eye(DIM, dtype=np.float32))
    return ServingModel(version, 1, space, None, None, vectors, VectorIndex(DIM))


@dataclass
class Broken:
    """A scorer that fails."""

    def logits(self, *_: Any) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        raise RuntimeError("broken")


@dataclass
class Recorder:
    """A scorer that keeps the features that it is given."""

    seen: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def logits(
        self, x: npt.NDArray[np.float32], items: npt.NDArray[np.float32], recents: npt.NDArray[np.float32], *_: Any
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        self.seen.append(x)
        return np.zeros(x.shape[:2], np.float32), np.zeros((*items.shape[:2], recents.shape[1]), np.float32)

    def log_odds(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return logits


@dataclass
class Bench:
    """A pipeline with a catalogue of ten items, and the table that it would write."""

    settings: Settings = field(default_factory=lambda: Settings(exploration={"randomised_share": 0.0}))
    now_ms: int = NOW_MS

    def __post_init__(self) -> None:
        self.index = ItemIndex()
        self.catalogue = Catalogue(self.index, DIM)
        for i in range(10):
            self.catalogue.upsert(Item(item_id=f"i{i}", published_at=NOW_MS - 3_600_000 * (i + 1)))
        self.counters = ItemCounters(self.index, self.settings.counters)
        self.counters.own(0)
        self.live = model("v1", "space", self.index)
        self.metrics = Metrics()
        recommender = Recommender(self.settings.recommender, self.catalogue, self.counters, self.live.vector_index)
        self.pipeline = Pipeline(
            self.settings,
            self.catalogue,
            self.counters,
            recommender,
            self.metrics,
            epoch=EPOCH,
            space_id=self.live.space_hash,
            generation=1,
            model_version="v1",
            space_name="space",
        )
        self.use(self.live)
        self.rows: dict[tuple[int, bytes], bytes] = {}
        self.offset = 0

    def use(self, live: ServingModel, *shadows: ServingModel) -> None:
        """Serve with ``live``, in its vectors, as a swap does."""
        self.catalogue.use(live.vectors)
        self.pipeline.use(live, list(shadows))

    def at(self, event: Event, offset: int | None = None) -> Decoded:
        """Return ``event`` at the next offset, or at one used before."""
        if offset is None:
            offset, self.offset = self.offset, self.offset + 1
        key = event.user_id.encode()
        time_ms = int(event.event_time) if isinstance(event.event_time, int) else 0
        return Decoded(event, Message(offset=offset, key=key), 0, offset, key, time_ms, time_ms)

    def prepare(self, *events: Decoded) -> Prepared:
        """Process one batch and keep its rows."""
        prepared = self.pipeline.prepare(
            events, lambda p, k: self.rows.get((p, k)), lambda p, u: None, TextVectors(), self.now_ms
        )
        self.rows.update(prepared.rows)
        return prepared

    def records(self, *events: Decoded) -> list[FeaturesRecord]:
        """Process one batch and return its features records."""
        return [decode_features(sent.value) for sent in self.prepare(*events).features]


def shown(items: str, event_id: str = "e", user: str = "u", **more: Any) -> Impression:
    """Return an impression of the items i0, i1, … whose digits are given."""
    impressed = [ImpressedItem(f"i{digit}", position=place) for place, digit in enumerate(items, start=1)]
    fields = {"event_time": NOW_MS} | more
    return Impression(event_id=event_id, user_id=user, items=impressed, **fields)


def click(item: str, event_id: str, user: str = "u", at_ms: int = NOW_MS) -> Action:
    """Return a click on the item of a digit."""
    return Action(event_id=event_id, event_time=at_ms, user_id=user, item_id=f"i{item}", action="click")


def clicks_of(record: FeaturesRecord) -> list[float]:
    """Return the decayed clicks of each item, at the longest half-life."""
    return [round(float(v), 1) for v in np.expm1(raw_slates([record]).counters[0, :, 3, 1].astype(np.float64))]


def test_a_click_of_the_same_batch_does_not_leak_into_the_counters_of_its_impression() -> None:
    bench = Bench()
    (record,) = bench.records(bench.at(click("1", "e1", "other")), bench.at(shown("12")), bench.at(click("2", "e2")))
    assert clicks_of(record) == [0.0, 0.0]
    (record,) = bench.records(bench.at(shown("12", "e3")))
    assert clicks_of(record) == [1.0, 1.0]


def test_the_row_is_that_before_the_impression_also_in_the_middle_of_a_batch() -> None:
    bench = Bench()
    first, second = bench.records(
        bench.at(shown("12", "e0")), bench.at(click("2", "e1")), bench.at(shown("23", "e2")), bench.at(click("3", "e3"))
    )
    assert (first.user_counts, second.user_counts) == ((0, 0, 0), (1, 1, 1))
    assert (list(first.shown_counts), list(second.shown_counts)) == ([0, 0], [1, 0])
    assert first.recent_items == b""
    assert second.recent_items == hash64("i2").to_bytes(8, "little")


def test_a_record_says_where_its_impression_lies_and_what_was_shown() -> None:
    bench = Bench()
    bench.offset = 41
    event = shown("31", "e0", request_id="r", session_id="s", context={"device": "phone"})
    event.items[0].propensity = 0.25
    (record,) = bench.records(bench.at(event))
    assert record.impression_id == impression_id(EPOCH, 0, 41)
    assert (record.user_id, record.partition, record.offset, record.time_ms) == ("u", 0, 41, NOW_MS)
    assert (record.surface, record.request_id, record.session_id) == ("default", "r", "s")
    assert record.context == {"device": "phone"}
    assert (record.space_id, record.model_version) == ("space", "v1")
    assert np.frombuffer(record.items, "<u8").tolist() == [hash64("i3"), hash64("i1")]
    assert np.frombuffer(record.positions, "<u2").tolist() == [1, 2]
    assert np.array_equal(np.frombuffer(record.propensities, "<f4"), [0.25, np.nan], equal_nan=True)
    assert np.frombuffer(record.age_seconds, "<f4").tolist() == [4 * 3600.0, 2 * 3600.0]


def test_an_item_shown_twice_in_one_impression_is_there_once() -> None:
    bench = Bench()
    (record,) = bench.records(bench.at(shown("313")))
    assert np.frombuffer(record.items, "<u8").tolist() == [hash64("i3"), hash64("i1")]


def test_an_item_that_nobody_knows_is_there_without_facts() -> None:
    bench = Bench()
    event = shown("1")
    event.items.append(ImpressedItem("unheard of"))
    (record,) = bench.records(bench.at(event))
    raw = raw_slates([record])
    assert raw.valid.tolist() == [[True, True]]
    assert np.isnan(raw.age_seconds[0, 1])


@pytest.mark.parametrize(
    ("fields", "policy"),
    [
        ({"experiment": "randomised", "request_id": "r"}, "randomised"),
        ({"experiment": "arm B"}, "external"),
        ({"request_id": "r", "experiment": "arm B"}, "arm B"),
        ({"request_id": "r"}, "model"),
    ],
)
def test_every_example_names_the_policy_that_made_it(fields: dict[str, str], policy: str) -> None:
    bench = Bench()
    (record,) = bench.records(bench.at(shown("1", **fields)))
    assert record.policy == policy


def test_an_impression_processed_late_is_marked() -> None:
    bench = Bench(now_ms=NOW_MS + 61_000)
    (record,) = bench.records(bench.at(shown("1")))
    assert record.flags == LAGGED
    assert bench.metrics.features_lagged._value.get() == 1


def test_an_impression_that_a_client_held_back_is_marked() -> None:
    bench = Bench()
    event = bench.at(shown("1", event_time=NOW_MS - 3_600_000))
    (record,) = bench.records(replace(event, broker_ms=NOW_MS))
    assert record.flags == LAGGED


def test_an_imported_impression_is_not_late_because_it_is_long_ago() -> None:
    bench = Bench(Settings(events={"clock": {"policy": "trusted"}}))
    event = bench.at(shown("1", event_time=NOW_MS - 10**10))
    (record,) = bench.records(replace(event, broker_ms=NOW_MS))
    assert record.flags == 0


@pytest.mark.parametrize("one_batch", [True, False])
def test_an_impression_that_comes_behind_its_own_click_is_marked(one_batch: bool) -> None:
    bench = Bench()
    early, late = bench.at(click("2", "c", at_ms=NOW_MS + 900)), bench.at(shown("123"))
    if not one_batch:
        bench.prepare(early)
    (record,) = bench.records(*([early, late] if one_batch else [late]))
    assert hash64("i2") in np.frombuffer(record.recent_items, "<u8")
    assert record.flags == LAGGED


def test_an_impression_after_a_click_of_the_same_second_is_not_marked() -> None:
    bench = Bench()
    (record,) = bench.records(bench.at(click("2", "c")), bench.at(shown("123", event_time=NOW_MS + 900)))
    assert record.flags == 0


def test_counters_that_a_crash_left_ahead_of_the_rows_mark_their_impression() -> None:
    bench = Bench()
    batch = [bench.at(shown("123")), bench.at(click("2", "c", at_ms=NOW_MS + 1_000))]
    bench.prepare(*batch)
    bench.rows.clear()
    (record,) = bench.records(*batch)
    assert clicks_of(record) == [0.0, 1.0, 0.0]
    assert record.flags == REPLAYED


def test_a_replayed_impression_is_sent_again_under_its_id_and_marked() -> None:
    bench = Bench()
    event = shown("12")
    (first,) = bench.records(bench.at(event))
    (again,) = bench.records(bench.at(event, offset=0))
    assert (again.impression_id, again.flags, first.flags) == (first.impression_id, REPLAYED, 0)


def test_a_clients_retry_of_an_impression_has_no_record() -> None:
    bench = Bench()
    assert len(bench.records(bench.at(shown("12")), bench.at(shown("12")))) == 1


def test_records_can_be_turned_off() -> None:
    bench = Bench(Settings(examples={"enabled": False}))
    assert bench.records(bench.at(shown("12"))) == []


def test_records_go_to_the_partition_and_key_of_their_event() -> None:
    bench = Bench()
    (sent,) = bench.prepare(bench.at(shown("12", user="Zoë"))).features
    assert (sent.partition, sent.key) == (0, "Zoë".encode())


def test_live_and_shadow_models_say_what_they_would_have_said() -> None:
    bench = Bench()
    bench.use(bench.live, model("v2", "other space", bench.index, seed=1))
    for i in range(5):
        bench.prepare(bench.at(click("3", f"c{i}")))
    (record,) = bench.records(bench.at(shown("312")))
    scores = {version: np.frombuffer(values, "<f4") for version, values in record.scores}
    assert list(scores) == ["v1", "v2"]
    assert [v.shape for v in scores.values()] == [(3,), (3,)]
    # The same hand-set score, but each with the similarities of its own space.
    assert not np.allclose(scores["v1"], scores["v2"], atol=1e-3)
    assert scores["v1"].argmax() == scores["v2"].argmax() == 0


def test_a_model_reads_the_same_columns_whether_the_live_one_encodes_alike_or_not() -> None:
    seen = []
    for features in (FeatureConfig(), FeatureConfig(prior_strength=7.0)):
        bench, recorder = Bench(), Recorder()
        live = replace(bench.live, scorer=cast(CtrScorer, Recorder()), features=features)
        other = model("v2", "other space", bench.index, seed=1)
        bench.use(live, replace(other, scorer=cast(CtrScorer, recorder), features=FeatureConfig()))
        for i in range(5):
            bench.prepare(bench.at(click("3", f"c{i}")))
        bench.records(bench.at(shown("312")))
        seen.append(recorder.seen[-1])
    assert seen[0][0, :, COLUMNS.index("sim_short")].any()
    assert seen[0].tobytes() == seen[1].tobytes()


def test_a_shadow_model_that_fails_costs_its_scores_and_nothing_else() -> None:
    bench = Bench()
    other = model("v2", "other space", bench.index)
    broken = replace(other, scorer=cast(CtrScorer, Broken()), features=FeatureConfig())
    bench.use(bench.live, broken)
    (record,) = bench.records(bench.at(shown("312")))
    assert [version for version, _ in record.scores] == ["v1"]
    assert bench.metrics.processing_errors.labels("shadow")._value.get() == 1


def test_an_impression_that_our_code_fails_on_costs_its_own_record_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(rows: Any, item_rows: Any, *args: Any, **kwargs: Any) -> RawSlates:
        if (item_rows == 7).any():
            raise RuntimeError("broken")
        return raw_from_state(rows, item_rows, *args, **kwargs)

    monkeypatch.setattr("streams.examples.raw_from_state", failing)
    bench = Bench()
    prepared = bench.prepare(bench.at(shown("12", "a")), bench.at(shown("7", "b")), bench.at(shown("3", "c")))
    assert [decode_features(sent.value).offset for sent in prepared.features] == [0, 2]
    assert prepared.refused == []
    assert len(prepared.outcomes) == 3


def test_wide_and_narrow_impressions_come_back_in_their_order() -> None:
    bench = Bench()
    for i in range(600):
        bench.catalogue.upsert(Item(item_id=f"w{i}"))
    wide = [shown("1", f"e{n}") for n in range(40)]
    for n in (3, 20):
        wide[n].items = [ImpressedItem(f"w{i}") for i in range(500)]
    records = bench.records(*[bench.at(event) for event in wide])
    assert [record.offset for record in records] == list(range(40))
    assert [len(record) for record in records if len(record) > 1] == [500, 500]


def test_serving_and_training_see_the_same_features_to_the_bit() -> None:
    """A request with candidates, then the impression of those items at the same time: X of both, and of the record."""
    bench = Bench(now_ms=NOW_MS + 61_234)
    random = np.random.default_rng(5)
    for n in range(60):
        at_ms = NOW_MS + 1_000 * n
        items = "".join(random.permutation(list("0123456789"))[:5])
        user = str(random.choice(["u", "v", "w"]))
        bench.prepare(bench.at(shown(items, f"s{n}", user, event_time=at_ms)))
        bench.prepare(bench.at(click(items[0], f"c{n}", user, at_ms)))
    recorder = Recorder()
    bench.use(replace(bench.live, scorer=cast(CtrScorer, recorder), features=FeatureConfig()))
    candidates = [f"i{digit}" for digit in "4082"]
    request = Request(event_id="r", event_time=bench.now_ms, user_id="u", request_id="r", candidates=candidates, k=2)
    (slate,) = bench.prepare(bench.at(request)).slates
    assert len(slate.record.items) == 2
    (record,) = bench.records(bench.at(shown("4082", "last", event_time=bench.now_ms)))
    served, logged = recorder.seen
    trained = encode(raw_slates([record]), FeatureConfig())
    for name in ("clicks_first", "sim_short", "shown_count", "user_ctr", "ctr_fourth_gap"):
        assert trained[0, :, COLUMNS.index(name)].any(), name
    assert served.tobytes() == logged.tobytes() == trained.tobytes()
