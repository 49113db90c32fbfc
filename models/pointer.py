"""Records of the ``models`` topic: which version has which role. Never weights.

Key: name, a slash, role. Value: a ``Pointer`` as JSON. Roles: ``candidate`` is prepared and scored in shadow,
``live`` serves, ``previous`` is kept for a rollback and scored in shadow. Generations rise over all roles of a name,
so that of two deciders the later one wins everywhere.

Two versions are special. ``BOOTSTRAP_VERSION`` stands in no registry: every program has it; its pointer has an empty
``manifest_sha256``. The empty version (``Pointer.is_withdrawal``) takes a role away, as a null value does, but it has
a generation and can be signed: with a public key a null value is refused, since anybody could have written it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Final, Literal, get_args

import msgspec

from models.atomic import replace_file
from models.errors import BundleError, RegistryError
from models.manifest import BOOTSTRAP_VERSION, check_version
from models.signing import POINTER_CONTEXT, PrivateKey, PublicKey

Role = Literal["candidate", "live", "previous"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
MAX_POINTER_BYTES: Final = 16_384
MAX_GENERATION: Final = (1 << 32) - 1
"""User rows keep the generation that they were written under in 32 bits."""
GUARD_FILE: Final = "pointer-guard.json"
_HEX_SHA256: Final = frozenset("0123456789abcdef")


class Pointer(msgspec.Struct, frozen=True):
    """One role's version. ``signature`` is over ``canonical``, which has every other field."""

    name: str
    role: Role
    version: str
    """Empty: the role is taken away."""
    manifest_sha256: str
    """Of the bundle's manifest, 64 hexadecimal digits; empty for the bootstrap and for a withdrawal."""
    generation: int
    announced_ms: int
    by: str
    why: str
    signature: str | None = None

    @property
    def is_withdrawal(self) -> bool:
        """Return whether this takes the role away."""
        return not self.version

    @property
    def is_bootstrap(self) -> bool:
        """Return whether this names the version that every program has without a registry."""
        return self.version == BOOTSTRAP_VERSION

    @property
    def key(self) -> bytes:
        """Return the record's key."""
        return key(self.name, self.role)

    @property
    def canonical(self) -> bytes:
        """Return what is signed: JSON with sorted names and without the signature."""
        return msgspec.json.encode(msgspec.structs.replace(self, signature=None), order="sorted")

    def signed(self, private_key: PrivateKey | None) -> Pointer:
        """Return this pointer with a signature; as it is where there is no key."""
        if private_key is None:
            return self
        return msgspec.structs.replace(self, signature=private_key.sign(POINTER_CONTEXT, self.canonical))

    def encode(self) -> bytes:
        """Return the record's value."""
        return msgspec.json.encode(self)


def key(name: str, role: str) -> bytes:
    """Return the key of a role's record."""
    return f"{name}/{role}".encode()


def decode(record_key: bytes | None, value: bytes) -> Pointer:
    """Decode a record. Raises BundleError (``malformed-pointer``) where it is none, or is under another role's key."""
    try:
        if len(value) > MAX_POINTER_BYTES:
            raise ValueError(f"{len(value)} bytes, more than {MAX_POINTER_BYTES}")
        pointer = msgspec.json.decode(value, type=Pointer)
        if record_key != pointer.key:
            raise ValueError(f"its key is {record_key!r}, not {pointer.key!r}")
        if not 0 < pointer.generation <= MAX_GENERATION:
            raise ValueError(f"its generation is {pointer.generation}")
        if pointer.version and not pointer.is_bootstrap:
            check_version(pointer.version)
            if len(pointer.manifest_sha256) != 64 or not _HEX_SHA256.issuperset(pointer.manifest_sha256):
                raise ValueError("its manifest_sha256 is not 64 hexadecimal digits")
    except (msgspec.DecodeError, ValueError, BundleError) as error:
        raise BundleError(
            "malformed-pointer",
            f"a record of the models topic is not a pointer: {error}; the roles stay as they are. "
            "Announce with `millstream models promote` or the trainer",
        ) from None
    return pointer


class _Seen(msgspec.Struct, frozen=True):
    generation: int
    digest: str


