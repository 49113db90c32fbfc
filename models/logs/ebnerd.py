"""EB-NeRD (Ekstra Bladet, RecSys Challenge 2024), official layout: behaviors, history and articles as parquet.

``path`` is the folder of one split or the folder above `train` and `validation`; articles.parquet stands in either.
An article that it does not name is known by its id alone, which tells about when it was published: ids rise with time.
Times have no zone and are taken as UTC.

- An impression has its in-view articles without positions: their order in the file is not the order on the page.
- A click is dated ``read_time`` after its impression (a second where that is unknown or less). ``read_time`` is used
  for nothing else: it, ``scroll_percentage``, ``next_*`` and the articles' ``total_*`` come after the decision.
- An article that one impression's row names twice as clicked is one click.
- A history entry is a dated click without an impression (measured: its time is that of the click, not of the
  impression). The validation split's history repeats the train week: an entry within `SAME_CLICK_MS` of a click on
  the same article by the same user is that click and is left out.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.errors import LogFormatError
from models.events import MAX_ITEMS, Action, ImpressedItem, Impression, Item, User
from models.logs.log import CLICK_DELAY_MS, LogEvent, find, split_folders

SAME_CLICK_MS: Final = 10_000
MS_PER_ID: Final = 56_000
"""Ids rose by about 1,540 a day: a line through the first appearances of ids in the histories and impressions of the
demo bundle's split `train`, nine hours off in the mean. What counts is that a newer article has the greater id."""
KNOWN_ID: Final = 9_770_000
KNOWN_ID_MS: Final = 1_684_303_200_000
"""2023-05-17T06:00:00Z, some hours before that id was first clicked."""
_CHUNK: Final = 8_192
_HISTORY, _IMPRESSION, _CLICK = 0, 1, 2
_NEEDED: Final = (
    "impression_id",
    "impression_time",
    "read_time",
    "article_ids_inview",
    "article_ids_clicked",
    "user_id",
)
_CONTEXT: Final = {"article_id": "page_item_id", "device_type": "device_type", "is_subscriber": "is_subscriber"}
"""Columns known at the decision that are not numbers to compute with, and their names in an event's context."""
_PERSON: Final = ("gender", "age")
_ARTICLE_TEXT: Final = ("title", "subtitle", "body", "category_str", "topics", "ner_clusters", "published_time")
_ARTICLE_FACTS: Final = ("premium", "article_type", "sentiment_label")

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Lists:
    """A list column: the values of row i stand in values[starts[i]:starts[i + 1]]."""

    values: Ints
    starts: Ints

    def row(self, i: int) -> list[int]:
        values: list[int] = self.values[self.starts[i] : self.starts[i + 1]].tolist()
        return values

    def row_of_value(self) -> Ints:
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Everything as columns, and the order of events: about 40 bytes an event and 8 an in-view article."""

    impression_id: Ints
    user_id: Ints
    time_ms: Ints
    shown: _Lists
    clicked: _Lists
    context: list[tuple[str, pa.ChunkedArray]]
    session_id: pa.ChunkedArray | None
    click_row: Ints
    click_ms: Ints
    history_user: Ints
    history_item: Ints
    history_ms: Ints
    order: Ints
    """Positions in histories ++ impressions ++ clicks."""


class EbnerdLog:
    """Reader of EB-NeRD."""

    kind = "ebnerd"

    def __init__(self, *paths: Path) -> None:
        """``paths``: one folder as above, or several of one set, read as one log."""
        folders = list(dict.fromkeys(f for path in paths for f in split_folders(path, "behaviors.parquet")))
        self._behaviors = [folder / "behaviors.parquet" for folder in folders]
        self._histories = [file for folder in folders if (file := find(folder, "history.parquet"))]
        articles = [find(f, "articles.parquet") or find(f.parent, "articles.parquet") for f in folders]
        self._articles = [file for file in dict.fromkeys(articles) if file]
        self.files = (*self._behaviors, *self._histories, *self._articles)
        self.skipped: Counter[str] = Counter()
        self._data: _Loaded | None = None

    def items(self) -> Iterator[Item]:
        """Articles with their text where articles.parquet is there, then what the log names beyond it, by id."""
        seen: set[str] = set()
        for path in self._articles:
            for item in _articles(path):
                if item.item_id not in seen:
                    seen.add(item.item_id)
                    yield item
        data = self._load()
        named = np.unique(np.concatenate([data.shown.values, data.clicked.values, data.history_item]))
        for number in named.tolist():
            if str(number) not in seen:
                yield Item(item_id=str(number), published_at=published_ms(number))

    def users(self) -> Iterator[User]:
        """None: what the log says of a user stands in the context of each impression, as it was then."""
        return iter(())

    def events(self) -> Iterator[LogEvent]:
        """History clicks, impressions and clicks in event-time order."""
        self.skipped.clear()
        data = self._load()
        first_impression = len(data.history_ms)
        first_click = first_impression + len(data.time_ms)
        too_wide = f"impression of more than {MAX_ITEMS} items"
        for at in range(0, len(data.order), _CHUNK):
            chunk = data.order[at : at + _CHUNK]
            shown_or_clicked = chunk[chunk >= first_impression]
            is_click = shown_or_clicked >= first_click
            rows = shown_or_clicked - first_impression
            rows[is_click] = data.click_row[shown_or_clicked[is_click] - first_click]
            contexts = _contexts(data, rows)
            for position in chunk.tolist():
                if position < first_impression:
                    yield _history_click(data, position)
                    continue
                context, session = next(contexts)
                if position >= first_click:
                    yield _click(data, position - first_click, context)
                else:
                    row = position - first_impression
                    shown = list(dict.fromkeys(data.shown.row(row)))
                    if not shown or len(shown) > MAX_ITEMS:
                        self.skipped[too_wide if shown else "impression without items"] += 1
                    else:
                        yield _impression(data, row, shown, context, session)

    def count_events(self) -> int | None:
        """Exact, but for impressions that are left out."""
        return len(self._load().order)

    def _load(self) -> _Loaded:
        if self._data is None:
            self._data = _load(self._behaviors, self._histories)
        return self._data


def published_ms(article_id: int) -> int:
    """Return about when an article was published, epoch milliseconds, by its id; never before 1970."""
    return max(0, KNOWN_ID_MS + (article_id - KNOWN_ID) * MS_PER_ID)


def _load(behavior_files: list[Path], history_files: list[Path]) -> _Loaded:
    optional = [*_CONTEXT, *_PERSON, "session_id"]
    behaviors = pa.concat_tables([_read(f, _NEEDED, optional) for f in behavior_files], promote_options="permissive")
    user_id, time_ms = _ints(behaviors["user_id"]), _times_ms(behaviors["impression_time"])
    shown, clicked = _lists(behaviors["article_ids_inview"]), _lists(behaviors["article_ids_clicked"])
    read_ms = np.nan_to_num(behaviors["read_time"].cast(pa.float64()).to_numpy() * 1000, nan=0.0).astype(np.int64)
    click_row = clicked.row_of_value()
    click_ms = (time_ms + np.maximum(read_ms, CLICK_DELAY_MS))[click_row]
    users, items, times = [], [], []
    for file in history_files:
        table = _read(file, ("user_id", "impression_time_fixed", "article_id_fixed"), [])
        articles, dates = _lists(table["article_id_fixed"]), _lists(table["impression_time_fixed"], is_time=True)
        if not np.array_equal(articles.starts, dates.starts):
            raise LogFormatError(f"{file}: a user's history has not as many times as articles")
        users.append(_ints(table["user_id"])[articles.row_of_value()])
        items.append(articles.values)
        times.append(dates.values)
    empty = [np.empty(0, np.int64)]
    h_user, h_item, h_ms = (np.concatenate(parts or empty) for parts in (users, items, times))
    keep = _new_history(h_user, h_item, h_ms, user_id[click_row], clicked.values, click_ms)
    h_user, h_item, h_ms = h_user[keep], h_item[keep], h_ms[keep]
    counts = (len(h_ms), len(time_ms), len(click_ms))
    rank = np.repeat(np.array([_HISTORY, _IMPRESSION, _CLICK], np.int8), counts)
    order = np.lexsort((rank, np.concatenate([h_ms, time_ms, click_ms])))
    repeated = np.ones(sum(counts), np.bool_)
    repeated[: counts[0] + counts[1]] = False
    repeated[counts[0] + counts[1] + np.unique((click_row << 32) | clicked.values, return_index=True)[1]] = False
    order = order[~repeated[order]]
    names = {**_CONTEXT, **{name: name for name in _PERSON}}
    return _Loaded(
        impression_id=_ints(behaviors["impression_id"]),
        user_id=user_id,
        time_ms=time_ms,
        shown=shown,
        clicked=clicked,
        context=[(name, behaviors[column]) for column, name in names.items() if column in behaviors.column_names],
        session_id=behaviors["session_id"] if "session_id" in behaviors.column_names else None,
        click_row=click_row,
        click_ms=click_ms,
        history_user=h_user,
        history_item=h_item,
        history_ms=h_ms,
        order=order,
    )


def _new_history(
    user: Ints, item: Ints, time_ms: Ints, click_user: Ints, click_item: Ints, click_ms: Ints
) -> npt.NDArray[np.bool_]:
    """Return which history entries, bool [n], are neither a click of the log nor an entry met before."""
    n = len(user)
    is_click = np.repeat([False, True], [n, len(click_user)])
    users, items = np.concatenate([user, click_user]), np.concatenate([item, click_item])
    times = np.concatenate([time_ms, click_ms])
    order = np.lexsort((times, items, users))
    users, items, times, clicks = users[order], items[order], times[order], is_click[order]
    near = (users[1:] == users[:-1]) & (items[1:] == items[:-1]) & (times[1:] - times[:-1] <= SAME_CLICK_MS)
    repeats = np.zeros(len(order), np.bool_)
    repeats[1:] = near
    repeats[:-1] |= near & clicks[1:]
    keep = np.empty(len(order), np.bool_)
    keep[order] = ~repeats
    return keep[:n]


def _read(path: Path, needed: tuple[str, ...], optional: list[str]) -> pa.Table:
    try:
        file = pq.ParquetFile(path)
        names = set(file.schema_arrow.names)
        missing = [name for name in needed if name not in names]
        if missing:
            raise LogFormatError(f"{path} has no column {', '.join(missing)}: not EB-NeRD's layout with labels")
        table = file.read(columns=[*needed, *(name for name in optional if name in names)])
    except pa.ArrowInvalid as error:
        raise LogFormatError(f"{path} is not a parquet file: {error}") from None
    for name in needed:
        if table[name].null_count and name != "read_time":
            raise LogFormatError(f"{path}: column {name} has {table[name].null_count} empty rows")
    # Splits differ in the name of the list's child field, which a merge of schemas does not forgive.
    for i, field in enumerate(table.schema):
        if pa.types.is_large_list(field.type) or pa.types.is_list(field.type):
            is_time = pa.types.is_timestamp(field.type.value_type)
            kind = pa.large_list(pa.field("item", pa.timestamp("us") if is_time else pa.int64()))
            table = table.set_column(i, field.name, table[field.name].cast(kind))
    return table


def _ints(column: pa.ChunkedArray) -> Ints:
    return np.ascontiguousarray(column.cast(pa.int64()).to_numpy())


def _times_ms(column: pa.ChunkedArray) -> Ints:
    return _ints(column.cast(pa.timestamp("us")).cast(pa.int64())) // 1000


def _lists(column: pa.ChunkedArray, *, is_time: bool = False) -> _Lists:
    lengths = np.asarray(pc.list_value_length(column).to_numpy(), np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = pc.list_flatten(column)
    return _Lists(_times_ms(flat) if is_time else _ints(flat), starts)


def _contexts(data: _Loaded, rows: Ints) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    """Yield context and session of these rows, in their order, from one take per column."""
    names = [name for name, _ in data.context]
    columns = [column.take(pa.array(rows)).to_pylist() for _, column in data.context]
    sessions = data.session_id.take(pa.array(rows)).to_pylist() if data.session_id is not None else [None] * len(rows)
    for i, session in enumerate(sessions):
        context = {name: column[i] for name, column in zip(names, columns, strict=True) if column[i] is not None}
        if "page_item_id" in context:
            context["page_item_id"] = str(context["page_item_id"])
        yield context or None, None if session is None else str(session)


def _impression(
    data: _Loaded, row: int, shown: list[int], context: dict[str, Any] | None, session: str | None
) -> LogEvent:
    time_ms = int(data.time_ms[row])
    clicked = tuple(map(str, dict.fromkeys(data.clicked.row(row))))
    impression = Impression(
        event_id=f"ebnerd:{data.impression_id[row]}",
        event_time=time_ms,
        user_id=str(data.user_id[row]),
        items=[ImpressedItem(str(number)) for number in shown],
        session_id=session,
        context=context,
    )
    return LogEvent(time_ms, impression, clicked)


def _click(data: _Loaded, click: int, context: dict[str, Any] | None) -> LogEvent:
    row, time_ms = int(data.click_row[click]), int(data.click_ms[click])
    action = Action(
        event_id=f"ebnerd:{data.impression_id[row]}:click:{click - int(data.clicked.starts[row])}",
        event_time=time_ms,
        user_id=str(data.user_id[row]),
        item_id=str(data.clicked.values[click]),
        action="click",
        context=context,
    )
    return LogEvent(time_ms, action)


def _history_click(data: _Loaded, entry: int) -> LogEvent:
    time_ms, user, item = int(data.history_ms[entry]), int(data.history_user[entry]), int(data.history_item[entry])
    action = Action(
        event_id=f"ebnerd:history:{user}:{item}:{time_ms // 1000}",
        event_time=time_ms,
        user_id=str(user),
        item_id=str(item),
        action="click",
    )
    return LogEvent(time_ms, action, None, True)


def _articles(path: Path) -> Iterator[Item]:
    wanted = [*_ARTICLE_TEXT, *_ARTICLE_FACTS]
    try:
        file = pq.ParquetFile(path)
        names = set(file.schema_arrow.names)
        if "article_id" not in names:
            raise LogFormatError(f"{path} has no column article_id")
        for batch in file.iter_batches(1_024, columns=["article_id", *(name for name in wanted if name in names)]):
            for row in batch.to_pylist():
                yield _article(row)
    except pa.ArrowInvalid as error:
        raise LogFormatError(f"{path} is not a parquet file: {error}") from None


def _article(row: dict[str, Any]) -> Item:
    parts = [part for part in (row.get("subtitle"), row.get("body")) if part]
    published = row.get("published_time")
    facts = {name: row.get(name) for name in _ARTICLE_FACTS}
    category = row.get("category_str")
    return Item(
        item_id=str(row["article_id"]),
        title=(row.get("title") or "")[:4_000],
        text="\n\n".join(parts)[:100_000] or None,
        categories=[category[:256]] if category else None,
        tags=_names(row.get("topics")),
        entities=_names(row.get("ner_clusters")),
        published_at=round(published.replace(tzinfo=dt.UTC).timestamp() * 1000) if published else None,
        attributes={name: value for name, value in facts.items() if value is not None} or None,
    )


def _names(values: list[str] | None) -> list[str] | None:
    return list(dict.fromkeys(value[:256] for value in values or () if value))[:256] or None
