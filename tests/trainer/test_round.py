"""Rounds: what a candidate goes through, and what a failure anywhere leaves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from models import bundle as bundles
from models.errors import BrokerUnavailable, ModelError, RegistryError, TrainingError
from models.pointer import plan_promotion, plan_rollback, plan_withdrawal
from tests.trainer.round_world import FakeLearner, World, outside_error
from trainer import spool, state
from trainer.announce import VersionStatus, WorkerStatus
from trainer.window import Stopped


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def candidate(world: World) -> str:
    """Make the first round on 300 impressions and return the candidate."""
    world.impressions(300)
    assert world.round().outcomes == ["candidate"]
    version = world.role("candidate")
    assert version is not None
    world.workers_have(version)
    return version


def promoted(world: World, skill: float = 1.0) -> str:
    """Bring a model of this skill live, with the bootstrap as previous; another candidate waits."""
    world.next_skill = skill
    version = candidate(world)
    world.impressions(300, shadows=[version])
    world.workers_have(version)
    assert world.round().outcomes == ["promoted", "candidate"]
    return version


def test_the_first_round_announces_what_it_learned_as_candidate(world: World) -> None:
    version = candidate(world)
    manifest = world.registry.manifest(version)
    assert (manifest.window.impressions, manifest.window.examples) == (300, 1_500)
    assert world.role("live") is None


def test_a_bundle_names_the_offsets_that_it_learned_from(world: World) -> None:
    manifest = world.registry.manifest(candidate(world))
    assert [(r.topic, r.partition, r.start, r.end) for r in manifest.window.ranges] == [
        ("features", 0, 0, 300),
        ("labels", 0, 0, 300),
    ]


def test_a_candidate_waits_until_enough_was_labelled_after_its_window(world: World) -> None:
    version = candidate(world)
    world.impressions(150, shadows=[version])
    assert world.round().outcomes == ["waiting"]
    assert (world.role("candidate"), len(world.registry.versions())) == (version, 1)


def test_a_better_candidate_goes_live_and_the_bootstrap_becomes_previous(world: World) -> None:
    version = promoted(world)
    assert (world.role("live"), world.role("previous")) == (version, "bootstrap-0")


def test_the_decision_and_its_figures_stand_beside_the_bundle(world: World) -> None:
    version = promoted(world)
    [decision] = world.registry.decisions(version)
    assert (decision["outcome"], decision["against"]) == ("promote", "bootstrap-0")
    assert {"auc_difference_low", "randomised_auc_candidate", "positive_rate_model", "workers"} <= set(
        decision["figures"]
    )


def test_a_candidate_of_noise_is_withdrawn_and_the_live_one_stays(world: World) -> None:
    world.next_skill = 0.0
    version = candidate(world)
    world.impressions(300, shadows=[version])
    assert world.round().outcomes == ["refused", "candidate"]
    assert (world.role("live"), world.role("candidate") == version) == (None, False)


def test_a_refused_candidate_loses_its_role_though_no_other_follows(world: World) -> None:
    world.next_skill = 0.0
    version = candidate(world)
    world.impressions(300, shadows=[version])
    world.losses = (float("nan"),)
    assert world.round().outcomes == ["refused", "loss-not-finite"]
    assert world.role("candidate") is None


def test_a_training_that_is_no_better_than_its_parent_is_not_published(world: World) -> None:
    world.improved = False
    world.impressions(300)
    assert world.round().outcomes == ["nothing-learned"]
    assert (world.registry.versions(), world.round().outcomes) == ([], ["nothing-new"])


def test_a_second_candidate_is_judged_against_the_learned_live_one(world: World) -> None:
    live = promoted(world)
    second = world.role("candidate")
    assert second is not None
    world.skill[second] = 0.0
    world.impressions(300, live=live, shadows=["bootstrap-0", second])
    assert "refused" in world.round().outcomes
    assert world.role("live") == live
    assert world.registry.decisions(second)[0]["against"] == live


def test_the_bundle_says_which_one_it_started_from(world: World) -> None:
    live = promoted(world)
    second = world.role("candidate")
    assert second is not None
    assert (world.registry.manifest(second).parent, world.registry.manifest(live).parent) == (live, None)


def test_without_the_live_bundle_in_the_registry_learning_starts_from_the_bootstrap(world: World) -> None:
    live, second = promoted(world), world.role("candidate")
    world.topic += plan_withdrawal(world.pointers(), "candidate", at_ms=0, by="operator", why="test")
    world.registry.remove(live)
    for folder in (world.folder / "cache").iterdir():
        shutil.rmtree(folder)
    world.impressions(300, live=live)
    assert world.round().outcomes == ["candidate"]
    third = world.role("candidate")
    assert third not in (None, second)
    assert world.registry.manifest(str(third)).parent is None


def test_fetched_bundles_that_no_role_names_do_not_pile_up(world: World) -> None:
    for i in range(6):
        (world.folder / "cache" / f"old-{i}").mkdir(parents=True)
    candidate(world)
    assert len(list((world.folder / "cache").iterdir())) <= 4


def test_a_candidate_that_workers_score_otherwise_is_refused(world: World) -> None:
    version = candidate(world)
    world.skill[version] = 1.3
    world.impressions(300, shadows=[version])
    world.skill[version] = 1.0
    world.round()
    assert world.registry.decisions(version)[0]["reason"] == "shadow-differs"
    assert world.role("live") is None


def test_without_shadow_scores_a_candidate_waits_and_is_at_last_refused(world: World) -> None:
    version = candidate(world)
    world.impressions(300)
    assert world.round().outcomes == ["waiting"]
    world.impressions(600)
    assert "refused" in world.round().outcomes
    assert world.registry.decisions(version)[0]["reason"] == "shadow-too-few"


def test_within_the_cool_down_no_candidate_is_judged(world: World) -> None:
    live = promoted(world)
    second = world.role("candidate")
    assert second is not None
    before = world.now_ms
    world.impressions(300, live=live, shadows=["bootstrap-0", second])
    world.now_ms = before + 30_000
    assert world.round().outcomes == ["waiting"]
    world.now_ms = before + 61_000
    assert "waiting" not in world.round().outcomes


def test_a_slice_is_judged_once(world: World) -> None:
    world.next_skill = 0.0
    version = candidate(world)
    world.impressions(300, shadows=[version])
    world.round()
    # The next candidate has learned from that slice: it waits for impressions that nobody has seen.
    assert world.round().outcomes == ["waiting"]


def test_a_live_bundle_that_falls_behind_gives_way_to_the_previous_one(world: World) -> None:
    live = promoted(world)
    world.skill[live], world.skill["bootstrap-0"] = 0.0, 1.0
    world.impressions(300, live=live, shadows=["bootstrap-0"])
    assert "rolled-back" in world.round().outcomes
    assert (world.role("live"), world.role("previous")) == ("bootstrap-0", None)


def test_after_a_rollback_the_candidate_waits_for_the_cool_down(world: World) -> None:
    live = promoted(world)
    second = world.role("candidate")
    assert second is not None
    world.skill[live], world.skill["bootstrap-0"] = 0.0, 1.0
    world.impressions(300, live=live, shadows=["bootstrap-0", second])
    assert world.round().outcomes == ["rolled-back", "waiting"]


def test_a_live_bundle_that_holds_stays(world: World) -> None:
    live = promoted(world)
    world.impressions(300, live=live, shadows=["bootstrap-0"])
    assert "rolled-back" not in world.round().outcomes
    assert world.role("live") == live


def test_a_window_that_is_too_small_is_refused_with_the_reason(world: World) -> None:
    world.impressions(50)
    result = world.round()
    assert (result.outcomes, result.failed) == (["window-too-small"], False)
    assert result.done[0][1].startswith("50 labelled impressions")
    assert (world.registry.versions(), world.topic) == ([], [])


def test_labels_whose_rate_is_out_of_its_history_are_not_learned_from(world: World) -> None:
    for _ in range(3):
        world.impressions(150)
        world.round()
        planned = plan_withdrawal(world.pointers(), "candidate", at_ms=0, by="operator", why="test")
        world.topic += planned
    world.impressions(150, clicks=0.9)
    result = world.round()
    assert (result.outcomes, result.failed) == (["positive-rate-off"], True)
    assert len(world.registry.versions()) == 3


@pytest.mark.parametrize(
    ("losses", "auc", "reason"),
    [((0.5, float("nan")), (0.7, 0.6), "loss-not-finite"), ((0.5,), (0.5, 0.6), "metric-falls")],
)
def test_a_training_that_went_wrong_publishes_nothing(
    world: World, losses: tuple[float, ...], auc: tuple[float, float], reason: str
) -> None:
    world.losses, world.next_auc = losses, auc
    world.impressions(300)
    result = world.round()
    assert (result.outcomes, result.failed) == ([reason], True)
    assert (world.registry.versions(), world.topic) == ([], [])


def test_without_anything_new_no_second_model_is_trained(world: World) -> None:
    version = candidate(world)
    world.topic += plan_withdrawal(world.pointers(), "candidate", at_ms=0, by="operator", why="test")
    assert world.round().outcomes == ["nothing-new"]
    assert world.registry.versions() == [version]


def test_a_promotion_waits_until_the_workers_are_prepared(world: World) -> None:
    version = candidate(world)
    world.impressions(300, shadows=[version])
    world.statuses = [WorkerStatus("slow", world.now_ms)]
    world.on_sleep = lambda: world.workers_have(version)
    before = world.now_ms
    assert "promoted" in world.round().outcomes
    assert world.now_ms > before


def test_after_the_time_out_a_candidate_that_one_worker_has_goes_live(world: World) -> None:
    version = candidate(world)
    world.impressions(300, shadows=[version])
    world.workers_have(version, count=1)
    world.statuses.append(WorkerStatus("slow", world.now_ms + 60_000))
    assert "promoted" in world.round().outcomes


def test_a_candidate_that_every_worker_refuses_does_not_go_live(world: World) -> None:
    version = candidate(world)
    world.impressions(300, shadows=[version])
    refusal = VersionStatus(version, 1, "candidate", "canary", "it misses")
    world.statuses = [WorkerStatus("w", world.now_ms, refused=[refusal])]
    assert "refused" in world.round().outcomes
    assert "canary: it misses" in world.registry.decisions(version)[0]["sentence"]


def test_a_worker_that_is_silent_is_not_waited_for(world: World) -> None:
    version = candidate(world)
    world.impressions(300, shadows=[version])
    world.workers_have(version)
    world.statuses.append(WorkerStatus("gone", world.now_ms - 31_000))
    before = world.now_ms
    assert "promoted" in world.round().outcomes
    assert world.now_ms - before < 100


def test_an_operator_who_speaks_while_workers_prepare_overrides(world: World) -> None:
    version = candidate(world)
    world.impressions(300, shadows=[version])
    world.statuses = [WorkerStatus("slow", world.now_ms)]

    def withdraw() -> None:
        world.topic += plan_withdrawal(world.pointers(), "candidate", at_ms=0, by="operator", why="no")
        world.workers_have(version)

    world.on_sleep = withdraw
    assert "overridden" in world.round().outcomes
    assert world.role("live") is None


def test_an_operator_who_speaks_at_the_same_moment_overrides_and_is_not_overruled_later(world: World) -> None:
    version = candidate(world)
    world.impressions(300, shadows=[version])
    world.workers_have(version)

    def speak(call: str) -> None:
        if call == "board.announce":
            world.before_call = lambda _: None
            raise TrainingError("another-decider", "an operator was first")

    world.before_call = speak
    assert world.round().outcomes[0] == "overridden"
    assert world.role("live") is None
    assert "promoted" not in world.round().outcomes


def better_second(world: World) -> tuple[str, str]:
    """Return a live bundle and a better candidate whose slice may be judged."""
    live = promoted(world)
    second = world.role("candidate")
    assert second is not None
    world.now_ms += 120_000
    world.skill[second] = 2.5
    world.impressions(300, live=live, shadows=["bootstrap-0", second])
    return live, second


def test_an_operator_who_rolls_back_while_workers_prepare_overrides_and_the_candidate_waits(world: World) -> None:
    live, second = better_second(world)
    world.statuses = [WorkerStatus("slow", world.now_ms)]

    def roll_back() -> None:
        if world.role("live") == live:
            world.topic += plan_rollback(world.pointers(), at_ms=world.now_ms, by="operator", why="no")
        world.workers_have(second)

    world.on_sleep = roll_back
    assert world.round().outcomes == ["overridden"]
    assert (world.role("live"), world.role("candidate")) == ("bootstrap-0", second)


@pytest.mark.parametrize("sent", [1, 2])
def test_half_a_promotion_that_is_finished_keeps_what_was_live_as_previous(world: World, sent: int) -> None:
    live, second = better_second(world)
    world.workers_have(second)
    announced = 0

    def die(call: str) -> None:
        nonlocal announced
        announced += call == "board.announce"
        if announced > sent:
            raise BrokerUnavailable("gone")

    world.before_call = die
    with pytest.raises(BrokerUnavailable):
        world.round()
    world.before_call = lambda _: None
    assert world.round().outcomes[0] == "finished"
    assert (world.role("live"), world.role("previous")) == (second, live)


def test_a_rollback_does_not_wait_for_a_registry_that_is_away(world: World) -> None:
    live = promoted(world)
    world.skill[live], world.skill["bootstrap-0"] = 0.0, 1.0
    world.impressions(300, live=live, shadows=["bootstrap-0"])

    def away(call: str) -> None:
        if call.startswith("registry"):
            raise outside_error(call)

    world.before_call = away
    with pytest.raises(RegistryError):
        world.round()
    assert world.role("live") == "bootstrap-0"


def test_a_candidate_that_cannot_be_scored_is_refused_and_holds_nothing_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = candidate(world)
    world.impressions(300, shadows=[version])

    def not_finite(*_: object) -> None:
        raise ModelError("a score is not a finite number")

    monkeypatch.setattr(FakeLearner, "score", not_finite)
    assert world.round().outcomes == ["refused", "candidate"]


def test_old_records_leave_a_full_disk_before_new_ones_are_written(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate(world)
    old = list(world.config.data_folder.rglob("*.parquet"))
    world.now_ms += 30 * 24 * 3_600_000
    world.impressions(300)

    def full(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(spool, "replace_file", full)
    with pytest.raises(OSError, match="no space"):
        world.round()
    assert old
    assert not any(file.exists() for file in old)


def test_workers_whose_clocks_are_behind_are_waited_for(world: World) -> None:
    version = candidate(world)
    world.impressions(300, shadows=[version])
    polls = 0

    def speak() -> None:
        nonlocal polls
        polls += 1
        prepared = [VersionStatus(version)] if polls == 6 else []
        world.statuses = [WorkerStatus("w", world.now_ms - 60_000, prepared=prepared)]

    speak()
    world.on_sleep = speak
    assert world.round().outcomes[0] == "promoted"
    assert polls == 6


def test_a_decision_that_was_made_is_carried_out_by_the_next_process_without_a_second_look(world: World) -> None:
    version = candidate(world)
    world.impressions(300, shadows=[version])

    def die(call: str) -> None:
        if call == "board.announce":
            raise BrokerUnavailable("gone")

    world.before_call = die
    with pytest.raises(BrokerUnavailable):
        world.round()
    world.before_call = lambda _: None
    looked = list(world.scored)
    assert world.round().outcomes[0] == "promoted"
    assert (world.role("live"), world.scored) == (version, looked)


def test_half_a_promotion_is_finished(world: World) -> None:
    version = candidate(world)
    pointers = world.pointers()
    sha256 = world.registry.manifest_sha256(version)
    world.topic += plan_promotion(pointers, version, sha256, at_ms=world.now_ms, by="trainer", why="t")[:1]
    world.round()
    assert (world.role("live"), world.role("candidate") == version) == (version, False)


def test_a_stop_ends_between_steps_and_the_next_round_goes_on(world: World) -> None:
    world.impressions(300)
    world.stopping = True
    with pytest.raises(Stopped):
        world.round()
    world.stopping = False
    assert world.round().outcomes == ["candidate"]


def test_a_lost_state_is_rebuilt_from_roles_and_manifests(world: World) -> None:
    version = candidate(world)
    (world.config.data_folder / state.STATE_FILE).unlink()
    world.impressions(300, shadows=[version])
    assert "promoted" in world.round().outcomes
    kept = state.load_state(world.config.data_folder)
    assert kept is not None
    assert len(kept.positive_rates) == 2


def test_a_lost_state_is_rebuilt_though_a_manifest_is_of_another_program(world: World) -> None:
    version = candidate(world)
    (world.config.data_folder / state.STATE_FILE).unlink()
    (world.folder / "registry" / "default" / "20200101T000000000Z").mkdir()
    (world.folder / "registry" / "default" / "20200101T000000000Z" / "manifest.json").write_bytes(b'{"format": 99}')
    world.impressions(300, shadows=[version])
    assert "promoted" in world.round().outcomes


def test_a_state_that_cannot_be_read_is_started_anew(world: World) -> None:
    candidate(world)
    (world.config.data_folder / state.STATE_FILE).write_bytes(b"{half")
    assert world.round().outcomes == ["waiting"]


def test_without_the_spool_the_window_is_read_again(world: World) -> None:
    version = candidate(world)
    for file in world.config.data_folder.rglob("*.parquet"):
        file.unlink()
    world.impressions(300, shadows=[version])
    assert "promoted" in world.round().outcomes


def whole(world: World) -> None:
    """Assert that nothing half is to be seen: every version loads, every role names one."""
    for version in world.registry.versions():
        bundles.load(world.registry.fetch(version, world.folder / "check")).check_canary()
    roles = world.pointers().roles.values()
    assert {p.version for p in roles} <= {*world.registry.versions(), "bootstrap-0"}
    generations = [p.generation for p in world.topic]
    assert generations == sorted(set(generations))


@pytest.mark.parametrize("at", range(22))
def test_a_failure_at_any_call_leaves_everything_whole_and_the_next_round_goes_on(world: World, at: int) -> None:
    version = candidate(world)
    world.impressions(300, shadows=[version])
    calls = 0

    def fail(call: str) -> None:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise outside_error(call)

    world.before_call = fail
    try:
        world.round()
    except (BrokerUnavailable, RegistryError, OSError):
        world.before_call = lambda _: None
        whole(world)
        world.round()
    else:
        # Fewer calls than this: every place was tried.
        assert calls <= at
    world.before_call = lambda _: None
    whole(world)
    assert world.role("live") == version
    assert world.role("candidate") not in (None, version)


@pytest.mark.parametrize("at", range(20))
def test_a_full_disk_at_any_file_leaves_everything_whole_and_the_next_round_goes_on(
    world: World, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import atomic, bundle

    world.impressions(300)
    writes, write_file = 0, atomic.write_file

    def full(file: Path, content: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes == at + 1:
            file.write_bytes(content[: len(content) // 2])
            raise OSError(28, "no space left on device")
        write_file(file, content)

    monkeypatch.setattr(atomic, "write_file", full)
    monkeypatch.setattr(bundle, "write_file", full)
    try:
        world.round()
    except (OSError, RegistryError):
        whole(world)
        monkeypatch.undo()
        world.round()
    else:
        assert writes <= at
    whole(world)
    assert world.role("candidate") is not None