class PointerGuard:
    """Which pointers one program takes: of its name, signed where a key is configured, never an older generation.

    The highest generation of each role is kept in ``folder``, so that an old pointer that is announced again after a
    restart is still recognised. Raises BundleError (``guard-unreadable``) for a file that is not one of its own.
    """

    def __init__(self, folder: Path, name: str, public_key: PublicKey | None = None) -> None:
        self._file = folder / GUARD_FILE
        self._name = name
        self._public_key = public_key
        self._seen: dict[str, _Seen] = {}
        try:
            self._seen = msgspec.json.decode(self._file.read_bytes(), type=dict[str, _Seen])
        except FileNotFoundError:
            return
        except (msgspec.DecodeError, OSError) as error:
            raise BundleError(
                "guard-unreadable",
                f"{self._file} cannot be read: {error}; no pointer is taken without it. Delete it to start from "
                "the pointers that stand on the topic now",
            ) from None

    def accept(self, record_key: bytes | None, value: bytes | None) -> Pointer | None:
        """Return the pointer of a record that may be followed; None for a record of another name.

        The same record again is accepted again. A null value is returned as a withdrawal at the role's generation.
        Raises BundleError (``malformed-pointer``, ``unsigned``, ``wrong-signature``, ``old-generation``,
        ``generation-reused``) and RegistryError where the generation cannot be kept; nothing is followed then.
        """
        if record_key is not None and not record_key.startswith(f"{self._name}/".encode()):
            return None
        if value is None:
            return self._without_value(record_key)
        pointer = decode(record_key, value)
        if self._public_key is not None:
            self._public_key.verify(
                POINTER_CONTEXT, pointer.canonical, pointer.signature, f"the pointer to {_described(pointer)}"
            )
        self._compare(pointer)
        return pointer

    def generation(self, role: Role) -> int:
        """Return the highest generation seen of a role, 0 where there was none."""
        seen = self._seen.get(key(self._name, role).decode())
        return seen.generation if seen else 0

    def _compare(self, pointer: Pointer) -> None:
        place, digest = pointer.key.decode(), sha256(pointer.canonical).hexdigest()
        seen = self._seen.get(place)
        if seen is not None and pointer.generation < seen.generation:
            raise BundleError(
                "old-generation",
                f"the pointer to {_described(pointer)} is older than generation {seen.generation}, which was seen "
                "before; that one stays. Announce again with a higher generation, as `millstream models promote` does",
            )
        if seen is not None and pointer.generation == seen.generation and digest != seen.digest:
            raise BundleError(
                "generation-reused",
                f"the pointer to {_described(pointer)} has the generation of another one that was seen before; "
                "that one stays. Two deciders are at work: end one of them",
            )
        if seen is None or pointer.generation > seen.generation:
            self._keep({**self._seen, place: _Seen(pointer.generation, digest)})

    def _keep(self, seen: dict[str, _Seen]) -> None:
        try:
            replace_file(self._file, msgspec.json.encode(seen, order="sorted"))
        except OSError as error:
            raise RegistryError(
                f"the generation cannot be kept in {self._file}: {error}; the pointer is not followed, "
                "the models in use stay. Make room or give the folder back its rights"
            ) from error
        self._seen = seen

    def _without_value(self, record_key: bytes | None) -> Pointer | None:
        role = next((r for r in ROLES if record_key == key(self._name, r)), None)
        if role is None:
            return None
        if self._public_key is not None:
            raise BundleError(
                "unsigned",
                f"a null value would take the role {role!r} away, and nothing unsigned is taken; the role stays. "
                "`millstream models rollback` withdraws with a signed pointer",
            )
        return Pointer(self._name, role, "", "", self.generation(role), 0, "", "null value")


def _described(pointer: Pointer) -> str:
    return f"{pointer.version or 'no version'} as {pointer.role!r}, generation {pointer.generation},"


class Pointers(msgspec.Struct, frozen=True):
    """What the ``models`` topic says of one name now. Made by ``Pointers.of``."""

    name: str
    roles: dict[Role, Pointer]
    """Without roles that were taken away."""
    generation: int
    """The highest of all roles, those that were taken away included; 0 where nothing was announced."""

    @classmethod
    def of(cls, name: str, pointers: Iterable[Pointer]) -> Pointers:
        """Return the newest pointer of each role of ``name``."""
        newest: dict[Role, Pointer] = {}
        for pointer in pointers:
            known = newest.get(pointer.role)
            if pointer.name == name and (known is None or pointer.generation >= known.generation):
                newest[pointer.role] = pointer
        highest = max((p.generation for p in newest.values()), default=0)
        return cls(name, {r: p for r, p in newest.items() if not p.is_withdrawal}, highest)

    def version(self, role: Role) -> str | None:
        """Return the version that has a role, None where none has."""
        pointer = self.roles.get(role)
        return pointer.version if pointer else None

    def roles_of(self, version: str) -> list[Role]:
        """Return the roles of a version."""
        return [role for role in ROLES if self.version(role) == version]


