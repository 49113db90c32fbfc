"""`millstream models`: what is published, which version has which role, and the operator's promotion and rollback.

The operator's word goes before the trainer's: a pointer takes the next generation, whoever sent the one before.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from aiokafka import ConsumerRecord

from models.bundle import Bundle, load
from models.errors import BundleError, MillstreamError, SettingsError
from models.manifest import BOOTSTRAP_VERSION, MANIFEST, Manifest, check_version
from models.pointer import (
    Pointer,
    Pointers,
    decode,
    newest,
    plan_candidate,
    plan_promotion,
    plan_rollback,
    plan_withdrawal,
)
from models.registry import Registry
from models.signing import PrivateKey
from streams.model_status import WorkerStatus
from streams.model_wanted import ARM
from streams.sender import Outbox
from streams.settings import ModelSettings, Settings
from streams.topic_io import TopicWriter, open_topic
from streams.topics import TopicNames

OPERATOR: Final = "operator"
SILENT_INTERVALS: Final = 3.0
"""A worker that said nothing for so many status intervals is not waited for."""
POLL_SECONDS: Final = 0.5
ATTEMPTS: Final = 3
"""How often roles are announced again because somebody else announced at the same moment."""
LEFTOVER_HOURS: Final = 24.0
"""A half upload that nobody touched for so long is nobody's any more."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Situation:
    """What the topics ``models`` and ``model-status`` say now."""

    pointers: Pointers
    workers: list[WorkerStatus]
    """Those that live: they said something within SILENT_INTERVALS status intervals."""

    def serving(self, version: str) -> list[WorkerStatus]:
        """Return the workers that serve a version."""
        return [w for w in self.workers if w.live.version == version]

    def prepared(self, version: str) -> list[WorkerStatus]:
        """Return the workers that could serve a version at once."""
        return [w for w in self.workers if w.live.version == version or any(p.version == version for p in w.prepared)]

    def refusals(self, version: str, generation: int) -> list[str]:
        """Return why workers refused a version that was announced at ``generation`` or later."""
        return [
            f"worker {worker.worker_id}: {refused.detail}"
            for worker in self.workers
            for refused in worker.refused
            if refused.version == version and refused.generation >= generation
        ]


@dataclass(frozen=True, slots=True)
class Listed:
    """One version, for ``millstream models list``."""

    version: str
    manifest: Manifest | None
    """None for the bootstrap, and where the registry has no such version (any more) or it cannot be read."""
    roles: list[str]
    """Those of pointers, and ``arm`` where a worker that lives names it for an arm of its experiment."""
    serving: int
    """Workers that serve it."""
    problem: str | None = None

    def described(self) -> dict[str, Any]:
        """Return it as plain data."""
        told: dict[str, Any] = {"version": self.version, "roles": self.roles, "serving": self.serving}
        if self.manifest is not None:
            told["manifest"] = msgspec.to_builtins(self.manifest)
        return told | ({"problem": self.problem} if self.problem else {})

    def line(self) -> str:
        """Return it as one line."""
        manifest = self.manifest
        facts = [self.problem or "in every program"]
        if manifest is not None:
            auc = manifest.metrics.get("auc")
            facts = [
                f"made {_time(manifest.created_ms)}",
                f"from {manifest.parent or BOOTSTRAP_VERSION}",
                f"window {_time(manifest.window.from_ms)} to {_time(manifest.window.to_ms)}",
                f"{manifest.window.impressions:,} impressions",
                f"AUC {auc:.4f}" if auc is not None else "no AUC",
                _size(manifest.total_bytes),
            ]
        roles = ", ".join(self.roles) or "no role"
        served = f", serves on {self.serving} worker{'s' if self.serving != 1 else ''}" if self.serving else ""
        return f"{self.version}  {roles}{served}; {', '.join(facts)}"


@dataclass(slots=True)
class Collected:
    """What ``gc`` did, or would do."""

    removed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)


async def situation(settings: Settings) -> Situation:
    """Read both topics to their ends. Raises BrokerUnavailable and LayoutError."""
    names = TopicNames.of(settings)
    pointers = newest(await _last_values(settings, names.models), settings.models.name)
    now_ms = _now_ms()
    oldest_ms = now_ms - SILENT_INTERVALS * settings.models.status_interval_seconds * 1000
    workers = []
    for value in (await _last_values(settings, names.model_status)).values():
        try:
            worker = msgspec.json.decode(value, type=WorkerStatus)
        except msgspec.DecodeError:
            # A worker of another version: it is no reason to stop an operator, it is not counted.
            continue
        if worker.time_ms >= oldest_ms:
            workers.append(worker)
    return Situation(pointers, sorted(workers, key=lambda w: w.worker_id))


