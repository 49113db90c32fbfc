"""Arms of an experiment with bundles of their own, on real Kafka: each slate names the version that made its scores."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from streams import model_tools
from tests.integration.announcer import Announcer, bundle_contents, ctr_of, damage
from tests.integration.conftest import SettingsWith, wait_until
from tests.integration.workers import WorkerProcess, World, now_ms, record, world

pytestmark = pytest.mark.integration

USERS = 30
SECTIONS: dict[str, Any] = {
    "exploration": {"randomised_share": 0.0},
    "models": {"status_interval_seconds": 1.0},
    "recommender": {
        "surfaces": {"default": {"k": 5}},
        "experiment": {
            "name": "heads",
            "arms": {"near": {"share": 0.35, "bundle": "v1"}, "far": {"share": 0.35, "bundle": "v2"}},
        },
    },
}


async def versions_by_arm(on: World, group: str) -> dict[str, set[tuple[str, str, float]]]:
    """Have new users click and ask; return version, space and CTR of their slates by arm."""
    users = [f"{group} {n}" for n in range(USERS)]
    clicks = [
        {"type": "action", "event_id": f"a-{user}", "event_time": now_ms(), "user_id": user, "item_id": "item-3"}
        for user in users
    ]
    requests = [
        {"type": "request", "event_id": f"r-{user}", "event_time": now_ms(), "user_id": user, "request_id": user}
        for user in users
    ]
    await on.publish([record({**click, "action": "click"}) for click in clicks])
    await on.publish([record(request) for request in requests])
    found: list[Any] = []

    async def all_there() -> bool:
        found[:] = [slate for slate in await on.slates() if slate["request_id"] in users]
        return len(found) >= USERS

    await wait_until(all_there, 90, "every user has the slate that they asked for", every_seconds=0.2)
    assert not any(slate["degraded"] for slate in found)
    told: defaultdict[str, set[tuple[str, str, float]]] = defaultdict(set)
    for slate in found:
        ctrs = {round(item["ctr"], 5) for item in slate["items"]}
        told[slate["experiment"]] |= {(slate["model_version"], slate["space_id"], ctr) for ctr in ctrs}
    return dict(told)


def said(version: int, space_id: str) -> set[tuple[str, str, float]]:
    return {(f"v{version}", space_id, round(ctr_of(version), 5))}


async def until_arms(announcer: Announcer, expected: list[tuple[str, bool, str]]) -> None:
    """Return when the worker says exactly this of its arms on model-status."""

    async def told() -> bool:
        arms = [s.get("arms", []) for s in (await announcer.statuses()).values()]
        return [[(a["version"], a["is_ready"], a["reason"]) for a in worker] for worker in arms] == [expected]

    await wait_until(told, 60, f"the worker says {expected} of its arms", every_seconds=0.2)


def rename_bundle(worker_settings: Path, old: str, new: str) -> None:
    """Have the settings file name another bundle for an arm."""
    file = worker_settings / "millstream.toml"
    text = file.read_text()
    assert text.count(f'bundle = "{old}"') == 1
    file.write_text(text.replace(f'bundle = "{old}"', f'bundle = "{new}"'))


async def test_two_arms_with_two_bundles_are_scored_by_them_and_by_the_live_one_where_they_are_not_there(
    settings_with: SettingsWith, tmp_path: Path
) -> None:
    async with world(settings_with, tmp_path, **SECTIONS) as on:
        announcer = Announcer(on, tmp_path / "made")
        announcer.publish(bundle_contents(on, 1))
        announcer.publish(bundle_contents(on, 2, new_space=True))
        worker: WorkerProcess = await on.ready_worker()
        await announcer.swap(bundle_contents(on, 3), workers=1)
        await until_arms(announcer, [("v1", True, ""), ("v2", True, "")])
        space_id = on.space().space_id
        # Scores of the far arm are made in a space of its own; its slate was retrieved in the live one.
        assert await versions_by_arm(on, "first") == {
            "heads/near": said(1, space_id),
            "heads/far": said(2, space_id),
            "heads/control": said(3, space_id),
        }

        announcer.publish(bundle_contents(on, 4))
        damage(on, "v4", "ctr.safetensors")
        rename_bundle(tmp_path / "worker-settings", "v1", "v4")
        rename_bundle(tmp_path / "worker-settings", "v2", "v5")
        await until_arms(announcer, [("v4", False, "wrong-hash"), ("v5", False, "not-in-registry")])
        assert set().union(*(await versions_by_arm(on, "second")).values()) == said(3, space_id)
        assert await worker.metric("millstream_model_refused_total", reason="wrong-hash") == 1
        assert await worker.metric("millstream_model_arm_ready", version="v5") == 0

        announcer.publish(bundle_contents(on, 5, new_space=True))
        await until_arms(announcer, [("v4", False, "wrong-hash"), ("v5", True, "")])
        third = await versions_by_arm(on, "third")
        assert third["heads/far"] == said(5, space_id)
        assert third["heads/near"] == third["heads/control"] == said(3, space_id)
        # v1 and v2 are named by nothing any more; v4 is named, though it is refused.
        collected = await model_tools.collect(on.settings, keep=0, dry_run=True)
        assert (set(collected.kept), set(collected.removed)) == ({"v3", "v4", "v5"}, {"v1", "v2"})
        rows, found = await model_tools.listing(on.settings)
        roles = {row.version: row.roles for row in rows}
        assert (roles["v1"], roles["v3"], roles["v4"], roles["v5"]) == ([], ["live"], ["arm"], ["arm"])
        [line] = [line for line in model_tools.lines(rows, found) if "of an arm is not ready" in line]
        assert line.startswith("v4 of an arm is not ready on worker ")
        assert "the live version serves: wrong-hash: " in line
        assert worker.returncode is None
        assert await worker.metric("millstream_processing_errors_total") == 0
