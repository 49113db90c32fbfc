"""MIND (Microsoft News), official layout: behaviors.tsv with news.tsv beside it or in its parent, plain or gzip.

Each row is an impression; clicks are dated a second after it, since the log does not say when they happened. Times
have no zone and are taken as UTC. A user's history is undated: it is entered once per user, from that user's first
row in time, all at one synthetic time an hour before the first impression of the set (`HISTORY_GAP_MS`). A test split
without labels has impressions only.
"""

from __future__ import annotations

import datetime as dt
import heapq
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final

import msgspec

from models.errors import LogFormatError
from models.events import MAX_ITEMS, Action, ImpressedItem, Impression, Item, User
from models.logs.log import CLICK_DELAY_MS, LogEvent, TimeOrderedLines, find, open_bytes, split_folders

HISTORY_GAP_MS: Final = 3_600_000
_BEHAVIOR_COLUMNS: Final = 5
_NEWS_COLUMNS: Final = 8


class _Entity(msgspec.Struct):
    label: str = msgspec.field(name="Label", default="")


_ENTITIES: Final = msgspec.json.Decoder(list[_Entity])


class MindLog:
    """Reader of MIND; ``path`` is the folder of one split or the folder above the splits."""

    kind = "mind"

    def __init__(self, *paths: Path) -> None:
        """``paths``: one folder as above, or several of one set, read as one log."""
        folders = list(dict.fromkeys(f for path in paths for f in split_folders(path, "behaviors.tsv")))
        self._behaviors = tuple(file for folder in folders if (file := find(folder, "behaviors.tsv")))
        news = [file for folder in folders if (file := find(folder, "news.tsv") or find(folder.parent, "news.tsv"))]
        self._news = tuple(dict.fromkeys(news))
        if not self._news:
            raise LogFormatError(f"no news.tsv beside {self._behaviors[0]} or in the folder above it")
        self.files = self._behaviors + self._news
        self.skipped: Counter[str] = Counter()
        self._ordered: TimeOrderedLines | None = None

    def items(self) -> Iterator[Item]:
        """Every news article; abstract and entities where the set has them."""
        seen: set[str] = set()
        for path in self._news:
            with open_bytes(path) as file:
                for number, line in enumerate(file, 1):
                    columns = _text(line, path, number).rstrip("\r\n").split("\t")
                    if columns == [""]:
                        continue
                    if len(columns) != _NEWS_COLUMNS or not columns[0]:
                        raise LogFormatError(
                            f"{path}, line {number}: {len(columns)} columns where news.tsv has {_NEWS_COLUMNS}"
                        )
                    if columns[0] not in seen:
                        seen.add(columns[0])
                        yield _item(columns, path, number)

    def users(self) -> Iterator[User]:
        """MIND has no profiles."""
        return iter(())

    def events(self) -> Iterator[LogEvent]:
        """Histories, then impressions and their clicks in time order."""
        self.skipped.clear()
        lines = self._lines()
        yield from self._histories(lines)
        waiting: list[tuple[int, int, LogEvent]] = []
        sequence = 0
        for time_ms, place, line in lines:
            while waiting and waiting[0][0] < time_ms:
                yield heapq.heappop(waiting)[2]
            impression, clicks = self._row(time_ms, place, line)
            if impression is not None:
                yield impression
            for click in clicks:
                sequence += 1
                heapq.heappush(waiting, (click.time_ms, sequence, click))
        while waiting:
            yield heapq.heappop(waiting)[2]

    def count_events(self) -> int | None:
        """Not known without reading everything."""
        return None

    def _lines(self) -> TimeOrderedLines:
        if self._ordered is None:
            self._ordered = TimeOrderedLines(self._behaviors, _row_time)
        return self._ordered

    def _histories(self, lines: TimeOrderedLines) -> Iterator[LogEvent]:
        if lines.first_ms is None:
            return
        time_ms = lines.first_ms - HISTORY_GAP_MS
        seen: set[bytes] = set()
        for _, _, line in lines:
            _, user, _, history, _ = line.split(b"\t")
            if user in seen:
                continue
            seen.add(user)
            user_id = user.decode()
            for n, item_id in enumerate(history.decode().split()):
                action = Action(
                    event_id=f"mind:history:{user_id}:{n}:{item_id}",
                    event_time=time_ms,
                    user_id=user_id,
                    item_id=item_id,
                    action="click",
                )
                yield LogEvent(time_ms, action, None, True)

    def _row(self, time_ms: int, place: str, line: bytes) -> tuple[LogEvent | None, list[LogEvent]]:
        number, user_id, _, _, shown_text = line.decode().split("\t")
        shown: dict[str, None] = {}
        clicked: dict[str, None] = {}
        has_labels = True
        for entry in shown_text.split():
            item_id, dash, label = entry.rpartition("-")
            if not dash:
                item_id, has_labels = entry, False
            elif label == "1":
                clicked[item_id] = None
            elif label != "0":
                raise LogFormatError(f"{place}: {entry!r} is not an item with -0 or -1")
            shown[item_id] = None
        if not shown or len(shown) > MAX_ITEMS:
            self.skipped["impression without items" if not shown else f"impression of more than {MAX_ITEMS} items"] += 1
            return None, []
        event_id = f"mind:{number}:{user_id}:{time_ms // 1000}"
        impression = Impression(
            event_id=event_id,
            event_time=time_ms,
            user_id=user_id,
            items=[ImpressedItem(item_id) for item_id in shown],
        )
        clicks = []
        for n, item_id in enumerate(clicked):
            click_ms = time_ms + CLICK_DELAY_MS * (n + 1)
            action = Action(
                event_id=f"{event_id}:click:{n}",
                event_time=click_ms,
                user_id=user_id,
                item_id=item_id,
                action="click",
            )
            clicks.append(LogEvent(click_ms, action))
        return LogEvent(time_ms, impression, tuple(clicked) if has_labels else None), clicks


