"""Follows the ``models`` topic: prepares what a role names, and swaps when it is live. So too what arms name.

Preparation runs beside serving: fetch, verify, canary and index in a thread of low priority, what touches state in the
state thread, a chunk at a time. Whatever fails keeps the model in use, and says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, ParamSpec, TypeVar

import structlog

from models.bootstrap import Space
from models.bundle import Bundle, load
from models.errors import BundleError, RegistryError
from models.item_space import ItemSpace
from models.manifest import BOOTSTRAP_VERSION
from models.pointer import ROLES, Pointer, PointerGuard, Role
from models.registry import Registry, prune_cache
from models.retrieval import VectorIndex, lower_priority
from models.serving import ServingModel
from streams.catalogue_mirror import CHUNK_RECORDS, CatalogueMirror
from streams.mirror import Mirror, Record
from streams.model_metrics import ModelMetrics
from streams.model_slot import ModelSlot
from streams.model_wanted import ARM, Held, Key, Refused, Retry, Target, Wanted, bootstrap, named_by, served
from streams.settings import Settings
from streams.state_thread import StateThread
from streams.topics import TopicNames

log = structlog.get_logger(__name__)

RETRY_SECONDS: Final = 1.0
RETRY_MAX_SECONDS: Final = 60.0
ENCODING_POLL_SECONDS: Final = 0.5
SETTLE_SECONDS: Final = 0.2
"""How long news is gathered after a preparation was given up: a storm of pointers must not start a thread for each."""
KEEP_SECONDS: Final = 10.0
"""How long a version without a role is kept: its new role may be on its way."""

P = ParamSpec("P")
R = TypeVar("R")
Switch = Callable[[ServingModel, list[ServingModel], Mapping[str, ServingModel]], Awaitable[None]]
"""Awaited with the live model, those in shadow, and by version those of arms; returns when the next batch will be
served by them."""


class ModelWatch:
    """Keeps a ModelSlot as the ``models`` topic says, as far as the bundles are sound."""

    def __init__(
        self,
        settings: Settings,
        slot: ModelSlot,
        catalogue_mirror: CatalogueMirror,
        state: StateThread,
        metrics: ModelMetrics,
        switch: Switch,
    ) -> None:
        self.mirror = Mirror(settings, TopicNames.of(settings).models, self._on_records)
        self.decided = asyncio.Event()
        """Set when the first choice is made: the newest live bundle, or why it is not that one."""
        self.changed = asyncio.Event()
        """Set at each change of what is served, prepared or refused."""
        self.refused: dict[str, Refused] = {}
        """The last refusal of each role, until another pointer of that role is followed."""
        self.arms_refused: dict[str, Refused] = {}
        """Why the version of an arm is not there, by version; the arm is served by the live model."""
        self._settings = settings
        self._slot = slot
        self._catalogue_mirror = catalogue_mirror
        self._thread = state
        self._metrics = metrics
        self._switch = switch
        self._registry = Registry(settings.models)
        self._guard: PointerGuard | None = None
        self._unread: list[Record] = []
        self._newest_at_start: dict[bytes | None, int] = {}
        """Offset of the newest record of each key when the topic was read for the first time."""
        self._news = asyncio.Event()
        self._started_at = time.monotonic()
        self._preparing: Space | None = None
        """Stays with its encodings, though no version holds it yet."""
        first = catalogue_mirror.state.spaces[slot.live.space_id]
        self._state = Wanted(held={(slot.live.version, ""): Held(slot.live, first)})
        metrics.set_roles(slot.by_role())
        self.name_arms(settings.recommender.experiment.bundles)

    @property
    def arms(self) -> tuple[str, ...]:
        """Return the versions that arms name."""
        return self._state.arms

    def name_arms(self, versions: Sequence[str]) -> None:
        """Hold the versions that arms name from now on, in the background; what was refused is tried again."""
        self._state.name_arms(versions)
        self.arms_refused = {version: why for version, why in self.arms_refused.items() if version in versions}
        self._metrics.set_arms(self._state.arms, self._slot.arms)
        self._news.set()
        self.changed.set()

    async def run(self) -> None:
        """Follow the topic until cancelled; an error of our own code is raised."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.mirror.run(), name="mirror-models")
            group.create_task(self._follow(), name="follow-models")

    # -- pointers ------------------------------------------------------------------------------------------------

    def _on_records(self, records: Sequence[Record]) -> None:
        self._unread += records
        self._news.set()

    async def _read_pointers(self) -> None:
        """Follow what was read: what the guard lets pass."""
        unread, self._unread = self._unread, []
        for place, record in enumerate(unread):
            try:
                # The guard keeps generations on the disk: not in the event loop.
                pointer = await asyncio.to_thread(self._accept, record)
            except RegistryError as error:
                # The generation could not be kept: followed later, or a restart would follow an older one.
                log.error("pointer_not_kept", error=str(error))
                self._unread = [*unread[place:], *self._unread]
                return
            except BundleError as error:
                is_history = record.offset < self._newest_at_start.get(record.key, 0)
                if not (is_history and error.reason == "old-generation"):
                    self._refuse(*named_by(record), error)
                continue
            if pointer is not None and self._state.pointers.get(pointer.role) != pointer:
                log.info("pointer", role=pointer.role, version=pointer.version, generation=pointer.generation)
                self._state.pointers[pointer.role] = pointer
                self.refused.pop(pointer.role, None)
                self.changed.set()

    def _accept(self, record: Record) -> Pointer | None:
        if self._guard is None:
            models = self._settings.models
            self._guard = PointerGuard(self._settings.worker.data_folder, models.name, models.trusted())
        return self._guard.accept(record.key, record.value)

    def _refuse(self, role: str, version: str, generation: int, error: BundleError) -> None:
        refused = Refused(role, version, generation, error.reason, error.detail)
        if role == ARM:
            self.arms_refused[version] = refused
        else:
            self.refused[role] = refused
        self._metrics.refused.labels(error.reason).inc()
        self.changed.set()
        log.error(
            "model_refused", role=role, version=version, generation=generation, reason=error.reason, detail=error.detail
        )

    # -- following -----------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        await self.mirror.caught_up.wait()
        # A whole catalogue is built at once, not as it comes in.
        await self._catalogue_mirror.caught_up()
        self._started_at = time.monotonic()
        # Older values of a key stand on the topic until it is compacted: an announcement anew is the last one only.
        self._newest_at_start = {record.key: record.offset for record in self._unread}
        while True:
            self._news.clear()
            if self._unread:
                await self._read_pointers()
            await self._assign()
            due = self._state.next(time.monotonic())
            if not self.decided.is_set() and (due is None or due.role != "live"):
                self._decide()
            if due is None:
                await self._wait()
            else:
                await self._prepare_until_news(due)

    async def _wait(self) -> None:
        """Wait for news, or for the time at which something is due."""
        named = self._state.keys()
        waits = [retry.at for key, retry in self._state.retries.items() if key in named]
        waits += [at + KEEP_SECONDS for at in self._state.unnamed_at.values()]
        if not self.decided.is_set():
            waits.append(self._patience_ends_at())
        if self._unread:
            waits.append(time.monotonic() + RETRY_SECONDS)
        seconds = max(0.01, min(waits) - time.monotonic()) if waits else None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)

    def _patience_ends_at(self) -> float:
        return self._started_at + self._settings.models.start_wait_seconds

    def _decide(self) -> None:
        """Say that the first choice is made, but where the live bundle may still be had in time."""
        pointer, live = self._state.pointers.get("live"), self._slot.live
        is_waiting = pointer is not None and Target.of(pointer).key in self._state.retries
        if is_waiting and time.monotonic() < self._patience_ends_at():
            return
        if pointer is not None and (pointer.version or live.version) != live.version:
            log.error(
                "live_bundle_missing",
                wanted=pointer.version,
                serving=live.version,
                generation=live.generation,
                refused=self.refused["live"].detail if "live" in self.refused else None,
            )
        self.decided.set()

    async def _assign(self) -> None:
        """Give each role the model that its pointer names, as far as it is prepared; free what no role names."""
        slot, wanted, held = self._slot, self._state.pointers, self._state.held
        models: dict[Role, ServingModel | None] = {}
        for role in ROLES:
            pointer = wanted.get(role)
            is_none = pointer is None or (pointer.is_withdrawal and role != "live")
            found = None if pointer is None or is_none else held.get(Target.of(pointer).key)
            models[role] = None if pointer is None or found is None else found.model.under(pointer.generation)
        live = models["live"] or slot.live
        before = slot.by_role()
        after = {"live": live, "candidate": models["candidate"], "previous": models["previous"]}
        arms = self._state.for_arms()
        if _roles(before) != _roles(after) or slot.arms != arms:
            try:
                await self._take(live, models["candidate"], models["previous"], arms)
            except Exception as error:
                log.exception("switch_failed", version=live.version)
                pointer = wanted.get("live")
                if pointer is None or live is slot.live:
                    raise
                wanted.pop("live")
                self._give_up(Target.of(pointer), BundleError("switch-failed", f"{error!r}; the model in use stays"))
        await self._free()

    async def _take(
        self,
        live: ServingModel,
        candidate: ServingModel | None,
        previous: ServingModel | None,
        arms: dict[str, ServingModel],
    ) -> None:
        slot = self._slot
        old = slot.live
        shadows = [m for m in (candidate, previous) if m is not None and m.version != live.version]
        await self._switch(live, shadows if self._settings.models.shadow else [], arms)
        slot.live, slot.candidate, slot.previous, slot.arms = live, candidate, previous, arms
        if (live.version, live.generation) != (old.version, old.generation):
            log.info(
                "model_live", version=live.version, generation=live.generation, space=live.space_id, was=old.version
            )
        self._metrics.set_roles(slot.by_role())
        self._metrics.set_arms(self._state.arms, arms)
        self.arms_refused = {version: why for version, why in self.arms_refused.items() if version not in arms}
        self.changed.set()

    async def _free(self) -> None:
        """Free the versions that no role and no arm names and nobody serves with."""
        state, slot, now = self._state, self._slot, time.monotonic()
        named = state.keys() | {self._serving_key()}
        state.retries = {key: retry for key, retry in state.retries.items() if key in named}
        state.unnamed_at = {key: state.unnamed_at.get(key, now) for key in state.held if key not in named}
        # The pointer that makes the old live version the previous one comes a moment after the live one.
        for key in [key for key, at in state.unnamed_at.items() if now - at >= KEEP_SECONDS]:
            del state.unnamed_at[key], state.held[key]
            log.info("model_freed", version=key[0])
        mirrored = self._catalogue_mirror.state
        spaces = {held.model.space_id for held in state.held.values()}
        encoders = {slot.bootstrap_space.encoder_id}
        if self._preparing is not None:
            spaces.add(self._preparing.space_id)
            encoders.add(self._preparing.encoder_id)
        used = encoders | {held.model.encoder_id for held in state.held.values()}
        if mirrored.spaces.keys() - spaces or mirrored.encodings.keys() - used:
            for space in await self._thread.run(mirrored.keep_only, spaces, encoders):
                await self._in_background(space.index.close)

    def _serving_key(self) -> Key:
        """Return the held version that serves, which need not be the one that the topic names."""
        live = self._slot.live
        return next(key for key, held in self._state.held.items() if held.model.is_same_version(live))

    # -- preparing -----------------------------------------------------------------------------------------------

    async def _prepare_until_news(self, target: Target) -> None:
        """Prepare; give it up where the topic comes to say something more urgent."""
        preparing = asyncio.create_task(self._try(target), name=f"prepare-{target.version}")
        gives_up = False
        try:
            while not preparing.done():
                news = asyncio.create_task(self._news.wait())
                await asyncio.wait(
                    {preparing, news}, timeout=self._seconds_to_live(target.role), return_when=asyncio.FIRST_COMPLETED
                )
                news.cancel()
                if preparing.done():
                    continue
                if self._news.is_set():
                    self._news.clear()
                    if self._unread:
                        await self._read_pointers()
                    # A rollback to what is held does not wait for what is being prepared.
                    await self._assign()
                if not self.decided.is_set() and self._live_retry() is not None:
                    self._decide()
                due = self._state.next(time.monotonic())
                if due is None or due.key != target.key:
                    log.info("preparation_given_up", version=target.version)
                    gives_up = True
                    break
        finally:
            if not preparing.done():
                preparing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await preparing
            self._preparing = None
        if gives_up:
            await asyncio.sleep(SETTLE_SECONDS)

    def _live_retry(self) -> Retry | None:
        """Return when the live version is asked for again, None where it is not waited for."""
        pointer = self._state.pointers.get("live")
        return None if pointer is None else self._state.retries.get(Target.of(pointer).key)

    def _seconds_to_live(self, preparing: str) -> float | None:
        """Return how long the preparation of a role may go on undisturbed; None: until there is news."""
        retry = self._live_retry()
        if retry is None:
            return None
        waits = [retry.at] if preparing != "live" else []
        if not self.decided.is_set():
            waits.append(self._patience_ends_at())
        return max(0.0, min(waits) - time.monotonic()) if waits else None

    async def _try(self, target: Target) -> None:
        started = time.perf_counter()
        try:
            key, held = await self._prepare(target)
        except (RegistryError, OSError) as error:
            self._metrics.unreachable.inc()
            seconds = self._try_later(target)
            log.warning("model_unreachable", version=target.version, retry_seconds=seconds, error=str(error))
            if target.role == ARM:
                self.arms_refused[target.version] = Refused(ARM, target.version, 0, "unreachable", str(error))
                self.changed.set()
            return
        except BundleError as error:
            if target.role == ARM and error.reason == "not-in-registry":
                # No pointer will tell when it is published.
                self._try_later(target)
                self._refuse(ARM, target.version, 0, error)
                return
            self._give_up(target, error)
            return
        except Exception as error:
            log.exception("preparation_failed", version=target.version)
            self._give_up(target, BundleError("preparation-failed", f"{error!r}; the model in use stays"))
            return
        self._state.retries.pop(target.key, None)
        self._state.held[key] = held
        seconds = time.perf_counter() - started
        self._metrics.prepare_seconds.observe(seconds)
        self.changed.set()
        log.info("model_prepared", role=target.role, version=target.version, seconds=round(seconds, 3))

    def _try_later(self, target: Target) -> float:
        """Have a version asked for again; return in how many seconds."""
        retry = self._state.retries.setdefault(target.key, Retry())
        seconds: float = min(RETRY_MAX_SECONDS, RETRY_SECONDS * 2**retry.attempts)
        retry.attempts += 1
        retry.at = time.monotonic() + seconds
        return seconds

    def _give_up(self, target: Target, error: BundleError) -> None:
        self._state.given_up.add(target)
        self._state.retries.pop(target.key, None)
        self._refuse(target.role, target.version, target.generation, error)

    async def _prepare(self, target: Target) -> tuple[Key, Held]:
        """Return a version that may serve, and its key. Raises BundleError, RegistryError and OSError."""
        if target.version == BOOTSTRAP_VERSION:
            self._preparing = self._slot.bootstrap_space
            space = await self._item_space(self._slot.bootstrap_space)
            return target.key, Held(bootstrap(space), space)
        stop = threading.Event()
        try:
            # A time-out is an OSError: asked again like any registry that is not reached.
            async with asyncio.timeout(self._settings.models.fetch_timeout_seconds):
                bundle = await self._in_background(self._load, target, stop)
        finally:
            stop.set()
        self._check(bundle)
        self._preparing = bundle.space
        encoder_id = bundle.space.encoder_id
        await self._catalogue_mirror.add_encoder(encoder_id, bundle.space.base_dim)
        await self._bring(bundle)
        item_space = await self._item_space(bundle.space)
        if encoder_id != self._slot.bootstrap_space.encoder_id and self.decided.is_set():
            await self._encodings(encoder_id)
        await self._prune_cache()
        return (bundle.version, bundle.manifest_sha256), Held(served(bundle, item_space), item_space)

    async def _prune_cache(self) -> None:
        models = self._settings.models
        keep = {p.version for p in self._state.pointers.values()} | {*self._state.arms}
        keep |= {m.version for m in (*self._slot.by_role().values(), *self._slot.arms.values())}
        try:
            await self._in_background(prune_cache, models.cache_folder, keep, models.cache_bundles)
        except OSError as error:
            log.warning("cache_not_pruned", folder=str(models.cache_folder), error=repr(error))

    def _load(self, target: Target, stop: threading.Event) -> Bundle:
        models = self._settings.models
        # An arm's settings name no manifest: the registry's is taken, its signature is checked as any other.
        sha256 = None if target.role == ARM else target.manifest_sha256
        folder = self._registry.fetch(target.version, models.cache_folder, manifest_sha256=sha256)
        if stop.is_set():
            raise RegistryError(f"{target.version} was fetched when nobody waited for it any more; it is in the cache")
        bundle = load(folder, models.trusted(), manifest_sha256=sha256, max_bytes=models.max_bundle_bytes)
        if (bundle.manifest.name, bundle.version) != (models.name, target.version):
            raise BundleError("wrong-name", f"{target.version} is {bundle.version} of {bundle.manifest.name!r}")
        bundle.check_canary()
        return bundle

    def _check(self, bundle: Bundle) -> None:
        """Raise BundleError where the space of a bundle cannot stand beside those that are held."""
        space, state = bundle.space, self._catalogue_mirror.state
        if space.dim != self._slot.catalogue.dim:
            raise BundleError(
                "wrong-dimension",
                f"{bundle.version} has vectors of {space.dim} dimensions, rows have {self._slot.catalogue.dim}; "
                "the model in use stays. Train it with the projection of this size",
            )
        encodings = state.encodings.get(space.encoder_id)
        if encodings is not None and encodings.dim != space.base_dim:
            raise BundleError(
                "wrong-dimension",
                f"{bundle.version} projects {space.base_dim} dimensions, {space.encoder_id} gives {encodings.dim}; "
                "the model in use stays",
            )
        held = state.spaces.get(space.space_id)
        if held is not None and not held.space.same_as(space):
            raise BundleError(
                "space-changed",
                f"{bundle.version} puts items elsewhere than {space.space_id}, whose id it has; the model in use "
                "stays. A changed projection or residual needs a space id of its own",
            )

    async def _bring(self, bundle: Bundle) -> None:
        encodings = bundle.encodings
        if encodings is None:
            return
        state = self._catalogue_mirror.state
        for start in range(0, len(encodings.items), CHUNK_RECORDS):
            part = slice(start, start + CHUNK_RECORDS)
            items, contents, base = encodings.items[part], encodings.contents[part], encodings.base[part]
            await self._thread.run(state.bring, bundle.space.encoder_id, items, contents, base, _now_ms())

    async def _item_space(self, space: Space) -> ItemSpace:
        """Return the items in a space: as they are held already, or built aside and caught up."""
        state = self._catalogue_mirror.state
        held = state.spaces.get(space.space_id)
        if held is not None:
            return held
        stop = threading.Event()
        index = VectorIndex(space.dim, self._settings.retrieval)
        made, embeddings = await self._thread.run(state.begin, space, index)
        is_whole = False
        try:
            # A start is not held up by the graph: nothing is served meanwhile, and exact search is there at once.
            waits = self.decided.is_set()
            await self._in_background(made.build, embeddings, _now_ms(), stop, wait_for_graph=waits)
            while not is_whole:
                is_whole = await self._thread.run(state.catch_up, made, _now_ms())
        finally:
            stop.set()
            if not is_whole:
                await asyncio.shield(self._thread.run(state.forget, made))
        return made

    async def _encodings(self, encoder_id: str) -> None:
        """Wait until the items have encodings of a bundle's own encoder, for a bounded time."""
        state = self._catalogue_mirror.state
        deadline = time.monotonic() + self._settings.models.encoding_wait_seconds
        while missing := await self._thread.run(state.without_encoding, encoder_id, _now_ms()):
            if time.monotonic() > deadline:
                log.warning("encodings_missing", encoder=encoder_id, items=missing)
                return
            await asyncio.sleep(ENCODING_POLL_SECONDS)

    async def _in_background(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call in a thread of low priority. Of its own each time: a fetch that hangs stands before nothing else."""
        executor = ThreadPoolExecutor(1, "model-preparation", initializer=lower_priority)
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, partial(function, *args, **kwargs))
        finally:
            executor.shutdown(wait=False)


def _roles(models: Mapping[str, ServingModel | None]) -> dict[str, tuple[str, int]]:
    return {role: (m.version, m.generation) for role, m in models.items() if m is not None}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
