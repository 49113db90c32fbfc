"""Slates by context: what a new user gets, what the list of a context says, and that off and unknown change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from models.candidates import Quotas
from models.context_lists import MADE_AT_ONCE, BatchLeanings, ContextLists, Leaning
from models.context_popularity import ContextPopularity
from models.events import Action, Request
from models.ranking import TASTES, RankingConfig
from models.reason_texts import TEXTS
from models.recommender import RecommenderConfig, Slate, SlateRequest, SurfaceConfig
from models.user_events import UserStateConfig
from tests.models.recommender_world import NOW_MS, World, unit_vector
from tests.models.test_model_slates import scorer, serve

LATER_MS = NOW_MS + 1_000


class ContextWorld:
    """A world whose users click in contexts, as a worker's pipeline takes them."""

    def __init__(self, *, quotas: Quotas | None = None, k: int = 5, **settings: Any) -> None:
        surface = SurfaceConfig(k=k, quotas=quotas or Quotas())
        fields = {"popularity_context": ("device", "locale"), "surfaces": {"default": surface}, **settings}
        self.config = RecommenderConfig(**fields)
        self.world = World(users=3, config=self.config)
        for letter in "abc":
            for n in range(20):
                self.world.item(f"{letter}{n}", unit_vector(*[float(letter == other) for other in "abc"], n / 1_000))
        self.contexts = ContextPopularity(
            self.config, self.world.counters.config, UserStateConfig(), self.world.catalogue.index
        )
        self.world.recommender.contexts = ContextLists(self.contexts, self.world.catalogue, self.world.counters)
        self._offset = 0

    def clicks(self, counts: Mapping[str, int], **context: Any) -> None:
        """Count clicks of as many users, over all and in a context."""
        self.world.popular(counts)
        for item, times in counts.items():
            for user in range(times):
                self._offset += 1
                event = Action(
                    event_id=f"{self._offset}",
                    event_time=NOW_MS,
                    user_id=f"{context} {user}",
                    item_id=item,
                    action="click",
                    context=context,
                )
                self.contexts.add(0, self._offset, event, NOW_MS)

    def wish(self, user: int = 0, **context: Any) -> SlateRequest:
        asked = Request(event_id="r", event_time=NOW_MS, user_id=f"user {user}", request_id="r", context=context)
        request = SlateRequest.of(asked, user)
        request.context = self.contexts.values_of(asked)
        return request

    def slate(self, user: int = 0, **context: Any) -> Slate:
        self.world.recommender.refresh(LATER_MS)
        (slate,) = self.world.recommender.recommend(self.world.rows, [self.wish(user, **context)], LATER_MS)
        return slate

    def ids(self, user: int = 0, **context: Any) -> list[str]:
        return [item.item_id for item in self.slate(user, **context).items]


def busy(**settings: Any) -> ContextWorld:
    """Return a world in which phones click a0 … a4 a lot, and television sets c0 … c4."""
    found = ContextWorld(**settings)
    found.clicks({f"a{n}": 300 - n for n in range(5)}, device="phone")
    found.clicks({f"c{n}": 60 - n for n in range(5)}, device="tv")
    return found


def test_a_new_user_gets_what_users_of_the_same_device_click() -> None:
    world = busy()
    assert world.ids(device="tv") == ["c0", "c1", "c2", "c3", "c4"]
    assert world.ids(device="phone") == ["a0", "a1", "a2", "a3", "a4"]


def test_a_new_user_gets_new_items_too_where_their_quota_says_so() -> None:
    world = busy(quotas=Quotas(fresh=0.5), k=20)
    for n in range(20):
        world.world.item(f"new{n}", published_at=NOW_MS)
    items = world.slate(device="tv").items
    assert {item.source for item in items} == {"popular_context", "fresh"}
    assert [item.item_id for item in items[:5]] == ["c0", "c1", "c2", "c3", "c4"]


def test_what_the_list_of_the_context_lacks_comes_from_the_newest_of_the_overall_list() -> None:
    slate = busy(k=30).slate(device="tv")
    sources = [item.source for item in slate.items]
    assert sources == ["popular_context"] * 10 + ["popular"] * 20


