"""Arms: who is in one, for how long, what it changes, and what its report says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.arm_report import ArmTally, lines
from models.examples import FeaturesRecord, LabelsRecord
from models.experiments import CONTROL, HOLD_OUT, Arm, ExperimentConfig
from models.recommender import RecommenderConfig, SlateRequest, SurfaceConfig
from tests.models.recommender_world import NOW_MS, World

USERS = [f"user-{n}" for n in range(20_000)]
SPRING = ExperimentConfig(name="spring", arms={"bold": Arm(share=0.2), "shy": Arm(share=0.3)}, hold_out_share=0.1)


def users_of(config: ExperimentConfig, arm: str | None) -> set[str]:
    return {user for user in USERS if config.arm_of(user) == arm}


def test_shares_of_arms_are_those_of_the_settings() -> None:
    # 10 % are held out; of the 18,000 others, 20 and 30 %. Standard deviations are below 70.
    assert abs(len(users_of(SPRING, HOLD_OUT)) - 2_000) < 200
    assert abs(len(users_of(SPRING, "bold")) - 3_600) < 250
    assert abs(len(users_of(SPRING, "shy")) - 5_400) < 250
    assert abs(len(users_of(SPRING, CONTROL)) - 9_000) < 300


def test_a_share_that_grows_at_the_last_arm_moves_users_of_control_alone() -> None:
    more = SPRING.model_copy(update={"arms": {"bold": Arm(share=0.2), "shy": Arm(share=0.5)}})
    assert users_of(more, "bold") == users_of(SPRING, "bold")
    assert users_of(more, HOLD_OUT) == users_of(SPRING, HOLD_OUT)
    assert users_of(more, "shy") > users_of(SPRING, "shy")


def test_the_next_experiment_has_the_same_hold_out_and_other_arms() -> None:
    summer = SPRING.model_copy(update={"name": "summer"})
    assert users_of(summer, HOLD_OUT) == users_of(SPRING, HOLD_OUT)
    both = users_of(summer, "bold") & users_of(SPRING, "bold")
    assert len(both) < 0.3 * len(users_of(SPRING, "bold"))


def test_without_a_name_nobody_is_in_an_arm() -> None:
    assert ExperimentConfig(arms={"bold": Arm(share=1.0)}).arm_of("user-1") is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a/b"}, "must be 1 to 100"),
        ({"name": "a", "arms": {"control": {"share": 0.1}}}, "cannot be called 'control'"),
        ({"name": "a", "arms": {"x": {"share": 0.6}, "y": {"share": 0.6}}}, "more than 1"),
    ],
)
def test_an_impossible_experiment_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExperimentConfig.model_validate(values)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"share": 0.1, "ranking": {"short_weight": 1.0}}, "arm 'x' .* short_weight: Extra inputs"),
        ({"share": 0.1, "surface": {"rules": {"pinned": 3}}}, "arm 'x' .* rules.pinned"),
    ],
)
def test_an_arm_that_changes_what_does_not_exist_is_refused_by_name(arm: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RecommenderConfig.model_validate({"experiment": {"name": "a", "arms": {"x": arm}}})


def world_of(**arm: object) -> World:
    """Return a world of ten items of rising popularity in which an arm "x" changes something."""
    config = RecommenderConfig(
        surfaces={"default": SurfaceConfig(k=3)},
        experiment=ExperimentConfig(name="spring", arms={"x": Arm.model_validate({"share": 0.5, **arm})}),
    )
    world = World(users=2, config=config)
    for i in range(10):
        world.item(f"i{i}", categories=["even" if i % 2 == 0 else "odd"])
    world.popular({f"i{i}": 2 * i for i in range(10)})
    return world


def test_an_arm_has_rules_of_its_own_and_the_others_keep_theirs() -> None:
    world = world_of(surface={"rules": {"allowed": {"categories": ["even"]}}})
    assert world.ids(arm="x") == ["i8", "i6", "i4"]
    assert world.ids(arm=CONTROL) == world.ids(arm=HOLD_OUT) == world.ids() == ["i9", "i8", "i7"]


def test_an_arm_has_weights_and_lengths_of_its_own() -> None:
    world = world_of(ranking={"popularity_weight": 0.0, "ctr_weight": 0.0}, surface={"k": 2})
    assert world.ids(arm="x") == ["i0", "i1"]
    assert world.recommender.config.plan(None, "x").ranking.short_term_weight == 1.0


def test_a_slate_says_its_arm_also_where_it_is_degraded_but_not_where_it_was_randomised() -> None:
    world = world_of()
    assert world.slate(arm="x").experiment == "spring/x"
    assert world.slate(arm=CONTROL).experiment == "spring/control"
    assert world.slate().experiment is None
    assert world.slate(arm="x", draw_seed=1).experiment == "randomised"
    degraded = world.recommender.fallback(world.rows, [SlateRequest("user 0", 0, arm="x")], NOW_MS)[0]
    assert degraded.experiment == "spring/x"


def test_users_of_two_arms_in_one_batch_get_what_each_gets_alone() -> None:
    world = world_of(surface={"rules": {"allowed": {"categories": ["even"]}}})
    world.recommender.refresh(NOW_MS)
    requests = [SlateRequest("a", 0, arm="x"), SlateRequest("b", 1, arm=CONTROL)]
    both = world.recommender.recommend(world.rows, requests, NOW_MS)
    alone = [world.recommender.recommend(world.rows, [request], NOW_MS)[0] for request in requests]
    assert both == alone


def features(impression_id: int, user_id: str, experiment: str | None, request_id: str | None = "r") -> FeaturesRecord:
    return FeaturesRecord(
        impression_id=impression_id,
        user_id=user_id,
        partition=0,
        offset=impression_id,
        time_ms=NOW_MS,
        broker_ms=NOW_MS,
        processed_ms=NOW_MS,
        flags=0,
        surface="default",
        request_id=request_id,
        experiment=experiment,
        policy=experiment or "model",
        session_id=None,
        context=None,
        space_id="s",
        items=b"",
        positions=b"",
        propensities=b"",
        counters=b"",
        age_seconds=b"",
        first_seen_seconds=b"",
        sims=b"",
        shown_counts=b"",
        shown_age_seconds=b"",
        acted_age_seconds=b"",
        recent_items=b"",
        recent_age_seconds=b"",
        recent_codes=b"",
        user_counts=(0, 0, 0),
        scores=[],
        model_version="m",
    )


def labels(impression_id: int, clicked: bool, as_of: int = 0) -> LabelsRecord:
    return LabelsRecord(
        impression_id=impression_id,
        user_id="u",
        time_ms=NOW_MS,
        closed_ms=NOW_MS,
        revision=0,
        flags=0,
        clicked=b"\0\0" if clicked else b"",
        refused=b"",
        actions=b"\1" if clicked else b"",
        as_of=as_of,
    )


def tally(shown: list[tuple[str, str, bool]]) -> ArmTally:
    """Count impressions of (arm, user, clicked)."""
    counted = ArmTally()
    for i, (arm, user, clicked) in enumerate(shown, start=1):
        counted.add_features(features(i, user, f"spring/{arm}"))
        counted.add_labels(labels(i, clicked))
    return counted


def test_the_report_counts_clicked_impressions_of_each_arm_control_first() -> None:
    shown = [("bold", "a", True), ("bold", "b", False), ("control", "c", True)]
    shown += [("control", "d", False), ("control", "e", False), ("control", "c", False)]
    control, bold = tally(shown).results()
    assert (control.arm, control.users, control.impressions, control.clicked) == ("control", 3, 4, 1)
    assert (bold.arm, bold.users, bold.impressions, bold.clicked) == ("bold", 2, 2, 1)
    assert control.difference is None
    assert bold.difference is not None
    assert bold.difference.mean == pytest.approx(0.25)


def test_an_impression_counts_once_with_its_first_arm_and_the_label_that_knows_most() -> None:
    counted = ArmTally()
    counted.add_labels(labels(7, True, as_of=9))
    counted.add_features(features(7, "a", "spring/bold"))
    counted.add_features(features(7, "a", "spring/control"))
    counted.add_labels(labels(7, False, as_of=3))
    (bold,) = counted.results()
    assert (bold.arm, bold.impressions, bold.clicked) == ("bold", 1, 1)


def test_impressions_without_a_label_or_an_arm_do_not_count() -> None:
    counted = ArmTally()
    counted.add_features(features(1, "a", "spring/bold"))
    for i, experiment in enumerate([None, "randomised"], start=2):
        counted.add_features(features(i, "a", experiment))
        counted.add_labels(labels(i, True))
    assert counted.results() == []


def test_a_report_of_one_experiment_leaves_the_others_out() -> None:
    counted = tally([("bold", "a", True)])
    counted.add_features(features(99, "a", "summer/bold"))
    counted.add_labels(labels(99, False))
    assert [r.experiment for r in counted.results("summer")] == ["summer"]
    assert {r.experiment for r in counted.results()} == {"spring", "summer"}


def test_the_interval_of_a_difference_covers_the_truth_as_often_as_it_says() -> None:
    # Users differ in how much they click and see; arms differ by 0.05 for everybody.
    covered = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        shown = []
        for user in range(240):
            arm = "bold" if user % 2 else "control"
            chance = random.beta(2, 6) * 0.8 + (0.05 if arm == "bold" else 0.0)
            shown += [(arm, str(user), bool(random.random() < chance)) for _ in range(random.integers(1, 12))]
        difference = tally(shown).results()[1].difference
        assert difference is not None
        covered += difference.low <= 0.05 <= difference.high
    assert 0.90 <= covered / 200 <= 0.995


def test_ten_impressions_of_a_user_who_always_clicks_count_as_little_more_than_one() -> None:
    apart = tally([("control", f"{i}-{j}", i % 2 == 0) for i in range(20) for j in range(10)]).results()[0]
    alike = tally([("control", str(i), i % 2 == 0) for i in range(20) for _ in range(10)]).results()[0]
    assert alike.rate.mean == apart.rate.mean == 0.5
    assert (alike.rate.high - alike.rate.low) > 3 * (apart.rate.high - apart.rate.low)


def test_one_user_tells_nothing_of_others() -> None:
    (only,) = tally([("control", "a", True)] * 50).results()
    assert (only.rate.low, only.rate.high) == (0.0, 1.0)
    assert math.isfinite(only.rate.mean)


def test_the_table_has_a_line_for_each_arm_and_says_what_is_not_chance() -> None:
    shown = [("bold", f"b{i}", i % 2 == 0) for i in range(400)] + [("control", f"c{i}", False) for i in range(400)]
    head, control, bold = lines(tally(shown).results())
    assert head.startswith("experiment/arm")
    assert control.startswith("spring/control")
    assert "+50.00 points" in bold
    assert bold.endswith("not by chance")


def test_the_report_tells_an_arms_bundle_from_the_version_that_stood_in_for_it() -> None:
    counted = tally([("control", "c", False)])
    slates = [("s1", "v2", False), ("s2", "v1", False), ("s3", "v2", False), ("s4", "v1", True), ("s6", "v9", False)]
    for i, shown in enumerate(["s1", "s2", "s3", "s4", "s5", None], start=10):
        counted.add_features(features(i, f"u{i}", "spring/trial", shown))
        counted.add_labels(labels(i, True))
    counted.look_at_slates()
    for recommendation_id, version, degraded in slates:
        counted.add_slate(recommendation_id, version, degraded=degraded)
    control, trial = counted.results()
    assert trial.ranked_by == {"v2": 2, "v1": 1, "degraded": 1, "not known": 2}
    assert control.ranked_by == {"not known": 1}
    assert list(lines([trial]))[-1] == "    ranked by v2 (33.3%), not known (33.3%), v1 (16.7%), degraded (16.7%)"


def test_a_report_over_slates_that_are_gone_says_that_it_does_not_know() -> None:
    counted = tally([("bold", "a", True), ("bold", "b", False)])
    counted.look_at_slates()
    (bold,) = counted.results()
    assert bold.ranked_by == {"not known": 2}


def test_a_report_that_looked_at_no_slate_says_nothing_of_versions() -> None:
    (bold,) = tally([("bold", "a", True)]).results()
    assert bold.ranked_by == {}
    assert len(list(lines([bold]))) == 2


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(12)))
def test_the_order_of_records_changes_nothing(order: list[int]) -> None:
    records = [features(i, f"u{i % 3}", f"spring/{'bold' if i % 2 else 'control'}") for i in range(6)]
    outcomes = [labels(i, i % 3 == 0) for i in range(6)]
    counted = ArmTally()
    for place in order:
        if place < 6:
            counted.add_features(records[place])
        else:
            counted.add_labels(outcomes[place - 6])
    assert [(r.arm, r.impressions, r.clicked, r.users) for r in counted.results()] == [
        ("control", 3, 1, 3),
        ("bold", 3, 1, 3),
    ]
