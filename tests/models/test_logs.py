from __future__ import annotations

import datetime as dt
import gzip
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import LogFormatError
from models.events import EVENT_CODEC, Action, ClockPolicy, Impression, Item, Request, User
from models.logs import LogEvent, LogReader, fingerprint, open_log
from models.logs.ebnerd import EbnerdLog
from models.logs.jsonl import Refusal, check_lines
from models.logs.log import TimeOrderedLines
from models.logs.mind import MindLog
from models.logs.movielens import MovieLensLog

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
real_logs = pytest.mark.skipif(not DATA.is_dir(), reason="the real logs are not at ../shared/data")


def at(text: str) -> int:
    return int(dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC).timestamp() * 1000)


def told(reader: LogReader) -> list[tuple[str, ...]]:
    """Events in short: kind, user, items, in the order in which they come."""
    short: list[tuple[str, ...]] = []
    for logged in reader.events():
        event = logged.event
        if isinstance(event, Impression):
            short.append(("saw", event.user_id, *(shown.item_id for shown in event.items)))
        elif isinstance(event, Action):
            short.append(("history" if logged.is_history else event.action, event.user_id, event.item_id))
    return short


def impressions(reader: LogReader) -> list[tuple[Impression, LogEvent]]:
    return [(e.event, e) for e in reader.events() if isinstance(e.event, Impression)]


# ---------------------------------------------------------------------------------------------------------- MIND

NEWS = (
    "N1\tsports\tsoccer\tA match\tAn abstract\thttps://x\t"
    '[{"Label": "Cup", "Type": "O", "WikidataId": "Q1"}]\t[{"Label": "Cup"}, {"Label": "Rome"}]\n'
    "N2\tnews\tnews\tTitle alone\t\t\t\t\n"
)


def mind(folder: Path, *rows: str, news: str = NEWS) -> MindLog:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "behaviors.tsv").write_text("".join(row + "\n" for row in rows))
    (folder / "news.tsv").write_text(news)
    return MindLog(folder)


def test_mind_rows_become_impressions_followed_by_their_clicks(tmp_path: Path) -> None:
    log = mind(tmp_path, "7\tU1\t11/11/2019 9:05:58 AM\t\tN1-0 N2-1")
    assert told(log) == [("saw", "U1", "N1", "N2"), ("click", "U1", "N2")]


def test_mind_clicks_are_dated_a_second_after_their_impression(tmp_path: Path) -> None:
    log = mind(tmp_path, "7\tU1\t11/11/2019 9:05:58 AM\t\tN1-0 N2-1")
    assert [e.time_ms for e in log.events()] == [at("2019-11-11 09:05:58"), at("2019-11-11 09:05:59")]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("11/11/2019 12:00:00 AM", "2019-11-11 00:00:00"),
        ("11/11/2019 12:30:00 PM", "2019-11-11 12:30:00"),
        ("1/2/2019 11:59:59 PM", "2019-01-02 23:59:59"),
    ],
)
def test_mind_times_are_american_and_read_as_utc(tmp_path: Path, text: str, wanted: str) -> None:
    log = mind(tmp_path, f"7\tU1\t{text}\t\tN1-0")
    assert [e.time_ms for e in log.events()] == [at(wanted)]


def test_mind_rows_come_in_time_order_whatever_the_files_order(tmp_path: Path) -> None:
    log = mind(
        tmp_path,
        "1\tU1\t11/12/2019 9:00:00 AM\t\tN1-0",
        "2\tU2\t11/11/2019 9:00:00 PM\t\tN2-0",
        "3\tU3\t11/11/2019 9:00:00 AM\t\tN1-0",
    )
    assert [row[1] for row in told(log)] == ["U3", "U2", "U1"]


def test_mind_history_comes_once_per_user_an_hour_before_the_first_impression(tmp_path: Path) -> None:
    log = mind(
        tmp_path,
        "1\tU1\t11/11/2019 9:00:00 AM\tN2 N1\tN1-0",
        "2\tU1\t11/11/2019 9:30:00 AM\tN2 N1\tN2-0",
        "3\tU2\t11/11/2019 9:40:00 AM\tN1\tN2-0",
    )
    assert told(log)[:3] == [("history", "U1", "N2"), ("history", "U1", "N1"), ("history", "U2", "N1")]
    assert {e.time_ms for e in log.events() if e.is_history} == {at("2019-11-11 08:00:00")}
    assert len(told(log)) == 6


