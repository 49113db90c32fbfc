"""Rounds that learn a space from histories: when, from what, and what the bundle says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.encoder import EncoderConfig
from models.hashing import hash64
from models.manifest import Window
from models.sampling import LoneAction
from models.user_row import NEGATIVE, POSITIVE
from tests.models.bundles import features_record
from tests.trainer import tiny_world
from tests.trainer.round_world import ITEMS, START_MS, World
from tests.trainer.test_history import histories as topical_histories
from tests.trainer.test_space_learning import CONFIG
from trainer.dataset import Example, Examples, ItemFacts
from trainer.learner import FinetuneLearner
from trainer.lone_actions import histories
from trainer.ports import Identity
from trainer.progress import silent
from trainer.training_config import TrainingConfig

HOUR_MS = 3_600_000
LIKED = 1 | POSITIVE


def action(user: str, item: str, at_ms: int, code: int = LIKED) -> LoneAction:
    return LoneAction(user, hash64(item), code, START_MS + at_ms, START_MS + at_ms, 0, at_ms)


def acting(folder: Path, least_items: int = 2) -> World:
    """Two readers who acted on x and y, and impressions of other items."""
    world = World(folder)
    world.actions = [
        action(user, item, n) for n, (user, item) in enumerate([("u", "x"), ("u", "y"), ("v", "x"), ("v", "y")])
    ]
    world.facts = ItemFacts({hash64(item): f"News of {item}" for item in "xy"}, {})
    changes = {"histories": "frozen", "histories_least_items": least_items, "histories_every_hours": 48.0}
    world.config = world.config.model_copy(update=changes)
    return world


def topics(world: World) -> list[list[str]]:
    return [world.registry.manifest(version).window.topics for version in world.registry.versions()]


def next_round(world: World, hours: float) -> None:
    """Withdraw the candidate by letting users be shown enough, some time later, and make a round."""
    world.now_ms += round(hours * HOUR_MS)
    world.next_skill = 0.0
    world.impressions(300, shadows=[v for v in [world.role("candidate")] if v])
    world.round()


def test_a_round_learns_from_histories_and_its_bundle_names_their_offsets(tmp_path: Path) -> None:
    world = acting(tmp_path)
    world.impressions(300)
    world.round()
    assert topics(world) == [["events", "features", "labels"]]


def test_no_history_is_read_unless_the_settings_say_so(tmp_path: Path) -> None:
    world = acting(tmp_path)
    world.config = world.config.model_copy(update={"histories": "off"})
    world.impressions(300)
    world.round()
    assert topics(world) == [["features", "labels"]]


def test_a_learned_space_stands_until_the_next_one_is_due(tmp_path: Path) -> None:
    world = acting(tmp_path)
    world.impressions(300)
    world.round()
    for hours in (1.0, 46.0, 2.0):
        next_round(world, hours)
    assert ["events" in names for names in topics(world)] == [True, False, False, True]


def test_too_few_histories_are_looked_at_again_before_long(tmp_path: Path) -> None:
    world = acting(tmp_path, least_items=3)
    world.impressions(300)
    world.round()
    assert topics(world) == [["features", "labels"]]
    world.config = world.config.model_copy(update={"histories_least_items": 2})
    for hours in (1.0, 1.0):
        next_round(world, hours)
    assert ["events" in names for names in topics(world)] == [False, False, True]


def test_what_was_shown_or_disliked_is_no_history() -> None:
    shown = Example(features_record(ITEMS), np.zeros(len(ITEMS), np.float32), START_MS)
    user = shown.features.user_id
    given = [action(user, "late", 2), action(user, "early", 1), action(user, ITEMS[0], 3)]
    given += [action(user, "bad", 4, code=2 | NEGATIVE), action("other", ITEMS[0], 5)]
    assert histories(given, Examples([shown])) == {
        user: [hash64("early"), hash64("late")],
        "other": [hash64(ITEMS[0])],
    }


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> FinetuneLearner:
    training = TrainingConfig(epochs=1, device="cpu", residuals=False)
    return FinetuneLearner(training, EncoderConfig(), tmp_path_factory.mktemp("learner"), CONFIG)


def test_a_learner_goes_on_from_the_space_of_the_histories(learner: FinetuneLearner) -> None:
    shown = tiny_world.impressions(60)
    impressions = [Example(r, y, r.time_ms) for r, y in zip(shown.records, shown.labels, strict=True)]
    items = ItemFacts(tiny_world.texts(), {})
    identity = Identity("default", "v-1", START_MS, Window([], 0, 0, 0, 0, 0))
    plain = learner.train(identity, Examples(impressions), items, None, silent).contents
    learned = learner.train(
        identity, Examples(impressions, histories=topical_histories()), items, None, silent
    ).contents

    def nearness(projection: np.ndarray) -> float:
        hashes = [tiny_world.item_hash(item) for item in range(tiny_world.ITEMS)]
        base = learner._encoder().encode([items.texts[h] for h in hashes])
        vectors = base @ projection
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        same = np.equal.outer(np.arange(tiny_world.ITEMS) % 3, np.arange(tiny_world.ITEMS) % 3)
        return float((vectors @ vectors.T)[same].mean() - (vectors @ vectors.T)[~same].mean())

    assert nearness(learned.projection) > nearness(plain.projection) + 0.1
    # Rows that workers hold are of the bootstrap's space: the bundle says how they go over.
    assert learned.carry is not None
    assert learned.carry_from is not None
    assert learned.carry_from.startswith("bootstrap-")
