"""Logs with actions only: what the trainer makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from models.examples import SAMPLED
from models.hashing import hash64
from models.manifest import OffsetRange
from tests.trainer.round_world import START_MS, World
from trainer.connection import EventRules
from trainer.dataset import ItemFacts
from trainer.lone_actions import read_lone_actions, sampled_examples
from trainer.spool import Spool, SpooledRecord

ITEMS = ItemFacts({hash64(f"item-{i}"): f"title {i}" for i in range(30)}, {})


def event(offset: int, **fields: Any) -> SpooledRecord:
    """Return a spooled event of ann at START_MS."""
    known = {"event_id": f"e{offset}", "event_time": START_MS, "user_id": "ann", "type": "action", "action": "click"}
    return SpooledRecord(offset, START_MS, msgspec.json.encode({**known, **fields}))


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """Two clicks, a request, and a record that is none."""
    made = Spool(tmp_path)
    request = {"type": "request", "request_id": "r1"}
    records = [
        event(0, item_id="item-1"),
        event(1, **request),
        SpooledRecord(2, START_MS, b"{"),
        event(3, item_id="item-2"),
    ]
    made.write(OffsetRange("events", 0, 0, 4), records)
    return made


def test_the_actions_of_a_range_are_read_and_nothing_else(spool: Spool) -> None:
    found = read_lone_actions(spool, [OffsetRange("events", 0, 0, 4)], EventRules())
    assert [(a.item, a.offset) for a in found] == [(hash64("item-1"), 0), (hash64("item-2"), 3)]


def test_a_positive_action_stands_first_among_drawn_items(spool: Spool) -> None:
    actions = read_lone_actions(spool, [OffsetRange("events", 0, 0, 4)], EventRules())
    found = sampled_examples(actions, ITEMS, 4, 0, 100)
    assert [e.labels.tolist() for e in found.impressions] == [[1.0, 0.0, 0.0, 0.0, 0.0]] * 2
    assert all(e.features.flags == SAMPLED and e.features.negative_rate for e in found.impressions)


def test_above_the_limit_the_newest_actions_are_kept(spool: Spool) -> None:
    actions = read_lone_actions(spool, [OffsetRange("events", 0, 0, 4)], EventRules())
    found = sampled_examples(actions, ITEMS, 4, 0, 1)
    assert [e.features.offset for e in found.impressions] == [3]
    assert found.left_out == {"above-limit": 1}


def _acting(world: World, spool: Spool) -> None:
    world.actions = read_lone_actions(spool, [OffsetRange("events", 0, 0, 4)], EventRules())
    world.facts = ITEMS
    world.config = world.config.model_copy(update={"sampled_negatives": 4, "min_impressions": 2, "min_clicks": 2})


def test_a_round_learns_from_actions_where_nothing_was_shown(tmp_path: Path, spool: Spool) -> None:
    world = World(tmp_path / "world")
    _acting(world, spool)
    assert world.round().outcomes == ["candidate"]
    [version] = world.registry.versions()
    assert world.registry.manifest(version).window.topics == ["events"]


def test_a_round_never_draws_where_something_was_shown(tmp_path: Path, spool: Spool) -> None:
    world = World(tmp_path / "world")
    _acting(world, spool)
    world.impressions(50)
    assert world.round().outcomes == ["candidate"]
    [version] = world.registry.versions()
    assert world.registry.manifest(version).window.topics == ["features", "labels"]
