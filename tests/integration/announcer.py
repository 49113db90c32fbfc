"""Bundles for worker tests: told apart by the CTR that they state, published and announced as the trainer does.

The head of each is constant: its calibrated log-odds are one number for every item, so that a slate's own ``ctr``
shows which version made it, whatever its ``model_version`` says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from models.bundle import BundleContents, Canary, save
from models.ctr import CtrConfig, tensor_shapes
from models.examples import encode
from models.features import COLUMNS
from models.hashing import hash64
from models.pointer import Pointer, Pointers, newest, plan_candidate, plan_promotion, plan_rollback
from models.registry import Registry
from models.signing import PrivateKey
from streams.sender import Outbox
from streams.topic_io import TopicWriter
from tests.integration.conftest import read_topic, wait_until
from tests.integration.workers import BASE_DIM, World, encoder_id, now_ms
from tests.models.bundles import contents, features_record

DIM = 64


def log_odds_of(number: int) -> float:
    """Return the log-odds that bundle ``number`` states of every item."""
    return -3.0 + 0.25 * number


def ctr_of(number: int) -> float:
    """Return the CTR that bundle ``number`` states of every item."""
    return 1.0 / (1.0 + math.exp(-log_odds_of(number)))


def constant_scorer(number: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return configuration and tensors of a CTR model that says ``log_odds_of(number)`` of everything."""
    config = CtrConfig(dim=DIM, features=len(COLUMNS), hidden=(8,), attention_dim=4, positions=0)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(config).items()}
    tensors["feature_std"] = np.ones(len(COLUMNS), np.float32)
    tensors["calibration"] = np.array([1.0, log_odds_of(number)], np.float32)
    return config.model_dump(mode="json"), tensors


def bundle_contents(on: World, number: int, *, new_space: bool = False, **given: Any) -> BundleContents:
    """Return bundle ``number``: version v<number>, in the bootstrap's space or in one of its own."""
    space = on.space()
    random = np.random.default_rng(number)
    config, tensors = constant_scorer(number)
    known = np.array([hash64(item) for item in on.item_ids[:3]], np.uint64)
    fields: dict[str, Any] = {
        "name": on.settings.models.name,
        "created_ms": now_ms(),
        "encoder_id": encoder_id(),
        "scorer_config": config,
        "scorer_tensors": tensors,
        "space_id": f"space-v{number}" if new_space else space.space_id,
        "projection": random.standard_normal((BASE_DIM, DIM)).astype(np.float32) if new_space else space.projection,
        "canary": Canary(
            records=[encode(features_record(on.item_ids[:2], on.item_ids[2:3]))],
            items=known,
            base=random.standard_normal((3, BASE_DIM)).astype(np.float16),
        ),
    }
    made: BundleContents = contents(f"v{number}", base_dim=BASE_DIM, dim=DIM, **{**fields, **given})
    return made


class Announcer:
    """Publishes bundles of one world and announces them."""

    def __init__(self, on: World, folder: Path, private_key: PrivateKey | None = None) -> None:
        self._on = on
        self._folder = folder
        self.private_key = private_key
        self.registry = Registry(on.settings.models)

    async def pointers(self) -> Pointers:
        """Return what the topic says now."""
        records = await read_topic(self._on.settings, self._on.names.models)
        return newest({r.key: r.value for r in records if r.value is not None}, self._on.settings.models.name)

    def publish(self, made: BundleContents) -> str:
        """Publish a bundle and return the SHA-256 of its manifest."""
        folder = self._folder / made.version
        save(folder, made, self.private_key)
        self.registry.publish(folder)
        return self.registry.manifest_sha256(made.version)

    async def send(self, pointers: Sequence[Pointer]) -> None:
        """Send pointers, signed with this announcer's key where it has one."""
        await self.send_by(self.private_key, pointers)

    async def send_by(self, signer: PrivateKey | None, pointers: Sequence[Pointer]) -> None:
        """Send pointers, signed with a key, None: not signed."""
        outbox = Outbox()
        async with TopicWriter(self._on.settings, self._on.names.models) as writer:
            for pointer in pointers:
                writer.add(outbox, self._on.names.models, pointer.key, pointer.signed(signer).encode())
            await writer.send(outbox)

    async def announce_candidate(self, version: str, sha256: str) -> int:
        """Announce a candidate; returns its generation."""
        plan = plan_candidate(await self.pointers(), version, sha256, at_ms=now_ms(), by="test", why="a test")
        await self.send(plan)
        return plan[0].generation

    async def announce_live(self, version: str, sha256: str) -> int:
        """Announce a live version and what goes with it; returns its generation."""
        plan = plan_promotion(await self.pointers(), version, sha256, at_ms=now_ms(), by="test", why="a test")
        await self.send(plan)
        return plan[0].generation

    async def roll_back(self) -> int:
        """Make the previous version live again; returns its generation."""
        plan = plan_rollback(await self.pointers(), at_ms=now_ms(), by="test", why="a test")
        await self.send(plan)
        return plan[0].generation

    async def swap(self, made: BundleContents, workers: int) -> int:
        """Publish, announce as candidate, wait until ``workers`` have it prepared, announce live, wait again."""
        sha256 = self.publish(made)
        await self.announce_candidate(made.version, sha256)
        await self.wait_prepared(made.version, workers)
        generation = await self.announce_live(made.version, sha256)
        await self.wait_live(made.version, generation, workers)
        return generation

    async def statuses(self) -> dict[str, dict[str, Any]]:
        """Return what each worker said last on model-status, by worker id."""
        last: dict[str, dict[str, Any]] = {}
        for record in await read_topic(self._on.settings, self._on.names.model_status):
            name = record.key.decode()
            last.pop(name, None)
            if record.value is not None:
                last[name] = msgspec.json.decode(record.value)
        return last

    async def wait_prepared(self, version: str, workers: int) -> None:
        """Return when as many workers say that they have prepared a version."""

        async def prepared() -> bool:
            found = [any(p["version"] == version for p in s["prepared"]) for s in (await self.statuses()).values()]
            return sum(found) >= workers

        await wait_until(prepared, 60, f"{version} is prepared by {workers}", every_seconds=0.2)

    async def wait_live(self, version: str, generation: int, workers: int) -> None:
        """Return when as many workers say that they serve a version under a generation."""

        async def live() -> bool:
            want = {"version": version, "generation": generation}
            serving = [want.items() <= s["live"].items() for s in (await self.statuses()).values()]
            return serving.count(True) >= workers

        await wait_until(live, 60, f"{version} is live on {workers}", every_seconds=0.2)

    async def wait_refused(self, reason: str, workers: int) -> list[dict[str, Any]]:
        """Return what as many workers say of a refusal, when they all do."""

        async def told() -> list[dict[str, Any]]:
            return [r for s in (await self.statuses()).values() for r in s["refused"] if r["reason"] == reason]

        async def all_told() -> bool:
            return len(await told()) >= workers

        await wait_until(all_told, 60, f"{reason} is told by {workers}", every_seconds=0.2)
        return await told()


def damage(on: World, version: str, name: str) -> None:
    """Change one byte of a published bundle's file."""
    file = Path(on.settings.models.url) / on.settings.models.name / version / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
