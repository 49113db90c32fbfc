"""Candidate sources that a surface turns on, their turns, and what the reasons say, in English and Chinese."""

from __future__ import annotations

import dataclasses
import string

import numpy as np
import pytest

from models.candidates import FRESH, Quotas, merge
from models.reason_texts import TEXTS, Language
from models.reasons import KINDS
from models.recommender import RecommenderConfig, SlateRequest, SurfaceConfig
from models.rules import RulesConfig
from models.trending import Lists
from tests.models.recommender_world import NOW_MS, World, unit_vector

HOUR_MS = 3_600_000


def world_of(quotas: Quotas, *, language: Language = "en", candidates: int = 12, k: int = 12) -> World:
    """Return a world with news of three categories: 60 each, the first of each clicked, those of "c" new."""
    surface = SurfaceConfig(k=k, candidates=candidates, quotas=quotas, reason_language=language)
    world = World(users=2, config=RecommenderConfig(surfaces={"default": surface}, popular_items=4))
    for place, letter in enumerate("abc"):
        for i in range(60):
            world.item(
                f"{letter}{i}",
                unit_vector(*[1.0 if place == n else 0.1 for n in range(3)], i / 1_000),
                title=f"Title {letter}{i}",
                categories=[letter],
                published_at=NOW_MS - (1 if letter == "c" else 100 + i) * HOUR_MS,
            )
    world.popular({f"a{i}": 40 - i for i in range(10)} | {f"b{i}": 20 - i for i in range(10)})
    return world


def sources(world: World) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for item in world.slate().items:
        found.setdefault(item.source, []).append(item.item_id)
    return found


def test_at_the_defaults_there_are_no_other_sources() -> None:
    world = world_of(Quotas())
    world.act("b0")
    assert set(sources(world)) <= {"short_term", "long_term", "popular"}


def test_trending_items_take_turns_with_popular_ones() -> None:
    # Popular 0, 2, 4, 6 at half a turn; trending 0, 1, 2, … at a whole one: the same items, and those further down.
    found = sources(world_of(Quotas(trending=1.0)))
    assert found["popular"][:1] == ["a0"]
    assert {"a4", "a5", "a6"} <= set(found["trending"])


def test_what_trends_is_what_is_clicked_now_not_what_was_clicked_more_some_hours_ago() -> None:
    world = World()
    world.item("then")
    world.item("now")
    for _ in range(30):
        world.act("then", at_ms=NOW_MS - 3 * HOUR_MS)
    world.popular({"now": 2})
    lists = Lists.build(world.catalogue, world.counters, NOW_MS)
    assert [world.catalogue.index.item_id(row) for row in lists.trending] == ["now", "then"]


def test_a_source_with_four_times_the_turns_has_four_times_the_candidates() -> None:
    nothing = np.zeros((1, 4, 0), np.int32)
    popular, fresh = np.arange(10, dtype=np.int32), np.arange(10, 30, dtype=np.int32)[None]
    pool = merge(
        nothing,
        np.zeros((1, 4), np.bool_),
        popular,
        15,
        lambda rows: np.zeros(rows.shape, np.bool_),
        Quotas(popular=0.5, fresh=2.0),
        [(FRESH, fresh, 2.0)],
    )
    assert pool.rows[0].tolist() == [0, 10, 11, 12, 13, 1, 14, 15, 16, 17, 2, 18, 19, 20, 21]
    assert (pool.sources[0] == FRESH).sum() == 12


def test_without_a_click_in_months_nothing_trends() -> None:
    world = world_of(Quotas(trending=1.0))
    later = world.slate(now_ms=NOW_MS + 200 * 24 * HOUR_MS)
    assert "trending" not in {item.source for item in later.items}


def test_a_click_brings_what_trends_in_its_category() -> None:
    world = world_of(Quotas(trending_category=4.0), candidates=40, k=40)
    assert "trending_category" not in sources(world)
    world.act("b30", at_ms=NOW_MS)
    found = sources(world)["trending_category"]
    # The search for what is near b30 has its turns too, so not all ten of them are named after the category.
    assert len(found) >= 5
    assert set(found) <= {f"b{i}" for i in range(10)} | {"b30"}


def test_fresh_items_come_by_their_quota() -> None:
    found = sources(world_of(Quotas(fresh=2.0)))
    assert len(found["fresh"]) >= 6
    assert all(item_id.startswith("c") for item_id in found["fresh"])


def test_an_item_that_is_not_out_yet_is_not_fresh() -> None:
    world = world_of(Quotas(fresh=100.0))
    world.item("soon", title="Soon", published_at=NOW_MS + 2 * HOUR_MS)
    assert "soon" not in sources(world)["fresh"]


def test_a_narrow_pool_keeps_the_share_of_each_source() -> None:
    world = world_of(Quotas(fresh=1.0), candidates=20, k=10)
    world.act("b30")
    slate = world.slate(k=10)
    assert len(slate.items) == 10


REASONS = [
    ("en", "Because you clicked “Title b30”", "Popular at the moment in b", "Popular at the moment"),
    ("zh", "因为你点击过《Title b30》", "“b”类当前热门", "当前热门"),
]


@pytest.mark.parametrize(("language", "because", "category", "trending"), REASONS)
def test_reasons_speak_the_language_of_the_surface(
    language: Language, because: str, category: str, trending: str
) -> None:
    world = world_of(Quotas(trending_category=4.0), language=language, candidates=40, k=40)
    world.act("b30")
    texts = {item.source: item.reason.text for item in world.slate().items}
    assert texts["short_term"] == because
    assert texts["trending_category"] == category
    assert {item.reason.text for item in world.slate(user=1, k=2).items} == {trending}


@pytest.mark.parametrize(("language", "text"), [("en", "Among the newest items"), ("zh", "最新上线的内容")])
def test_an_item_without_clicks_is_there_for_being_new_also_in_a_degraded_slate(language: Language, text: str) -> None:
    surface = SurfaceConfig(reason_language=language)
    world = World(config=RecommenderConfig(surfaces={"default": surface}))
    world.item("i", published_at=NOW_MS)
    for slate in (world.slate(), world.recommender.fallback(world.rows, [SlateRequest("user 0", 0)], NOW_MS)[0]):
        assert [(item.reason.kind, item.reason.text) for item in slate.items] == [("new", text)]


def test_every_language_has_every_sentence_with_the_same_fields() -> None:
    def fields(text: str) -> set[str]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    english = dataclasses.asdict(TEXTS["en"])
    for texts in TEXTS.values():
        for name, text in dataclasses.asdict(texts).items():
            if name == "verbs":
                assert set(text) == set(english[name])
            else:
                assert text
                assert fields(text) == fields(english[name])


def test_the_kinds_of_reasons_are_told_apart() -> None:
    assert len(set(KINDS)) == len(KINDS) == 7


def test_a_title_with_braces_is_no_template() -> None:
    world = world_of(Quotas())
    world.item("odd", unit_vector(0.1, 1.0), title="{0} {verb} {title}")
    world.act("odd")
    texts = {item.reason.text for item in world.slate().items}
    assert "Because you clicked “{0} {verb} {title}”" in texts


def test_pinned_items_say_so_in_chinese() -> None:
    surface = SurfaceConfig(reason_language="zh", rules=RulesConfig(pinned=("i",)))
    world = World(config=RecommenderConfig(surfaces={"default": surface}))
    world.item("i")
    assert world.slate().items[0].reason.text == "本页精选"