def plan_candidate(
    current: Pointers, version: str, manifest_sha256: str, *, at_ms: int, by: str, why: str
) -> list[Pointer]:
    """Return the pointers, in the order of sending, that make a version the candidate.

    Raises BundleError (``already-live``) where it is live.
    """
    if current.version("live") == version:
        raise BundleError("already-live", f"{version} is live already; nothing was announced")
    return [
        Pointer(current.name, "candidate", version, manifest_sha256, current.generation + 1, at_ms, by, why),
    ]


def plan_promotion(
    current: Pointers, version: str, manifest_sha256: str, *, at_ms: int, by: str, why: str
) -> list[Pointer]:
    """Return the pointers, in the order of sending, that make a version live and the live one previous.

    Without a live one the bootstrap becomes previous, so that it too is scored in shadow and can be rolled back to.
    The candidate's role is taken away where the version had it; another candidate stays. The live pointer goes first:
    where the sending ends after it, the old one is still held by workers and only its shadow scores are missing.
    Raises BundleError (``already-live``).
    """
    if current.version("live") == version:
        raise BundleError("already-live", f"{version} is live already; nothing was announced")
    first = current.generation + 1
    old = current.roles.get("live")
    planned = [
        Pointer(current.name, "live", version, manifest_sha256, first, at_ms, by, why),
        Pointer(
            current.name,
            "previous",
            old.version if old else BOOTSTRAP_VERSION,
            old.manifest_sha256 if old else "",
            first + 1,
            at_ms,
            by,
            f"gave way to {version}",
        ),
    ]
    if current.version("candidate") == version:
        planned.append(Pointer(current.name, "candidate", "", "", first + 2, at_ms, by, f"{version} is live"))
    return planned


def plan_rest_of_promotion(current: Pointers, old: Pointer | None, *, at_ms: int, by: str, why: str) -> list[Pointer]:
    """Return what is left to send of a promotion whose sending ended after its live pointer; none where nothing is.

    ``old``: what was live before it, None where nothing was announced.
    """
    first, live = current.generation + 1, current.version("live")
    version, sha256 = (old.version, old.manifest_sha256) if old else (BOOTSTRAP_VERSION, "")
    planned = []
    if current.version("previous") != version:
        planned.append(Pointer(current.name, "previous", version, sha256, first, at_ms, by, why))
    if live is not None and current.version("candidate") == live:
        planned.append(Pointer(current.name, "candidate", "", "", first + len(planned), at_ms, by, why))
    return planned


def plan_rollback(current: Pointers, *, at_ms: int, by: str, why: str) -> list[Pointer]:
    """Return the pointers, in the order of sending, that make the previous version live again.

    Raises BundleError (``no-previous``) where there is none.
    """
    previous, live = current.roles.get("previous"), current.roles.get("live")
    if previous is None:
        raise BundleError(
            "no-previous",
            f"no version has the role 'previous', so {live.version if live else BOOTSTRAP_VERSION} stays live. "
            "Promote a version by name: `millstream models promote VERSION`",
        )
    first = current.generation + 1
    return [
        Pointer(current.name, "live", previous.version, previous.manifest_sha256, first, at_ms, by, why),
        Pointer(current.name, "previous", "", "", first + 1, at_ms, by, f"{previous.version} is live again"),
    ]


def plan_withdrawal(current: Pointers, role: Role, *, at_ms: int, by: str, why: str) -> list[Pointer]:
    """Return the pointer that takes a role away; none where nothing has it."""
    if role not in current.roles:
        return []
    return [Pointer(current.name, role, "", "", current.generation + 1, at_ms, by, why)]


def newest(records: Mapping[bytes, bytes], name: str) -> Pointers:
    """Return the pointers of ``name`` among the topic's last value of each key; records that are none are passed over.

    For programs that show or plan. A program that follows pointers takes them from ``PointerGuard``.
    """
    found = []
    for record_key, value in records.items():
        with contextlib.suppress(BundleError):
            found.append(decode(record_key, value))
    return Pointers.of(name, found)