async def listing(settings: Settings) -> tuple[list[Listed], Situation]:
    """Return every published version and every one that has a role, is served or named for an arm, newest name last."""
    registry = Registry(settings.models)
    found = await situation(settings)
    published = await asyncio.to_thread(registry.versions)
    arms = {arm.version for worker in found.workers for arm in worker.arms}
    named = {p.version for p in found.pointers.roles.values()} | {w.live.version for w in found.workers} | arms
    rows = []
    for version in sorted({*published, *named}):
        manifest, problem = None, None
        if version != BOOTSTRAP_VERSION:
            try:
                manifest = await asyncio.to_thread(registry.manifest, version)
            except BundleError as error:
                problem = error.reason
        roles = [*found.pointers.roles_of(version), *([ARM] if version in arms else [])]
        rows.append(Listed(version, manifest, roles, len(found.serving(version)), problem))
    return rows, found


def show(settings: Settings, version: str) -> dict[str, Any]:
    """Return a version's manifest and what was decided about it, as plain data. Raises BundleError."""
    registry = Registry(settings.models)
    manifest = registry.manifest(version)
    return {
        "manifest": msgspec.to_builtins(manifest),
        "manifest_sha256": registry.manifest_sha256(version),
        "bytes": manifest.total_bytes,
        "decisions": registry.decisions(version),
    }


async def promote(
    settings: Settings, version: str, *, timeout_seconds: float, now: bool, why: str, say: Say
) -> Situation:
    """Make a version live: as candidate first, until the workers that live have prepared it, then live.

    With ``now`` the first phase is left out. Raises BundleError where a worker refuses it or none prepares it within
    the time; its candidacy is taken back then, and what serves stays.
    """
    registry, signer = Registry(settings.models), _signer(settings.models)
    if version == BOOTSTRAP_VERSION:
        sha256 = ""
    else:
        sha256 = await asyncio.to_thread(registry.manifest_sha256, check_version(version))
        # Said here rather than by every worker: a manifest that this program would refuse.
        await asyncio.to_thread(registry.manifest, version)
    said: dict[str, Any] = {"by": OPERATOR, "why": why}
    found = await situation(settings)
    if not now:
        planned = plan_candidate(found.pointers, version, sha256, at_ms=_now_ms(), **said)
        (candidate,), found = await _announce(settings, planned, signer)
        say(f"{version} is the candidate, generation {candidate.generation}; waiting until workers have prepared it")
        try:
            found = await _until_prepared(settings, version, candidate.generation, timeout_seconds, say)
        except BundleError:
            current = (await situation(settings)).pointers
            if current.version("candidate") == version:
                back = plan_withdrawal(current, "candidate", at_ms=_now_ms(), by=OPERATOR, why="not prepared")
                await _announce(settings, back, signer)
            raise
    planned = plan_promotion(found.pointers, version, sha256, at_ms=_now_ms(), **said)
    (live, *_), _ = await _announce(settings, planned, signer)
    await _record(registry, version, "promoted", live, say)
    return await _until_serving(settings, live, timeout_seconds, say)


async def rollback(settings: Settings, *, timeout_seconds: float, why: str, say: Say) -> Situation:
    """Make the previous version live again. Raises BundleError (``no-previous``)."""
    signer = _signer(settings.models)
    current = (await situation(settings)).pointers
    planned = plan_rollback(current, at_ms=_now_ms(), by=OPERATOR, why=why)
    left = current.version("live")
    (live, *_), _ = await _announce(settings, planned, signer)
    if left is not None:
        await _record(Registry(settings.models), left, "rolled back", live, say)
    return await _until_serving(settings, live, timeout_seconds, say)


def verify(settings: Settings, what: str | None) -> list[tuple[str, Bundle | BundleError]]:
    """Fetch and check a version, a bundle's folder, or with None every published version: the bundle, or why not.

    Everything that a worker checks, the canary included; versions are fetched anew, past the cache.
    """
    models = settings.models
    registry = Registry(models)
    if what is not None and (Path(what) / MANIFEST).is_file():
        return [(what, _checked(models, Path(what)))]
    results: list[tuple[str, Bundle | BundleError]] = []
    for version in [check_version(what)] if what is not None else registry.versions():
        with tempfile.TemporaryDirectory(prefix="millstream-verify-") as aside:
            try:
                folder = registry.fetch(version, Path(aside))
            except BundleError as error:
                results.append((version, error))
            else:
                results.append((version, _checked(models, folder)))
    return results


