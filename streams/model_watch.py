"""Follows the ``models`` topic: prepares what a role names, and swaps when it is live.

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
from dataclasses import dataclass, field
from functools import partial
from typing import Final, ParamSpec, TypeVar

import structlog

from models.bootstrap import Space
from models.bundle import Bundle, load
from models.errors import BundleError, RegistryError
from models.hashing import hash64
from models.item_space import ItemSpace
from models.manifest import BOOTSTRAP_VERSION
from models.pointer import ROLES, Pointer, PointerGuard, Role, decode
from models.registry import Registry, prune_cache
from models.retrieval import VectorIndex, lower_priority
from models.serving import ServingModel
from streams.catalogue_mirror import CHUNK_RECORDS, CatalogueMirror
from streams.mirror import Mirror, Record
from streams.model_metrics import ModelMetrics
from streams.model_slot import ModelSlot
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
Switch = Callable[[ServingModel, list[ServingModel]], Awaitable[None]]
"""Awaited with the live model and those in shadow; returns when the next batch will be served by them."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A pointer that was not followed, or whose bundle was not taken."""

    role: str
    version: str
    generation: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class _Held:
    """A version that is prepared."""

    model: ServingModel
    space: ItemSpace


@dataclass(slots=True)
class _Retry:
    attempts: int = 0
    at: float = 0.0