def test_mind_outcome_stands_beside_the_impression_and_not_in_it(tmp_path: Path) -> None:
    log = mind(tmp_path, "7\tU1\t11/11/2019 9:05:58 AM\t\tN1-0 N2-1")
    ((impression, logged),) = impressions(log)
    assert logged.outcome == ("N2",)
    assert [shown.position for shown in impression.items] == [None, None]


def test_mind_rows_without_labels_have_no_outcome(tmp_path: Path) -> None:
    log = mind(tmp_path, "7\tU1\t11/11/2019 9:05:58 AM\t\tN1 N2")
    assert [logged.outcome for _, logged in impressions(log)] == [None]


def test_mind_articles_have_title_abstract_categories_and_entities(tmp_path: Path) -> None:
    first, second = mind(tmp_path, "7\tU1\t11/11/2019 9:05:58 AM\t\tN1-0").items()
    assert first == Item(
        item_id="N1",
        title="A match",
        text="An abstract",
        categories=["sports", "soccer"],
        entities=["Cup", "Rome"],
    )
    assert second == Item(item_id="N2", title="Title alone", categories=["news"])


def test_mind_event_ids_are_the_same_on_every_reading(tmp_path: Path) -> None:
    log = mind(tmp_path, "7\tU1\t11/11/2019 9:05:58 AM\tN1\tN1-0 N2-1")
    again = MindLog(tmp_path)
    assert [e.event.event_id for e in log.events()] == [e.event.event_id for e in again.events()]


def test_mind_splits_below_the_folder_are_read_together_with_news_beside_or_above_them(tmp_path: Path) -> None:
    mind(tmp_path / "MINDsmall_train", "1\tU1\t11/11/2019 9:00:00 AM\t\tN1-0")
    mind(tmp_path / "MINDsmall_dev", "1\tU1\t11/15/2019 9:00:00 AM\t\tN3-1", news=NEWS.replace("N1", "N3"))
    log = MindLog(tmp_path)
    assert told(log) == [("saw", "U1", "N1"), ("saw", "U1", "N3"), ("click", "U1", "N3")]
    assert sorted(item.item_id for item in log.items()) == ["N1", "N2", "N3"]


def test_mind_gzip_reads_like_plain(tmp_path: Path) -> None:
    rows = ("1\tU1\t11/12/2019 9:00:00 AM\tN2\tN1-1", "2\tU2\t11/11/2019 9:00:00 AM\t\tN2-0")
    plain = mind(tmp_path / "plain", *rows)
    (tmp_path / "packed").mkdir()
    for name in ("behaviors.tsv", "news.tsv"):
        packed = gzip.compress((tmp_path / "plain" / name).read_bytes())
        (tmp_path / "packed" / f"{name}.gz").write_bytes(packed)
    assert list(MindLog(tmp_path / "packed").events()) == list(plain.events())


def test_mind_row_with_a_missing_column_is_named_by_file_and_line(tmp_path: Path) -> None:
    log = mind(tmp_path, "1\tU1\t11/12/2019 9:00:00 AM\t\tN1-1", "2\tU2\t11/12/2019 9:00:00 AM\tN1-1")
    with pytest.raises(LogFormatError, match=r"behaviors\.tsv, line 2: 4 columns"):
        list(log.events())


def test_mind_time_that_is_none_is_named_by_file_and_line(tmp_path: Path) -> None:
    log = mind(tmp_path, "1\tU1\t2019-11-12 09:00:00\t\tN1-1")
    with pytest.raises(LogFormatError, match=r"line 1: '2019-11-12 09:00:00' is not a time"):
        list(log.events())


def test_mind_folder_without_behaviors_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(LogFormatError, match=r"no behaviors\.tsv"):
        MindLog(tmp_path)


# -------------------------------------------------------------------------------------------------------- EB-NeRD


def behavior(number: int, user: int, time: str, shown: list[int], clicked: list[int], **more: Any) -> dict[str, Any]:
    return {
        "impression_id": number,
        "article_id": None,
        "impression_time": dt.datetime.fromisoformat(time),
        "read_time": 20.0,
        "scroll_percentage": 99.0,
        "device_type": 2,
        "article_ids_inview": shown,
        "article_ids_clicked": clicked,
        "user_id": user,
        "is_subscriber": False,
        "gender": None,
        "age": None,
        "session_id": 3,
        "next_read_time": 1.0,
        **more,
    }


