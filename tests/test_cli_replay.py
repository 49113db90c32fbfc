"""`millstream replay` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from millstream import app
from models.errors import MillstreamError
from tests.trainer.replay_logs import Written, write_log

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    write_log(folder, *Written.fashions(hours=16, scored_hours=6))
    return folder


def failure(*arguments: str) -> str:
    """Return the message of the error that ends the command."""
    error = RUNNER.invoke(app, ["replay", *arguments]).exception
    assert isinstance(error, MillstreamError)
    return str(error)


def test_figures_are_printed_and_all_files_written(log: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("json", "png", "html")}
    arguments = ["replay", "jsonl", str(log / "train"), "--score", str(log / "scored"), "--slates", "5", "--seed", "4"]
    arguments += ["--feedback-delay", "0s", "--feedback-delay", "30m", "--retrain-every", "2h", "--jobs", "1"]
    arguments += ["--json", str(files["json"]), "--plot", str(files["png"]), "--report", str(files["html"])]
    ran = RUNNER.invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    assert "0 s live: AUC 0." in ran.output
    assert "30 minutes late costs" in ran.output
    told = json.loads(files["json"].read_text())
    assert [(r["mode"], r["feedback_delay_seconds"]) for r in told["results"]] == [
        (mode, delay) for delay in (0.0, 1800.0) for mode in ("frozen", "live", "retrained")
    ]
    assert told["seed"] == 4
    assert told["paths"] == ["train", "scored"]
    assert str(log) not in files["json"].read_text() + files["html"].read_text()
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_the_folder_above_the_parts_is_enough(log: Path) -> None:
    ran = RUNNER.invoke(
        app, ["replay", "jsonl", str(log), "--feedback-delay", "0s", "--modes", "live", "--slates", "0"]
    )
    assert ran.exit_code == 0, ran.output
    assert "0 s live" in ran.output
    assert "frozen" not in ran.output.split("0 s live", 1)[1].split("\n")[0]


def test_a_folder_that_is_not_there_is_named() -> None:
    assert "nowhere does not exist; name the folder of the log" in failure("jsonl", "nowhere")


def test_a_delay_that_is_no_time_is_named(log: Path) -> None:
    assert failure("jsonl", str(log), "--feedback-delay", "soon").startswith("--feedback-delay: 'soon' is no length")


def test_a_mode_that_is_none_is_named(log: Path) -> None:
    assert failure("jsonl", str(log), "--modes", "live,fast").startswith("--modes:")


def test_a_file_without_a_folder_is_refused_before_the_work(log: Path, tmp_path: Path) -> None:
    assert "make it first" in failure("jsonl", str(log), "--json", str(tmp_path / "no" / "out.json"))


def test_a_log_of_ratings_is_refused_with_the_reason(log: Path) -> None:
    assert "no impressions" in failure("movielens", str(log))


def test_a_scored_part_without_anything_before_it_is_refused(log: Path) -> None:
    assert "nothing would be left to learn from" in failure(
        "jsonl", str(log / "scored"), "--score", str(log / "scored")
    )


def test_the_help_says_what_the_weight_of_unclicked_items_means() -> None:
    shown = " ".join(RUNNER.invoke(app, ["replay", "--help"], terminal_width=200).output.replace("│", " ").split())
    assert "each of them counts as this many impressions" in shown


def test_an_encoder_cannot_be_trained_without_texts_or_histories(log: Path) -> None:
    for without in ("--no-texts", "--no-histories"):
        said = failure("jsonl", str(log), "--train-encoder", without)
        assert said == "--train-encoder learns from texts and histories: leave out --no-texts and --no-histories"
