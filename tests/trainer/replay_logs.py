"""Tiny logs written to disk for tests of the replay: JSON lines, and EB-NeRD's parquet."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.examples import FeaturesRecord
from tests.trainer.tiny_world import record
from trainer.replay_log import Parts

HOUR = 3_600_000
START_MS = 1_700_000_000_000 // (24 * HOUR) * (24 * HOUR)
Line = dict[str, Any]


def impression(at_ms: int, user: str, items: str | Sequence[str]) -> Line:
    """An impression ``at_ms`` after START_MS."""
    return {
        "type": "impression",
        "event_id": f"i-{user}-{at_ms}",
        "event_time": START_MS + at_ms,
        "user_id": user,
        "items": [{"item_id": item} for item in items],
    }


def click(at_ms: int, user: str, item: str) -> Line:
    return {
        "type": "action",
        "event_id": f"c-{user}-{item}-{at_ms}",
        "event_time": START_MS + at_ms,
        "user_id": user,
        "item_id": item,
        "action": "click",
    }


@dataclass(frozen=True)
class Written(Parts):
    """A log on disk, and ways to make one."""

    @staticmethod
    def records(times_ms: Sequence[int]) -> list[FeaturesRecord]:
        return [record(n, 0, [1, 2], [], time_ms) for n, time_ms in enumerate(times_ms)]

    @staticmethod
    def fashions(hours: int, scored_hours: int) -> tuple[list[Line], list[Line]]:
        """Ten impressions an hour of eight of forty items; each half hour another item is what all click."""
        random = np.random.default_rng(5)
        lines: list[Line] = []
        fashion = ""
        for n in range(hours * 20):
            at_ms, user = n * 180_000, f"u{n % 400}"
            if n % 10 == 0:
                fashion = f"i{random.integers(40)}"
            others = [f"i{i}" for i in random.permutation(40).tolist() if f"i{i}" != fashion][:7]
            shown = random.permutation([fashion, *others]).tolist()
            lines.append(impression(at_ms, user, shown))
            lines.append(click(at_ms + 2_000, user, fashion if random.random() < 0.9 else others[0]))
        # What comes last closes the labels of what was before.
        edge = START_MS + (hours - scored_hours) * HOUR
        lines.append(impression((hours + 3) * HOUR, "last", ["i0", "i1"]))
        early = [line for line in lines if line["event_time"] < edge]
        return early, [line for line in lines if line["event_time"] >= edge]

    @staticmethod
    def ebnerd(folder: Path, impressions: int = 20) -> None:
        """Two parts, a minute between impressions; the second part's history repeats a click of the first."""
        start = dt.datetime(2023, 5, 18, 7, tzinfo=dt.UTC).replace(tzinfo=None)
        random = np.random.default_rng(1)
        for number, name in enumerate(("train", "validation")):
            (folder / name).mkdir(parents=True)
            times = [start + dt.timedelta(days=number, minutes=n) for n in range(impressions)]
            shown = [random.permutation(12)[:5].tolist() for _ in times]
            columns: dict[str, Any] = {
                "impression_id": pa.array(range(1_000 * number, 1_000 * number + impressions), pa.uint32()),
                "impression_time": pa.array(times, pa.timestamp("us")),
                "read_time": pa.array([5.0] * impressions, pa.float32()),
                "article_ids_inview": pa.array(shown, pa.list_(pa.int32())),
                "article_ids_clicked": pa.array([[min(s)] for s in shown], pa.list_(pa.int32())),
                "user_id": pa.array([n % 7 for n in range(impressions)], pa.uint32()),
            }
            pq.write_table(pa.table(columns), folder / name / "behaviors.parquet")
            history = {
                "user_id": pa.array([0], pa.uint32()),
                "article_id_fixed": pa.array([[3]], pa.list_(pa.int32())),
                "impression_time_fixed": pa.array([[start - dt.timedelta(days=1)]], pa.list_(pa.timestamp("us"))),
            }
            pq.write_table(pa.table(history), folder / name / "history.parquet")

    @staticmethod
    def cut(data: Path, folder: Path, before: int, after: int, users: int) -> None:
        """Write the last and the first impressions of two real parts, with some of the histories."""
        for name, part in (("train", slice(-before, None)), ("validation", slice(0, after))):
            (folder / name).mkdir(parents=True)
            behaviors = pq.read_table(data / name / "behaviors.parquet").sort_by("impression_time")
            chosen = range(len(behaviors))[part]
            pq.write_table(behaviors.slice(chosen.start, len(chosen)), folder / name / "behaviors.parquet")
            history = pq.read_table(data / name / "history.parquet").slice(0, users)
            pq.write_table(history, folder / name / "history.parquet")


def write_log(
    folder: Path, train: Sequence[Line], scored: Sequence[Line], items: Sequence[Line] | None = None
) -> Written:
    """Write the parts ``train`` and ``scored`` of JSON lines, the catalogue above them."""
    for name, lines in (("train", train), ("scored", scored)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths: tuple[Path, ...] = (folder / "train", folder / "scored")
    if items is not None:
        (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        paths = (*paths, folder)
    return Written("jsonl", paths, (folder / "scored",))