@dataclass(slots=True)
class _State:
    """What is known of roles and versions. Versions are told apart by name and manifest."""

    wanted: dict[Role, Pointer] = field(default_factory=dict)
    held: dict[tuple[str, str], _Held] = field(default_factory=dict)
    given_up: set[tuple[Role, int]] = field(default_factory=set)
    """Roles and generations whose bundle was refused."""
    unnamed_at: dict[tuple[str, str], float] = field(default_factory=dict)
    """Since when (monotonic) a held version has had no role."""
    retries: dict[tuple[str, str], _Retry] = field(default_factory=dict)


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
        self._state = _State(held={(slot.live.version, ""): _Held(slot.live, first)})
        metrics.set_roles(slot.by_role())

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
                    self._refuse(*_named(record), error)
                continue
            if pointer is not None and self._state.wanted.get(pointer.role) != pointer:
                log.info("pointer", role=pointer.role, version=pointer.version, generation=pointer.generation)
                self._state.wanted[pointer.role] = pointer
                self.refused.pop(pointer.role, None)
                self.changed.set()

    def _accept(self, record: Record) -> Pointer | None:
        if self._guard is None:
            models = self._settings.models
            self._guard = PointerGuard(self._settings.worker.data_folder, models.name, models.trusted())
        return self._guard.accept(record.key, record.value)

    def _refuse(self, role: str, version: str, generation: int, error: BundleError) -> None:
        self.refused[role] = Refused(role, version, generation, error.reason, error.detail)
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
            due = self._next()
            if not self.decided.is_set() and (due is None or due[0] != "live"):
                self._decide()
            if due is None:
                await self._wait()
            else:
                await self._prepare_until_news(*due)

    async def _wait(self) -> None:
        """Wait for news, or for the time at which something is due."""
        named = self._named_keys()
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
        pointer, live = self._state.wanted.get("live"), self._slot.live
        is_waiting = pointer is not None and _key(pointer) in self._state.retries
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

    def _named_keys(self) -> set[tuple[str, str]]:
        """Return the versions that have a role; a live role that was taken away is the bootstrap's."""
        wanted = self._state.wanted.items()
        return {_key(pointer) for role, pointer in wanted if role == "live" or not pointer.is_withdrawal}

    def _next(self) -> tuple[Role, Pointer] | None:
        """Return the pointer whose version is to be prepared next: the live one first."""
        now = time.monotonic()
        for role in ("live", "candidate", "previous"):
            pointer = self._state.wanted.get(role)
            if pointer is None or (pointer.is_withdrawal and role != "live"):
                continue
            key = _key(pointer)
            retry = self._state.retries.get(key)
            if (
                key not in self._state.held
                and (role, pointer.generation) not in self._state.given_up
                and (retry is None or retry.at <= now)
            ):
                return role, pointer
        return None

    async def _assign(self) -> None:
        """Give each role the model that its pointer names, as far as it is prepared; free what no role names."""
        slot, wanted, held = self._slot, self._state.wanted, self._state.held
        models: dict[Role, ServingModel | None] = {}
        for role in ROLES:
            pointer = wanted.get(role)
            is_none = pointer is None or (pointer.is_withdrawal and role != "live")
            found = None if pointer is None or is_none else held.get(_key(pointer))
            models[role] = None if pointer is None or found is None else found.model.under(pointer.generation)
        live = models["live"] or slot.live
        before = slot.by_role()
        after = {"live": live, "candidate": models["candidate"], "previous": models["previous"]}
        if _roles(before) != _roles(after):
            try:
                await self._take(live, models["candidate"], models["previous"])
            except Exception as error:
                log.exception("switch_failed", version=live.version)
                pointer = wanted.get("live")
                if pointer is None or live is slot.live:
                    raise
                wanted.pop("live")
                self._give_up("live", pointer, BundleError("switch-failed", f"{error!r}; the model in use stays"))
        await self._free()

    async def _take(self, live: ServingModel, candidate: ServingModel | None, previous: ServingModel | None) -> None:
        slot = self._slot
        old = slot.live
        shadows = [m for m in (candidate, previous) if m is not None and m.version != live.version]
        await self._switch(live, shadows if self._settings.models.shadow else [])
        slot.live, slot.candidate, slot.previous = live, candidate, previous
        if (live.version, live.generation) != (old.version, old.generation):
            log.info(
                "model_live", version=live.version, generation=live.generation, space=live.space_id, was=old.version
            )
        self._metrics.set_roles(slot.by_role())
        self.changed.set()

    async def _free(self) -> None:
        """Free the versions that no role names and nobody serves with."""
        state, slot, now = self._state, self._slot, time.monotonic()
        named = self._named_keys() | {self._serving_key()}
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

    def _serving_key(self) -> tuple[str, str]:
        """Return the held version that serves, which need not be the one that the topic names."""
        live = self._slot.live
        return next(key for key, held in self._state.held.items() if held.model.is_same_version(live))

    # -- preparing -----------------------------------------------------------------------------------------------

    async def _prepare_until_news(self, role: Role, pointer: Pointer) -> None:
        """Prepare; give it up where the topic comes to say something more urgent."""
        preparing = asyncio.create_task(self._try(role, pointer), name=f"prepare-{pointer.version}")
        gives_up = False
        try:
            while not preparing.done():
                news = asyncio.create_task(self._news.wait())
                await asyncio.wait(
                    {preparing, news}, timeout=self._seconds_to_live(role), return_when=asyncio.FIRST_COMPLETED
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
                due = self._next()
                if due is None or _key(due[1]) != _key(pointer):
                    log.info("preparation_given_up", version=pointer.version)
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

    def _live_retry(self) -> _Retry | None:
        """Return when the live version is asked for again, None where it is not waited for."""
        pointer = self._state.wanted.get("live")
        return None if pointer is None else self._state.retries.get(_key(pointer))

    def _seconds_to_live(self, preparing: Role) -> float | None:
        """Return how long the preparation of a role may go on undisturbed; None: until there is news."""
        retry = self._live_retry()
        if retry is None:
            return None
        waits = [retry.at] if preparing != "live" else []
        if not self.decided.is_set():
            waits.append(self._patience_ends_at())
        return max(0.0, min(waits) - time.monotonic()) if waits else None

    async def _try(self, role: Role, pointer: Pointer) -> None:
        key = _key(pointer)
        started = time.perf_counter()
        try:
            held = await self._prepare(pointer)
        except (RegistryError, OSError) as error:
            retry = self._state.retries.setdefault(key, _Retry())
            seconds = min(RETRY_MAX_SECONDS, RETRY_SECONDS * 2**retry.attempts)
            retry.attempts += 1
            retry.at = time.monotonic() + seconds
            self._metrics.unreachable.inc()
            log.warning("model_unreachable", version=pointer.version, retry_seconds=seconds, error=str(error))
            return
        except BundleError as error:
            self._give_up(role, pointer, error)
            return
        except Exception as error:
            log.exception("preparation_failed", version=pointer.version)
            self._give_up(role, pointer, BundleError("preparation-failed", f"{error!r}; the model in use stays"))
            return
        self._state.retries.pop(key, None)
        self._state.held[key] = held
        seconds = time.perf_counter() - started
        self._metrics.prepare_seconds.observe(seconds)
        self.changed.set()
        log.info("model_prepared", role=role, version=pointer.version, seconds=round(seconds, 3))

    def _give_up(self, role: Role, pointer: Pointer, error: BundleError) -> None:
        self._state.given_up.add((role, pointer.generation))
        self._state.retries.pop(_key(pointer), None)
        self._refuse(role, pointer.version, pointer.generation, error)

    async def _prepare(self, pointer: Pointer) -> _Held:
        """Return a version that may serve. Raises BundleError, RegistryError and OSError."""
        if pointer.is_bootstrap or pointer.is_withdrawal:
            self._preparing = self._slot.bootstrap_space
            space = await self._item_space(self._slot.bootstrap_space)
            return _Held(_bootstrap(space), space)
        stop = threading.Event()
        try:
            # A time-out is an OSError: asked again like any registry that is not reached.
            async with asyncio.timeout(self._settings.models.fetch_timeout_seconds):
                bundle = await self._in_background(self._load, pointer, stop)
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
        return _Held(_served(bundle, item_space), item_space)

    async def _prune_cache(self) -> None:
        models = self._settings.models
        keep = {p.version for p in self._state.wanted.values()} | {m.version for m in self._slot.by_role().values()}
        try:
            await self._in_background(prune_cache, models.cache_folder, keep, models.cache_bundles)
        except OSError as error:
            log.warning("cache_not_pruned", folder=str(models.cache_folder), error=repr(error))

    def _load(self, pointer: Pointer, stop: threading.Event) -> Bundle:
        models = self._settings.models
        folder = self._registry.fetch(pointer.version, models.cache_folder, manifest_sha256=pointer.manifest_sha256)
        if stop.is_set():
            raise RegistryError(f"{pointer.version} was fetched when nobody waited for it any more; it is in the cache")
        bundle = load(
            folder, models.trusted(), manifest_sha256=pointer.manifest_sha256, max_bytes=models.max_bundle_bytes
        )
        if (bundle.manifest.name, bundle.version) != (models.name, pointer.version):
            raise BundleError("wrong-name", f"{pointer.version} is {bundle.version} of {bundle.manifest.name!r}")
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


def _served(bundle: Bundle, items: ItemSpace) -> ServingModel:
    manifest = bundle.manifest
    carry = None
    if bundle.carry is not None and manifest.carry_from is not None:
        carry = (hash64(manifest.carry_from), bundle.carry)
    return ServingModel(
        version=bundle.version,
        generation=0,
        space=items.space,
        scorer=bundle.scorer,
        features=bundle.features,
        vectors=items.vectors,
        vector_index=items.index,
        carry=carry,
        window_end_ms=manifest.window.to_ms or None,
    )


def _bootstrap(items: ItemSpace) -> ServingModel:
    return ServingModel(BOOTSTRAP_VERSION, 0, items.space, None, None, items.vectors, items.index)


def _key(pointer: Pointer) -> tuple[str, str]:
    """Return what tells versions apart; a live role that was taken away is the bootstrap's."""
    return (pointer.version or BOOTSTRAP_VERSION, pointer.manifest_sha256)


def _roles(models: Mapping[str, ServingModel | None]) -> dict[str, tuple[str, int]]:
    return {role: (m.version, m.generation) for role, m in models.items() if m is not None}


def _named(record: Record) -> tuple[str, str, int]:
    """Return role, version and generation that a refused record names, as far as it can be read."""
    role = (record.key or b"").decode("utf-8", "replace").rpartition("/")[2][:100]
    try:
        pointer = decode(record.key, record.value or b"")
    except BundleError:
        return role, "", 0
    return role, pointer.version, pointer.generation


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
