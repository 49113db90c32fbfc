"""The demo's catalogue, its settings, what it reads of the worker's metrics, and its view."""

from __future__ import annotations

import asyncio
import io
import math
from pathlib import Path

import msgspec
import pytest
from pydantic import SecretStr
from rich.console import Console

from models.encoder import item_text
from models.errors import SettingsError
from models.events import ITEM_CODEC
from models.exploration import RANDOMISED
from models.signing import PrivateKey
from streams.demo.catalogue import directors_of, make_films
from streams.demo.films import GENRES
from streams.demo.learning import (
    GATE_IMPRESSIONS,
    GATE_MARGIN_AUC,
    Learning,
    TrainerProcess,
    attribution_window_seconds,
    trainer_section,
)
from streams.demo.run import summary
from streams.demo.stage import WorkerMetrics, demo_settings, worker_environment
from streams.demo.statistics import Line, Statistics, Story
from streams.demo.users import Half, World
from streams.demo.view import Scene, milliseconds, percent, plain_line, render, story_lines, swap_line
from streams.settings import Settings, load, render_toml
from streams.topics import TopicNames
from trainer import settings as trainer_settings


def test_films_have_different_titles_and_ids() -> None:
    films = make_films(1_500, 7)
    assert len({f.title for f in films}) == len({f.item_id for f in films}) == 1_500


def test_the_same_seed_makes_the_same_films() -> None:
    assert make_films(100, 3) == make_films(100, 3)


def test_the_first_films_to_be_encoded_are_of_every_genre() -> None:
    assert {f.genre for f in make_films(1_200, 7)[:250]} == set(GENRES)


def test_no_director_makes_films_of_two_genres() -> None:
    names = [name for genre in GENRES for name in directors_of(genre)]
    assert len(names) == len(set(names))


def test_what_the_encoder_reads_of_a_film_says_its_genre_decade_and_director() -> None:
    film = next(f for f in make_films(50, 7) if f.genre == "western")
    text = item_text(film.item())
    assert "western" in text
    assert f"{film.decade}s" in text
    assert film.director in text


def test_a_film_is_a_valid_record() -> None:

    film = make_films(1, 7)[0]
    assert ITEM_CODEC.decode(msgspec.json.encode(film.item())).title == film.title


def test_more_films_than_there_are_titles_for_are_refused() -> None:
    with pytest.raises(SettingsError, match="5001 films cannot be made"):
        make_films(5_001, 7)


def test_the_demo_shares_no_topic_and_no_group_with_the_real_settings(tmp_path: Path) -> None:
    real = Settings()
    demo = demo_settings(real, "demo-1", tmp_path, 1234)
    assert not set(TopicNames.of(real).all()) & set(TopicNames.of(demo).all())
    assert demo.worker.group != real.worker.group


def test_the_demo_learns_into_a_registry_of_its_own_and_trusts_its_own_trainer(tmp_path: Path) -> None:
    signed = Settings(models={"public_key": PrivateKey.generate().public.text, "url": "s3://bundles"})
    demo = demo_settings(signed, "demo-1", tmp_path, 1234)
    assert (demo.models.url, demo.models.public_key) == (str(tmp_path / "registry"), None)
    assert demo.models.cache_folder.is_relative_to(tmp_path)


def test_the_demo_s_settings_file_is_read_by_the_worker_and_by_the_trainer(tmp_path: Path) -> None:
    demo = demo_settings(Settings(), "demo-1", tmp_path, 1234, window_seconds=9)
    file = tmp_path / "millstream.toml"
    file.write_text(render_toml(demo) + trainer_section(tmp_path))
    assert load(file) == demo
    trainer = trainer_settings.load(file)
    assert trainer.data_folder == tmp_path / "trainer"
    assert (trainer.gate.margin_auc, trainer.gate.min_impressions) == (GATE_MARGIN_AUC, GATE_IMPRESSIONS)


def test_the_attribution_window_is_long_enough_for_what_slow_users_click() -> None:
    assert attribution_window_seconds(users=40, events_per_second=80.0) == 8
    assert attribution_window_seconds(users=1_000, events_per_second=80.0) == 19


