"""Bundles that arms of an experiment name: held while they are named; where one is not there, the live one serves."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from models.manifest import BOOTSTRAP_VERSION
from models.signing import PrivateKey
from streams import model_watch
from streams.model_metrics import ModelMetrics
from streams.model_status import ArmModel, WorkerStatus
from tests.integration.conftest import wait_until
from tests.streams.test_model_watch import NOW, SPACE, TURNED, Scene, item_record, scene, short_waits, vector_record

__all__ = ["short_waits"]


async def until_ready(on: Scene, *versions: str) -> None:
    await wait_until(lambda: set(on.slot.arms) == set(versions), 10, f"{versions} are ready for arms")


async def until_told(on: Scene, version: str, reason: str) -> None:
    def told() -> bool:
        why = on.watch.arms_refused.get(version)
        return why is not None and why.reason == reason

    await wait_until(told, 10, f"{reason} is told of {version}")


def arms_of(on: Scene) -> list[ArmModel]:
    return WorkerStatus.of("me", "a-group", on.slot, on.watch, NOW).arms


async def test_version_of_an_arm_is_held_beside_the_live_one_without_a_role(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1")
        on.watch.name_arms(["v1"])
        await until_ready(on, "v1")
        assert on.slot.arms["v1"].scorer is not None
        assert (on.slot.version, list(on.slot.by_role())) == (BOOTSTRAP_VERSION, ["live"])
        assert arms_of(on) == [ArmModel("v1", True)]


async def test_version_of_an_arm_in_the_live_space_shares_its_vectors(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1")
        on.watch.name_arms(["v1"])
        await until_ready(on, "v1")
        assert on.slot.arms["v1"].vectors is on.slot.live.vectors


async def test_version_of_an_arm_in_another_space_has_vectors_there_of_later_items_too(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1", space_id="turned", projection=TURNED)
        on.watch.name_arms(["v1"])
        await until_ready(on, "v1")
        on.state.apply_items([item_record("d")], NOW)
        on.state.apply_vectors([vector_record("d", SPACE.encoder_id)], NOW)
        theirs, ours = on.slot.arms["v1"].vectors.vectors, on.slot.live.vectors.vectors
        assert theirs[:4] == pytest.approx(ours[:4, ::-1])
        assert ours[3].any()


async def test_version_that_no_arm_names_any_more_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_watch, "KEEP_SECONDS", 0.05)
    async with scene(tmp_path) as on:
        on.publish("v1", space_id="turned", projection=TURNED)
        on.watch.name_arms(["v1"])
        await until_ready(on, "v1")
        on.watch.name_arms([])
        await until_ready(on)
        await wait_until(lambda: "turned" not in on.state.spaces, 10, "its space is let go")


async def test_version_of_a_role_that_an_arm_names_too_is_fetched_once_and_kept_by_the_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_watch, "KEEP_SECONDS", 0.05)
    async with scene(tmp_path) as on:
        on.publish("v1")
        on.watch.name_arms(["v1"])
        await until_ready(on, "v1")
        on.announce("live", "v1", 1)
        await on.until_live("v1", 1)
        on.announce("live", BOOTSTRAP_VERSION, 2)
        await on.until_live(BOOTSTRAP_VERSION, 2)
        on.publish("v2", seed=2)
        on.announce("candidate", "v2", 3)
        await on.until_in_shadow("v2")
        assert set(on.slot.arms) == {"v1"}
        assert on.registry.fetched == ["v1", "v2"]


async def test_version_that_is_not_published_is_told_and_taken_once_it_is(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1")
        on.watch.name_arms(["v7"])
        await until_told(on, "v7", "not-in-registry")
        assert [(a.version, a.is_ready, a.reason) for a in arms_of(on)] == [("v7", False, "not-in-registry")]
        assert on.watch.refused == {}
        on.publish("v7", seed=7)
        await until_ready(on, "v7")
        assert arms_of(on) == [ArmModel("v7", True)]


def corrupt(on: Scene, version: str) -> None:
    file = Path(on.settings.models.url) / "default" / version / "ctr.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


async def test_unsound_bundle_is_refused_once_and_tried_again_when_the_settings_change(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1")
        on.publish("v2", seed=2)
        corrupt(on, "v1")
        on.watch.name_arms(["v1", "v2"])
        await until_ready(on, "v2")
        await until_told(on, "v1", "wrong-hash")
        assert on.registry.fetched == ["v1", "v2"]
        corrupt(on, "v1")
        on.watch.name_arms(["v1"])
        await until_ready(on, "v1")
        assert on.watch.arms_refused == {}


async def test_unsigned_bundle_is_refused_for_an_arm_as_for_a_role(tmp_path: Path) -> None:
    key = PrivateKey.generate()
    async with scene(tmp_path, public_key=key.public.text) as on:
        on.publish("v1")
        on.publish("v2", private_key=key)
        on.watch.name_arms(["v1", "v2"])
        await until_ready(on, "v2")
        await until_told(on, "v1", "unsigned")
        assert set(on.slot.arms) == {"v2"}


async def test_registry_that_is_not_reached_is_told_and_asked_again(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1")
        on.registry.failures = 1_000_000
        on.watch.name_arms(["v1"])
        await until_told(on, "v1", "unreachable")
        on.registry.failures = 0
        await until_ready(on, "v1")
        assert on.watch.arms_refused == {}


async def test_live_version_is_prepared_before_that_of_an_arm_whose_fetch_hangs(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1")
        on.publish("v2", seed=2)
        on.registry.hangs_at = "v1"
        on.watch.name_arms(["v1"])
        await wait_until(lambda: "v1" in on.registry.fetched, 10, "the fetch has begun")
        on.announce("live", "v2", 1)
        await on.until_live("v2", 1)
        assert on.slot.arms == {}, "its fetch still hangs"
        on.registry.free.set()
        await until_ready(on, "v1")


async def test_start_does_not_wait_for_the_version_of_an_arm(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1")
        on.registry.hangs_at = "v1"
        on.watch.name_arms(["v1"])
        await wait_until(on.watch.decided.is_set, 10, "the first choice is made")
        assert on.slot.arms == {}


async def test_bootstrap_can_be_the_version_of_an_arm(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.publish("v1", space_id="turned", projection=TURNED)
        on.watch.name_arms([BOOTSTRAP_VERSION])
        on.announce("live", "v1", 1)
        await on.until_live("v1", 1)
        await until_ready(on, BOOTSTRAP_VERSION)
        assert on.slot.arms[BOOTSTRAP_VERSION].scorer is None


def test_metric_says_of_each_version_that_an_arm_names_whether_it_is_there() -> None:
    registry = CollectorRegistry()
    metrics = ModelMetrics(registry)
    metrics.set_arms(["v1", "v2"], {"v2": None})
    found = {v: registry.get_sample_value("millstream_model_arm_ready", {"version": v}) for v in ("v1", "v2", "v3")}
    assert found == {"v1": 0, "v2": 1, "v3": None}