def past(user: int, *clicks: tuple[str, int]) -> dict[str, Any]:
    return {
        "user_id": user,
        "impression_time_fixed": [dt.datetime.fromisoformat(time) for time, _ in clicks],
        "article_id_fixed": [item for _, item in clicks],
        "read_time_fixed": [1.0 for _ in clicks],
        "scroll_percentage_fixed": [None for _ in clicks],
    }


def ebnerd(folder: Path, behaviors: list[dict[str, Any]], histories: Sequence[dict[str, Any]] = ()) -> EbnerdLog:
    folder.mkdir(parents=True, exist_ok=True)
    ids = pa.large_list(pa.int32())
    schema = {"article_ids_inview": ids, "article_ids_clicked": ids, "article_id": pa.int32(), "gender": pa.int8()}
    schema |= {"age": pa.int8(), "read_time": pa.float32()}
    table = pa.table({name: pa.array([b[name] for b in behaviors], schema.get(name)) for name in behaviors[0]})
    pq.write_table(table, folder / "behaviors.parquet")
    if histories:
        pq.write_table(pa.Table.from_pylist(list(histories)), folder / "history.parquet")
    return EbnerdLog(folder)


def test_ebnerd_rows_become_impressions_followed_by_their_clicks(tmp_path: Path) -> None:
    log = ebnerd(tmp_path, [behavior(1, 9, "2023-05-18 07:00:00", [5, 6], [6])])
    assert told(log) == [("saw", "9", "5", "6"), ("click", "9", "6")]


def test_ebnerd_clicks_come_read_time_after_their_impression(tmp_path: Path) -> None:
    log = ebnerd(tmp_path, [behavior(1, 9, "2023-05-18 07:00:00", [5, 6], [6])])
    assert [e.time_ms for e in log.events()] == [at("2023-05-18 07:00:00"), at("2023-05-18 07:00:20")]


def test_ebnerd_click_without_read_time_comes_a_second_after_its_impression(tmp_path: Path) -> None:
    log = ebnerd(tmp_path, [behavior(1, 9, "2023-05-18 07:00:00", [5, 6], [6], read_time=None)])
    assert [e.time_ms for e in log.events()][1] == at("2023-05-18 07:00:01")


def test_ebnerd_click_stands_after_the_impressions_that_were_shown_before_it(tmp_path: Path) -> None:
    log = ebnerd(
        tmp_path,
        [
            behavior(2, 8, "2023-05-18 07:00:10", [5], [5]),
            behavior(1, 9, "2023-05-18 07:00:00", [5, 6], [6]),
        ],
    )
    assert [row[:2] for row in told(log)] == [("saw", "9"), ("saw", "8"), ("click", "9"), ("click", "8")]


def test_ebnerd_impression_carries_nothing_that_was_known_only_afterwards(tmp_path: Path) -> None:
    log = ebnerd(tmp_path, [behavior(1, 9, "2023-05-18 07:00:00", [5, 6], [6], article_id=77)])
    ((impression, logged),) = impressions(log)
    assert impression.context == {"page_item_id": "77", "device_type": 2, "is_subscriber": False}
    assert [shown.position for shown in impression.items] == [None, None]
    assert logged.outcome == ("6",)


def test_ebnerd_click_has_the_context_of_its_own_impression(tmp_path: Path) -> None:
    log = ebnerd(
        tmp_path,
        [
            behavior(2, 8, "2023-05-18 07:00:10", [5], [5], device_type=3),
            behavior(1, 9, "2023-05-18 07:00:00", [5, 6], [6], device_type=1),
        ],
    )
    clicks = [logged.event for logged in log.events() if isinstance(logged.event, Action)]
    assert [(click.user_id, (click.context or {})["device_type"]) for click in clicks] == [("9", 1), ("8", 3)]


def test_ebnerd_history_is_dated_and_stands_among_the_other_events(tmp_path: Path) -> None:
    log = ebnerd(
        tmp_path,
        [behavior(1, 9, "2023-05-18 07:00:00", [5], [5]), behavior(2, 9, "2023-05-18 09:00:00", [6], [6])],
        [past(9, ("2023-05-17 12:00:00", 4), ("2023-05-18 08:00:00", 3))],
    )
    assert [row[0] for row in told(log)] == ["history", "saw", "click", "history", "saw", "click"]