def _text(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LogFormatError(f"{path}, line {number}: not UTF-8: {error}") from None


def _item(columns: list[str], path: Path, number: int) -> Item:
    item_id, category, subcategory, title, abstract, _, *entities = columns
    labels: dict[str, None] = {}
    for text in entities:
        if not text or text == "[]":
            continue
        try:
            labels.update((entity.label[:256], None) for entity in _ENTITIES.decode(text) if entity.label)
        except msgspec.DecodeError as error:
            raise LogFormatError(f"{path}, line {number}: entities: {error}") from None
    categories = [name for name in dict.fromkeys((category, subcategory)) if name]
    return Item(
        item_id=item_id,
        title=title[:4_000],
        text=abstract[:100_000] or None,
        categories=categories or None,
        entities=list(labels)[:256] or None,
    )


def _row_time(line: bytes) -> int | None:
    if not line.strip():
        return None
    columns = line.split(b"\t")
    if len(columns) != _BEHAVIOR_COLUMNS:
        raise ValueError(f"{len(columns)} columns where behaviors.tsv has {_BEHAVIOR_COLUMNS}")
    line.decode("utf-8")
    if not columns[1]:
        raise ValueError("no user")
    return _time_ms(columns[2].decode())


@lru_cache(maxsize=4_096)
def _day_ms(date: str) -> int:
    month, day, year = date.split("/")
    return int(dt.datetime(int(year), int(month), int(day), tzinfo=dt.UTC).timestamp() * 1000)


def _time_ms(text: str) -> int:
    """Return the epoch ms of a time as MIND writes it: 11/12/2019 2:14:46 PM."""
    try:
        date, clock, half = text.split()
        hour, minute, second = clock.split(":")
        hours = int(hour) % 12 + (12 if half == "PM" else 0)
        if half not in ("AM", "PM") or not (1 <= int(hour) <= 12 and 0 <= int(minute) < 60 and 0 <= int(second) < 60):
            raise ValueError(text)
        return _day_ms(date) + ((hours * 60 + int(minute)) * 60 + int(second)) * 1000
    except ValueError:
        raise ValueError(f"{text!r} is not a time like 11/12/2019 2:14:46 PM") from None
