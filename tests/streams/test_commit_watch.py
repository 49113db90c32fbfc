"""The watchdog's judgement: commits that stand still behind what was read."""

from __future__ import annotations

from streams.maintenance import CommitWatch, next_offsets


def test_commits_that_follow_are_never_late() -> None:
    watch = CommitWatch()
    assert [watch.oldest_seconds({0: n * 10}, {0: n * 10 - 5}, float(n)) for n in range(1, 60)] == [0.0] * 59


def test_commits_that_stand_still_are_as_old_as_they_stand() -> None:
    watch = CommitWatch()
    ages = [watch.oldest_seconds({0: 100 + now}, {0: 90}, float(now)) for now in (10, 20, 30)]
    assert ages == [0.0, 10.0, 20.0]


def test_a_partition_without_events_is_not_stuck() -> None:
    watch = CommitWatch()
    assert [watch.oldest_seconds({0: 100}, {0: 100}, float(now)) for now in (0, 1_000)] == [0.0, 0.0]


def test_events_after_a_long_silence_are_not_late_at_once() -> None:
    watch = CommitWatch()
    watch.oldest_seconds({0: 100}, {0: 100}, 0.0)
    watch.oldest_seconds({0: 100}, {0: 100}, 1_000.0)
    assert watch.oldest_seconds({0: 150}, {0: 100}, 1_001.0) == 1.0


def test_a_partition_that_never_committed_is_watched_too() -> None:
    watch = CommitWatch()
    watch.oldest_seconds({0: 5}, {}, 0.0)
    assert watch.oldest_seconds({0: 9}, {}, 7.0) == 7.0


def test_the_worst_partition_counts() -> None:
    watch = CommitWatch()
    watch.oldest_seconds({0: 10, 1: 10}, {0: 5, 1: 5}, 0.0)
    watch.oldest_seconds({0: 10, 1: 10}, {0: 9, 1: 5}, 4.0)
    assert watch.oldest_seconds({0: 10, 1: 10}, {0: 9, 1: 5}, 6.0) == 6.0


def test_a_partition_that_went_away_is_forgotten() -> None:
    watch = CommitWatch()
    watch.oldest_seconds({0: 10}, {0: 5}, 0.0)
    watch.oldest_seconds({}, {}, 50.0)
    assert watch.oldest_seconds({0: 10}, {0: 5}, 100.0) == 0.0


def test_the_next_offset_is_after_the_last_one_read() -> None:
    assert next_offsets({0: 37, 1: 0, 2: -1}, {0: 30, 2: 0}) == {0: 38, 1: 1, 2: 0}


def test_the_next_offset_is_never_behind_what_is_committed() -> None:
    assert next_offsets({0: 37, 1: 37}, {0: 38, 1: 45}) == {0: 38, 1: 45}


def test_a_partition_that_stays_idle_after_a_restart_never_counts_as_stuck() -> None:
    watch = CommitWatch()
    ages = [
        watch.oldest_seconds(next_offsets({0: 37, 1: -1}, {0: 38, 1: 0}), {0: 38, 1: 0}, now)
        for now in (0.0, 60.0, 600.0)
    ]
    assert ages == [0.0, 0.0, 0.0]