async def collect(settings: Settings, *, keep: int, dry_run: bool) -> Collected:
    """Remove published versions but the newest ``keep``, those with a role or served, and the parents of those.

    Those too that a worker which lives names for an arm of its experiment; of other settings nothing is known here.
    Also what half uploads of LEFTOVER_HOURS ago left. Raises BrokerUnavailable: without the roles nothing is removed.
    """
    rows, found = await listing(settings)
    published = {row.version: row.manifest for row in rows if row.manifest is not None}
    in_use = {row.version for row in rows if row.roles or row.serving}
    in_use |= {p.version for worker in found.workers for p in worker.prepared}
    parents = {manifest.parent for version, manifest in published.items() if version in in_use and manifest.parent}
    by_age = sorted(published, key=lambda version: (published[version].created_ms, version))
    kept = in_use | parents | set(by_age[len(by_age) - keep :])
    registry = Registry(settings.models)
    result = Collected(kept=[v for v in by_age if v in kept])
    for version in by_age:
        if version not in kept:
            if not dry_run:
                await asyncio.to_thread(registry.remove, version)
            result.removed.append(version)
    if not dry_run:
        before_ms = _now_ms() - round(LEFTOVER_HOURS * 3_600_000)
        result.leftovers = await asyncio.to_thread(registry.remove_leftovers, before_ms)
    return result


def details(told: dict[str, Any]) -> list[str]:
    """Return what ``show`` found as lines for a person."""
    manifest, window = told["manifest"], told["manifest"]["window"]
    lines = [
        f"version        {manifest['version']} of {manifest['name']!r}, from {manifest['parent'] or BOOTSTRAP_VERSION}",
        f"made           {_time(manifest['created_ms'])}",
        f"manifest       {told['manifest_sha256']}",
        f"space          {manifest['space_id']}",
        f"encoder        {manifest['encoder_id']}",
        f"features       {manifest['feature_spec']}",
        f"learned from   {_time(window['from_ms'])} to {_time(window['to_ms'])}: "
        f"{window['impressions']:,} impressions, {window['examples']:,} examples, {window['users']:,} users",
    ]
    lines += [f"  {r['topic']}/{r['partition']}: offsets {r['start']} to {r['end']}" for r in window["ranges"]]
    lines += [f"metric         {name} = {value:.6g}" for name, value in sorted(manifest["metrics"].items())]
    lines += [f"file           {name}, {_size(entry['bytes'])}" for name, entry in sorted(manifest["files"].items())]
    decisions = [*([manifest["decision"]] if manifest["decision"] else []), *told["decisions"]]
    return lines + [f"decision       {msgspec.json.encode(d, order='sorted').decode()}" for d in decisions]


async def _until_prepared(
    settings: Settings, version: str, generation: int, timeout_seconds: float, say: Say
) -> Situation:
    deadline = time.monotonic() + timeout_seconds
    while True:
        found = await situation(settings)
        refusals = found.refusals(version, generation)
        if refusals:
            raise BundleError(
                "refused-by-workers", f"{version} was not promoted, what serves stays:\n" + "\n".join(refusals)
            )
        prepared = found.prepared(version)
        if not found.workers:
            say("no worker lives now; the next one that starts will take it")
            return found
        if len(prepared) == len(found.workers):
            say(f"prepared by all {len(prepared)} workers")
            return found
        if time.monotonic() > deadline:
            missing = ", ".join(w.worker_id for w in found.workers if w not in prepared)
            if not prepared:
                raise BundleError(
                    "not-prepared",
                    f"no worker prepared {version} within {timeout_seconds:g} s; it was not promoted, what serves "
                    "stays. Look at their logs, give more --timeout, or force it with --now",
                )
            say(f"prepared by {len(prepared)} of {len(found.workers)} workers; going on without {missing}")
            return found
        await asyncio.sleep(POLL_SECONDS)


async def _until_serving(settings: Settings, live: Pointer, timeout_seconds: float, say: Say) -> Situation:
    deadline = time.monotonic() + timeout_seconds
    while True:
        found = await situation(settings)
        serving = [w for w in found.workers if (w.live.version, w.live.generation) == (live.version, live.generation)]
        if len(serving) == len(found.workers) or time.monotonic() > deadline:
            say(
                f"{live.version} is live, generation {live.generation}; "
                f"{len(serving)} of {len(found.workers)} workers serve it"
            )
            for line in found.refusals(live.version, live.generation):
                say(f"refused by {line}")
            return found
        await asyncio.sleep(POLL_SECONDS)


