"""Simulated users: tastes, position bias, clicks, visits, and the popularity list they are compared with."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streams.demo.catalogue import Film, make_films
from streams.demo.users import (
    SHOWN_LIMIT,
    Ask,
    Click,
    Half,
    Person,
    PopularityList,
    Show,
    Simulation,
    World,
    examination,
    people,
)


def film(item_id: str, genre: str = "war", decade: int = 1950, director: str = "Nobody") -> Film:
    return Film(item_id, f"Title of {item_id}", genre, decade, director, "A text.")


def world_of(chances: list[float]) -> World:
    """One taste; item "i0" has the first chance of a click where it is examined, and so on."""
    films = [film(f"i{n}") for n in range(len(chances))]
    taste = World.make(films, 1, 0).tastes
    return World(films, taste, np.array([chances], np.float32), {f.item_id: n for n, f in enumerate(films)})


def test_the_first_position_is_always_examined_and_the_third_half_of_the_time() -> None:
    assert (examination(1), examination(3)) == (1.0, 0.5)


@given(st.integers(1, 1_000))
def test_a_lower_position_is_examined_less_often(position: int) -> None:
    assert examination(position + 1) < examination(position)


def test_equal_films_are_clicked_less_often_further_down() -> None:
    world, rng = world_of([0.3] * 4), np.random.default_rng(1)
    slate = ["i0", "i1", "i2", "i3"]
    clicks = [Person("u", Half.OURS, 0).look(world, slate, rng) for _ in range(2_000)]
    assert clicks.count("i0") > clicks.count("i1") > clicks.count("i3") > 0


def test_a_film_in_a_loved_genre_attracts_more_than_the_same_film_in_another() -> None:
    world = World.make([film("a", "war"), film("b", "war")], 50, 3)
    lovers = [i for i, taste in enumerate(world.tastes) if "war" in taste.loved]
    others = [i for i, taste in enumerate(world.tastes) if "war" not in (*taste.loved, taste.liked)]
    assert world.attraction[lovers].min() > world.attraction[others].max()


def test_a_loved_director_and_decade_add_to_a_film() -> None:
    taste = World.make([film("a")], 1, 3).tastes[0]
    genre = taste.loved[0]
    films = [film("plain", genre, 1900), film("loved", genre, taste.decade, taste.director)]
    attraction = World.make(films, 1, 3).attraction[0]
    quality = np.random.default_rng([3, 2]).normal(0.0, 0.6, 2)
    logits = np.log(attraction / (1 - attraction)) - quality
    assert logits[1] - logits[0] > 1.0


def test_the_same_seed_makes_the_same_world() -> None:
    films = make_films(60, 5)
    assert np.array_equal(World.make(films, 4, 9).attraction, World.make(make_films(60, 5), 4, 9).attraction)


def test_a_film_is_never_clicked_twice_by_one_user() -> None:
    world, rng, person = world_of([1.0]), np.random.default_rng(1), Person("u", Half.OURS, 0)
    assert [person.look(world, ["i0"], rng) for _ in range(3)] == ["i0", None, None]


def test_a_film_that_was_passed_over_is_less_likely_to_be_clicked_later() -> None:
    world, rng = world_of([0.5]), np.random.default_rng(1)
    first = [Person("u", Half.OURS, 0).look(world, ["i0"], rng) for _ in range(2_000)]
    tired = [Person("u", Half.OURS, 0, examined={"i0": 2}).look(world, ["i0"], rng) for _ in range(2_000)]
    assert tired.count("i0") < 0.6 * first.count("i0")


def test_films_below_a_clicked_one_count_as_shown() -> None:
    person = Person("u", Half.OURS, 0)
    person.look(world_of([1.0, 0.0]), ["i0", "i1"], np.random.default_rng(1))
    assert person.shown == {"i0": 1, "i1": 1}


def test_each_taste_is_in_both_halves() -> None:
    made = people(6)
    tastes = {half: sorted(p.taste for p in made if p.half is half) for half in Half}
    assert tastes == {Half.OURS: [0, 1, 2], Half.POPULAR: [0, 1, 2]}


def test_the_most_clicked_film_stands_first_in_the_popularity_list() -> None:
    popular = PopularityList(["a", "b", "c"], 1)
    for item_id in ("b", "c", "c"):
        popular.click(item_id)
    assert popular.slate(Person("u", Half.POPULAR, 0), 2) == ["c", "b"]


@given(st.lists(st.sampled_from("abcdef"), max_size=40))
def test_the_popularity_list_is_sorted_by_clicks_after_any_clicks(clicks: list[str]) -> None:
    popular = PopularityList(list("abcdef"), 1)
    for item_id in clicks:
        popular.click(item_id)
    counts = [clicks.count(i) for i in popular.slate(Person("u", Half.POPULAR, 0), 6)]
    assert counts == sorted(counts, reverse=True)


def test_the_popularity_list_leaves_out_what_the_user_clicked_or_saw_too_often() -> None:
    popular = PopularityList(["a", "b", "c"], 1)
    person = Person("u", Half.POPULAR, 0, clicked={"a"}, shown={"b": SHOWN_LIMIT, "c": SHOWN_LIMIT - 1})
    assert popular.slate(person, 3) == ["c"]


def two_users(chance: float) -> Simulation:
    return Simulation(world_of([chance] * 20), people(2), k=5, events_per_second=1.0, seed=1)


def test_a_visit_of_our_half_starts_with_a_request_and_one_of_the_other_with_a_slate() -> None:
    simulation = two_users(0.0)
    simulation.start(0.0)
    first = {deed.person.half: type(deed) for deed in reversed(simulation.due(4.0))}
    assert first == {Half.OURS: Ask, Half.POPULAR: Show}


def test_a_user_looks_at_the_slate_that_answers_the_request() -> None:
    simulation = two_users(0.0)
    simulation.start(0.0)
    simulation.due(4.0)
    assert simulation.slate("viewer-001a", ["i7", "i3"], "slate-1", 4.0)
    shown = [d for d in simulation.due(4.1) if isinstance(d, Show) and d.person.half is Half.OURS]
    assert [(d.items, d.slate_id) for d in shown] == [(["i7", "i3"], "slate-1")]


def test_the_experiment_of_a_slate_is_echoed_when_it_is_shown() -> None:
    simulation = two_users(0.0)
    simulation.start(0.0)
    simulation.due(4.0)
    simulation.slate("viewer-001a", ["i7"], "slate-1", 4.0, "randomised")
    shown = [d for d in simulation.due(4.1) if isinstance(d, Show) and d.person.half is Half.OURS]
    assert [d.experiment for d in shown] == ["randomised"]


def test_after_a_click_the_next_slate_is_awaited_without_another_request() -> None:
    simulation = two_users(1.0)
    simulation.start(0.0)
    simulation.due(4.0)
    simulation.slate("viewer-001a", ["i7"], "slate-1", 4.0)
    deeds = [type(d) for d in simulation.due(8.9) if d.person.half is Half.OURS]
    assert deeds == [Show, Click]
    assert simulation.slate("viewer-001a", ["i3"], "slate-2", 8.9)


def test_a_slate_that_nobody_waits_for_is_not_taken() -> None:
    assert not two_users(0.0).slate("viewer-001a", ["i1"], "slate-1", 0.0)


def test_a_slate_for_the_other_half_is_not_taken() -> None:
    simulation = two_users(0.0)
    simulation.start(0.0)
    simulation.due(4.0)
    assert not simulation.slate("viewer-001b", ["i1"], "slate-1", 4.0)


def test_a_user_who_gets_no_slate_turns_away_and_comes_back() -> None:
    simulation = two_users(0.0)
    simulation.start(0.0)
    asked = [d for d in simulation.due(30.0) if isinstance(d, Ask)]
    assert len(asked) >= 2
    assert simulation.given_up >= 1
