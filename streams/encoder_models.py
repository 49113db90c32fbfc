"""Which encoders the encoder process needs: that of the settings, those of the bundles that a role or an arm names.

Follows the ``models`` topic as the worker does, and takes a pointer and a bundle as strictly. A bundle that fails
costs its encoder alone: what is loaded goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import structlog

from models.bundle import load
from models.errors import BundleError, EncoderError, RegistryError
from models.hashing import hash64
from models.manifest import BOOTSTRAP_VERSION
from models.pointer import Pointer, PointerGuard, Role, decode
from models.registry import Registry
from streams.item_encoder import Encoder
from streams.mirror import Mirror, Record
from streams.settings import Settings
from streams.topics import TopicNames

log = structlog.get_logger(__name__)

RANKS: Final[dict[Role, int]] = {"live": 0, "candidate": 1, "previous": 2}
"""Whose items are encoded first."""
ARM_RANK: Final = 3
UNNAMED_RANK: Final = 4
GUARD_FOLDER: Final = "encoder-process"
"""The worker beside this process keeps the generations that it has seen for itself."""
RETRY_SECONDS: Final = 1.0
RETRY_MAX_SECONDS: Final = 60.0
SETTLE_SECONDS: Final = 0.3
"""A promotion is several records: what is live goes first, and is previous a moment later."""

LoadDelta = Callable[[Path], Encoder]
"""Load the encoder that a bundle's folder ``encoder/`` makes; raises EncoderError."""
Key = tuple[str, str]
"""Version and manifest: what tells bundles apart. The manifest is empty where an arm's settings name the version."""


@dataclass(frozen=True, slots=True, eq=False)
class Brought:
    """The encodings that a bundle brings, as hashes of items, rising, with the hash of each one's text."""

    items: npt.NDArray[np.uint64]
    contents: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, items: npt.NDArray[np.uint64], contents: npt.NDArray[np.uint64]) -> Brought:
        """Return pairs [n] in any order."""
        order = np.argsort(items, kind="stable")
        return cls(items[order], contents[order])

    def has(self, item_id: str, hashed: int) -> bool:
        """Tell whether the encoding of an item whose text has this hash is among them."""
        item = np.uint64(hash64(item_id))
        place = int(np.searchsorted(self.items, item))
        return place < len(self.items) and self.items[place] == item and int(self.contents[place]) == hashed


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """What is known of a bundle: the encoder that it needs, and which encodings it brings."""

    encoder_id: str
    brought: Brought | None


@dataclass(slots=True)
class _Retry:
    attempts: int = 0
    at: float = 0.0