async def _announce(
    settings: Settings, planned: Sequence[Pointer], signer: PrivateKey | None
) -> tuple[list[Pointer], Situation]:
    """Send pointers in their order, each acknowledged before the next; return them and what the topics say then.

    Where somebody else took one of their generations at the same moment, they are sent again under higher ones:
    the operator's word stands. Raises BundleError (``another-decider``) where that does not end.
    """
    topic = TopicNames.of(settings).models
    sent: list[Pointer] = []
    async with TopicWriter(settings, topic) as writer:
        for _ in range(ATTEMPTS):
            wave = [p.signed(signer) for p in planned]
            for pointer in wave:
                outbox = Outbox()
                writer.add(outbox, topic, pointer.key, pointer.encode())
                await writer.send(outbox)
            sent += wave
            others = [p for p in await _announced(settings) if p not in sent]
            highest = max((p.generation for p in others), default=0)
            if highest < wave[0].generation:
                return wave, await situation(settings)
            first = max(highest, wave[-1].generation) + 1
            planned = [msgspec.structs.replace(p, generation=first + i, signature=None) for i, p in enumerate(planned)]
    raise BundleError(
        "another-decider",
        f"somebody else announced roles {ATTEMPTS} times at the same moment. Look at `millstream models list`, and end "
        "one of the deciders before you announce again",
    )


async def _announced(settings: Settings) -> list[Pointer]:
    """Return every pointer of the name that still stands on the topic, older ones of a role included."""
    found = []
    for record in await _records(settings, TopicNames.of(settings).models):
        if record.value is not None:
            with contextlib.suppress(BundleError):
                found.append(decode(record.key, record.value))
    return [p for p in found if p.name == settings.models.name]


async def _record(registry: Registry, version: str, what: str, live: Pointer, say: Say) -> None:
    if version == BOOTSTRAP_VERSION:
        return
    decision = {"decision": what, "by": live.by, "why": live.why, "generation": live.generation, "live": live.version}
    try:
        await asyncio.to_thread(registry.record_decision, version, decision, live.announced_ms)
    except MillstreamError as error:
        # The roles have changed already: the record is for people.
        say(f"the decision was not recorded: {error}")


async def _records(settings: Settings, topic: str) -> list[ConsumerRecord]:
    async with open_topic(settings, topic) as opened:
        return [r async for r in opened.read(await opened.begin_offsets(), await opened.end_offsets())]


async def _last_values(settings: Settings, topic: str) -> dict[bytes, bytes]:
    last = {r.key: r.value for r in await _records(settings, topic)}
    return {key: value for key, value in last.items() if key is not None and value is not None}


def _checked(models: ModelSettings, folder: Path) -> Bundle | BundleError:
    try:
        bundle = load(folder, models.trusted(), max_bytes=models.max_bundle_bytes)
        bundle.check_canary()
    except BundleError as error:
        return error
    return bundle


def _signer(models: ModelSettings) -> PrivateKey | None:
    signer = models.signer()
    if signer is None and models.public_key is not None:
        raise SettingsError(
            "models.public_key is set, so workers take nothing unsigned, and models.private_key_file is not: "
            "nothing was announced. Set it to the private key's file"
        )
    return signer


def _time(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}" if at_ms else "?"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count:,} bytes"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def lines(rows: Iterable[Listed], found: Situation) -> list[str]:
    """Return what ``listing`` found as lines for a person."""
    told = [row.line() for row in rows]
    refused = [
        f"refused by worker {worker.worker_id}: {r.version or 'a record'} as {r.role!r}: {r.reason}: {r.detail}"
        for worker in found.workers
        for r in worker.refused
    ]
    arms = [
        f"{a.version} of an arm is not ready on worker {worker.worker_id}, the live version serves: "
        + (f"{a.reason}: {a.detail}" if a.reason else "in preparation")
        for worker in found.workers
        for a in worker.arms
        if not a.is_ready
    ]
    workers = len(found.workers)
    said = f"{workers} worker{'s' if workers != 1 else ''} live, generation {found.pointers.generation}"
    return [*(told or ["nothing is published; workers serve with the bootstrap"]), *refused, *arms, said]
