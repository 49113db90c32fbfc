"""The published bundles, over fsspec: a folder, ``memory://``, ``s3://``, ``gs://``.

Layout: ``<url>/<name>/<version>/`` holds a bundle's files, ``<url>/<name>/_decisions/<version>/`` what was decided
about it (JSON; a manifest is never written again). A version is there when its manifest is: it is written last and
removed first. Where the registry is a folder, a version appears and disappears by one rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import fsspec
import msgspec
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from models import manifest as manifests
from models.atomic import make_folder, remove_folder, replace_file, sync_folder, write_file
from models.bundle import verify_files
from models.errors import BundleError, MillstreamError, RegistryError, SettingsError
from models.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    PARTIAL_SUFFIX,
    SIGNATURE,
    Manifest,
    check_version,
    digest,
    refusal,
)
from models.signing import MAX_SIGNATURE_BYTES, PrivateKey, PublicKey

DECISIONS: Final = "_decisions"
MAX_DECISION_BYTES: Final = 1 << 20
PARTIAL_SECONDS: Final = 24 * 3600.0
"""What is half fetched for so long is nobody's any more."""
_READ_BYTES: Final = 1 << 20


class RegistryConfig(BaseModel):
    """Where bundles are, how many are kept here, and whose are taken."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        "default",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the model: programs with the same name share roles.",
    )
    url: str = Field(
        ".millstream/registry", min_length=1, description="A folder, or file://, s3://, gs:// (extras s3 and gs)."
    )
    storage_options: dict[str, SecretStr] = Field(
        default_factory=dict, description="Passed to the file system of `url`, as endpoint_url, key and secret of s3."
    )
    cache_folder: Path = Field(Path(".millstream/bundles"), description="Where fetched bundles are kept.")
    cache_bundles: int = Field(4, ge=3, le=1_000, description="Fetched bundles that are kept at most, roles included.")
    max_bundle_bytes: int = Field(
        manifests.MAX_BUNDLE_BYTES, ge=1 << 20, description="A bundle that would be larger is refused unread."
    )
    public_key: str | None = Field(
        None,
        description="ed25519:… (several with commas while one is replaced): nothing unsigned is taken. "
        "`millstream models keygen` makes a pair.",
    )
    private_key_file: Path | None = Field(
        None, description="PEM file of the key that the trainer and operators sign with; workers need none."
    )

    @field_validator("url")
    @classmethod
    def _without_secrets(cls, value: str) -> str:
        scheme, found, rest = value.partition("://")
        if found and "@" in rest.split("/")[0]:
            raise ValueError(f"credentials do not belong in a {scheme} address: put them into storage_options")
        return value

    @field_validator("public_key")
    @classmethod
    def _is_key(cls, value: str | None) -> str | None:
        try:
            return None if value is None else PublicKey.parse(value).text
        except SettingsError as error:
            raise ValueError(str(error)) from None

    def trusted(self) -> PublicKey | None:
        """Return the key that manifests and pointers must be signed with, None where none is configured."""
        return None if self.public_key is None else PublicKey.parse(self.public_key)

    def signer(self) -> PrivateKey | None:
        """Return the key to sign with, None where none is configured. Raises SettingsError."""
        return None if self.private_key_file is None else PrivateKey.read(self.private_key_file)


class Registry:
    """The published versions of one name. Every call may raise RegistryError (retriable) where it is not reached.

    Blocking: an event loop calls it in a thread. Threads and processes may use the same registry and cache.
    """

    def __init__(self, config: RegistryConfig) -> None:
        self._config = config
        self.name = config.name

    def publish(self, folder: Path) -> Manifest:
        """Publish a saved bundle under its version; the same one again is no error.

        Raises BundleError: as ``verify_files``, ``wrong-name``, ``version-exists`` where another bundle has it.
        """
        manifest, encoded = verify_files(folder, max_bytes=self._config.max_bundle_bytes, content=True)
        if manifest.name != self.name:
            raise refusal("wrong-name", str(folder), f"it is of the model {manifest.name!r}, not of {self.name!r}")
        with self._reaching(f"publish {manifest.version}"):
            there = self._bytes(self._path(manifest.version, MANIFEST), MAX_MANIFEST_BYTES)
            if there is not None:
                if digest(there) == digest(encoded):
                    return manifest
                raise BundleError(
                    "version-exists",
                    f"the registry has another bundle under {manifest.version}; it was left as it is. "
                    "A version is never written twice: take another",
                )
            # The manifest last: a version whose files are half there is not there.
            names = [*manifest.files, *([SIGNATURE] if (folder / SIGNATURE).is_file() else []), MANIFEST]
            local = self._local(self._path(manifest.version))
            if local is not None:
                make_folder(local, lambda aside: _copy(folder, aside, names))
            else:
                for name in names:
                    self._fs.put_file(str(folder / name), self._path(manifest.version, name))
        return manifest

    def versions(self) -> list[str]:
        """Return the versions that are there, in the order of their names, which is that of their times."""
        found = []
        with self._reaching("list the versions"):
            for entry in self._list(self._path()):
                name = str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]
                with contextlib.suppress(BundleError):
                    if self._fs.exists(self._path(check_version(name), MANIFEST)):
                        found.append(name)
        return sorted(found)

    def manifest(self, version: str) -> Manifest:
        """Return a version's manifest. Raises BundleError (``not-in-registry``, or what ``manifest.decode`` raises)."""
        return self._decoded(version, self._manifest_bytes(version))

    def manifest_sha256(self, version: str) -> str:
        """Return what a pointer to a version names. Raises BundleError as ``manifest`` does."""
        return digest(self._manifest_bytes(version))

    def fetch(self, version: str, into: Path, *, manifest_sha256: str | None = None) -> Path:
        """Return ``into``/version with the bundle's files, downloaded aside and checked where it is not there yet.

        Files, sizes and hashes are checked; signature, contents and canary are ``bundle.load``'s. Fetchers of the same
        version do not disturb each other. Raises BundleError for a bundle that is not what its manifest says.
        """
        target = into / check_version(version)
        with self._reaching(f"fetch {version}"):
            if self._is_cached(target, manifest_sha256):
                return target
            try:
                encoded = self._manifest_bytes(version)
            except BundleError as error:
                if error.reason == "not-in-registry" and not self._exists(self._path()):
                    # A volume that is not mounted yet looks like this: it must not cost a start its live bundle.
                    raise FileNotFoundError(f"there is nothing at all under {self._path()}") from error
                raise
            if manifest_sha256 is not None and digest(encoded) != manifest_sha256:
                raise refusal(
                    "wrong-hash", version, f"the registry has the manifest {digest(encoded)}, not {manifest_sha256}"
                )
            manifest = self._decoded(version, encoded)
            try:
                make_folder(target, lambda aside: self._download(manifest, encoded, aside))
            except OSError:
                # Another fetcher was faster; what it brought is checked like our own.
                if not target.exists():
                    raise
                verify_files(target, manifest_sha256=digest(encoded), content=True)
        return target

    def remove(self, version: str) -> None:
        """Remove a version; what was decided about it stays. One that is not there is no error."""
        path = self._path(check_version(version))
        with self._reaching(f"remove {version}"):
            local = self._local(path)
            if local is not None:
                remove_folder(local)
            elif self._exists(path):
                self._fs.rm_file(self._path(version, MANIFEST))
                self._fs.rm(path, recursive=True)

    def remove_leftovers(self, before_ms: int) -> list[str]:
        """Remove what broken-off uploads left and nobody has touched since ``before_ms``; return its names."""
        removed = []
        with self._reaching("remove what broken-off uploads left"):
            for entry in self._list(self._path()):
                path = str(entry["name"]).rstrip("/")
                name = path.rsplit("/", 1)[-1]
                is_whole = name == DECISIONS or self._fs.exists(f"{path}/{MANIFEST}")
                if is_whole and not name.endswith(PARTIAL_SUFFIX):
                    continue
                touched = [self._fs.modified(file) for file in self._fs.find(path)] or [self._fs.modified(path)]
                if all(at.timestamp() * 1000 < before_ms for at in touched):
                    self._fs.rm(path, recursive=True)
                    removed.append(name)
        return removed

    def record_decision(self, version: str, decision: Mapping[str, Any], at_ms: int) -> None:
        """Keep what was decided about a version, beside its bundle."""
        path = self._path(DECISIONS, check_version(version), f"{at_ms:015d}.json")
        content = msgspec.json.encode(dict(decision), order="sorted")
        with self._reaching(f"record a decision on {version}"):
            local = self._local(path)
            if local is not None:
                replace_file(local, content)
            else:
                self._fs.pipe_file(path, content)

    def decisions(self, version: str) -> list[dict[str, Any]]:
        """Return what was decided about a version, oldest first."""
        found: list[dict[str, Any]] = []
        with self._reaching(f"read the decisions on {version}"):
            names = sorted(str(entry["name"]) for entry in self._list(self._path(DECISIONS, check_version(version))))
            for name in names:
                content = self._bytes(name, MAX_DECISION_BYTES) if name.endswith(".json") else None
                if content is not None:
                    found.append(msgspec.json.decode(content, type=dict[str, Any]))
        return found

    @cached_property
    def _place(self) -> tuple[Any, str]:
        options = {name: value.get_secret_value() for name, value in self._config.storage_options.items()}
        file_system, root = fsspec.core.url_to_fs(self._config.url, **options)
        return file_system, str(root).rstrip("/")

    @property
    def _fs(self) -> Any:
        return self._place[0]

    def _path(self, *parts: str) -> str:
        return "/".join([self._place[1], self.name, *parts])

    def _local(self, path: str) -> Path | None:
        protocols = self._fs.protocol
        return Path(path) if "file" in ((protocols,) if isinstance(protocols, str) else protocols) else None

    def _exists(self, path: str) -> bool:
        self._fs.invalidate_cache()
        return bool(self._fs.exists(path))

    def _list(self, path: str) -> list[dict[str, Any]]:
        self._fs.invalidate_cache()
        try:
            return list(self._fs.ls(path, detail=True))
        except FileNotFoundError:
            return []

    def _bytes(self, path: str, max_bytes: int) -> bytes | None:
        """Return a small file's bytes, None where there is none. Raises BundleError where it is too large."""
        self._fs.invalidate_cache()
        try:
            with self._fs.open(path, "rb") as file:
                content = bytes(file.read(max_bytes + 1))
        except (FileNotFoundError, NotADirectoryError):
            return None
        if len(content) > max_bytes:
            raise refusal("too-large", path, f"it has more than {max_bytes} bytes")
        return content

    def _manifest_bytes(self, version: str) -> bytes:
        with self._reaching(f"read the manifest of {version}"):
            content = self._bytes(self._path(check_version(version), MANIFEST), MAX_MANIFEST_BYTES)
        if content is None:
            raise refusal("not-in-registry", version, "the registry has no such version")
        return content

    def _decoded(self, version: str, encoded: bytes) -> Manifest:
        manifest = manifests.decode(encoded, version, max_bytes=self._config.max_bundle_bytes)
        if (manifest.name, manifest.version) != (self.name, version):
            raise refusal("wrong-name", version, f"its manifest is of {manifest.name!r}, version {manifest.version!r}")
        return manifest

    def _is_cached(self, target: Path, manifest_sha256: str | None) -> bool:
        if not target.exists():
            return False
        try:
            verify_files(target, self._config.trusted(), manifest_sha256=manifest_sha256, content=True)
        except BundleError:
            # Another bundle's, damaged, or fetched before it was signed: the registry may have the right one.
            remove_folder(target)
            return False
        os.utime(target)
        return True

    def _download(self, manifest: Manifest, encoded: bytes, aside: Path) -> None:
        for name, entry in manifest.files.items():
            (aside / name).parent.mkdir(exist_ok=True)
            found, size = hashlib.sha256(), 0
            try:
                with (
                    self._fs.open(self._path(manifest.version, name), "rb") as source,
                    (aside / name).open("wb") as out,
                ):
                    # Never more than was announced, whatever the other side sends.
                    while size <= entry.bytes and (chunk := source.read(_READ_BYTES)):
                        out.write(chunk)
                        found.update(chunk)
                        size += len(chunk)
                    out.flush()
                    os.fsync(out.fileno())
            except FileNotFoundError:
                raise refusal("missing-file", manifest.version, f"the registry has no {name} of it") from None
            if size != entry.bytes:
                raise refusal("wrong-size", manifest.version, f"{name} has {size} bytes or more, not {entry.bytes}")
            if found.hexdigest() != entry.sha256:
                raise refusal("wrong-hash", manifest.version, f"{name} is not the file that its manifest lists")
        signature = self._bytes(self._path(manifest.version, SIGNATURE), MAX_SIGNATURE_BYTES)
        if signature is not None:
            write_file(aside / SIGNATURE, signature)
        write_file(aside / MANIFEST, encoded)

    @contextlib.contextmanager
    def _reaching(self, what: str) -> Iterator[None]:
        try:
            yield
        except MillstreamError:
            raise
        except Exception as error:
            # The errors of file systems (botocore, gcsfs, aiohttp) share no base class.
            raise RegistryError(
                f"the registry at {self._config.url} could not {what}: {error!r}; nothing was changed, "
                "the models in use stay. Check models.url, its rights, its room and the network"
            ) from error


def prune_cache(folder: Path, keep: Collection[str], at_most: int) -> list[str]:
    """Remove fetched bundles that were not used for longest, down to ``at_most``; return what went.

    Those in ``keep`` stay, also where they are more. What fetches that were killed left goes too, when it is
    PARTIAL_SECONDS older than the bundle that was used last.
    """
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    whole = {path: path.stat().st_mtime for path in found if not path.name.endswith(PARTIAL_SUFFIX)}
    free = sorted((path for path in whole if path.name not in keep), key=lambda path: whole[path])
    doomed = free[: max(0, len(whole) - at_most)]
    for path in doomed:
        remove_folder(path)
    oldest = max(whole.values(), default=0.0) - PARTIAL_SECONDS
    for path in found:
        if path not in whole and path.stat().st_mtime < oldest:
            shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in doomed]


def _copy(folder: Path, aside: Path, names: list[str]) -> None:
    for name in names:
        (aside / name).parent.mkdir(exist_ok=True)
        with (folder / name).open("rb") as source, (aside / name).open("wb") as out:
            shutil.copyfileobj(source, out, _READ_BYTES)
            out.flush()
            os.fsync(out.fileno())
    for part in {(aside / name).parent for name in names}:
        sync_folder(part)