def test_ebnerd_history_entry_that_is_a_click_of_the_log_comes_once(tmp_path: Path) -> None:
    log = ebnerd(
        tmp_path,
        [behavior(1, 9, "2023-05-18 07:00:00", [5], [5])],
        [past(9, ("2023-05-18 07:00:19", 5), ("2023-05-18 07:00:21", 5), ("2023-05-18 08:00:00", 5))],
    )
    assert told(log) == [("saw", "9", "5"), ("click", "9", "5"), ("history", "9", "5")]


def test_ebnerd_histories_of_two_splits_do_not_repeat_each_other(tmp_path: Path) -> None:
    row = behavior(1, 9, "2023-05-18 07:00:00", [5], [5])
    ebnerd(tmp_path / "train", [row], [past(9, ("2023-05-17 12:00:00", 4))])
    ebnerd(
        tmp_path / "validation",
        [behavior(2, 9, "2023-05-26 07:00:00", [6], [6])],
        [past(9, ("2023-05-17 12:00:00", 4), ("2023-05-17 12:30:00", 4))],
    )
    assert [row[0] for row in told(EbnerdLog(tmp_path))] == ["history", "history", "saw", "click", "saw", "click"]


def test_ebnerd_article_named_twice_as_clicked_is_one_click(tmp_path: Path) -> None:
    log = ebnerd(tmp_path, [behavior(1, 9, "2023-05-18 07:00:00", [5, 6], [6, 6])])
    assert told(log) == [("saw", "9", "5", "6"), ("click", "9", "6")]
    assert log.count_events() == 2


def test_ebnerd_items_are_known_by_id_where_there_are_no_articles(tmp_path: Path) -> None:
    log = ebnerd(tmp_path, [behavior(1, 9, "2023-05-18 07:00:00", [5, 6], [6])], [past(9, ("2023-05-17 12:00:00", 4))])
    assert [(item.item_id, item.title) for item in log.items()] == [("4", ""), ("5", ""), ("6", "")]


def test_ebnerd_article_of_a_greater_id_is_the_younger_one(tmp_path: Path) -> None:
    log = ebnerd(tmp_path, [behavior(1, 9, "2023-05-18 07:00:00", [9_770_000, 9_760_000], [9_760_000])])
    published = {item.item_id: item.published_at for item in log.items()}
    assert published == {"9760000": 1_683_743_200_000, "9770000": 1_684_303_200_000}


def test_ebnerd_articles_have_text_and_publication_but_no_later_totals(tmp_path: Path) -> None:
    ebnerd(tmp_path / "train", [behavior(1, 9, "2023-05-18 07:00:00", [5, 6], [6])])
    article = {
        "article_id": 5,
        "title": "Title",
        "subtitle": "Below it",
        "body": "Body",
        "category_str": "sport",
        "topics": ["football"],
        "ner_clusters": ["Rome", "Rome"],
        "published_time": dt.datetime.fromisoformat("2023-05-17 12:00:00"),
        "premium": True,
        "total_pageviews": 1_000,
    }
    pq.write_table(pa.Table.from_pylist([article]), tmp_path / "articles.parquet")
    first, second = EbnerdLog(tmp_path).items()
    assert first == Item(
        item_id="5",
        title="Title",
        text="Below it\n\nBody",
        categories=["sport"],
        tags=["football"],
        entities=["Rome"],
        published_at=at("2023-05-17 12:00:00"),
        attributes={"premium": True},
    )
    assert (second.item_id, second.title) == ("6", "")


def test_ebnerd_impression_without_items_is_left_out_and_counted(tmp_path: Path) -> None:
    log = ebnerd(tmp_path, [behavior(1, 9, "2023-05-18 07:00:00", [], [])])
    assert told(log) == []
    assert log.skipped == {"impression without items": 1}


def test_ebnerd_test_split_without_clicks_is_refused_by_the_missing_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"impression_id": [1], "user_id": [2]}), tmp_path / "behaviors.parquet")
    with pytest.raises(LogFormatError, match="article_ids_clicked"):
        list(EbnerdLog(tmp_path).events())


# ------------------------------------------------------------------------------------------------------ MovieLens