class EncoderModels:
    """The loaded encoders, by id, as roles and arms need them: at most one for each beside that of the settings."""

    def __init__(
        self,
        settings: Settings,
        base: Encoder,
        load_delta: LoadDelta,
        on_refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """``load_delta`` runs in a thread of its own. ``on_refused`` is called with the reason of each refusal."""
        self.base = base
        self.encoders: dict[str, Encoder] = {base.encoder_id: base}
        self.changed = asyncio.Event()
        """Set when an encoder was loaded or dropped, or another bundle needs one."""
        self.mirror = Mirror(settings, TopicNames.of(settings).models, self.apply)
        self._settings = settings
        self._load_delta = load_delta
        self._on_refused = on_refused
        self._registry = Registry(settings.models)
        self._guard: PointerGuard | None = None
        self._unread: list[Record] = []
        self._wanted: dict[Role, Pointer] = {}
        self._arms: tuple[Key, ...] = tuple((v, "") for v in settings.recommender.experiment.bundles)
        self._foreign: set[bytes] = set()
        """Keys of roles of other names that something has: their encoders are not known here."""
        self._known: dict[Key, Known] = {}
        self._refused: set[Key] = set()
        self._retries: dict[Key, _Retry] = {}
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Follow the topic until cancelled; an error of our own code is raised."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.mirror.run(), name="mirror-models")
            tasks.create_task(self.follow(), name="follow-models")

    def name_arms(self, versions: Sequence[str]) -> None:
        """Load what these versions need from now on too, which arms of an experiment name; refused ones again."""
        self._arms = tuple((version, "") for version in versions)
        self._refused -= set(self._arms)
        for key in self._arms:
            self._retries.pop(key, None)
        self._news.set()

    def rank(self, encoder_id: str) -> int:
        """Return whose items go first: those of the live encoder have the lowest rank."""
        if "live" not in self._wanted and encoder_id == self.base.encoder_id:
            return RANKS["live"]
        ranks = [RANKS[role] for role, pointer in self._wanted.items() if self._encoder_of(_key(pointer)) == encoder_id]
        ranks += [ARM_RANK for key in self._arms if self._encoder_of(key) == encoder_id]
        return min(ranks, default=UNNAMED_RANK)

    def named(self) -> set[str] | None:
        """Return the ids of encoders that may be needed; None while it is not known of which one a role's bundle is.

        So too while a model of another name has a role: its workers may read the same items. That of the settings is
        always among them: a worker whose bundle is refused serves with it.
        """
        if not self.mirror.caught_up.is_set() or self._unread or self._foreign:
            return None
        ids = {self._encoder_of(key) for key in self._keys()}
        found = {encoder_id for encoder_id in ids if encoder_id is not None} | {self.base.encoder_id}
        return None if None in ids else found

    def bundles_of(self, encoder_id: str) -> frozenset[Key]:
        """Return the bundles that a role or an arm names and that need an encoder."""
        known = ((key, self._known.get(key)) for key in self._keys())
        return frozenset(key for key, bundle in known if bundle is not None and bundle.encoder_id == encoder_id)

    def is_brought(self, encoder_id: str, item_id: str, hashed: int) -> bool:
        """Tell whether every named bundle that needs an encoder brings the encoding of an item's text.

        One that does not bring it needs it on the topic: it may be the first that a worker loads.
        """
        bundles = [self._known[key] for key in self.bundles_of(encoder_id)]
        return bool(bundles) and all(b.brought is not None and b.brought.has(item_id, hashed) for b in bundles)

    # -- pointers ------------------------------------------------------------------------------------------------

    def apply(self, records: Sequence[Record]) -> None:
        """Take records of ``models``; ``follow`` acts on them."""
        self._unread += records
        self._news.set()

    def _read_pointers(self) -> None:
        # All of them, in order: the last one of a key may be an old pointer announced again, or nobody's.
        unread, self._unread = self._unread, []
        last = {record.key: place for place, record in enumerate(unread)}
        for place, record in enumerate(unread):
            try:
                pointer = self._accept(record)
            except BundleError as error:
                # Older values of a key may stand on the topic until it is compacted: they are no older announcement.
                if error.reason != "old-generation" or place == last[record.key]:
                    log.warning("pointer_refused", reason=error.reason, detail=error.detail)
                    self._on_refused(error.reason)
                continue
            except RegistryError as error:
                log.error("pointer_not_kept", error=str(error))
                self._unread = unread[place:]
                return
            if pointer is None:
                self._note_foreign(record)
            elif pointer.is_withdrawal:
                self._wanted.pop(pointer.role, None)
            else:
                self._wanted[pointer.role] = pointer

    def _accept(self, record: Record) -> Pointer | None:
        if self._guard is None:
            models = self._settings.models
            folder = self._settings.worker.data_folder / GUARD_FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            self._guard = PointerGuard(folder, models.name, models.trusted())
        return self._guard.accept(record.key, record.value)

    def _note_foreign(self, record: Record) -> None:
        key = record.key or b""
        try:
            is_held = record.value is not None and not decode(record.key, record.value).is_withdrawal
        except BundleError:
            # Not ours to judge; nothing is taken away meanwhile.
            is_held = True
        (self._foreign.add if is_held else self._foreign.discard)(key)

    def _keys(self) -> list[Key]:
        """Return the bundles that are named: by roles, the live one first, then by arms."""
        roles = [_key(self._wanted[role]) for role in RANKS if role in self._wanted]
        return list(dict.fromkeys([*roles, *self._arms]))

    def _encoder_of(self, key: Key) -> str | None:
        """Return the id of the encoder that a bundle needs, None where it is not known."""
        if key[0] == BOOTSTRAP_VERSION:
            return self.base.encoder_id
        known = self._known.get(key)
        return known.encoder_id if known else None

    # -- bundles -------------------------------------------------------------------------------------------------

    async def follow(self) -> None:
        """Load and drop encoders as the records say, until cancelled."""
        await self.mirror.caught_up.wait()
        while True:
            self._news.clear()
            self._read_pointers()
            self._drop()
            key = self._next()
            if key is not None:
                await self._try(key)
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), self._seconds_to_retry())
                await asyncio.sleep(SETTLE_SECONDS)

    def _drop(self) -> None:
        """Let go what nothing names any more, before anything else is loaded."""
        keys = set(self._keys())
        self._known = {key: known for key, known in self._known.items() if key in keys}
        self._refused &= keys
        self._retries = {key: retry for key, retry in self._retries.items() if key in keys}
        needed = {known.encoder_id for known in self._known.values()} | {self.base.encoder_id}
        dropped = self.encoders.keys() - needed
        self.encoders = {e: encoder for e, encoder in self.encoders.items() if e in needed}
        for encoder_id in sorted(dropped):
            log.info("encoder_dropped", encoder=encoder_id)
        self.changed.set()

    def _next(self) -> Key | None:
        """Return the bundle that is to be read next, the live one first."""
        now = time.monotonic()
        for key in self._keys():
            retry = self._retries.get(key)
            is_open = key[0] != BOOTSTRAP_VERSION and key not in self._known and key not in self._refused
            if is_open and (retry is None or retry.at <= now):
                return key
        return None

    def _seconds_to_retry(self) -> float | None:
        waits = [retry.at - time.monotonic() for retry in self._retries.values()]
        waits += [RETRY_SECONDS] if self._unread else []
        return max(0.01, min(waits)) if waits else None

    async def _try(self, key: Key) -> None:
        version = key[0]
        # A thread of its own: a fetch that hangs stands before no other one, nor before what else uses threads.
        executor = ThreadPoolExecutor(1, "encoder-preparation")
        try:
            # A time-out is an OSError: asked again like any registry that is not reached.
            async with asyncio.timeout(self._settings.models.fetch_timeout_seconds):
                known, encoder = await asyncio.get_running_loop().run_in_executor(executor, self._read, key)
        except (RegistryError, OSError) as error:
            log.warning("bundle_unreachable", version=version, retry_seconds=self._try_later(key), error=repr(error))
            return
        except (BundleError, EncoderError) as error:
            reason = error.reason if isinstance(error, BundleError) else "encoder"
            if key in self._arms and reason == "not-in-registry":
                # No pointer will tell when it is published.
                log.warning("bundle_not_published", version=version, retry_seconds=self._try_later(key))
                return
            log.error("encoder_refused", version=version, reason=reason, error=str(error))
            self._refuse(key, reason)
            return
        except Exception:
            # A bundle must not cost the encoders that work their process.
            log.exception("encoder_not_loaded", version=version)
            self._refuse(key, "unexpected")
            return
        finally:
            executor.shutdown(wait=False)
        self._retries.pop(key, None)
        self._known[key] = known
        if encoder is not None:
            self.encoders = {**self.encoders, encoder.encoder_id: encoder}
            log.info("encoder_loaded", encoder=encoder.encoder_id, version=version, rank=self.rank(encoder.encoder_id))
        self.changed.set()

    def _try_later(self, key: Key) -> float:
        """Have a bundle asked for again; return in how many seconds."""
        retry = self._retries.setdefault(key, _Retry())
        seconds: float = min(RETRY_MAX_SECONDS, RETRY_SECONDS * 2**retry.attempts)
        retry.attempts += 1
        retry.at = time.monotonic() + seconds
        return seconds

    def _refuse(self, key: Key, reason: str) -> None:
        self._on_refused(reason)
        self._refused.add(key)

    def _read(self, key: Key) -> tuple[Known, Encoder | None]:
        """Return what a bundle needs, and its encoder where that one is not loaded yet."""
        models = self._settings.models
        version, sha256 = key[0], key[1] or None
        folder = self._registry.fetch(version, models.cache_folder, manifest_sha256=sha256)
        bundle = load(folder, models.trusted(), manifest_sha256=sha256, max_bytes=models.max_bundle_bytes)
        encoder_id, encodings = bundle.manifest.encoder_id, bundle.encodings
        brought = None if encodings is None else Brought.of(encodings.items, encodings.contents)
        if encoder_id in self.encoders:
            return Known(encoder_id, brought), None
        if bundle.encoder_folder is None:
            raise EncoderError(
                f"bundle {version} needs the encoder {encoder_id!r} and brings none; encoder.model gives "
                f"{self.base.encoder_id!r}: set it to the one that the bundle was trained with"
            )
        encoder = self._load_delta(bundle.encoder_folder)
        if encoder.encoder_id != encoder_id:
            raise EncoderError(
                f"the delta of bundle {version} makes {encoder.encoder_id!r}, its manifest says {encoder_id!r}"
            )
        return Known(encoder_id, brought), encoder


def lanes_of(models: EncoderModels) -> Mapping[str, frozenset[Key]]:
    """Return the lanes that are needed beside that of the settings: encoder id and the bundles that need it."""
    return {e: models.bundles_of(e) for e in models.encoders if e != models.base.encoder_id}


def _key(pointer: Pointer) -> Key:
    return pointer.version, pointer.manifest_sha256
