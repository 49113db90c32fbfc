"""What one preparation must not do to another: starve, outlive or take from it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from models.encoder_delta import EncoderDelta
from models.manifest import BOOTSTRAP_VERSION
from streams import model_watch
from tests.integration.conftest import wait_until
from tests.streams.test_model_watch import ENCODER, NOW, TURNED, scene, short_waits, vector_record

__all__ = ["short_waits"]


async def test_live_version_that_was_not_reached_is_asked_for_again_while_a_candidate_is_prepared(
    tmp_path: Path,
) -> None:
    async with scene(tmp_path, follow=False, start_wait_seconds=30.0) as on:
        on.publish("v1")
        on.publish("v2", seed=2)
        on.registry.failures = 1
        on.registry.hangs_at = "v2"
        on.announce("candidate", "v2", 1)
        on.announce("live", "v1", 2)
        task = asyncio.create_task(on.watch._follow())
        await asyncio.wait_for(on.watch.decided.wait(), 10)
        assert on.slot.version == "v1"
        task.cancel()


async def test_patience_with_the_live_version_ends_while_a_candidate_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_watch, "RETRY_SECONDS", 60.0)
    async with scene(tmp_path, follow=False, start_wait_seconds=0.2) as on:
        on.publish("v1")
        on.publish("v2", seed=2)
        on.registry.failures = 1
        on.registry.hangs_at = "v2"
        on.announce("candidate", "v2", 1)
        on.announce("live", "v1", 2)
        task = asyncio.create_task(on.watch._follow())
        await asyncio.wait_for(on.watch.decided.wait(), 10)
        assert on.slot.version == BOOTSTRAP_VERSION
        assert on.registry.fetched == ["v1", "v2"]
        task.cancel()


async def test_storm_of_pointers_starts_a_preparation_for_few_of_them_and_ends_with_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_watch, "SETTLE_SECONDS", 2.0)
    async with scene(tmp_path) as on:
        await asyncio.wait_for(on.watch.decided.wait(), 10)
        on.publish("v0")
        on.registry.hangs_at = "v0"
        on.announce("candidate", "v0", 1)
        await wait_until(lambda: "v0" in on.registry.fetched, 10, "the fetch has begun")
        for number in range(1, 30):
            on.publish(f"v{number}", seed=number)
        for number in range(1, 30):
            on.announce("candidate", f"v{number}", number + 1)
            await asyncio.sleep(0.05)
        await on.until_in_shadow("v29")
        assert len(on.registry.fetched) < 10


async def test_registry_whose_folder_is_not_mounted_yet_is_waited_for(tmp_path: Path) -> None:
    async with scene(tmp_path, start_wait_seconds=30.0) as on:
        sha256 = on.publish("v1")
        (tmp_path / "registry").rename(tmp_path / "aside")
        on.announce("live", "v1", 1, sha256)
        await wait_until(lambda: len(on.registry.fetched) > 1, 10, "it is asked for again")
        (tmp_path / "aside").rename(tmp_path / "registry")
        await on.until_live("v1", 1)
        assert on.watch.refused == {}


async def test_other_news_do_not_take_the_space_of_a_bundle_that_waits_for_encodings(tmp_path: Path) -> None:
    delta = EncoderDelta({"base_encoder_id": ENCODER}, {"layer.weight": np.ones((2, 2), np.float32)})
    async with scene(tmp_path) as on:
        await asyncio.wait_for(on.watch.decided.wait(), 10)
        on.publish("v1", space_id="own", projection=TURNED, encoder=delta, encoder_id=delta.encoder_id)
        on.announce("candidate", "v1", 1)
        await wait_until(lambda: "own" in on.state.spaces, 10, "the space is built")
        on.announce("previous", BOOTSTRAP_VERSION, 2)
        await wait_until(lambda: on.slot.previous is not None, 10, "the news are followed")
        on.state.apply_vectors([vector_record(name, delta.encoder_id) for name in "abc"], NOW)
        await on.until_in_shadow("v1")
        assert on.slot.candidate is not None
        assert len(on.slot.candidate.vector_index) == 3