def movielens(folder: Path, ratings: str) -> MovieLensLog:
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + ratings)
    (folder / "movies.csv").write_text(
        'movieId,title,genres\n1,Toy Story (1995),Adventure|Comedy\n2,"One, Two",(no genres listed)\n'
    )
    (folder / "tags.csv").write_text("userId,movieId,tag,timestamp\n3,1,Pixar,9\n4,1,pixar,9\n4,1,fun,9\n")
    return MovieLensLog(folder)


def test_movielens_ratings_come_in_time_order_with_their_stars(tmp_path: Path) -> None:
    log = movielens(tmp_path, "1,2,4.5,200\n2,1,3.0,100\n")
    events = [e.event for e in log.events()]
    assert [(e.user_id, e.item_id, e.value, e.event_time) for e in events if isinstance(e, Action)] == [
        ("2", "1", 3.0, 100_000),
        ("1", "2", 4.5, 200_000),
    ]
    assert log.count_events() == 2


def test_movielens_films_have_genres_tags_and_year(tmp_path: Path) -> None:
    first, second = movielens(tmp_path, "1,2,4.5,200\n").items()
    assert first == Item(
        item_id="1",
        title="Toy Story (1995)",
        categories=["Adventure", "Comedy"],
        tags=["pixar", "fun"],
        attributes={"year": 1995},
    )
    assert second == Item(item_id="2", title="One, Two")


def test_movielens_tags_can_be_left_out(tmp_path: Path) -> None:
    movielens(tmp_path, "1,2,4.5,200\n")
    assert [item.tags for item in MovieLensLog(tmp_path, with_tags=False).items()] == [None, None]


def test_movielens_rating_that_is_no_number_is_refused(tmp_path: Path) -> None:
    log = movielens(tmp_path, "1,2,good,200\n")
    with pytest.raises(LogFormatError, match=r"ratings\.csv"):
        list(log.events())


# ---------------------------------------------------------------------------------------------------------- JSONL

