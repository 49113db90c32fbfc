"""The process around the rounds: settings, lock, statuses of workers, progress, metrics."""

from __future__ import annotations

import asyncio
import io
import threading
from pathlib import Path

import msgspec
import pytest
from prometheus_client import generate_latest

from models.encoder import EncoderConfig
from models.errors import SettingsError
from models.registry import RegistryConfig
from models.signing import PrivateKey
from trainer import settings
from trainer.announce import VersionStatus, WorkerStatus, preparation, read_status
from trainer.connection import Connection, Topics
from trainer.loop import _lock, new_round
from trainer.metrics import TrainerMetrics
from trainer.progress import progress, silent
from trainer.promotion import Decision


def test_the_environment_goes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.toml"
    file.write_text('[trainer]\nround_minutes = 5\nwindow_hours = 2\n[trainer.gate]\nmin_users = 7\n[kafka]\nx = "y"\n')
    monkeypatch.setenv("MILLSTREAM_TRAINER__ROUND_MINUTES", "9")
    monkeypatch.setenv("MILLSTREAM_TRAINER__TRAINING__EPOCHS", "2")
    found = settings.load(file)
    assert (found.round_minutes, found.window_hours, found.gate.min_users, found.training.epochs) == (9, 2, 7, 2)


@pytest.mark.parametrize(
    ("text", "named"),
    [("[trainer]\nround_minuts = 5\n", "round_minuts"), ("[trainer.gate]\nmargin_auc = -1\n", "gate")],
)
def test_an_unknown_or_impossible_value_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "m.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=named):
        settings.load(file)


def test_an_unknown_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MILLSTREAM_TRAINER__ROUNDS", "9")
    with pytest.raises(SettingsError, match="MILLSTREAM_TRAINER__ROUNDS"):
        settings.load()


def test_a_second_trainer_of_the_same_folder_is_refused(tmp_path: Path) -> None:
    with _lock(tmp_path), pytest.raises(SettingsError, match="another trainer works in"), _lock(tmp_path):
        pass


def test_a_trainer_that_ended_leaves_the_folder_free(tmp_path: Path) -> None:
    with _lock(tmp_path):
        pass
    with _lock(tmp_path):
        pass


def test_a_trainer_without_the_key_that_workers_ask_for_does_not_start(tmp_path: Path) -> None:
    models = RegistryConfig(public_key=PrivateKey.generate().public.text)
    config = settings.TrainerConfig(data_folder=tmp_path)
    connection = Connection({}, Topics("f", "l", "i", "e", "m", "s"), 10.0)
    with asyncio.Runner() as runner, pytest.raises(SettingsError, match="private_key_file"):
        new_round(config, models, EncoderConfig(), connection, runner, TrainerMetrics(), silent, threading.Event())


READY = WorkerStatus("a", 100_000, prepared=[VersionStatus("v2", 4, "candidate")])
SLOW = WorkerStatus("b", 100_000, live=VersionStatus("v1", 3))
REFUSES = WorkerStatus("c", 100_000, refused=[VersionStatus("v2", 4, "candidate", "canary", "it misses")])


def test_only_workers_that_spoke_lately_are_waited_for() -> None:
    found = preparation([READY, SLOW], "v2", now_ms=130_000, interval_seconds=10.0)
    assert (found.workers, found.prepared, found.is_done) == (2, 1, False)
    assert preparation([READY, SLOW], "v2", now_ms=130_001, interval_seconds=10.0).workers == 0


def test_a_worker_that_refused_is_not_waited_for() -> None:
    found = preparation([READY, REFUSES], "v2", now_ms=100_000, interval_seconds=10.0)
    assert (found.is_done, [r.reason for r in found.refusals]) == (True, ["canary"])


def test_a_worker_that_serves_a_version_has_it() -> None:
    assert preparation([SLOW], "v1", now_ms=100_000, interval_seconds=10.0).prepared == 1


def test_a_status_that_is_none_is_passed_over_and_unknown_fields_are_ignored() -> None:
    value = msgspec.json.encode({"worker_id": "w", "time_ms": 5, "group": "g", "live": None, "extra": 1})
    assert [s.worker_id for s in read_status([b"{broken", value])] == ["w"]


def test_elsewhere_than_on_a_terminal_progress_is_plain_lines() -> None:
    out = io.StringIO()
    with progress(out, line_seconds=60.0) as show:
        for done in range(4):
            show("epoch 1", done, 3)
        show("read", 5, None)
    assert out.getvalue().splitlines() == ["epoch 1: 0 of 3", "epoch 1: 3 of 3", "read: 5"]


def test_the_age_of_the_newest_example_is_unknown_before_the_first_round() -> None:
    metrics = TrainerMetrics()
    assert b"newest_example_age_seconds NaN" in generate_latest(metrics.registry)
    metrics.learned_to(1_000)
    assert b"newest_example_age_seconds NaN" not in generate_latest(metrics.registry)


def test_decisions_are_counted_by_outcome_and_reason() -> None:
    metrics = TrainerMetrics()
    metrics.decided(Decision("refuse", "not-better", "s", {"auc_difference": 0.001}), 1)
    shown = generate_latest(metrics.registry).decode()
    assert 'millstream_trainer_gate_decisions_total{outcome="refuse",reason="not-better"} 1.0' in shown
    assert 'millstream_trainer_gate{figure="auc_difference"} 0.001' in shown


def test_policies_beyond_the_most_frequent_have_no_label() -> None:
    metrics = TrainerMetrics()
    metrics.arms({f"experiment-{i}": 0.1 for i in range(40)}, 1)
    assert generate_latest(metrics.registry).decode().count("arm_positive_rate{") == 12


def test_tensorboard_logs_are_written_where_they_are_wanted(tmp_path: Path) -> None:
    metrics = TrainerMetrics(tmp_path)
    metrics.trained({"auc_held_back": 0.7}, 1)
    metrics.close()
    assert list(tmp_path.glob("events.out.tfevents.*"))
