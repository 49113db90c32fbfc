"""The spool: ranges of offsets on disk."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import atomic
from models.errors import TrainingError
from models.manifest import OffsetRange
from trainer.spool import Spool, SpooledRecord


def ranged(start: int, end: int, partition: int = 0) -> OffsetRange:
    return OffsetRange("features", partition, start, end)


def records(*offsets: int, broker_ms: int = 1_000) -> list[SpooledRecord]:
    return [SpooledRecord(o, broker_ms, f"value {o}".encode()) for o in offsets]


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    Spool(tmp_path).write(ranged(5, 8), records(5, 6, 7))
    assert list(Spool(tmp_path).read(ranged(0, 100))) == records(5, 6, 7)


def test_a_range_is_read_to_the_offset(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write(ranged(0, 4), records(0, 1, 2, 3))
    spool.write(ranged(4, 6), records(4, 5))
    assert [r.offset for r in spool.read(ranged(2, 5))] == [2, 3, 4]


def test_what_is_missing_is_named_around_what_is_there(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write(ranged(10, 20), records(12))
    spool.write(ranged(30, 40), records(33))
    assert spool.missing(ranged(5, 50)) == [ranged(5, 10), ranged(20, 30), ranged(40, 50)]
    assert spool.missing(ranged(12, 18)) == []


def test_offsets_without_a_record_count_as_spooled(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write(ranged(0, 9), records(1))
    assert spool.missing(ranged(0, 9)) == []


def test_partitions_do_not_mix(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write(ranged(0, 2, partition=1), records(0, 1))
    assert list(spool.read(ranged(0, 2, partition=2))) == []


def test_a_window_starts_at_the_file_that_reaches_into_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write(ranged(0, 5), records(0, broker_ms=1_000))
    spool.write(ranged(5, 9), records(6, broker_ms=2_000))
    assert spool.first_offset("features", 0, 1_500) == 5
    assert spool.first_offset("features", 0, 2_500) is None


def test_files_are_deleted_when_all_in_them_is_old(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write(ranged(0, 5), records(0, broker_ms=1_000))
    spool.write(ranged(5, 9), records(6, broker_ms=2_000))
    assert spool.delete_before(1_500) == 1
    assert [r.offset for r in spool.read(ranged(0, 9))] == [6]


def test_a_topic_that_was_created_again_is_forgotten(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write(ranged(0, 5), records(0))
    spool.forget("features")
    assert (spool.end("features", 0), list(spool.read(ranged(0, 5)))) == (0, [])


def test_a_full_disk_keeps_nothing_of_the_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, content: bytes) -> None:
        file.write_bytes(content[:7])
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(atomic, "write_file", full)
    spool = Spool(tmp_path)
    with pytest.raises(OSError, match="no space"):
        spool.write(ranged(0, 2), records(0, 1))
    assert spool.missing(ranged(0, 2)) == [ranged(0, 2)]
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_damaged_file_is_deleted_and_its_offsets_are_missing_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write(ranged(0, 2), records(0, 1))
    next(tmp_path.rglob("*.parquet")).write_bytes(b"PAR1 and no more")
    with pytest.raises(TrainingError, match="spool-unreadable"):
        list(spool.read(ranged(0, 2)))
    assert spool.missing(ranged(0, 2)) == [ranged(0, 2)]


@settings(max_examples=40, deadline=None)
@given(ranges=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), max_size=6))
def test_overlapping_files_give_each_record_once_and_nothing_that_is_missing(
    tmp_path_factory: pytest.TempPathFactory, ranges: list[tuple[int, int]]
) -> None:
    spool = Spool(tmp_path_factory.mktemp("spool"))
    written: set[int] = set()
    for start, length in ranges:
        spool.write(ranged(start, start + length), records(*range(start, start + length)))
        written |= set(range(start, start + length))
    found = [r.offset for r in spool.read(ranged(0, 50))]
    missing = {o for gap in spool.missing(ranged(0, 50)) for o in range(gap.start, gap.end)}
    assert found == sorted(written)
    assert missing == set(range(50)) - written
