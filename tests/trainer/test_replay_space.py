"""Which histories a replay learns a space from, and what it does with that space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.encoder import EncoderConfig
from models.hashing import hash64
from tests.trainer.replay_logs import HOUR, START_MS, Line, Written, click, impression, write_log
from tests.trainer.test_space_learning import CONFIG
from trainer.replay import ReplayConfig, ReplayResult, item_vectors, replay
from trainer.replay_log import survey_log
from trainer.replay_models import ItemVectors
from trainer.replay_space import Histories, learned, learned_spaces

GROUPS = (
    ("salmon", "Tuesday", "violin", "concrete", "purple", "Norway", "algebra", "umbrella"),
    ("candle", "Monday", "trumpet", "marble", "orange", "Brazil", "grammar", "ladder"),
    ("carpet", "Friday", "piano", "timber", "silver", "Japan", "botany", "bucket"),
)
"""Words that belong together for these readers, and for no encoder."""
ITEMS = 90
A, B, C = (hash64(item) for item in "abc")


def histories_of(log: Written, until_ms: int) -> Histories:
    return Histories.read(log.open(), START_MS + until_ms)


def test_a_click_on_what_was_shown_is_no_history(tmp_path: Path) -> None:
    lines = [click(0, "u", "a"), impression(1_000, "u", "ab"), click(2_000, "u", "b"), click(3_000, "u", "c")]
    log = write_log(tmp_path, train=lines, scored=[impression(HOUR, "u", "ab")])
    assert histories_of(log, HOUR).arrived(START_MS + HOUR, 0) == {"u": [A, C]}


def test_what_happened_or_arrived_after_the_start_is_not_learned_from(tmp_path: Path) -> None:
    lines = [click(0, "u", "a"), click(10_000, "u", "b"), impression(20_000, "u", "ab"), click(30_000, "u", "c")]
    log = write_log(tmp_path, train=lines[:2], scored=lines[2:])
    known = histories_of(log, 20_000)
    assert known.arrived(START_MS + 20_000, 0) == {"u": [A, B]}
    assert known.arrived(START_MS + 20_000, 10_000) == {"u": [A, B]}
    assert known.arrived(START_MS + 20_000, 10_001) == {"u": [A]}


def test_an_item_that_was_hidden_is_no_history(tmp_path: Path) -> None:
    log = write_log(tmp_path, train=[click(0, "u", "a") | {"action": "hide"}], scored=[impression(HOUR, "u", "ab")])
    assert histories_of(log, HOUR).arrived(START_MS + HOUR, 0) == {}


def title(item: int) -> str:
    """Return three words of the item's group."""
    return " ".join(np.random.default_rng(item).choice(GROUPS[item % 3], 3, replace=False))


def reading(folder: Path) -> Written:
    """Readers who each stay with one of three groups, long before impressions; each impression has one of each."""
    random = np.random.default_rng(3)
    before = [
        click(n * 1_000 + user, f"u{user}", f"item-{user % 3 + 3 * ((user + 7 * n) % 30)}")
        for user in range(30)
        for n in range(10)
    ]
    lines: list[Line] = sorted(before, key=lambda line: line["event_time"])
    for n in range(240):
        user, at_ms = int(random.integers(30)), HOUR + n * 60_000
        shown = [f"item-{topic + 3 * random.integers(30)}" for topic in range(3)]
        lines.append(impression(at_ms, f"u{user}", shown))
        lines.append(click(at_ms + 2_000, f"u{user}", shown[user % 3]))
    lines.append(impression(9 * HOUR, "last", ["item-0", "item-1"]))
    edge = START_MS + 4 * HOUR
    items = [{"item_id": f"item-{n}", "title": title(n)} for n in range(ITEMS)]
    early, late = ([x for x in lines if (x["event_time"] < edge) == is_early] for is_early in (True, False))
    return write_log(folder, early, late, items)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return reading(tmp_path_factory.mktemp("readers"))


def run(readers: Written, **changes: Any) -> ReplayResult:
    config = ReplayConfig(slates=0, modes=("live",), **changes)
    return replay(readers, config, encoder=EncoderConfig(), space=CONFIG)


