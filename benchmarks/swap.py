"""Hot swap: freshness at 100 evenly spaced events a second while ten bundles are prepared and swapped, against before.

Both halves of the measurement are of one worker in one run, the first with a bundle that serves and nothing to
prepare. Swaps alternate between a new head in the space that is served and a new projection, for which the vectors
of the whole catalogue and their index are built aside.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.freshness import send_events, timed_slates
from benchmarks.processes import BenchmarkError, WorkerProcess
from benchmarks.results import CpuAccount, Figure, percentile
from benchmarks.stage import Bench, Stage, stage
from models.bundle import BundleContents, Canary, save
from models.ctr import CtrConfig, tensor_shapes
from models.examples import FeaturesRecord, encode
from models.features import COLUMNS, FeatureConfig
from models.hashing import hash64
from models.pointer import Pointer, Pointers, newest, plan_candidate, plan_promotion
from models.registry import Registry
from streams.sender import Outbox
from streams.topic_io import TopicWriter

SWAPS: Final = 10
AFTERMATH_SECONDS: Final = 1.0
"""After each swap, counted to it: rows are rebuilt, what is freed is freed."""
PAUSE_SECONDS: Final = 5.0
"""Quiet between two swaps: tells a machine that became busy from a swap that costs."""
GAP_MS: Final = round(PAUSE_SECONDS * 1000)
PREPARE_SECONDS: Final = 600.0
"""The graph of a new space is built behind everything else: on a machine with much else, slowly."""
LAST_SLATES_SECONDS: Final = 5.0
MOST_TIMES: Final = 2.0
MODEL: Final = "bench"


async def run(bench: Bench) -> None:
    """Measure before and during ten swaps."""
    account = CpuAccount()
    models = {
        "name": MODEL,
        "url": str(bench.folder / "swap" / "registry"),
        "cache_folder": bench.folder / "swap" / "bundles",
    }
    async with stage(bench, "swap", users=bench.sizes.users, models=models) as made:
        worker = await made.worker()
        await _measure(made, worker)
    bench.report.beside["swap"] = account.describe()


async def _measure(made: Stage, worker: WorkerProcess) -> None:
    seconds = made.bench.sizes.freshness_seconds
    announcer = _Announcer(made, worker)
    await announcer.swap(0, new_space=False)
    await send_events(made, made.bench.sizes.warm_up_seconds)
    before_ms = _now_ms()
    await send_events(made, seconds)
    rss_before = worker.rss_bytes()
    during_ms = _now_ms()
    took: list[float] = []
    spans_ms: list[tuple[int, int]] = []

    async def swaps() -> None:
        for number in range(1, SWAPS + 1):
            begun_ms = _now_ms()
            took.append(await announcer.swap(number, new_space=number % 2 == 0))
            await asyncio.sleep(AFTERMATH_SECONDS)
            spans_ms.append((begun_ms, _now_ms()))
            await asyncio.sleep(PAUSE_SECONDS)

    await send_events(made, float("inf"), until=asyncio.create_task(swaps()))
    await asyncio.sleep(LAST_SLATES_SECONDS)
    triggers, timed = await timed_slates(made, before_ms)
    missing = len(triggers) - len(timed)
    quiet = [took_ms for at_ms, took_ms in timed if at_ms < during_ms]
    busy = [took_ms for at_ms, took_ms in timed if any(begin <= at_ms < end for begin, end in spans_ms)]
    between = [took_ms for at_ms, took_ms in timed if any(0 <= at_ms - end < GAP_MS for _, end in spans_ms)]
    swapped = await worker.metric("millstream_model_swap_seconds_count")
    if swapped < SWAPS + 1:
        raise BenchmarkError(f"{swapped:.0f} swaps of {SWAPS + 1}:\n{worker.tail()}")
    swap_ms = 1e3 * await worker.metric("millstream_model_swap_seconds_sum") / swapped
    p99_before, p99_during = percentile(quiet, 0.99), percentile(busy, 0.99)
    figures = made.bench.report.figures
    figures.append(Figure("freshness before the swaps, p99", p99_before, "ms", note=f"{len(quiet):,} slates"))
    note = (
        f"p50 {percentile(busy, 0.5):.0f} ms, max {max(busy, default=0)} ms, {len(busy):,} slates; between the swaps "
        f"p99 {percentile(between, 0.99):.0f} ms, {len(between):,} slates; {missing} missing; a swap itself "
        f"{swap_ms:.2f} ms, announced to live {min(took):.1f} to {max(took):.1f} s; worker RSS "
        f"{rss_before >> 20} MiB before, {worker.rss_bytes() >> 20} MiB after"
    )
    figures.append(Figure("freshness during ten swaps, p99", p99_during, "ms", note=note))
    figures.append(
        Figure("freshness during swaps ÷ before, p99", p99_during / max(p99_before, 1.0), "×", at_most=MOST_TIMES)
    )


class _Announcer:
    """Publishes made-up bundles and announces them as the trainer does."""

    def __init__(self, made: Stage, worker: WorkerProcess) -> None:
        self._made = made
        self._worker = worker
        self._registry = Registry(made.settings.models)
        self._said: dict[bytes, bytes] = {}

    async def swap(self, number: int, *, new_space: bool) -> float:
        """Publish bundle ``number``, announce it as candidate, when it is prepared as live; return the seconds."""
        contents = _contents(self._made, number, new_space=new_space)
        folder = self._made.folder / "made" / contents.version
        await asyncio.to_thread(self._publish, folder, contents)
        sha256 = await asyncio.to_thread(self._registry.manifest_sha256, contents.version)
        facts: dict[str, Any] = {"at_ms": _now_ms(), "by": "benchmark", "why": "a swap"}
        started = time.perf_counter()
        await self._send(plan_candidate(self._known(), contents.version, sha256, **facts))
        await self._has_role("candidate", contents.version)
        await self._send(plan_promotion(self._known(), contents.version, sha256, **facts))
        await self._has_role("live", contents.version)
        return time.perf_counter() - started

    def _publish(self, folder: Path, contents: BundleContents) -> None:
        save(folder, contents)
        self._registry.publish(folder)

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
    config = CtrConfig(dim=space.dim, features=len(COLUMNS))
    random = np.random.default_rng(number)
    tensors = {name: random.normal(0, 0.05, shape).astype(np.float32) for name, shape in tensor_shapes(config).items()}
    tensors["feature_std"] = np.ones(len(COLUMNS), np.float32)
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
        version=f"swap-{number:02d}",
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
            random.standard_normal((len(items), space.base_dim)).astype(np.float16),
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


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
