"""The death ledger: who is suspected, who is set aside, and what survives a process."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from streams.in_flight import DeathLedger, InFlightMark, Span, Suspects, read_mark

SPANS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 20), st.integers(0, 20)).map(lambda s: (s[0], min(s[1:]), max(s[1:]))),
    max_size=3,
    unique_by=lambda s: s[0],
)


def test_two_deaths_at_the_same_offsets_accuse_nobody() -> None:
    ledger = DeathLedger(3)
    assert not ledger.died([(0, 10, 20)])
    assert not ledger.died([(0, 10, 20)])
    assert ledger.suspects == Suspects()


def test_the_third_death_in_a_row_makes_the_common_offsets_go_one_by_one() -> None:
    ledger = DeathLedger(3)
    for spans in ([(0, 10, 20), (1, 0, 5)], [(0, 15, 30)], [(0, 12, 18), (2, 0, 9)]):
        changed = ledger.died(spans)
    assert changed
    assert ledger.suspects.one_by_one == [(0, 15, 18)]
    assert ledger.suspects.refused == []


def test_a_death_elsewhere_begins_the_count_anew() -> None:
    ledger = DeathLedger(3)
    ledger.died([(0, 10, 20)])
    ledger.died([(0, 10, 20)])
    ledger.died([(0, 40, 50)])
    assert not ledger.died([(0, 40, 50)])
    assert ledger.died([(0, 40, 50)])


def test_a_death_with_nothing_in_flight_begins_the_count_anew() -> None:
    ledger = DeathLedger(2)
    ledger.died([(0, 10, 20)])
    assert not ledger.died([])
    assert not ledger.died([(0, 10, 20)])


def test_the_same_offsets_of_another_partition_are_not_the_same() -> None:
    ledger = DeathLedger(2)
    ledger.died([(0, 10, 20)])
    assert not ledger.died([(1, 10, 20)])


def test_a_suspect_that_kills_alone_as_often_again_is_refused() -> None:
    ledger = DeathLedger(3)
    for _ in range(3):
        ledger.died([(0, 10, 20)])
    for _ in range(2):
        assert not ledger.died([(0, 14, 14)])
    assert ledger.died([(0, 14, 14)])
    assert ledger.suspects.refused == [(0, 14)]


def test_an_event_that_was_alone_by_chance_is_not_refused_at_once() -> None:
    ledger = DeathLedger(2)
    ledger.died([(0, 14, 14)])
    ledger.died([(0, 14, 14)])
    assert ledger.suspects == Suspects(one_by_one=[(0, 14, 14)])


@given(st.lists(SPANS, max_size=12))
def test_only_what_was_in_flight_at_a_death_is_ever_suspected(deaths: list[list[Span]]) -> None:
    ledger = DeathLedger(3)
    seen = set()
    for spans in deaths:
        ledger.died(spans)
        seen |= {(p, offset) for p, low, high in spans for offset in range(low, high + 1)}
    suspected = {(p, o) for p, low, high in ledger.suspects.one_by_one for o in range(low, high + 1)}
    assert suspected | set(ledger.suspects.refused) <= seen


def test_a_mark_is_read_by_another_process_as_first_and_last_offset_of_each_partition(tmp_path: Path) -> None:
    InFlightMark(tmp_path).set([(0, 7), (1, 3), (0, 5), (0, 9)])
    assert read_mark(tmp_path) == [(0, 5, 9), (1, 3, 3)]


def test_a_finished_batch_leaves_no_mark(tmp_path: Path) -> None:
    mark = InFlightMark(tmp_path)
    mark.set([(0, 7)])
    mark.clear()
    assert read_mark(tmp_path) == []


def test_a_new_process_begins_without_the_mark_of_the_dead_one(tmp_path: Path) -> None:
    InFlightMark(tmp_path).set([(0, 7)])
    InFlightMark(tmp_path)
    assert read_mark(tmp_path) == []


def test_a_worker_that_never_started_has_no_mark(tmp_path: Path) -> None:
    assert read_mark(tmp_path / "no-such-folder") == []


def test_a_thousand_partitions_fit_into_the_mark(tmp_path: Path) -> None:
    InFlightMark(tmp_path).set((p, 10**12 + p) for p in range(1_000))
    assert len(read_mark(tmp_path)) == 1_000


def test_suspects_are_read_as_they_were_saved(tmp_path: Path) -> None:
    saved = Suspects(one_by_one=[(0, 10, 20)], refused=[(1, 4)])
    saved.save(tmp_path)
    loaded = Suspects.load(tmp_path)
    assert loaded == saved
    assert loaded.is_one_by_one(0, 20)
    assert not loaded.is_one_by_one(0, 21)
    assert loaded.is_refused(1, 4)
    assert not loaded.is_refused(1, 5)


def test_without_a_supervisor_nobody_is_suspected(tmp_path: Path) -> None:
    assert Suspects.load(tmp_path) == Suspects()
