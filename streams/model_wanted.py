"""What a worker is to hold: the versions that roles and arms of an experiment name, and how far it is with each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from models.bundle import Bundle
from models.errors import BundleError
from models.hashing import hash64
from models.item_space import ItemSpace
from models.manifest import BOOTSTRAP_VERSION
from models.pointer import Pointer, Role, decode
from models.serving import ServingModel
from streams.mirror import Record

ARM: Final = "arm"
"""In the place of a role: an arm of the experiment names the version, in the settings."""
URGENCY: Final[tuple[Role, ...]] = ("live", "candidate", "previous")

Key = tuple[str, str]
"""Version and hash of the manifest: what tells versions apart. The bootstrap's hash is empty."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A pointer that was not followed, or whose bundle was not taken."""

    role: str
    version: str
    generation: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Target:
    """A version that is to be prepared, and what names it."""

    role: str
    version: str
    manifest_sha256: str
    """Empty for the bootstrap and for an arm, whose settings name the version alone."""
    generation: int

    @classmethod
    def of(cls, pointer: Pointer) -> Target:
        """Return what a pointer names; a live role that was taken away is the bootstrap's."""
        version = pointer.version or BOOTSTRAP_VERSION
        return cls(pointer.role, version, pointer.manifest_sha256, pointer.generation)

    @property
    def key(self) -> Key:
        """Return the key of its version, as far as it is known what manifest that has."""
        return self.version, self.manifest_sha256


@dataclass(frozen=True, slots=True)
class Held:
    """A version that is prepared."""

    model: ServingModel
    space: ItemSpace


@dataclass(slots=True)
class Retry:
    """When a version whose registry was not reached is asked for again (monotonic)."""

    attempts: int = 0
    at: float = 0.0


@dataclass(slots=True)
class Wanted:
    """What is known of roles, arms and versions."""

    pointers: dict[Role, Pointer] = field(default_factory=dict)
    arms: tuple[str, ...] = ()
    """Versions that arms name."""
    held: dict[Key, Held] = field(default_factory=dict)
    given_up: set[Target] = field(default_factory=set)
    """Those whose bundle was refused."""
    unnamed_at: dict[Key, float] = field(default_factory=dict)
    """Since when (monotonic) a held version has been named by nothing."""
    retries: dict[Key, Retry] = field(default_factory=dict)

    def name_arms(self, versions: Sequence[str]) -> None:
        """Take other versions for arms; those that were refused, or are waited for, are tried again now."""
        self.arms = tuple(versions)
        self.given_up = {target for target in self.given_up if target.role != ARM}
        for version in self.arms:
            self.retries.pop((version, ""), None)

    def for_arms(self) -> dict[str, ServingModel]:
        """Return the models that are prepared for arms, by version."""
        found = {version: self._of_version(version) for version in self.arms}
        return {version: held.model for version, held in found.items() if held is not None}

    def keys(self) -> set[Key]:
        """Return the versions that a role or an arm names; a live role that was taken away is the bootstrap's."""
        pointers = self.pointers.items()
        named = {Target.of(p).key for role, p in pointers if role == "live" or not p.is_withdrawal}
        named |= {(version, "") for version in self.arms}
        return named | {key for key in self.held if key[0] in self.arms}

    def next(self, now: float) -> Target | None:
        """Return what is to be prepared next: the live version first, those of arms last."""
        for target in self._targets():
            retry = self.retries.get(target.key)
            if not self._has(target) and target not in self.given_up and (retry is None or retry.at <= now):
                return target
        return None

    def _targets(self) -> list[Target]:
        pointers = [self.pointers[role] for role in URGENCY if role in self.pointers]
        roles = [Target.of(p) for p in pointers if p.role == "live" or not p.is_withdrawal]
        return roles + [Target(ARM, version, "", 0) for version in self.arms]

    def _has(self, target: Target) -> bool:
        return target.key in self.held or (target.role == ARM and self._of_version(target.version) is not None)

    def _of_version(self, version: str) -> Held | None:
        # A version is published once: under whatever manifest a role names it, it was fetched and verified.
        return next((held for key, held in self.held.items() if key[0] == version), None)


def served(bundle: Bundle, items: ItemSpace) -> ServingModel:
    """Return what serves with a bundle; its generation is its role's to give."""
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


def bootstrap(items: ItemSpace) -> ServingModel:
    """Return what serves without a bundle."""
    return ServingModel(BOOTSTRAP_VERSION, 0, items.space, None, None, items.vectors, items.index)


def named_by(record: Record) -> tuple[str, str, int]:
    """Return role, version and generation that a refused record names, as far as it can be read."""
    role = (record.key or b"").decode("utf-8", "replace").rpartition("/")[2][:100]
    try:
        pointer = decode(record.key, record.value or b"")
    except BundleError:
        return role, "", 0
    return role, pointer.version, pointer.generation
