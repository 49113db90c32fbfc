"""Learning from histories, on a tiny BERT and users who each stay with one topic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.ctr import CtrConfig, CtrScorer
from models.ctr_module import first_tensors
from models.encoder import TextEncoder
from models.errors import TrainingError
from tests.trainer import tiny_world as world
from trainer.finetune import StartingPoint
from trainer.history import HistoryConfig, learn_histories
from trainer.training_config import TrainingConfig

FEATURES = 3
HISTORY = HistoryConfig(steps=60, users=8, window=8, targets=4, negatives=24)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return world.load_bert(world.write_bert(tmp_path_factory.mktemp("bert")))


def histories() -> dict[str, list[int]]:
    """Users 0 … 29, each with ten items of topic number user % 3."""
    topics = len(world.TOPICS)
    return {
        f"u{user}": [world.item_hash((user % topics) + topics * ((user + 7 * n) % 30)) for n in range(10)]
        for user in range(30)
    }


def start(encoder: TextEncoder) -> StartingPoint:
    point = world.starting_point(encoder)
    config = CtrConfig(dim=8, features=FEATURES, hidden=(8,), attention_dim=8)
    tensors = first_tensors(config, np.zeros(FEATURES, np.float32), np.ones(FEATURES, np.float32), 0.1, 0)
    return StartingPoint(point.space, encoder, scorer=CtrScorer(config, tensors))


def test_the_next_item_becomes_easier_to_foresee(encoder: TextEncoder) -> None:
    rates = TrainingConfig(learning_rate=5e-3, projection_learning_rate=5e-3, seed=1)
    _, losses = learn_histories(histories(), world.texts(), start(encoder), rates, HISTORY)
    assert losses[-1] < losses[0] - 0.3


def test_a_frozen_encoder_stays_and_a_trained_one_gets_its_own_id(encoder: TextEncoder) -> None:
    few = HISTORY.model_copy(update={"steps": 3})
    frozen, _ = learn_histories(histories(), world.texts(), start(encoder), TrainingConfig(), few)
    trained, _ = learn_histories(histories(), world.texts(), start(encoder), TrainingConfig(encoder="top"), few)
    assert frozen.delta is None
    assert frozen.space.encoder_id == encoder.encoder_id
    assert trained.delta is not None
    assert trained.space.encoder_id == trained.delta.encoder_id != encoder.encoder_id
    assert not np.array_equal(frozen.space.projection, start(encoder).space.projection)


def test_the_weights_of_live_features_stay_as_they_are(encoder: TextEncoder) -> None:
    few = HISTORY.model_copy(update={"steps": 3})
    config = TrainingConfig(weight_decay=0.0)
    learned, _ = learn_histories(histories(), world.texts(), start(encoder), config, few)
    assert learned.scorer is not None
    before, after = start(encoder).scorer, learned.scorer
    assert before is not None
    assert np.array_equal(before.tensors["head.features"], after.tensors["head.features"])
    assert not np.array_equal(before.tensors["attention.query"], after.tensors["attention.query"])


def test_the_same_seed_gives_the_same_weights(encoder: TextEncoder, tmp_path: Path) -> None:
    few, config = HISTORY.model_copy(update={"steps": 5}), TrainingConfig(encoder="top", seed=4)
    one, _ = learn_histories(histories(), world.texts(), start(encoder), config, few, cache_folder=tmp_path)
    two, _ = learn_histories(histories(), world.texts(), start(encoder), config, few, cache_folder=tmp_path)
    assert one.delta is not None
    assert two.delta is not None
    assert one.delta.encoder_id == two.delta.encoder_id
    assert np.array_equal(one.space.projection, two.space.projection)


def test_an_item_of_the_user_is_no_negative(encoder: TextEncoder) -> None:
    # Both users have the same two items: nothing is left to tell the target apart from, and nothing is lost.
    alike = {name: [world.item_hash(0), world.item_hash(1)] for name in "ab"}
    one = HISTORY.model_copy(update={"steps": 1})
    _, losses = learn_histories(alike, world.texts(), start(encoder), TrainingConfig(), one)
    assert losses == [pytest.approx(0.0, abs=1e-6)]


def test_histories_of_one_user_are_refused(encoder: TextEncoder) -> None:
    with pytest.raises(TrainingError, match="1 users"):
        learn_histories({"u0": histories()["u0"]}, world.texts(), start(encoder))


def test_a_start_without_a_scorer_is_refused(encoder: TextEncoder) -> None:
    with pytest.raises(TrainingError, match="without a scorer"):
        learn_histories(histories(), world.texts(), world.starting_point(encoder))