def test_its_items_name_the_source_and_say_that_they_are_popular() -> None:
    # Also those that the short overall list does not have.
    for item in busy(popular_items=2).slate(device="tv").items:
        assert (item.source, item.reason.text) == ("popular_context", TEXTS["en"].trending)


def test_what_was_clicked_meanwhile_is_known_after_the_next_refresh() -> None:
    world = busy()
    assert world.ids(device="tv")[0] == "c0"
    world.clicks({"b0": 80}, device="tv")
    assert world.ids(device="tv")[0] == "c0"
    world.world.recommender.refresh(LATER_MS + 1_000)
    (slate,) = world.world.recommender.recommend(world.world.rows, [world.wish(device="tv")], LATER_MS + 1_000)
    assert slate.items[0].item_id == "b0"


def test_of_many_contexts_in_one_batch_some_are_renewed_in_the_next_one() -> None:
    world = busy(popularity_context_prior=1.0)
    devices = [f"d{n}" for n in range(MADE_AT_ONCE + 1)]
    for device in devices:
        world.clicks({"c0": 30}, device=device)
    recommender, wishes = world.world.recommender, [world.wish(device=device) for device in devices]

    def firsts(at_ms: int) -> list[str]:
        recommender.refresh(at_ms)
        return [slate.items[0].item_id for slate in recommender.recommend(world.world.rows, wishes, at_ms)]

    assert firsts(LATER_MS) == ["c0"] * 17, "what was never made is made at once"
    for device in devices:
        world.clicks({"b0": 90}, device=device)
    assert firsts(LATER_MS + 1_000) == ["b0"] * 16 + ["c0"]
    assert firsts(LATER_MS + 1_001) == ["b0"] * 17


def test_popularity_alone_orders_by_the_context_too() -> None:
    world = busy(ranking=RankingConfig(ctr_weight=0.0))
    assert world.ids(device="tv") == ["c0", "c1", "c2", "c3", "c4"]


def test_a_context_that_nobody_knows_gets_the_overall_list() -> None:
    world = busy()
    slate = world.slate(device="fridge")
    assert {item.source for item in slate.items} == {"popular"}
    assert slate == world.slate()


def test_a_context_with_few_clicks_says_nearly_what_all_say() -> None:
    world = busy(popularity_context_prior=10_000.0)
    world.clicks({"b0": 2}, device="watch")
    assert world.ids(device="watch") == ["a0", "a1", "a2", "a3", "a4"]


def test_a_second_key_says_its_part() -> None:
    world = busy()
    world.clicks({"b0": 290}, locale="de")
    assert world.ids(device="tv", locale="de")[0] == "b0"
    assert set(world.ids(device="tv", locale="de")[1:]) == {"c0", "c1", "c2", "c3"}


def test_the_first_click_already_changes_the_slate() -> None:
    world = busy()
    before = world.ids(device="tv")
    world.world.act("b3")
    after = world.slate(device="tv").items
    assert any(item.item_id.startswith("b") for item in after)
    assert [item.item_id for item in after] != before


def test_a_user_with_a_vector_gets_the_context_by_turns() -> None:
    world = busy(k=30)
    world.world.act("b3")
    sources = [item.source for item in world.slate(device="tv").items]
    assert {"short_term", "popular_context"} <= set(sources)


@pytest.mark.parametrize("off", [{"quotas": Quotas(popular_context=0.0)}, {"popularity_context": ()}])
def test_a_surface_that_does_not_look_at_contexts_makes_the_slates_of_before(off: dict[str, Any]) -> None:
    world = busy(**off)
    slate = world.slate(device="tv")
    assert slate == world.slate()
    assert {item.source for item in slate.items} == {"popular"}


def test_a_request_gets_the_same_slate_alone_and_in_a_batch_of_other_contexts() -> None:
    world = busy()
    world.world.act("b3", user=1)
    wishes = [world.wish(user, **context) for user in (0, 1) for context in ({}, {"device": "tv"}, {"device": "phone"})]
    recommender, rows = world.world.recommender, world.world.rows
    recommender.refresh(LATER_MS)
    together = recommender.recommend(rows, wishes, LATER_MS)
    assert together == [recommender.recommend(rows, [wish], LATER_MS)[0] for wish in wishes]