def test_a_variable_of_the_environment_cannot_send_the_demo_s_worker_to_other_topics(tmp_path: Path) -> None:
    file = tmp_path / "millstream.toml"
    found = worker_environment(Settings(), file, {"MILLSTREAM_TOPICS__PREFIX": "real", "PATH": "bin"})
    assert found == {"PATH": "bin", "MILLSTREAM_CONFIG": str(file)}


def test_a_password_reaches_the_worker_beside_the_file_that_masks_it(tmp_path: Path) -> None:
    settings = Settings()
    kafka = settings.kafka.model_copy(update={"sasl_password": SecretStr("very secret")})
    found = worker_environment(settings.model_copy(update={"kafka": kafka}), tmp_path / "x.toml", {})
    assert found["MILLSTREAM_KAFKA__SASL_PASSWORD"] == "very secret"


METRICS = """
millstream_index_items 640.0
millstream_slates_total{trigger="action"} 3.0
millstream_slates_total{trigger="request"} 4.0
millstream_freshness_seconds_bucket{le="0.01"} 50.0
millstream_freshness_seconds_bucket{le="0.06"} 99.0
millstream_freshness_seconds_bucket{le="+Inf"} 100.0
"""


def test_the_worker_s_own_freshness_is_the_bound_of_the_bucket_that_holds_it() -> None:
    metrics = WorkerMetrics()
    metrics.read(METRICS)
    assert (metrics.freshness_bound_ms(0.5), metrics.freshness_bound_ms(0.99)) == (10.0, 60.0)


def test_searchable_items_and_slates_of_every_kind_are_read_from_the_metrics() -> None:
    metrics = WorkerMetrics()
    metrics.read(METRICS)
    assert (metrics.searchable, metrics.slates) == (640, 7)


def test_a_worker_without_slates_says_nothing_about_freshness() -> None:
    assert WorkerMetrics().freshness_bound_ms(0.5) is None


def test_the_first_slate_of_another_version_is_the_moment_of_a_swap() -> None:
    learning = Learning()
    slates = [("bootstrap-0", 10.0), ("bootstrap-0", 11.0), ("v1", 70.0), ("v1", 71.0), ("v2", 90.0)]
    found = [learning.slate(version, None, at, 0.0, started_at=10.0) for version, at in slates]
    assert [swap and (swap.version, swap.after_seconds) for swap in found] == [
        None,
        None,
        ("v1", 60.0),
        None,
        ("v2", 80.0),
    ]
    assert learning.swaps == [swap for swap in found if swap]


def test_a_randomised_slate_tells_no_swap() -> None:
    learning = Learning()
    learning.slate("bootstrap-0", None, 0.0, 0.0, 0.0)
    assert learning.slate("v1", RANDOMISED, 1.0, 0.0, 0.0) is None
    assert learning.version == "bootstrap-0"


def test_of_what_the_trainer_says_again_and_again_the_last_sentence_is_kept() -> None:
    learning = Learning()
    learning.hear(["window-too-small: 0 of 800", "window-too-small: 500 of 800", "candidate: v1 learned from 900"])
    assert learning.said == [("window-too-small", "500 of 800"), ("candidate", "v1 learned from 900")]
    assert learning.doing == "candidate: v1 learned from 900"


def test_a_run_without_a_promotion_says_why_in_the_gate_s_words() -> None:
    learning = Learning()
    assert learning.why_not() == "the trainer had no round yet"
    learning.hear(["refused: v1 is not promoted (auc-worse): AUC 0.6", "candidate: v2 learned from 900"])
    assert learning.why_not() == "v1 is not promoted (auc-worse): AUC 0.6"


def test_what_the_trainer_prints_is_read_line_by_line_as_it_comes(tmp_path: Path) -> None:
    trainer = TrainerProcess(tmp_path)
    assert trainer.new_lines() == []
    said = tmp_path / "trainer-said.log"
    said.write_text("waiting: a\nrefus")
    assert trainer.new_lines() == ["waiting: a"]
    said.write_text("waiting: a\nrefused: b\n")
    assert trainer.new_lines() == ["refused: b"]