CLICK = {"type": "action", "event_id": "1", "event_time": 5_000, "user_id": "ann", "item_id": "a", "action": "click"}
LATER = {**CLICK, "event_id": "2", "event_time": "1970-01-01T00:00:09Z"}
REQUEST = {"type": "request", "event_id": "3", "event_time": 1_000, "user_id": "ann", "request_id": "r"}


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_jsonl_events_come_in_event_time_order_with_ties_in_file_order(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(lines(LATER, CLICK, {**CLICK, "event_id": "1b"}, REQUEST))
    log = open_log("jsonl", tmp_path)
    assert [e.event.event_id for e in log.events()] == ["3", "1", "1b", "2"]
    assert [e.time_ms for e in log.events()] == [1_000, 5_000, 5_000, 9_000]
    assert log.count_events() == 4


def test_jsonl_one_file_may_hold_all_kinds(tmp_path: Path) -> None:
    file = tmp_path / "all.jsonl"
    file.write_text(lines({"item_id": "a"}, CLICK, {"user_id": "ann"}))
    log = open_log("jsonl", file)
    assert list(log.items()) == [Item(item_id="a")]
    assert list(log.users()) == [User(user_id="ann")]
    assert told(log) == [("click", "ann", "a")]


def test_jsonl_keeps_requests(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(lines(REQUEST))
    assert [type(e.event) for e in open_log("jsonl", tmp_path).events()] == [Request]


def test_jsonl_broken_line_is_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(lines(CLICK) + "\n{broken\n")
    with pytest.raises(LogFormatError, match=r"events\.jsonl, line 3: malformed"):
        list(open_log("jsonl", tmp_path).events())


def test_jsonl_last_line_needs_no_newline(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(lines(CLICK).rstrip("\n"))
    assert len(list(open_log("jsonl", tmp_path).events())) == 1


# ------------------------------------------------------------------------------------------------------- validate


def refusals(*texts: str, policy: ClockPolicy | None = None, broker_ms: int = 10_000) -> list[Refusal | None]:
    return list(check_lines((t.encode() for t in texts), None, policy or ClockPolicy(policy="trusted"), broker_ms))


def test_validate_takes_what_the_worker_takes() -> None:
    assert refusals(json.dumps(CLICK), json.dumps(REQUEST), '{"item_id": "a"}', '{"user_id": "u"}') == [None] * 4


def test_validate_names_the_line_and_the_reason() -> None:
    (refusal,) = refusals("", json.dumps({**CLICK, "user_id": 7}))
    assert refusal == Refusal(2, "invalid", "Expected `str`, got `int` - at `$.user_id`")


def test_validate_refuses_old_times_under_the_live_policy() -> None:
    (refusal,) = refusals(json.dumps(CLICK), policy=ClockPolicy(), broker_ms=at("2024-01-01"))
    assert refusal is not None
    assert refusal.reason == "event-time-absurd"


def test_validate_takes_old_times_under_the_trusted_policy() -> None:
    assert refusals(json.dumps(CLICK), broker_ms=at("2024-01-01")) == [None]


def test_validate_refuses_a_line_above_the_size_limit() -> None:
    (refusal,) = refusals(json.dumps({**CLICK, "note": "x" * 1_000_000}))
    assert refusal is not None
    assert refusal.reason == "too-large"


@given(st.binary(max_size=60))
def test_validate_refuses_any_bytes_with_a_reason_and_never_fails(line: bytes) -> None:
    found = list(check_lines([line], None, ClockPolicy(policy="trusted"), 0))
    assert all(refusal is None or refusal.reason in ("malformed", "invalid") for refusal in found)


# -------------------------------------------------------------------------------------------------- what all share


@given(st.lists(st.integers(0, 5), max_size=30))
def test_lines_come_in_time_order_and_ties_in_file_order(times: list[int]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "log"
        file.write_text("".join(f"{time} {n}\n" for n, time in enumerate(times)))
        ordered = [line for _, _, line in TimeOrderedLines([file], lambda line: int(line.split()[0]))]
    wanted = sorted(enumerate(times), key=lambda pair: pair[1])
    assert ordered == [f"{time} {n}".encode() for n, time in wanted]


def test_the_fingerprint_changes_with_the_content_and_not_with_the_folder(tmp_path: Path) -> None:
    one = fingerprint(mind(tmp_path / "one", "7\tU1\t11/11/2019 9:05:58 AM\t\tN1-0"))
    moved = fingerprint(mind(tmp_path / "moved", "7\tU1\t11/11/2019 9:05:58 AM\t\tN1-0"))
    changed = fingerprint(mind(tmp_path / "changed", "7\tU1\t11/11/2019 9:05:59 AM\t\tN1-0"))
    assert one == moved != changed


def test_an_unknown_kind_of_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogFormatError, match="mind, ebnerd, movielens, jsonl"):
        open_log("netflix", tmp_path)


REAL = [
    ("ebnerd", "ebnerd-demo", 42_203),
    ("ebnerd", "ebnerd-demo/train", 24_724),
    ("mind", "mind-subset", 13_031),
    ("movielens", "ml-latest-small", 0),
]


@real_logs
@pytest.mark.logs
@pytest.mark.parametrize(("kind", "folder", "shown"), REAL)
def test_a_real_log_is_in_time_order_with_unique_ids_and_events_that_the_worker_takes(
    kind: str, folder: str, shown: int
) -> None:
    import msgspec

    ids: set[str] = set()
    count, last_ms, found = 0, 0, 0
    for logged in open_log(kind, DATA / folder).events():
        assert logged.time_ms >= last_ms
        last_ms = logged.time_ms
        ids.add(logged.event.event_id)
        found += isinstance(logged.event, Impression)
        count += 1
        if count % 50 == 0:
            assert EVENT_CODEC.decode(msgspec.msgpack.encode(logged.event)) == logged.event
    assert len(ids) == count
    assert found == shown


@real_logs
@pytest.mark.logs
def test_ebnerd_clicks_of_the_train_week_come_once_though_the_validation_history_repeats_them() -> None:
    clicks: dict[tuple[str, str], list[int]] = {}
    for logged in EbnerdLog(DATA / "ebnerd-demo").events():
        if isinstance(logged.event, Action):
            clicks.setdefault((logged.event.user_id, logged.event.item_id), []).append(logged.time_ms)
    near = sum(b - a <= 1_000 for times in clicks.values() for a, b in itertools.pairwise(times))
    assert near == 0  # the two histories alone would repeat 150,335 entries


@real_logs
@pytest.mark.logs
def test_mind_items_of_the_real_subset_have_titles() -> None:
    items = list(MindLog(DATA / "mind-subset").items())
    assert len(items) == 51_282
    assert all(item.title for item in items)
