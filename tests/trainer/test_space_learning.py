"""Learning a space from histories, on a tiny BERT and users who each stay with one topic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.encoder import TextEncoder
from models.errors import TrainingError
from tests.trainer import tiny_world as world
from tests.trainer.test_history import histories
from trainer.finetune import StartingPoint, train
from trainer.history import HistoryConfig
from trainer.space_learning import SpaceConfig, enough_histories, learn_space, with_features
from trainer.towers import TowerConfig
from trainer.training_config import TrainingConfig

QUICK = HistoryConfig(steps=30, users=8, window=8, targets=4, negatives=24)
RATES = TrainingConfig(learning_rate=5e-3, projection_learning_rate=5e-3, encoder_learning_rate=1e-3, seed=1)
CONFIG = SpaceConfig(
    least_items=80,
    warm=QUICK,
    towers=TowerConfig(steps=20, items=24, clicks=64),
    again=QUICK,
    history_rates=RATES,
    tower_rates=RATES,
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return world.load_bert(world.write_bert(tmp_path_factory.mktemp("bert")))


def bootstrap(encoder: TextEncoder) -> StartingPoint:
    return StartingPoint(world.starting_point(encoder).space, encoder)


def test_two_items_of_one_topic_come_closer_together(encoder: TextEncoder) -> None:
    learned = learn_space(histories(), world.texts(), bootstrap(encoder), CONFIG)

    def nearness(projection: np.ndarray) -> float:
        vectors = encoder.encode([world.item_text(item) for item in range(world.ITEMS)]) @ projection
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        same = np.equal.outer(np.arange(world.ITEMS) % 3, np.arange(world.ITEMS) % 3)
        return float((vectors @ vectors.T)[same].mean() - (vectors @ vectors.T)[~same].mean())

    assert nearness(learned.start.space.projection) > nearness(bootstrap(encoder).space.projection) + 0.2
    assert list(learned.losses) == ["warm", "towers", "again"]


def test_too_few_items_acted_on_twice_are_not_learned_from(encoder: TextEncoder) -> None:
    once = {f"u{user}": [world.item_hash(2 * user), world.item_hash(2 * user + 1)] for user in range(40)}
    assert enough_histories(histories(), world.texts(), CONFIG)
    assert not enough_histories(once, world.texts(), CONFIG)
    with pytest.raises(TrainingError, match="0 items with a text were acted on twice or more, 80 are needed"):
        learn_space(once, world.texts(), bootstrap(encoder), CONFIG)


def test_items_without_a_text_do_not_count(encoder: TextEncoder) -> None:
    some = dict(list(world.texts().items())[:79])
    assert not enough_histories(histories(), some, CONFIG)


def test_only_the_latest_items_of_a_history_are_learned_from() -> None:
    # Of ten items each, the last two: 60 places for 90 items.
    assert not enough_histories(histories(), world.texts(), CONFIG.model_copy(update={"history_items": 2}))


def test_the_encoder_is_trained_only_where_that_is_asked_for(encoder: TextEncoder) -> None:
    frozen = learn_space(histories(), world.texts(), bootstrap(encoder), CONFIG).start
    trained = learn_space(histories(), world.texts(), bootstrap(encoder), CONFIG.with_encoder("top")).start
    assert frozen.delta is None
    assert frozen.space.encoder_id == encoder.encoder_id
    assert trained.delta is not None
    assert trained.space.encoder_id == trained.delta.encoder_id != encoder.encoder_id


def test_the_same_histories_give_the_same_space_and_others_another_id(encoder: TextEncoder) -> None:
    first, again = (learn_space(histories(), world.texts(), bootstrap(encoder), CONFIG).start for _ in range(2))
    fewer = learn_space(dict(list(histories().items())[1:]), world.texts(), bootstrap(encoder), CONFIG).start
    assert first.space.same_as(again.space)
    assert first.space.space_id == again.space.space_id != fewer.space.space_id


def test_features_begin_without_weight_and_are_learned_in_the_space_that_stays(encoder: TextEncoder) -> None:
    learned = learn_space(histories(), world.texts(), bootstrap(encoder), CONFIG).start
    impressions = world.impressions(200)
    start = with_features(learned, impressions)
    assert start.scorer is not None
    assert not start.scorer.tensors["head.features"].any()
    trained = train(
        impressions, start, TrainingConfig(projection=False, residuals=False, epochs=1, batch_impressions=16)
    )
    assert trained.scorer.tensors["head.features"].any()
    assert trained.space is start.space


def test_a_starting_point_without_a_scorer_takes_no_features(encoder: TextEncoder) -> None:
    with pytest.raises(TrainingError, match="learn a space first"):
        with_features(bootstrap(encoder), world.impressions(20))


def test_outputs_of_frozen_layers_are_kept_for_the_next_time(encoder: TextEncoder, tmp_path: Path) -> None:
    learn_space(histories(), world.texts(), bootstrap(encoder), CONFIG, cache_folder=tmp_path)
    assert list(tmp_path.glob("*/*.index.npy"))