def test_a_trainer_that_was_not_started_is_stopped_without_harm(tmp_path: Path) -> None:
    trainer = TrainerProcess(tmp_path)
    asyncio.run(trainer.stop())
    assert trainer.problem() is None


def scene(*, running: bool) -> Scene:
    films = make_films(60, 7)
    story = Story(
        "viewer-001a",
        before=[Line(1, films[0].item_id, "why", False)],
        after=[Line(1, films[1].item_id, "Because you clicked “it”", True)],
        took_ms=12.0,
    )
    story.clicks.append((0.0, films[0].item_id))
    by_id = {f.item_id: f for f in films}
    made = Scene(Statistics(1, story), by_id, World.make(films, 1, 7).tastes[0], 2, 60.0, WorkerMetrics(), ["starting"])
    made.ends_at = 100.0 if running else None
    return made


def drawn(what: Scene) -> str:
    console = Console(width=100, height=30, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(render(what, 50.0))
    return capture.get()


def test_the_view_fits_into_a_hundred_columns_and_thirty_lines() -> None:
    lines = drawn(scene(running=True)).rstrip("\n").split("\n")
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100


def test_the_view_shows_the_step_in_work_until_the_users_start() -> None:
    assert "▸ starting …" in drawn(scene(running=False))


def test_the_view_marks_the_version_and_the_moment_of_a_swap() -> None:
    what = scene(running=True)
    what.statistics.learning.slate("bootstrap-0", None, 1.0, 0.0, 0.0)
    assert "model bootstrap-0" in drawn(what)
    swap = what.statistics.learning.slate("v1", None, 45.0, 0.0, 0.0)
    assert "v1 live since" in drawn(what)
    assert "after 45 s" in drawn(what)
    assert swap is not None
    assert "45 s: v1, learned from these clicks" in swap_line(swap)


def test_the_summary_shows_both_halves_before_and_after_the_swap() -> None:
    what = scene(running=True)
    clicks, learning = what.statistics.clicks, what.statistics.learning
    for half in Half:
        clicks.show(0.0, half, 0)
    learning.slate("bootstrap-0", None, 1.0, 0.0, 0.0)
    learning.slate("v1", None, 45.0, 0.0, 0.0)
    clicks.begin_after()
    for half in Half:
        clicks.show(0.0, half, 0)
        clicks.click(0.0, half, 0)
    lines = summary(what)
    assert "model              v1 live 45 s after the users started" in lines
    assert any(line.startswith("before the swap    click rate millstream 0.0%") for line in lines)
    assert any(line.startswith("after the swap     click rate millstream 100.0%") for line in lines)


def test_the_summary_of_a_run_without_a_swap_says_plainly_that_nothing_was_promoted() -> None:
    what = scene(running=True)
    what.statistics.learning.hear(["refused: v1 is not promoted (auc-worse): AUC 0.6"])
    lines = summary(what)
    assert "model              no bundle was promoted: v1 is not promoted (auc-worse): AUC 0.6" in lines
    assert any("AUC not worse by 0.05" in line for line in lines)


def test_the_view_tells_the_clicked_film_the_new_one_and_its_reason() -> None:
    what = scene(running=True)
    text = drawn(what)
    story = what.statistics.story
    clicked, new = (what.films[line.item_id].title for line in (story.before[0], story.after[0]))
    assert clicked in text
    assert f"● {new}" in text
    assert "Because you clicked “it”" in text


def test_the_summary_s_story_marks_what_is_new_after_the_click() -> None:
    what = scene(running=True)
    assert f"    + 1. {what.films[what.statistics.story.after[0].item_id].label}" in story_lines(what)


def test_a_plain_line_has_dashes_where_nothing_was_measured_yet() -> None:
    assert "freshness p50 – p99 –" in plain_line(scene(running=True), 1.0)


def test_times_from_a_second_on_are_written_in_seconds() -> None:
    assert [milliseconds(v) for v in (12.4, 1_440.0, math.nan)] == ["12 ms", "1.4 s", "–"]


def test_a_share_is_written_in_percent() -> None:
    assert [percent(v) for v in (0.1234, math.nan)] == ["12.3 %", "–"]
