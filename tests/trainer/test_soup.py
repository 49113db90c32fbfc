"""The mean of several trainings that start from the same weights, on a tiny BERT."""

from __future__ import annotations

import numpy as np
import pytest

from models.encoder import TextEncoder
from models.errors import TrainingError
from tests.trainer import tiny_world as world
from trainer.encodings import OutputCache
from trainer.finetune import StartingPoint, train
from trainer.scoring import ItemTable, encode_items, score
from trainer.soup import train_soup
from trainer.space_learning import first_scorer, with_features
from trainer.training_config import TrainingConfig

CONFIG = TrainingConfig(
    epochs=1, batch_impressions=16, projection=False, residuals=False, device="cpu", seed=3, learning_rate=5e-3
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return world.load_bert(world.write_bert(tmp_path_factory.mktemp("bert")))


def learned(encoder: TextEncoder) -> StartingPoint:
    point = world.starting_point(encoder)
    start = StartingPoint(point.space, encoder, scorer=first_scorer(point.space.dim, 0))
    return with_features(start, world.impressions(200))


def table(start: StartingPoint) -> ItemTable:
    return ItemTable(start.space, encode_items(start.encoder, world.texts(), OutputCache(None, 0)))


def test_the_weights_are_the_mean_of_those_of_the_trainings(encoder: TextEncoder) -> None:
    start, sets = learned(encoder), [world.impressions(200), world.impressions(200, seed=1)]
    soup = train_soup(sets, start, CONFIG, table(start))
    first = train(sets[0], start, CONFIG)
    second = train(sets[1], start, CONFIG.model_copy(update={"seed": 4}))
    for name in ("head.features", "attention.query", "head.base"):
        mean = (first.scorer.tensors[name] + second.scorer.tensors[name]) / 2
        np.testing.assert_allclose(soup.scorer.tensors[name], mean, atol=1e-6)
    assert not np.allclose(first.scorer.tensors["head.features"], second.scorer.tensors["head.features"])


def test_the_mean_is_calibrated_anew(encoder: TextEncoder) -> None:
    start, sets = learned(encoder), [world.impressions(400), world.impressions(400, seed=1)]
    soup = train_soup(sets, start, CONFIG.model_copy(update={"calibration_share": 0.4}), table(start))
    later = sets[0].records[-160:]
    odds = np.concatenate(score(soup.scorer, soup.features, table(start), later))
    rate = float(np.concatenate(sets[0].labels[-160:]).mean())
    assert abs(float((1 / (1 + np.exp(-odds))).mean()) - rate) < 0.005


def test_one_training_is_its_own_mean(encoder: TextEncoder) -> None:
    start, shown = learned(encoder), world.impressions(200)
    soup, alone = train_soup([shown], start, CONFIG, table(start)), train(shown, start, CONFIG)
    for name, tensor in alone.scorer.tensors.items():
        np.testing.assert_allclose(soup.scorer.tensors[name], tensor, atol=1e-5)


def test_drawn_first_weights_have_no_mean(encoder: TextEncoder) -> None:
    with pytest.raises(TrainingError, match="give a learned start"):
        train_soup([world.impressions(50)], world.starting_point(encoder), CONFIG, table(learned(encoder)))


def test_spaces_have_no_mean(encoder: TextEncoder) -> None:
    moving = CONFIG.model_copy(update={"projection": True})
    with pytest.raises(TrainingError, match="train the head alone"):
        train_soup([world.impressions(50)], learned(encoder), moving, table(learned(encoder)))
