from __future__ import annotations

import io
from pathlib import Path

import pytest
from typer.testing import CliRunner

from millstream import app
from models.errors import LogFormatError
from models.events import Action, ClockPolicy, ImpressedItem, Impression, Request
from models.logs import open_log
from streams.importer import (
    ImportResult,
    ImportState,
    advice,
    read_state,
    sequence_fingerprint,
    summary,
    with_requests,
    write_state,
)
from streams.progress import progress
from streams.settings import EventSettings, Settings

LIVE = Settings(events=EventSettings(clock=ClockPolicy(policy="live")))
TRUSTED = Settings(events=EventSettings(clock=ClockPolicy(policy="trusted")))
CLICK = Action(event_id="c", event_time=2, user_id="ann", item_id="a", action="click")
IMPRESSION = Impression(event_id="i", event_time=1, user_id="ann", surface="home", items=[ImpressedItem("a")])


def test_a_request_is_put_before_each_impression_and_before_nothing_else() -> None:
    sequence = list(with_requests([IMPRESSION, CLICK]))
    assert [type(event) for event in sequence] == [Request, Impression, Action]


def test_a_request_is_for_the_same_user_time_and_surface() -> None:
    request = next(with_requests([IMPRESSION]))
    assert request == Request(event_id="i:request", event_time=1, user_id="ann", request_id="i:request", surface="home")


def test_requests_make_another_sequence_of_the_same_log(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("")
    log = open_log("jsonl", tmp_path)
    assert sequence_fingerprint(log, True) != sequence_fingerprint(log, False)


def test_a_state_reads_back_as_it_was_written(tmp_path: Path) -> None:
    state = ImportState(1, "f", "t", True, 7, {0: 3, 11: 4}, False)
    write_state(tmp_path / "deep" / "state.json", state)
    assert read_state(tmp_path / "deep" / "state.json") == state


def test_a_state_that_is_written_leaves_no_other_file(tmp_path: Path) -> None:
    write_state(tmp_path / "state.json", ImportState(1, "f", "t"))
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_no_state_file_is_no_state(tmp_path: Path) -> None:
    assert read_state(tmp_path / "state.json") is None


@pytest.mark.parametrize("text", ["", "{", '{"version": 1}', '{"version": 2, "fingerprint": "f", "topic": "t"}'])
def test_a_state_file_that_cannot_be_used_is_refused_with_the_way_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(LogFormatError, match="import without --resume"):
        read_state(tmp_path / "state.json")


def test_an_import_says_what_policy_the_workers_need(tmp_path: Path) -> None:
    (line,) = advice(TRUSTED, tmp_path / "state.json", resume=False)
    assert 'events.clock.policy = "trusted"' in line


def test_an_import_warns_where_the_policy_in_force_is_live(tmp_path: Path) -> None:
    lines = advice(LIVE, tmp_path / "state.json", resume=False)
    assert any(line.startswith("WARNING") and "older than 30 days" in line for line in lines)


def test_an_import_that_starts_anew_says_that_an_earlier_one_could_go_on(tmp_path: Path) -> None:
    write_state(tmp_path / "state.json", ImportState(1, "f", "t", True, 1_234))
    assert "1,234 events; `--resume`" in advice(TRUSTED, tmp_path / "state.json", resume=False)[1]


def test_the_summary_names_what_was_left_out() -> None:
    assert summary(ImportResult(events=3, skipped={"impression without items": 2}))[1:] == [
        "left out: 2 impression without items"
    ]


def test_progress_off_a_terminal_is_plain_lines() -> None:
    stream = io.StringIO()
    with progress(stream, line_seconds=0.0) as show:
        show("events", 1_000, 5_000)
        show("events", 5_000, 5_000)
    assert stream.getvalue().splitlines() == ["events: 1,000 of 5,000", "events: 5,000 of 5,000"]


def test_validate_reports_each_refused_line_and_exits_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLSTREAM_EVENTS__CLOCK__POLICY", "trusted")
    log = tmp_path / "log.jsonl"
    log.write_text('{"item_id": "a"}\n{"item_id": 7}\n')
    result = CliRunner().invoke(app, ["validate", str(log)])
    assert result.exit_code == 1
    assert "line 2: invalid: Expected `str`, got `int` - at `$.item_id`" in result.output
    assert "1 lines would be taken, 1 refused (1 invalid)" in result.output


def test_validate_of_a_good_log_exits_with_0(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"item_id": "a"}\n')
    assert CliRunner().invoke(app, ["validate", str(log)]).exit_code == 0


def test_schemas_command_writes_them(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["schemas", "--out", str(tmp_path)])
    assert result.exit_code == 0
    assert (tmp_path / "event.v1.json").is_file()
