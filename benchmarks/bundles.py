"""Made-up bundles of the shape that a training makes, and their announcement as the trainer makes it.

Heads and projections are random: their scores mean nothing, their cost does.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.processes import BenchmarkError, WorkerProcess
from benchmarks.stage import Bench, Stage
from models.bundle import BundleContents, Canary, save
from models.ctr import CtrConfig, tensor_shapes
from models.examples import FeaturesRecord, encode
from models.features import COLUMNS, FeatureConfig
from models.hashing import hash64
from models.pointer import Pointer, Pointers, newest, plan_candidate, plan_promotion
from models.registry import Registry
from streams.sender import Outbox
from streams.topic_io import TopicWriter

PREPARE_SECONDS: Final = 600.0
"""The graph of a new space is built behind everything else: on a machine with much else, slowly."""
MODEL: Final = "bench"


def head(dim: int) -> CtrConfig:
    """Return the shape of the head that a training makes where nothing else is asked for."""
    return CtrConfig(dim=dim, features=len(COLUMNS), hidden=(128, 32), activation="silu")


def random_tensors(config: CtrConfig, seed: int, scale: float = 0.05) -> dict[str, npt.NDArray[np.float32]]:
    """Return random weights of that shape, by name."""
    random = np.random.default_rng(seed)
    tensors = {name: random.normal(0, scale, shape).astype(np.float32) for name, shape in tensor_shapes(config).items()}
    tensors["feature_std"] = np.ones(config.features, np.float32)
    return tensors


def registry_of(bench: Bench, name: str) -> dict[str, Any]:
    """Return the section ``models`` of a worker that follows the bundles made for the benchmark ``name``."""
    folder = bench.folder / name
    return {"name": MODEL, "url": str(folder / "registry"), "cache_folder": folder / "bundles"}


class Announcer:
    """Publishes made-up bundles and announces them as the trainer does."""

    def __init__(self, made: Stage, worker: WorkerProcess) -> None:
        self._made = made
        self._worker = worker
        self._registry = Registry(made.settings.models)
        self._said: dict[bytes, bytes] = {}

    async def swap(self, number: int, *, new_space: bool) -> float:
        """Publish bundle ``number``, announce it as candidate, when it is prepared as live; return the seconds."""
        version, sha256 = await self._publish(number, new_space=new_space)
        started = time.perf_counter()
        await self._send(plan_candidate(self._known(), version, sha256, **_facts()))
        await self._has_role("candidate", version)
        await self._send(plan_promotion(self._known(), version, sha256, **_facts()))
        await self._has_role("live", version)
        return time.perf_counter() - started

    async def candidate(self, number: int, *, new_space: bool) -> None:
        """Publish bundle ``number`` and announce it as candidate; returns when it is scored in shadow."""
        version, sha256 = await self._publish(number, new_space=new_space)
        await self._send(plan_candidate(self._known(), version, sha256, **_facts()))
        await self._has_role("candidate", version)

    async def _publish(self, number: int, *, new_space: bool) -> tuple[str, str]:
        """Publish bundle ``number``; return its version and its manifest's checksum."""
        contents = _contents(self._made, number, new_space=new_space)
        folder = self._made.folder / "made" / contents.version

        def publish() -> str:
            save(folder, contents)
            self._registry.publish(folder)
            return self._registry.manifest_sha256(contents.version)

        return contents.version, await asyncio.to_thread(publish)

    def _known(self) -> Pointers:
        return newest(self._said, MODEL)

    async def _send(self, pointers: list[Pointer]) -> None:
        topic = self._made.names.models
        outbox = Outbox()
        async with TopicWriter(self._made.settings, topic) as writer:
            for pointer in pointers:
                self._said[pointer.key] = pointer.encode()
                writer.add(outbox, topic, pointer.key, pointer.encode())
            await writer.send(outbox)

    async def _has_role(self, role: str, version: str) -> None:
        deadline = time.monotonic() + PREPARE_SECONDS
        while not await self._worker.metric("millstream_model_info", role=role, version=version):
            if self._worker.process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"{version} is not {role}:\n{self._worker.tail()}")
            await asyncio.sleep(0.2)


def _contents(made: Stage, number: int, *, new_space: bool) -> BundleContents:
    """Return a bundle with a random head; in a space of its own, the one before it turned a little."""
    space = made.bench.world.space
    config = head(space.dim)
    tensors = random_tensors(config, number)
    tensors["calibration"] = np.array([1.0, -3.0], np.float32)
    # A head of odd number follows a bundle of its space: only then is nothing to be rebuilt.
    turned = number if new_space else max(0, number - 1)
    noise = 0.02 * np.random.default_rng(turned).normal(size=(space.dim, space.dim))
    rotation, triangle = np.linalg.qr(np.eye(space.dim) + noise)
    rotation *= np.sign(np.diag(triangle))
    is_first = not turned
    items = [item.item_id for item in made.bench.world.items[:2]]
    return BundleContents(
        name=MODEL,
        version=f"made-up-{number:02d}",
        created_ms=_now_ms(),
        space_id=space.space_id if is_first else f"turned-{turned}",
        encoder_id=space.encoder_id,
        scorer_config=config.model_dump(mode="json"),
        scorer_tensors=tensors,
        features=FeatureConfig(),
        projection=space.projection if is_first else (space.projection @ rotation).astype(np.float32),
        canary=Canary(
            [encode(_record(items))],
            np.array([hash64(item) for item in items], np.uint64),
            np.random.default_rng(number).standard_normal((len(items), space.base_dim)).astype(np.float16),
        ),
    )


def _record(items: list[str]) -> FeaturesRecord:
    k = len(items)
    return FeaturesRecord(
        impression_id=1,
        user_id="canary",
        partition=0,
        offset=0,
        time_ms=_now_ms(),
        broker_ms=0,
        processed_ms=0,
        flags=0,
        surface="default",
        request_id=None,
        experiment=None,
        policy="model",
        session_id=None,
        context=None,
        space_id="",
        items=np.array([hash64(item) for item in items], "<u8").tobytes(),
        positions=bytes(2 * k),
        propensities=b"",
        counters=bytes(2 * 16 * k),
        age_seconds=np.full(k, 60.0, "<f4").tobytes(),
        first_seen_seconds=np.full(k, 60.0, "<f4").tobytes(),
        sims=bytes(2 * 2 * k),
        shown_counts=bytes(k),
        shown_age_seconds=np.full(k, np.nan, "<f4").tobytes(),
        acted_age_seconds=np.full(k, np.nan, "<f4").tobytes(),
        recent_items=b"",
        recent_age_seconds=b"",
        recent_codes=b"",
        user_counts=(0, 0, 0),
        scores=[],
        model_version="",
    )


def _facts() -> dict[str, Any]:
    return {"at_ms": _now_ms(), "by": "benchmark", "why": "a benchmark"}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
