from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import RowError
from models.events import Action, ImpressedItem, Impression, Request
from models.hashing import hash64, short_hash
from models.user_row import NEGATIVE, POSITIVE, Rows, empty_rows, forget, recent, shown
from models.user_state import (
    ACTION,
    IMPRESSION,
    REQUEST,
    Outcome,
    UserEvent,
    UserReader,
    UserStateConfig,
    VectorSource,
    apply,
    user_event,
    user_vectors,
)
from tests.models.user_state_logs import (
    CONFIG,
    START_MS,
    ItemVectors,
    click,
    event,
    impression,
    logs,
    moved_to,
    same_as_reference,
)
from tests.models.user_state_reference import ReferenceRow, World

Vector = npt.NDArray[np.float32]
EPOCH, SPACE, GENERATION = 11, 22, 3
SURFACES = ("front", "mail")
HALF = ItemVectors(range(0, 30, 2))
ALL = ItemVectors(range(30))
OTHER_SPACE = ItemVectors(range(30), seed=1)
STRONG = CONFIG.model_copy(
    update={
        "base_rates": {"mail": 0.3},
        "attribution_windows_seconds": {"mail": 60},
        "unclicked_weight": 1.0,
        "unclicked_max_share": 0.2,
        "weight_decay": 0.5,
    }
)
"""Negatives and shrink strong enough to be seen beside fp16's rounding."""


def run(
    rows: Rows,
    events: list[UserEvent],
    vectors: VectorSource = ALL,
    config: UserStateConfig = CONFIG,
    *,
    epoch: int = EPOCH,
    space_id: int = SPACE,
    generation: int = GENERATION,
) -> Rows:
    new, _ = apply(
        rows, events, vectors, config, epoch=epoch, space_id=space_id, generation=generation, surfaces=SURFACES
    )
    return new


def outcomes(rows: Rows, events: list[UserEvent], epoch: int = EPOCH) -> list[int]:
    _, done = apply(rows, events, ALL, CONFIG, epoch=epoch, space_id=SPACE, generation=GENERATION)
    return [int(o) for o in done]


def one_by_one(rows: Rows, events: list[UserEvent], vectors: VectorSource = ALL) -> Rows:
    for single in events:
        rows = run(rows, [single], vectors)
    return rows


def cosine(a: Vector, b: Vector) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def vector(item: int) -> Vector:
    return ALL.by_full[hash64(str(item))]


# --- the batch, the one-by-one form and the reference


@given(logs())
def test_a_batch_gives_the_same_bytes_as_its_events_one_by_one(log: list[UserEvent]) -> None:
    assert run(empty_rows(3), log).tobytes() == one_by_one(empty_rows(3), log).tobytes()


@settings(max_examples=150, deadline=None)
@given(logs(), st.data())
def test_a_batch_equals_the_plain_reference_through_new_items_new_spaces_and_lagging_workers(
    log: list[UserEvent], data: st.DataObject
) -> None:
    rows, references = empty_rows(3), [ReferenceRow() for _ in range(3)]
    stages: list[tuple[ItemVectors, int, int]] = [
        (HALF, SPACE, 3),
        (ALL, SPACE, 3),
        (OTHER_SPACE, 77, 4),
        (ALL, SPACE, 3),
    ]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(log)), min_size=3, max_size=3)))
    parts = [log[a:b] for a, b in zip([0, *cuts], [*cuts, len(log)], strict=True)]
    for part, (source, space_id, generation) in zip(parts, stages, strict=True):
        rows = run(rows, part, source, STRONG, space_id=space_id, generation=generation)
        vectors = {full: [float(x) for x in v] for full, v in source.by_full.items()}
        world = World(STRONG, vectors, EPOCH, space_id, generation, {1: 0.3}, {1: 60})
        for single in part:
            references[single.user].apply(single, world)
    same_as_reference(rows, references)


@given(logs(), st.permutations([0, 1, 2]))
def test_a_row_does_not_depend_on_its_place_or_on_the_other_users(log: list[UserEvent], places: list[int]) -> None:
    together = run(empty_rows(3), moved_to(log, places))
    for user in range(3):
        alone = run(empty_rows(3), [e for e in log if e.user == user])
        assert together[places[user]].tobytes() == alone[user].tobytes()


