"""A replay on tiny written logs: what is known when, what is trained on, what is scored, what our slates hold."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.encoder import EncoderConfig
from models.errors import LogFormatError, ReplayError
from models.events import Impression
from models.hashing import hash64
from models.logs import LogReader, open_log
from models.user_events import UserStateConfig
from tests.trainer.replay_logs import HOUR, START_MS, Line, Written, click, impression, write_log
from trainer.log_examples import LogExamples
from trainer.replay import ReplayConfig, ReplayResult, find_parts, replay
from trainer.replay_delay import Delay, tick_seconds
from trainer.replay_log import Survey, survey_log
from trainer.replay_measures import Ranked
from trainer.replay_models import ItemVectors, Schedule, like_the_scored, stretches, unclicked_per_click
from trainer.replay_report import as_json
from trainer.replay_settings import duration_seconds
from trainer.replay_slates import Popularity, Shelf, sample, whole_catalogue

MINUTE = 60_000
LAST = impression(9 * HOUR, "z", "ab")
"""Closes the labels of all before it; it has none itself."""


def row(result: ReplayResult, mode: Any, delay: float = 0.0) -> Any:
    found = result.row(mode, delay)
    assert found is not None
    return found


def seen_before(source: Written, delay_seconds: float, **changes: Any) -> LogExamples:
    """What the live pass over a log knew at each impression."""
    config = ReplayConfig(slates=0, **changes)
    survey = survey_log(source.open(), source.open_scored(), config.score_share)
    delay = Delay(source, survey, ItemVectors(), config, delay_seconds, lambda *_: None)
    return delay.examples("reading", frozen=False)


def recent(examples: LogExamples, place: int) -> list[int]:
    hashes: list[int] = np.frombuffer(examples.records[place].recent_items, "<u8").tolist()
    return hashes


def test_a_click_is_not_known_before_its_delay(tmp_path: Path) -> None:
    log = write_log(
        tmp_path,
        train=[impression(0, "u", "ab"), click(1_000, "u", "a")],
        scored=[impression(4 * MINUTE, "u", "ac"), impression(6 * MINUTE, "u", "ac"), LAST],
    )
    late, at_once = seen_before(log, 300.0), seen_before(log, 0.0)
    assert recent(at_once, 1) == [hash64("a")]
    assert recent(late, 1) == []
    assert recent(late, 2) == [hash64("a")]


def test_labels_that_are_not_closed_are_not_trained_on() -> None:
    user_state = UserStateConfig(attribution_window_seconds=600)
    schedule = Schedule.of(10 * HOUR, 300.0, user_state, 0.0)
    records = Written.records([10 * HOUR - 16 * MINUTE, 10 * HOUR - 15 * MINUTE, 10 * HOUR - 14 * MINUTE])
    assert schedule.closed(records, 10 * HOUR).tolist() == [True, True, False]


def test_a_model_is_trained_again_every_so_often_and_never_at_zero() -> None:
    schedule = Schedule.of(10 * HOUR, 0.0, UserStateConfig(), 0.0)
    assert schedule.trainings(HOUR, 12 * HOUR) == [11 * HOUR, 12 * HOUR]
    assert schedule.trainings(0, 12 * HOUR) == []


def test_an_impression_is_scored_by_the_model_that_was_trained_before_it() -> None:
    assert list(stretches([0, 5, 10, 11], [5, 11])) == [(0, slice(0, 1)), (1, slice(1, 3)), (2, slice(3, 4))]
    assert list(stretches([0, 1], [])) == [(0, slice(0, 2))]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Written, ReplayResult]:
    """Forty items; each hour one of them, another one each time, is what everybody clicks."""
    log = write_log(tmp_path_factory.mktemp("world"), *Written.fashions(hours=40, scored_hours=8))
    config = ReplayConfig(delays_seconds=(0.0, 3_600.0), slates=40, retrain_every_seconds=4 * 3_600, seed=3)
    return log, replay(log, config)


def test_frozen_mode_does_not_count_the_scored_part(world: tuple[Written, ReplayResult]) -> None:
    _, result = world
    assert row(result, "frozen").measures.auc.mean < 0.6
    assert row(result, "live").measures.auc.mean > 0.8
    assert row(result, "live").over_frozen.low > 0.1


def test_a_delay_longer_than_the_fashion_loses_it(world: tuple[Written, ReplayResult]) -> None:
    _, result = world
    assert row(result, "live", 3_600.0).measures.auc.mean < row(result, "live", 0.0).measures.auc.mean - 0.05
    assert result.best(0.0).measures.auc.mean > result.best(3_600.0).measures.auc.mean


def test_the_retrained_mode_has_a_model_for_each_training(world: tuple[Written, ReplayResult]) -> None:
    _, result = world
    assert (row(result, "live").models, row(result, "retrained").models) == (1, 2)
    assert row(result, "frozen").trained_on == row(result, "retrained").trained_on > 100


def test_all_modes_are_measured_on_the_same_impressions(world: tuple[Written, ReplayResult]) -> None:
    _, result = world
    assert len({r.measures.impressions for r in result.results}) == 1
    assert len({tuple(s.impressions for s in r.measures.slices.values()) for r in result.results}) == 1


def test_our_slates_hold_what_is_clicked_now_only_where_events_are_live(world: tuple[Written, ReplayResult]) -> None:
    _, result = world
    live, frozen = row(result, "live").slates, row(result, "frozen").slates
    assert live.impressions == frozen.impressions == 40
    assert live.source_recall["popular"] > 0.8
    assert live.recall > 0.5 > frozen.recall
    assert np.isnan(live.intra_list_diversity)


def test_the_same_seed_gives_the_same_figures(world: tuple[Written, ReplayResult]) -> None:
    log, result = world
    config = result.config.model_copy(update={"delays_seconds": (0.0,), "slates": 0})
    again = replay(log, config)
    before = [r for r in as_json(result)["results"] if not r["feedback_delay_seconds"]]
    assert as_json(again)["results"] == [{**r, "slates": None} for r in before]


def test_processes_give_the_same_rows_as_one(world: tuple[Written, ReplayResult]) -> None:
    log, result = world
    told: list[str] = []
    again = replay(log, result.config, jobs=2, show=lambda step, done, total: told.append(step))
    assert as_json(again)["results"] == as_json(result)["results"]
    assert "1 h: reading, live" in told


def test_a_killed_process_of_a_delay_is_told_in_words(world: tuple[Written, ReplayResult]) -> None:
    log, result = world

    def kill_one(step: str, done: int, total: int | None) -> None:
        if step == "1 h: reading, live" and children:
            os.kill(children.pop(), signal.SIGKILL)
        elif not children:
            children.extend(child.pid for child in multiprocessing.active_children() if child.pid is not None)

    children: list[int] = []
    with pytest.raises(ReplayError, match="the process of a feedback delay was killed"):
        replay(log, result.config, jobs=2, show=kill_one)


def test_processes_of_a_killed_replay_end_with_it(world: tuple[Written, ReplayResult]) -> None:
    log, _ = world
    script = (
        "import multiprocessing, sys\nfrom pathlib import Path\nfrom trainer.replay import *\n"
        "def show(step, done, total):\n"
        "    if ': ' in step: print(*(c.pid for c in multiprocessing.active_children()), flush=True)\n"
        "if __name__ == '__main__':\n"
        f"    paths = [Path(p) for p in {[str(p) for p in log.paths]!r}]\n"
        "    config = ReplayConfig(delays_seconds=(0.0, 3600.0))\n"
        "    replay(find_parts('jsonl', paths, paths[-1]), config, jobs=2, show=show)\n"
    )
    file = log.paths[0].parent / "replay_in_processes.py"
    file.write_text(script)
    with subprocess.Popen(
        [sys.executable, str(file)], stdout=subprocess.PIPE, text=True, env=_with_project()
    ) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(children) == 2
    deadline = time.monotonic() + 60
    while any(map(_runs, children)):
        assert time.monotonic() < deadline, f"of {children} some still run"
        time.sleep(0.05)


def _with_project() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_without_retraining_there_is_no_such_mode() -> None:
    assert ReplayConfig(retrain_every_seconds=0).wanted == ("frozen", "live")
    assert ReplayConfig(modes=("retrained", "live")).wanted == ("live", "retrained")


def test_impressions_that_are_all_clicked_or_not_at_all_count_in_no_auc() -> None:
    labels = [np.array(values, np.float32) for values in ([1, 0], [0, 0], [1, 1])]
    ranked = Ranked([np.array([1, 0], np.float32)] * 3, labels, ["u", "v", "w"])
    measures = ranked.measures({"warm": np.array([False, True, True])}, 1.0, 0)
    assert (measures.impressions, measures.auc.mean, measures.mrr, measures.clicks_in_top_5) == (1, 1.0, 1.0, 1.0)
    assert measures.slices["warm"].impressions == 0
    assert np.isnan(measures.slices["warm"].auc.mean)


def test_an_unclicked_item_weighs_as_many_as_it_stands_for() -> None:
    even = Ranked([np.zeros(2, np.float32)], [np.array([1, 0], np.float32)], ["u"])
    low = Ranked([np.full(2, -np.log(9), np.float32)], [np.array([1, 0], np.float32)], ["u"])
    assert even.measures({}, 1.0, 0).ece == pytest.approx(0.0)
    assert low.measures({}, 9.0, 0).ece == pytest.approx(0.0, abs=1e-6)


def test_what_is_trained_on_is_thinned_as_the_scored_part_is(tmp_path: Path) -> None:
    log = write_log(
        tmp_path,
        train=[impression(0, "u", "abcd"), click(1_000, "u", "a")],
        scored=[impression(HOUR, "u", "ac"), click(HOUR + 1_000, "u", "c"), LAST],
    )
    known = seen_before(log, 0.0)
    schedule = Schedule.of(START_MS + HOUR, 0.0, UserStateConfig(), 0.0, unclicked_weight=10.0)
    assert unclicked_per_click([known.labels[1]]) == 1
    alike = like_the_scored(known, schedule, 1)
    assert {len(labels) for labels in alike.labels} == {2}
    assert {record.negative_rate for record in alike.records} == {0.1}
    assert like_the_scored(known, Schedule.of(0, 0.0, UserStateConfig(), 0.0), 1) is known


def test_new_items_and_users_are_told_by_what_happened_not_by_what_arrived(tmp_path: Path) -> None:
    log = write_log(
        tmp_path,
        train=[impression(0, "u", "ab"), click(1_000, "u", "a")],
        scored=[impression(2_000, "u", "ac"), impression(3_000, "v", "ac")],
    )
    survey = survey_log(log.open(), log.open_scored(), 0.3)
    assert survey.actions_before.tolist() == [1, 0]
    assert survey.shown_before.tolist() == [1, 0, 2, 1]
    assert survey.start_ms == START_MS + 2_000


def test_the_latest_share_is_scored_where_the_log_is_one_part(tmp_path: Path) -> None:
    write_log(tmp_path, train=[impression(n * 1_000, "u", "ab") for n in range(10)], scored=[])
    source = find_parts("jsonl", [tmp_path / "train"])
    survey = survey_log(source.open(), source.open_scored(), 0.3)
    assert survey.times_ms.tolist() == [START_MS + n * 1_000 for n in (7, 8, 9)]


def test_hours_are_told_by_the_scored_part(tmp_path: Path) -> None:
    survey = survey_at([START_MS + n * HOUR for n in range(120)])
    assert tick_seconds(survey, ReplayConfig()) == 3_600
    assert tick_seconds(survey_at([START_MS + 1 + n * HOUR for n in range(120)]), ReplayConfig()) == 0.001
    assert tick_seconds(survey, ReplayConfig(tick_seconds=1.0)) == 1.0


def survey_at(times_ms: Sequence[int]) -> Survey:
    zeros = np.zeros(len(times_ms), np.int64)
    return Survey(
        0,
        0,
        0,
        0,
        times_ms[0],
        times_ms[-1],
        zeros,
        np.array(times_ms),
        zeros.astype("i4"),
        zeros,
        zeros.astype("i4"),
        {},
        {},
    )


def test_an_item_is_on_the_shelf_once_it_was_published_or_shown(tmp_path: Path) -> None:
    items: list[Line] = [{"item_id": "a", "published_at": START_MS + HOUR}, {"item_id": "b"}, {"item_id": "d"}]
    log = write_log(tmp_path, train=[impression(0, "u", "bc")], scored=[impression(HOUR, "u", "bc")], items=items)
    survey = survey_log(log.open(), log.open_scored(), 0.3)
    catalogue = whole_catalogue(log.open(), survey, ItemVectors().table())
    shelf = Shelf(catalogue, survey.first_shown_ms)

    def out(time_ms: int) -> str:
        shelf.open_before(time_ms)
        return "".join(sorted(catalogue.index.item_id(r) for r in catalogue.servable_rows(time_ms).tolist()))

    assert [out(START_MS), out(START_MS + 1), out(START_MS + HOUR), out(START_MS + HOUR + 1)] == ["", "bc", "bc", "abc"]


def test_popularity_is_of_the_whole_log() -> None:
    popularity = Popularity({"a": 6, "b": 1}, ["a", "b", "c", "d", "e"])
    assert popularity.bits("a") == pytest.approx(-np.log2(7 / 12))
    assert [popularity.is_tail(item) for item in "abc"] == [False, True, True]


def test_a_sample_is_evenly_spaced() -> None:
    assert sample(np.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert sample(np.arange(3), 4).tolist() == [0, 1, 2]
    assert sample(np.arange(3), 0).tolist() == []


def test_lengths_of_time_are_read_as_people_write_them() -> None:
    assert [duration_seconds(text, "--x") for text in ("0s", "90", "5m", "1.5h", "1d")] == [0, 90, 300, 5_400, 86_400]
    with pytest.raises(ReplayError, match="--feedback-delay: '5 weeks' is no length of time"):
        duration_seconds("5 weeks", "--feedback-delay")


def test_an_error_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LogFormatError, match=r"does not exist; name the folder"):
        find_parts("jsonl", [tmp_path / "nowhere"])
    with pytest.raises(ReplayError, match="has actions and no impressions"):
        find_parts("movielens", [tmp_path])
    log = write_log(tmp_path / "a", train=[click(0, "u", "a")], scored=[click(1, "u", "a")])
    with pytest.raises(ReplayError, match="the log has no impressions"):
        replay(log, ReplayConfig(slates=0))
    log = write_log(tmp_path / "b", train=[impression(0, "u", "ab")], scored=[click(1, "u", "a")])
    with pytest.raises(ReplayError, match="the scored part has no impressions"):
        replay(log, ReplayConfig(slates=0))
    log = write_log(tmp_path / "c", train=[impression(0, "u", "ab")], scored=[impression(HOUR, "u", "ab")])
    with pytest.raises(ReplayError, match=r"impressions have a label .* give an earlier part"):
        replay(log, ReplayConfig(slates=0))


def test_parts_are_one_log_and_the_last_one_in_time_is_scored(tmp_path: Path) -> None:
    log = write_log(tmp_path, train=[impression(HOUR, "u", "ab")], scored=[impression(0, "u", "ab")])
    parts = find_parts("jsonl", [tmp_path])
    assert parts.names == ("scored", "train")
    assert [path.name for path in parts.scored] == ["train"]
    assert [path.name for path in find_parts("jsonl", log.paths[:2]).scored] == ["scored"]
    assert _shown(parts.open()) == 2
    with pytest.raises(ReplayError, match="which is all of the log"):
        find_parts("jsonl", [tmp_path / "train"], tmp_path / "train")


def _shown(reader: LogReader) -> int:
    return sum(isinstance(event.event, Impression) for event in reader.events())


def test_histories_of_two_ebnerd_parts_are_entered_once(tmp_path: Path) -> None:
    Written.ebnerd(tmp_path)
    together = open_log("ebnerd", tmp_path / "train", tmp_path / "validation")
    assert [e.time_ms for e in together.events()] == [e.time_ms for e in open_log("ebnerd", tmp_path).events()]
    assert sum(e.is_history for e in together.events()) == 1


def test_a_replay_of_written_ebnerd_parts_gives_three_rows(tmp_path: Path) -> None:
    Written.ebnerd(tmp_path, impressions=60)
    result = replay(find_parts("ebnerd", [tmp_path]), ReplayConfig(slates=5, retrain_every_seconds=600))
    assert [r.mode for r in result.results] == ["frozen", "live", "retrained"]
    assert result.scored == 60
    assert result.names == ("train", "validation")


@pytest.mark.logs
def test_on_the_real_log_live_counters_beat_frozen_ones(tmp_path: Path) -> None:
    data = Path(__file__).parents[2].parent / "shared" / "data" / "ebnerd-demo"
    if not data.exists():
        pytest.skip("the EB-NeRD demo set is not beside the repository")
    Written.cut(data, tmp_path, before=1_500, after=500, users=300)
    config = ReplayConfig(modes=("frozen", "live"), slates=0)
    result = replay(find_parts("ebnerd", [tmp_path]), config)
    live = row(result, "live")
    assert live.measures.auc.mean > row(result, "frozen").measures.auc.mean + 0.05
    assert live.over_frozen.low > 0
    assert json.dumps(result.names) == '["train", "validation"]'


def test_requests_in_a_log_are_passed_by(tmp_path: Path) -> None:
    request = {"type": "request", "event_id": "r", "event_time": START_MS + 1, "user_id": "u", "request_id": "r-1"}
    log = write_log(tmp_path, train=[impression(0, "u", "ab"), request], scored=[impression(HOUR, "u", "ab"), LAST])
    assert [record.user_id for record in seen_before(log, 0.0).records] == ["u", "u"]


def test_items_with_texts_have_vectors_and_users_tastes(tmp_path: Path) -> None:
    items = [{"item_id": f"i{n}", "title": f"News of {word}"} for n, word in enumerate(("sport", "money", "film") * 14)]
    log = write_log(tmp_path, *Written.fashions(hours=30, scored_hours=8), items=items)
    told: list[tuple[str, int, int | None]] = []
    config = ReplayConfig(slates=10, modes=("live",))
    result = replay(log, config, encoder=EncoderConfig(), show=lambda *step: told.append(step))
    slates = row(result, "live").slates
    assert result.has_item_vectors
    assert 0 < slates.intra_list_diversity < 1
    assert slates.source_recall["short_term"] > 0
    assert ("encoding texts", 3, 3) in told


def test_items_that_bring_their_own_vectors_have_them_without_any_text(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    items = [{"item_id": f"i{n}", "embedding": random.standard_normal(8).tolist()} for n in range(40)]
    log = write_log(tmp_path, *Written.fashions(hours=30, scored_hours=8), items=items)
    result = replay(log, ReplayConfig(slates=10, modes=("live",)))
    assert result.has_item_vectors
    assert row(result, "live").slates.source_recall["short_term"] > 0