def test_what_may_not_be_shown_is_not_in_the_list_of_a_context() -> None:
    world = busy()
    world.world.item("c0", is_hidden=True)
    assert world.ids(device="tv")[0] == "c1"


def test_the_hand_set_score_does_not_put_the_overall_list_before_the_context() -> None:
    world = busy(quotas=Quotas(popular_context=4.0, popular=4.0), k=30)
    world.world.act("b3")
    found = [item_id for item_id in world.ids(device="tv") if item_id[0] in "ac"]
    assert found[:6] == ["c0", "c1", "c2", "c3", "c4", "a0"]


def test_a_model_that_knows_no_contexts_is_told_of_them() -> None:
    world = busy()
    world.world.recommender.reconfigure(world.config)
    serve(world.world, scorer())
    assert set(world.ids(device="tv")) == {"c0", "c1", "c2", "c3", "c4"}


def test_the_ctr_of_a_model_stays_its_own_in_every_context() -> None:
    world = busy()
    serve(world.world, scorer())
    assert {item.ctr for item in world.slate(device="tv").items} == {
        item.ctr for item in world.slate(device="phone").items
    }


def leaning(world: ContextWorld, **context: Any) -> Leaning:
    recommender = world.world.recommender
    recommender.refresh(LATER_MS)
    value = world.wish(**context).context[0]
    parts = [world.contexts.counts(0, value, LATER_MS)]
    popular = recommender._popular
    return Leaning.build(parts, popular, world.world.catalogue, world.world.counters, world.config, LATER_MS)


def test_the_popularity_of_a_context_is_shrunk_towards_that_of_all_by_the_stated_prior() -> None:
    # 100 actions on television sets, the prior as many: half of a share of 1, half of 100 in 400.
    world = ContextWorld(popularity_context_prior=100.0)
    world.clicks({"a0": 300}, device="phone")
    world.clicks({"c0": 100}, device="tv")
    found = leaning(world, device="tv")
    decayed = 2 ** (-1 / 3_600)
    # The decayed 100 are a hair less than the prior.
    weight = 100 * decayed / (100 * decayed + 100)
    clicks = {"a0": (1 - weight) * 300 * decayed, "c0": weight * 400 * decayed + (1 - weight) * 100 * decayed}
    expected = np.log1p(clicks["a0"]) / np.log1p(clicks["c0"])
    rows = world.world.catalogue.index.rows(["a0", "c0", "b0"])
    strength, _ = BatchLeanings([found]).read(rows[None], world.world.recommender._popular)
    assert strength[0, :2] == pytest.approx([expected, 1.0], rel=1e-4)


def test_a_lift_is_the_logarithm_of_observed_over_expected_with_five_more_on_both_sides() -> None:
    world = ContextWorld()
    world.clicks({"a0": 300}, device="phone")
    world.clicks({"c0": 100}, device="tv")
    found = leaning(world, device="tv")
    rows = world.world.catalogue.index.rows(["a0", "c0", "b0"])
    _, lift = BatchLeanings([found]).read(rows[None], world.world.recommender._popular)
    expected = [np.log(5 / (75 + 5)), np.log(105 / (25 + 5)), 0.0]
    assert lift[0] == pytest.approx(expected, abs=2e-3)


def test_what_may_not_be_shown_is_no_measure_of_popularity() -> None:
    world = busy()
    world.world.item("c0", is_hidden=True)
    found = leaning(world, device="tv")
    index = world.world.catalogue.index
    assert [index.item_id(row) for row in found.best.tolist()][:2] == ["c1", "c2"]
    strength, _ = BatchLeanings([found]).read(index.rows(["c0", "c1"])[None], world.world.recommender._popular)
    assert strength.tolist() == [[0.0, 1.0]]


def test_without_a_taste_the_context_has_the_turns_of_the_overall_list() -> None:
    world = busy()
    batch = BatchLeanings([leaning(world, device="tv"), None])
    quotas = Quotas(popular=2.0, popular_context=0.25)
    new, known = np.zeros((2, len(TASTES)), np.bool_), np.ones((2, len(TASTES)), np.bool_)
    assert [turns for _, _, turns in batch.sources(new, quotas, 4)] == [2.0, 0.25]
    assert [(rows.shape, turns) for _, rows, turns in batch.sources(known, quotas, 4)] == [((2, 1), 0.25)]