@given(logs(), st.integers(1, 9))
def test_the_size_of_the_batches_does_not_matter(log: list[UserEvent], size: int) -> None:
    rows = empty_rows(3)
    for at in range(0, len(log), size):
        rows = run(rows, log[at : at + size])
    assert rows.tobytes() == run(empty_rows(3), log).tobytes()


# --- guard


@given(logs(), st.integers(0, 40))
def test_a_repeated_suffix_of_the_log_changes_nothing(log: list[UserEvent], start: int) -> None:
    rows = run(empty_rows(3), log)
    assert run(rows, log[start:]).tobytes() == rows.tobytes()
    assert outcomes(rows, log[start:]) == [Outcome.REPLAYED] * len(log[start:])


@given(logs())
def test_the_rows_given_are_not_changed(log: list[UserEvent]) -> None:
    rows = run(empty_rows(3), log[: len(log) // 2])
    before = rows.tobytes()
    run(rows, log)
    assert rows.tobytes() == before


def test_a_retry_with_a_new_offset_moves_the_guard_and_nothing_else() -> None:
    first = run(empty_rows(1), [event(ACTION, [1], offset=4, event_id=9)])
    retry = event(ACTION, [1], offset=7, event_id=9, time_ms=START_MS + 60_000)
    again = run(first, [retry])
    assert outcomes(first, [retry]) == [Outcome.DUPLICATE]
    assert int(again["offset"][0]) == 8
    again["offset"] = first["offset"]
    assert again.tobytes() == first.tobytes()


def test_a_recreated_topic_starts_the_guard_again_and_keeps_the_state() -> None:
    rows = run(empty_rows(1), [click(1, offset=500)])
    assert outcomes(rows, [click(2, offset=0)], epoch=EPOCH + 1) == [Outcome.APPLIED]
    after = run(rows, [click(2, offset=0)], epoch=EPOCH + 1)
    assert int(after["clicks"][0]) == 2
    assert int(after["offset"][0]) == 1


def test_a_forgotten_user_stays_forgotten_when_the_log_is_read_again() -> None:
    log = [click(1, offset=3), click(2, offset=4)]
    marker = forget(run(empty_rows(1), log), [0])
    assert run(marker, log).tobytes() == marker.tobytes()


def test_a_forgotten_user_who_comes_back_starts_afresh() -> None:
    marker = forget(run(empty_rows(1), [click(1, offset=3), click(2, offset=4)]), [0])
    after = run(marker, [click(3, offset=5)])
    assert int(after["flags"][0]) == 0
    assert int(after["clicks"][0]) == 1
    assert recent(after)[0][0, :2].tolist() == [hash64("3"), 0]


# --- vectors


def test_a_click_moves_both_vectors_towards_the_item() -> None:
    rows = run(empty_rows(1), [click(1, offset=0)])
    short_term, long_term, has = user_vectors(rows, START_MS)
    assert has.tolist() == [True]
    assert cosine(short_term[0], vector(1)) > 0.999
    assert cosine(long_term[0], vector(1)) > 0.999
    assert np.linalg.norm(short_term) > np.linalg.norm(long_term) > 0


def test_a_click_on_a_shown_item_moves_the_vector_from_the_items_not_clicked() -> None:
    log = [impression([1, 2, 3], offset=0), click(1, offset=1)]
    (h,), _, _ = user_vectors(run(empty_rows(1), log), START_MS)
    assert h @ vector(1) > 0
    assert h @ vector(2) < 0
    assert h @ vector(3) < 0


def test_a_click_finds_its_impression_by_request_before_a_newer_one_with_the_item() -> None:
    log = [impression([1, 2], 0, request=5), impression([1, 3], 1, request=6), click(1, 2, request=5)]
    rows = run(empty_rows(1), log)
    assert [int(c) for c in rows["pending"]["clicked"][0, :2]] == [0, 1]


def test_a_click_without_request_finds_the_newest_impression_with_the_item() -> None:
    log = [impression([1, 2], 0), impression([3, 1], 1), impression([4], 2), click(1, 3)]
    rows = run(empty_rows(1), log)
    assert [int(c) for c in rows["pending"]["clicked"][0, :3]] == [0, 2, 0]


def test_the_base_rate_of_the_surface_sets_the_length_of_a_step() -> None:
    for surface, rate in ((0, 0.05), (1, 0.3), (255, 0.05)):
        rows = run(empty_rows(1), [event(ACTION, [1], offset=0, surface=surface)], config=STRONG)
        assert float(rows["norms"][0, 0]) == pytest.approx(0.1 * (1 - rate), rel=1e-3)


def test_a_click_on_an_item_beyond_the_held_ones_still_steps_against_those_held() -> None:
    log = [impression(range(15), offset=0, request=5), click(14, offset=1, request=5)]
    rows = run(empty_rows(1), log)
    (h,), _, _ = user_vectors(rows, START_MS)
    slate = np.array([vector(i) for i in (14, *range(12))])
    np.testing.assert_allclose(h, 0.1 * (slate[0] - slate.mean(axis=0)), atol=1e-4)
    assert int(rows["pending"]["clicked"][0, 0]) == 0x8000


def test_a_hide_moves_the_vector_away_from_a_liked_item() -> None:
    liked = run(empty_rows(1), [click(1, i) for i in range(5)])
    hidden = run(liked, [event(ACTION, [1], offset=5, action="hide")])
    before, after = (user_vectors(r, START_MS)[0][0] @ vector(1) for r in (liked, hidden))
    assert after < before


def test_a_middling_rating_enters_the_ring_and_moves_no_vector() -> None:
    rows = run(empty_rows(1), [event(ACTION, [1], offset=0, action="rating", value=3.0)])
    assert user_vectors(rows, START_MS)[2].tolist() == [False]
    assert recent(rows)[0][0, 0] == hash64("1")


def test_vectors_never_grow_beyond_the_bound() -> None:
    rows = run(empty_rows(1), [event(ACTION, [1], offset=i, action="purchase") for i in range(200)])
    assert float(rows["norms"].max()) <= CONFIG.max_norm * 1.001


def test_a_vector_halves_in_its_half_life() -> None:
    rows = run(empty_rows(1), [click(1, 0)])
    half_life_ms = int(CONFIG.short_term_half_life_seconds * 1000)
    later = run(rows, [event(REQUEST, [], offset=1, time_ms=START_MS + half_life_ms)])
    assert float(later["norms"][0, 0]) == pytest.approx(float(rows["norms"][0, 0]) / 2, rel=1e-5)
    read = user_vectors(rows, START_MS + half_life_ms, CONFIG)[0]
    np.testing.assert_allclose(read, user_vectors(later, START_MS + half_life_ms, CONFIG)[0], atol=1e-6)


def test_many_small_decays_add_up_to_one_large_one() -> None:
    rows = run(empty_rows(1), [click(1, 0)])
    small = run(rows, [event(REQUEST, [], offset=1 + i, time_ms=START_MS + 1_000 * (i + 1)) for i in range(3_600)])
    large = run(rows, [event(REQUEST, [], offset=1, time_ms=START_MS + 3_600_000)])
    np.testing.assert_allclose(small["norms"], large["norms"], rtol=1e-3)


def test_a_late_event_decays_nothing_and_does_not_turn_the_time_back() -> None:
    rows = run(empty_rows(1), [click(1, 0)])
    after = run(rows, [event(REQUEST, [], offset=1, time_ms=START_MS - 3_600_000)])
    assert after["norms"].tobytes() == rows["norms"].tobytes()
    assert int(after["last_time_ms"][0]) == START_MS


# --- impressions nobody clicked


def test_an_unclicked_impression_is_a_weak_negative_once_its_window_is_over() -> None:
    rows = run(empty_rows(1), [click(1, 0), impression([1, 2], 1)])
    inside = run(rows, [event(REQUEST, [], offset=2, time_ms=START_MS + 600_000)])
    over = run(rows, [event(REQUEST, [], offset=2, time_ms=START_MS + 601_000)])
    assert int(inside["pending"]["n"][0, 0]) == 2
    assert int(over["pending"]["n"][0, 0]) == 0
    assert int(over["unclicked"][0]) == 1
    before, after = (user_vectors(r, START_MS + 601_000)[0][0] @ vector(1) for r in (inside, over))
    assert 0.98 * before < after < before


def test_a_clicked_impression_closes_without_a_negative() -> None:
    rows = run(empty_rows(1), [impression([1, 2], 0), click(1, 1)])
    closed = run(rows, [event(REQUEST, [], offset=2, time_ms=START_MS + 601_000)])
    assert int(closed["pending"]["n"][0, 0]) == 0
    assert int(closed["unclicked"][0]) == 0
    assert closed["vectors"].tobytes() == rows["vectors"].tobytes()


def test_a_full_ring_of_impressions_drops_the_oldest_without_a_negative() -> None:
    rows = run(empty_rows(1), [click(9, 0), *(impression([i], 1 + i) for i in range(5))])
    assert [int(i) for i in rows["pending"]["items"][0, :, 0]] == [short_hash(hash64(str(i))) for i in (4, 3, 2, 1)]
    assert int(rows["unclicked"][0]) == 0


def test_after_the_cap_a_further_unclicked_impression_moves_nothing() -> None:
    config = CONFIG.model_copy(update={"unclicked_cap": 1})
    log = [click(1, 0), *(impression([1, 2], 1 + i, START_MS + 700_000 * i) for i in range(3))]
    rows = [run(empty_rows(1), log[: 2 + i], config=config) for i in range(3)]
    assert [int(r["unclicked"][0]) for r in rows] == [0, 1, 2]
    assert rows[1]["vectors"].tobytes() != rows[0]["vectors"].tobytes()
    assert rows[2]["vectors"].tobytes() == rows[1]["vectors"].tobytes()


def test_of_two_impressions_that_close_together_the_older_one_counts_first() -> None:
    config = STRONG.model_copy(update={"unclicked_cap": 1})
    older, newer = impression([2], 1), impression([3], 2, START_MS + 1_000)
    later = event(REQUEST, [], offset=3, time_ms=START_MS + 700_000)
    both = run(empty_rows(1), [click(1, 0), older, newer, later], config=config)
    alone = run(empty_rows(1), [click(1, 0), older, later], config=config)
    assert both["vectors"].tobytes() == alone["vectors"].tobytes()


def test_a_thousand_unclicked_impressions_do_not_drive_a_vector_away() -> None:
    """The trap of MIND: with b = 0 and many negatives a click, ranking falls to chance."""
    config = UserStateConfig(short_term_half_life_seconds=1e9, long_term_half_life_seconds=1e9)
    liked = run(empty_rows(1), [click(1, i) for i in range(5)], config=config)
    slates = [[1, *range(2 + i % 10, 16 + i % 10)] for i in range(1_000)]
    log = [impression(s, 10 + i, START_MS + 2_000_000 * (i + 1)) for i, s in enumerate(slates)]
    ignored = run(liked, log, config=config)
    before, _, _ = user_vectors(liked, START_MS, config)
    after, _, _ = user_vectors(ignored, START_MS, config)
    assert cosine(before[0], after[0]) > 0.95
    assert int(ignored["impressions"][0]) == 1_000


def test_unclicked_impressions_give_a_user_without_clicks_no_vector() -> None:
    log = [impression([1, 2, 3], i, START_MS + 2_000_000 * i) for i in range(20)]
    assert user_vectors(run(empty_rows(1), log), START_MS)[2].tolist() == [False]


# --- items and spaces


def test_the_step_for_an_unknown_item_is_taken_at_the_next_event_after_its_vector_came() -> None:
    before = run(empty_rows(1), [click(1, 0)], HALF)
    assert user_vectors(before, START_MS)[2].tolist() == [False]
    after = run(before, [event(REQUEST, [], offset=1)], ALL)
    assert cosine(user_vectors(after, START_MS)[0][0], vector(1)) > 0.999
    assert after["recent"]["action"][0, 0] == 1 | POSITIVE


def test_steps_left_over_are_taken_oldest_first() -> None:
    config = CONFIG.model_copy(update={"learning_rate": 1.0})
    waiting = run(empty_rows(1), [click(1, 0), click(3, 1)], HALF, config)
    late = run(waiting, [event(REQUEST, [], offset=2)], ALL, config)
    in_time = run(empty_rows(1), [click(1, 0), click(3, 1)], ALL, config)
    np.testing.assert_allclose(user_vectors(late, START_MS)[0], user_vectors(in_time, START_MS)[0], atol=2e-3)


def test_a_row_of_an_older_space_is_rebuilt_from_its_recent_items_on_first_touch() -> None:
    rows = run(empty_rows(1), [click(1, 0), click(2, 1)])
    after = run(rows, [event(REQUEST, [], offset=2)], OTHER_SPACE, space_id=77, generation=4)
    direct = run(empty_rows(1), [click(1, 0), click(2, 1)], OTHER_SPACE, space_id=77, generation=4)
    np.testing.assert_allclose(user_vectors(after, START_MS)[0], user_vectors(direct, START_MS)[0], atol=1e-3)
    assert (int(after["space_id"][0]), int(after["generation"][0])) == (77, 4)


def test_a_lagging_worker_leaves_the_vectors_of_a_newer_space_and_the_step_to_a_later_one() -> None:
    rows = run(empty_rows(1), [click(1, 0)], OTHER_SPACE, space_id=77, generation=4)
    lagging = run(rows, [click(2, 1, START_MS + 5_000)], ALL, space_id=SPACE, generation=3)
    assert lagging["vectors"].tobytes() == rows["vectors"].tobytes()
    assert lagging["norms"].tobytes() == rows["norms"].tobytes()
    assert int(lagging["space_id"][0]) == 77
    caught_up = run(
        lagging, [event(REQUEST, [], offset=2, time_ms=START_MS + 5_000)], OTHER_SPACE, space_id=77, generation=4
    )
    item = OTHER_SPACE.by_full[hash64("2")]
    assert user_vectors(caught_up, START_MS)[0][0] @ item > user_vectors(lagging, START_MS)[0][0] @ item


def test_a_newer_bundle_with_the_same_space_keeps_the_vectors() -> None:
    rows = run(empty_rows(1), [click(1, 0)])
    after = run(rows, [event(REQUEST, [], offset=1)], generation=9)
    assert after["vectors"].tobytes() == rows["vectors"].tobytes()
    assert int(after["generation"][0]) == 9


def test_a_reader_serves_a_row_of_another_space_in_its_own_without_changing_it() -> None:
    rows = run(empty_rows(1), [click(1, 0)], OTHER_SPACE, space_id=77, generation=4)
    before = rows.tobytes()
    short_term, _, has = UserReader(CONFIG, ALL, SPACE).user_vectors(rows, START_MS)
    assert has.tolist() == [True]
    assert cosine(short_term[0], vector(1)) > 0.999
    assert rows.tobytes() == before


def test_vectors_of_another_dimension_are_refused() -> None:
    wide = ItemVectors([1])
    wide.dim = 384
    with pytest.raises(RowError, match="384 dimensions"):
        run(empty_rows(1), [click(1, 0)], wide)


# --- rings


def test_an_item_shown_again_is_counted_and_moves_to_the_front() -> None:
    rows = run(empty_rows(1), [impression([1, 2, 3], 0), impression([3], 1, START_MS + 9_000)])
    hashes, counts, times_ms = shown(rows)
    assert hashes[0, :3].tolist() == [short_hash(hash64(i)) for i in "312"]
    assert counts[0, :4].tolist() == [2, 1, 1, 0]
    assert times_ms[0, :3].tolist() == [START_MS + 9_000, START_MS, START_MS]


def test_a_slate_longer_than_the_ring_keeps_its_first_items() -> None:
    hashes, _, _ = shown(run(empty_rows(1), [impression(range(30), 0)]))
    assert hashes[0].tolist() == [short_hash(hash64(str(i))) for i in range(20)]


def test_the_oldest_recent_item_leaves_a_full_ring() -> None:
    hashes, _, _ = recent(run(empty_rows(1), [click(i, i) for i in range(17)]))
    assert hashes[0].tolist() == [hash64(str(i)) for i in range(16, 0, -1)]


def test_an_item_acted_on_twice_stands_once_in_the_ring() -> None:
    log = [click(1, 0), click(2, 1), event(ACTION, [1], offset=2, action="dwell", value=20.0)]
    hashes, codes, _ = recent(run(empty_rows(1), log))
    assert hashes[0, :3].tolist() == [hash64("1"), hash64("2"), 0]
    assert codes[0, 0] == 1 | POSITIVE


# --- from records to events


def test_an_impression_record_becomes_distinct_hashes_and_a_short_request() -> None:
    record = Impression(
        event_id="e", event_time=1, user_id="u", request_id="r", surface="mail",
        items=[ImpressedItem(item_id="a"), ImpressedItem(item_id="b"), ImpressedItem(item_id="a")],
    )  # fmt: skip
    made = user_event(record, 2, 40, START_MS, CONFIG, SURFACES)
    assert (made.user, made.kind, made.offset, made.time_ms) == (2, IMPRESSION, 40, START_MS)
    assert made.items.tolist() == [hash64("a"), hash64("b")]
    assert (made.request_hash, made.surface) == (short_hash(hash64("r")), 1)


@pytest.mark.parametrize(
    ("action", "value", "strength", "label", "bit"),
    [
        ("click", None, 1.0, 1.0, POSITIVE),
        ("purchase", None, 2.5, 1.0, POSITIVE),
        ("hide", None, 3.0, 0.0, NEGATIVE),
        ("rating", 4.0, 1.0, 1.0, POSITIVE),
        ("rating", 3.5, 0.0, 0.0, 0),
        ("rating", 0.5, 1.0, 0.0, NEGATIVE),
        ("dwell", 31.0, 0.5, 1.0, POSITIVE),
        ("dwell", 8.0, 0.0, 0.0, 0),
        ("dwell", None, 0.0, 0.0, 0),
    ],
)
def test_an_action_record_has_the_strength_and_label_of_its_kind_and_value(
    action: str, value: float | None, strength: float, label: float, bit: int
) -> None:
    record = Action(event_id="e", event_time=1, user_id="u", item_id="i", action=action, value=value)  # type: ignore[arg-type]
    made = user_event(record, 0, 0, START_MS, CONFIG, SURFACES)
    assert (made.strength, made.label, made.action & 0x30) == (strength, label, bit)


def test_a_request_record_has_no_items() -> None:
    made = user_event(
        Request(event_id="e", event_time=1, user_id="u", request_id="r"), 0, 0, START_MS, CONFIG, SURFACES
    )
    assert (made.kind, made.surface, len(made.items)) == (REQUEST, 0, 0)


# --- rows before impressions, windows by surface, carried vectors


def test_settings_that_differ_in_a_surface_alone_keep_their_own_steps() -> None:
    likes_mail = CONFIG.model_copy(update={"base_rates": {"mail": 0.9}})
    assert hash(likes_mail) == hash(CONFIG)
    clicked = [event(ACTION, [1], offset=1, surface=1)]
    lengths = [float(run(empty_rows(1), clicked, config=c)["norms"][0, 0]) for c in (CONFIG, likes_mail, CONFIG)]
    assert lengths[0] == lengths[2] > lengths[1]


@given(logs())
def test_the_rows_kept_are_those_that_stood_before_each_impression(log: list[UserEvent]) -> None:
    _, _, before, index = apply(
        empty_rows(3), log, ALL, CONFIG, epoch=EPOCH, space_id=SPACE, generation=GENERATION, keep_before=True
    )
    rows, want = empty_rows(3), []
    for single in log:
        if single.kind == IMPRESSION:
            want.append(rows[single.user].tobytes())
        rows = run(rows, [single])
    assert index.tolist() == [number for number, single in enumerate(log) if single.kind == IMPRESSION]
    assert [row.tobytes() for row in before] == want


def test_the_row_kept_before_a_replayed_impression_is_the_one_that_holds_it() -> None:
    shown_once = run(empty_rows(1), [impression([1, 2], 5)])
    _, done, before, index = apply(
        shown_once, [impression([1, 2], 5)], ALL, CONFIG, epoch=EPOCH, space_id=SPACE, generation=3, keep_before=True
    )
    assert (done.tolist(), index.tolist()) == ([Outcome.REPLAYED], [0])
    assert before.tobytes() == shown_once.tobytes()


def test_a_surface_with_a_window_of_its_own_closes_by_it() -> None:
    config = CONFIG.model_copy(update={"attribution_windows_seconds": {"mail": 60}})
    log = [
        event(IMPRESSION, [1], offset=0, surface=0),
        event(IMPRESSION, [2], offset=1, surface=1),
        event(REQUEST, [], offset=2, time_ms=START_MS + 61_000),
    ]
    rows = run(empty_rows(1), log, config=config)
    assert [int(entry["surface"]) for entry in rows["pending"][0] if entry["n"]] == [0]


def turned(degrees: float) -> Vector:
    """Return a map of the space that turns its first two axes."""
    carry = np.eye(64, dtype=np.float32)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    carry[:2, :2] = [[c, s], [-s, c]]
    return carry


def test_a_rebuild_carries_the_long_term_vector_over_and_makes_the_short_term_one_anew() -> None:
    held = run(empty_rows(1), [click(item, item, START_MS + item) for item in range(20)])
    events = [event(REQUEST, [], offset=30, time_ms=START_MS + 20)]
    carry = (SPACE, turned(90))
    moved, _ = apply(held, events, OTHER_SPACE, CONFIG, epoch=EPOCH, space_id=77, generation=4, carry=carry)
    anew = run(held, events, OTHER_SPACE, space_id=77, generation=4)
    (short_term,), (long_term,), _ = user_vectors(moved, START_MS + 20, CONFIG)
    np.testing.assert_array_equal(short_term, user_vectors(anew, START_MS + 20, CONFIG)[0][0])
    (_,), (before,), _ = user_vectors(held, START_MS + 20, CONFIG)
    np.testing.assert_allclose(long_term, before @ turned(90), atol=1e-3)


def test_a_row_is_served_with_the_long_term_vector_that_its_next_event_will_carry_over() -> None:
    held = run(empty_rows(1), [click(item, item, START_MS + item) for item in range(20)])
    later_ms = START_MS + 86_400_000
    carry = (SPACE, turned(30))
    served = UserReader(CONFIG, OTHER_SPACE, 77, carry).user_vectors(held, later_ms)
    events = [event(REQUEST, [], offset=30, time_ms=later_ms)]
    moved, _ = apply(held, events, OTHER_SPACE, CONFIG, epoch=EPOCH, space_id=77, generation=4, carry=carry)
    for have, want in zip(served[:2], user_vectors(moved, later_ms, CONFIG)[:2], strict=True):
        np.testing.assert_allclose(have, want, atol=1e-3)


def test_a_row_of_another_space_than_the_map_knows_is_made_anew() -> None:
    held = run(empty_rows(1), [click(item, item, START_MS + item) for item in range(20)])
    with_map = UserReader(CONFIG, OTHER_SPACE, 77, (SPACE + 1, turned(30))).user_vectors(held, START_MS)
    without = UserReader(CONFIG, OTHER_SPACE, 77).user_vectors(held, START_MS)
    np.testing.assert_array_equal(with_map[1], without[1])


def test_vectors_are_read_at_a_time_for_each_row() -> None:
    rows = run(empty_rows(2), [click(1, 0), click(1, 1, user=1)])
    times_ms = np.array([START_MS, START_MS + 3_600_000])
    together = user_vectors(rows, times_ms, CONFIG)
    for place, time_ms in enumerate(times_ms.tolist()):
        np.testing.assert_array_equal(together[0][place], user_vectors(rows[place : place + 1], time_ms, CONFIG)[0][0])
