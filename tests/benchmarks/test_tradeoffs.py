"""The benchmark of diversity: the grid, nDCG of a slate, the figures of a tally; and all of it on a small log."""

from __future__ import annotations

import math

import pytest

from benchmarks.tradeoffs import OFF, Row, Setting, Tally, figures, grid, measure, ndcg, options
from benchmarks.tradeoffs_plot import draw
from models.diversity import DiversityConfig
from models.surfaces import SurfaceConfig
from tests.trainer.replay_logs import START_MS, Written, write_log
from trainer.progress import silent
from trainer.replay_slates import Popularity

POPULARITY = Popularity({"a": 9, "b": 1}, ["a", "b", "c", "d", "e"])


def _tally(*slates: list[str], clicked: str = "a", places: int = 2) -> Tally:
    tally = Tally()
    for slate in slates:
        tally.take(slate, [clicked], 2, places)
    return tally


def test_a_click_in_the_second_place_is_worth_less_than_in_the_first() -> None:
    assert ndcg(["a", "b", "c"], ["a"], 10) == 1.0
    assert ndcg(["b", "a", "c"], ["a"], 10) == pytest.approx(1 / math.log2(3))


def test_a_click_behind_the_k_th_place_or_left_out_is_worth_nothing() -> None:
    assert ndcg(["b", "c", "a"], ["a"], 2) == 0.0
    assert ndcg(["b", "c"], ["a"], 2) == 0.0


def test_two_clicks_in_the_first_two_places_are_the_best_that_can_be() -> None:
    assert ndcg(["b", "a", "c"], ["a", "b"], 10) == pytest.approx(1.0)


def test_the_grid_begins_with_all_off() -> None:
    first = grid(has_vectors=True, has_categories=True, has_dates=True)[0]

    assert first == OFF
    assert first.config(10) == SurfaceConfig(k=10)
    assert first.surface == "default"


@pytest.mark.parametrize(
    ("missing", "knob"),
    [("has_vectors", "sameness"), ("has_categories", "max_per_category"), ("has_dates", "fresh_slots")],
)
def test_a_knob_that_has_nothing_to_go_by_is_not_tried(missing: str, knob: str) -> None:
    known = {"has_vectors": True, "has_categories": True, "has_dates": True}

    assert knob in {s.knob for s in grid(**known)}
    assert knob not in {s.knob for s in grid(**known | {missing: False})}


def test_a_setting_turns_one_knob_alone() -> None:
    two = Setting("max_per_category", 2.0).config(10)

    assert two == SurfaceConfig(k=10, diversity=DiversityConfig(max_per_category=2))


def test_slots_for_new_items_are_spread_over_the_slate_to_its_end() -> None:
    assert Setting("fresh_slots", 1.0).config(10).fresh_slots.slots == (10,)
    assert Setting("fresh_slots", 3.0).config(10).fresh_slots.slots == (3, 7, 10)


def test_settings_of_the_grid_have_surfaces_of_their_own() -> None:
    settings = grid(has_vectors=True, has_categories=True, has_dates=True)

    assert len({s.surface for s in settings}) == len(settings)


def test_cost_is_paired_so_that_a_constant_loss_has_no_width() -> None:
    off = _tally(["a", "b"], ["a", "b"], ["a", "b"])
    own = _tally(["b", "a"], ["b", "a"], ["b", "a"])

    found = figures(own, off, ["u", "v", "w"], 5, POPULARITY, seed=0)

    loss = 1 / math.log2(3) - 1
    assert (found["cost"].low, found["cost"].mean, found["cost"].high) == pytest.approx((loss, loss, loss))


def test_coverage_counts_different_items_of_the_counted_places_alone() -> None:
    tally = _tally(["a", "b"], ["a", "c"], places=1)

    found = figures(tally, tally, ["u", "v"], 5, POPULARITY, seed=0)

    assert (found["items"], found["coverage"]) == (1, 0.2)


def test_tail_share_is_of_places_beyond_the_most_clicked_fifth() -> None:
    tally = _tally(["a", "b"], ["a", "c"])

    found = figures(tally, tally, ["u", "v"], 5, POPULARITY, seed=0)

    assert found["tail_share"] == 0.5
    assert math.isnan(found["intra_list_diversity"])


Found = dict[tuple[str, str, str, float], Row]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Forty dated items of two kinds, with vectors by kind; each half hour another item is what all click."""
    items = [
        {
            "item_id": f"i{n}",
            "title": "",
            "categories": ["even" if n % 2 == 0 else "odd"],
            "published_at": START_MS - 1_000 * n,
            "embedding": [1.0, 0.01 * n] if n % 2 == 0 else [0.01 * n, 1.0],
        }
        for n in range(40)
    ]
    folder = tmp_path_factory.mktemp("fashions")
    write_log(folder, *Written.fashions(hours=16, scored_hours=6), items=items)
    parts = [str(folder / name) for name in ("train", "scored")]
    args = options(["jsonl", *parts, "--slates", "40", "--no-texts"])
    return list(measure(args, folder, silent))


@pytest.fixture
def found(rows: list[Row]) -> Found:
    return {(row.view, row.score, row.knob, row.strength): row for row in rows}


def test_a_log_with_vectors_categories_and_dates_meets_every_knob_in_both_views(rows: list[Row]) -> None:
    slate = {(row.score, row.knob) for row in rows if row.view == "slate"}
    shown = {(row.score, row.knob) for row in rows if row.view == "shown"}

    knobs = {"popularity_debias", "sameness", "max_per_category", "fresh_slots"}
    assert slate == {(score, knob) for score in ("hand", "model") for knob in knobs}
    assert {knob for _, knob in shown} == knobs - {"fresh_slots"}


def test_all_off_costs_nothing(found: Found) -> None:
    off = found["slate", "model", OFF.knob, 0.0]

    assert (off.cost.low, off.cost.mean, off.cost.high) == (0.0, 0.0, 0.0)
    assert off.impressions == 40


def test_where_all_click_what_is_popular_debiasing_costs_beyond_chance(found: Found) -> None:
    assert found["slate", "hand", "popularity_debias", 1.0].cost.high < 0
    assert found["shown", "hand", "popularity_debias", 1.0].cost.high < 0


def test_sameness_makes_the_first_places_less_alike(found: Found) -> None:
    alike, unlike = found["shown", "hand", OFF.knob, 0.0], found["shown", "hand", "sameness", 0.7]

    assert unlike.intra_list_diversity > alike.intra_list_diversity + 0.05


def test_the_picture_is_a_png(rows: list[Row]) -> None:
    pytest.importorskip("matplotlib", reason="pictures are an extra")

    assert draw("What more diverse slates cost", rows).startswith(b"\x89PNG")