def vectors(readers: Written, folder: Path) -> ItemVectors:
    reader = readers.open()
    survey = survey_log(reader, readers.open_scored(), 0.3)
    return item_vectors(reader, survey, EncoderConfig(), folder, 100, lambda *_: None)


def test_delays_at_which_the_same_had_arrived_share_a_space(readers: Written, tmp_path: Path) -> None:
    items, start_ms = vectors(readers, tmp_path), START_MS + 4 * HOUR
    spaces = learned_spaces(readers.open(), start_ms, items, [0.0, 3_600.0, 4 * 3_600.0], CONFIG, lambda *_: None)
    assert spaces[0.0] is spaces[3_600.0]
    assert spaces[0.0].space.space_id.startswith("space-histories-")
    # Nothing had arrived by then: the bootstrap's space stays.
    assert spaces[4 * 3_600.0] is items


def test_impressions_are_scored_in_the_space_of_the_histories(readers: Written) -> None:
    result = run(readers)
    found = result.row("live", 0.0)
    assert result.spaces[0.0].startswith("space-histories-")
    assert found is not None
    assert found.measures.auc.mean > 0.9


def test_without_histories_items_stay_where_their_texts_put_them(readers: Written) -> None:
    assert run(readers, histories="off").spaces[0.0].startswith("bootstrap-")


def test_items_without_texts_stay_where_they_are(readers: Written) -> None:
    items = ItemVectors()
    spaces = learned_spaces(readers.open(), START_MS + 4 * HOUR, items, [0.0], CONFIG, lambda *_: None)
    assert spaces == {0.0: items}


def test_a_trained_encoder_encodes_the_items_anew(readers: Written, tmp_path: Path) -> None:
    items = vectors(readers, tmp_path)
    made = learned_spaces(
        readers.open(), START_MS + 4 * HOUR, items, [0.0], CONFIG.with_encoder("top"), lambda *_: None
    )[0.0]
    assert made.delta is not None
    assert made.space.encoder_id == made.delta.encoder_id
    assert np.abs(made.encodings.base.astype(np.float32) - items.encodings.base.astype(np.float32)).max() > 0.01


def test_a_cache_folder_keeps_the_encodings(readers: Written, tmp_path: Path) -> None:
    replay(readers, ReplayConfig(slates=0, modes=("live",), histories="off"), encoder=EncoderConfig(), cache=tmp_path)
    assert list(tmp_path.glob("*/*.index.npy"))


@pytest.mark.parametrize("encoder", ["frozen", "top"])
def test_a_learned_space_is_read_the_next_time_and_is_the_same(readers: Written, tmp_path: Path, encoder: str) -> None:
    items, config = vectors(readers, tmp_path), CONFIG.with_encoder(encoder)
    known = histories_of(readers, 4 * HOUR).arrived(START_MS + 4 * HOUR, 0)
    first = learned(items, known, config, lambda *_: None)
    steps: list[str] = []
    second = learned(items, known, config, lambda step, done, total: steps.append(step))
    assert "histories" not in steps
    assert second.space.same_as(first.space)
    assert second.space.space_id == first.space.space_id
    assert np.array_equal(second.encodings.base, first.encodings.base)
    assert first.scorer is not None
    assert second.scorer is not None
    assert all(np.array_equal(second.scorer.tensors[n], t) for n, t in first.scorer.tensors.items())


def test_a_kept_space_that_cannot_be_read_is_learned_again(readers: Written, tmp_path: Path) -> None:
    items = vectors(readers, tmp_path)
    known = histories_of(readers, 4 * HOUR).arrived(START_MS + 4 * HOUR, 0)
    first = learned(items, known, CONFIG, lambda *_: None)
    (tmp_path / first.space.space_id / "start.safetensors").write_bytes(b"half")
    steps: list[str] = []
    again = learned(items, known, CONFIG, lambda step, done, total: steps.append(step))
    assert "histories" in steps
    assert again.space.same_as(first.space)
