"""The window: which offsets a round asks for."""

from __future__ import annotations

from pathlib import Path

from models.manifest import OffsetRange
from trainer.spool import Spool, SpooledRecord
from trainer.window import without_gone


def spool_of(folder: Path, *ranges: tuple[int, int]) -> Spool:
    spool = Spool(folder)
    for start, end in ranges:
        spool.write(OffsetRange("t", 0, start, end), [SpooledRecord(start, 1_000, b"x")])
    return spool


def asked(spool: Spool, begin: int) -> list[tuple[int, int]]:
    return [(r.start, r.end) for r in without_gone(spool, OffsetRange("t", 0, 0, 900), begin)]


def test_what_retention_removed_before_it_was_spooled_is_not_asked_for(tmp_path: Path) -> None:
    assert asked(spool_of(tmp_path, (0, 100)), begin=500) == [(0, 100), (500, 900)]


def test_what_is_spooled_stays_in_the_window_when_kafka_has_it_no_more(tmp_path: Path) -> None:
    assert asked(spool_of(tmp_path, (0, 100), (100, 600)), begin=500) == [(0, 900)]


def test_two_holes_are_both_left_out(tmp_path: Path) -> None:
    assert asked(spool_of(tmp_path, (50, 100), (200, 300)), begin=500) == [(50, 100), (200, 300), (500, 900)]


def test_what_kafka_still_has_is_asked_for(tmp_path: Path) -> None:
    assert asked(spool_of(tmp_path, (0, 100), (300, 400)), begin=50) == [(0, 900)]
