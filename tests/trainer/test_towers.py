"""Learning the space from histories with two towers, on a tiny BERT and users who each stay with one topic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.encoder import TextEncoder
from models.errors import TrainingError
from tests.trainer import tiny_world as world
from trainer.encodings import autocast
from trainer.towers import TowerConfig, _clicks, learn_towers
from trainer.training_config import TrainingConfig

TOWERS = TowerConfig(steps=60, items=24, clicks=64)
RATES = TrainingConfig(learning_rate=5e-3, projection_learning_rate=5e-3, encoder_learning_rate=1e-3, seed=1)


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


@pytest.mark.parametrize("arm", ["frozen", "top", "lora"])
def test_the_next_item_becomes_easier_to_foresee(encoder: TextEncoder, arm: str) -> None:
    rates = RATES.model_copy(update={"encoder": arm})
    _, losses = learn_towers(histories(), world.texts(), world.starting_point(encoder), rates, TOWERS)
    assert losses[-1] < losses[0] - 0.1


def test_items_of_one_topic_come_closer_together(encoder: TextEncoder) -> None:
    start = world.starting_point(encoder)
    learned, _ = learn_towers(histories(), world.texts(), start, RATES, TOWERS)

    def nearness(projection: np.ndarray) -> float:
        vectors = encoder.encode([world.item_text(item) for item in range(world.ITEMS)]) @ projection
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        same = np.equal.outer(np.arange(world.ITEMS) % 3, np.arange(world.ITEMS) % 3)
        cosines = vectors @ vectors.T
        return float(cosines[same].mean() - cosines[~same].mean())

    assert nearness(learned.space.projection) > nearness(start.space.projection) + 0.2


def test_a_frozen_encoder_stays_and_a_trained_one_gets_its_own_id(encoder: TextEncoder) -> None:
    few, start = TOWERS.model_copy(update={"steps": 3}), world.starting_point(encoder)
    frozen, _ = learn_towers(histories(), world.texts(), start, TrainingConfig(), few)
    trained, _ = learn_towers(histories(), world.texts(), start, TrainingConfig(encoder="top"), few)
    assert frozen.delta is None
    assert frozen.space.encoder_id == encoder.encoder_id
    assert trained.delta is not None
    assert trained.space.encoder_id == trained.delta.encoder_id != encoder.encoder_id


def test_a_second_pass_goes_on_from_the_encoder_of_the_first(encoder: TextEncoder) -> None:
    few, config = TOWERS.model_copy(update={"steps": 3}), TrainingConfig(encoder="top")
    first, _ = learn_towers(histories(), world.texts(), world.starting_point(encoder), config, few)
    second, _ = learn_towers(histories(), world.texts(), first, config, few)
    assert second.delta is not None
    assert first.delta is not None
    assert second.delta.encoder_id != first.delta.encoder_id
    assert second.space.encoder_id == second.delta.encoder_id


def test_the_same_seed_gives_the_same_weights(encoder: TextEncoder, tmp_path: Path) -> None:
    few, config = TOWERS.model_copy(update={"steps": 5}), TrainingConfig(encoder="top", seed=4)
    start = world.starting_point(encoder)
    one, _ = learn_towers(histories(), world.texts(), start, config, few, cache_folder=tmp_path)
    two, _ = learn_towers(histories(), world.texts(), start, config, few, cache_folder=tmp_path)
    assert one.delta is not None
    assert two.delta is not None
    assert one.delta.encoder_id == two.delta.encoder_id
    assert np.array_equal(one.space.projection, two.space.projection)


def test_a_share_of_what_the_encoder_learned_lies_between_its_first_and_last_weights(encoder: TextEncoder) -> None:
    config, deltas = TrainingConfig(encoder="top", encoder_learning_rate=1e-2), []
    for share in (1.0, 0.25):
        towers = TowerConfig(steps=3, items=24, encoder_share=share)
        learned, _ = learn_towers(histories(), world.texts(), world.starting_point(encoder), config, towers)
        assert learned.delta is not None
        deltas.append(learned.delta.tensors)
    first = {name: value.numpy() for name, value in encoder.module.state_dict().items()}
    for name, last in deltas[0].items():
        assert np.allclose(deltas[1][name], 0.75 * first[name] + 0.25 * last, atol=1e-6)
    assert any(not np.allclose(first[name], last, atol=1e-4) for name, last in deltas[0].items())


def test_what_a_user_acted_on_is_no_negative_for_him(encoder: TextEncoder) -> None:
    # Both users have the same two items: nothing is left to tell the click apart from, and nothing is lost.
    alike = {name: [world.item_hash(0), world.item_hash(1), world.item_hash(0)] for name in "ab"}
    one = TowerConfig(steps=1)
    _, losses = learn_towers(alike, world.texts(), world.starting_point(encoder), TrainingConfig(), one)
    assert losses == [pytest.approx(0.0, abs=1e-6)]


def test_an_item_stands_for_as_many_negatives_as_it_has_clicks(encoder: TextEncoder) -> None:
    # All texts are alike, so that only the numbers of clicks tell the items apart: two on item 1, one on item 0.
    a, b, c, d = (world.item_hash(item) for item in range(4))
    clicks, texts = {"u": [a, b], "v": [c, b], "w": [d, a]}, dict.fromkeys((a, b, c, d), "the goal")
    one = TowerConfig(steps=1, least_clicks=1)
    _, losses = learn_towers(clicks, texts, world.starting_point(encoder), TrainingConfig(), one)
    # u acted on both; v: 2 of 3; w: 1 of 3.
    assert losses == [pytest.approx((0 + np.log(3 / 2) + np.log(3)) / 3, abs=1e-5)]


def test_recent_items_are_the_users_own_newest_first() -> None:
    items = np.array([10, 11, 12, 13], np.uint64)
    clicks = _clicks([np.array([0, 1]), np.array([3, 2, 1])], items)
    recents, known = clicks.recents(np.array([1, 4]))
    assert recents[0][known[0]].tolist() == [0]
    assert recents[1][known[1]].tolist() == [2, 3]


def test_first_clicks_of_users_are_not_to_be_foreseen() -> None:
    clicks = _clicks([np.array([0, 1]), np.array([1, 0, 1])], np.array([10, 11], np.uint64))
    assert clicks.places.tolist() == [3, 1, 4]
    assert clicks.ends.tolist() == [0, 1, 3]


def test_histories_that_share_no_items_are_refused(encoder: TextEncoder) -> None:
    apart = {"a": [world.item_hash(0), world.item_hash(1)], "b": [world.item_hash(2), world.item_hash(3)]}
    with pytest.raises(TrainingError, match="0 items with 2 clicks"):
        learn_towers(apart, world.texts(), world.starting_point(encoder))


def test_no_histories_are_refused(encoder: TextEncoder) -> None:
    with pytest.raises(TrainingError, match="0 items"):
        learn_towers({}, world.texts(), world.starting_point(encoder))


def test_bfloat16_on_a_cpu_gives_nearly_the_gradient_of_float32() -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 2, 5, 8)
    gradients = []
    for precision in ("float32", "bfloat16"):
        leaf = values.clone().requires_grad_()
        with autocast(torch.device("cpu"), precision):
            made = torch.nn.functional.scaled_dot_product_attention(leaf, leaf, leaf) @ torch.eye(8)
        made.float().square().sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=0.1)
