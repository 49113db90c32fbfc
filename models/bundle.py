"""One model version on disk: save, load, verify, canary.

A bundle is a folder of safetensors, JSON and MessagePack, nothing that can run code. The list of names is closed: a
file that no bundle has is refused, listed or not. See models.manifest for the names and docs/models.md for the bytes.
Legend of shapes: B = dimensions of a base encoding, D = dimensions of the space, n = any number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors import numpy as safetensors

from models.atomic import make_folder, write_file
from models.bootstrap import Space
from models.catalogue import SpaceVectors
from models.ctr import CtrConfig, CtrScorer
from models.encoder_delta import EncoderDelta
from models.errors import BundleError, EncoderError, ModelError, RecordError, RegistryError
from models.examples import decode_features, raw_slates
from models.features import FeatureConfig, require_spec, spec_id
from models.log_odds import learned_log_odds
from models.manifest import (
    BOOTSTRAP_VERSION,
    CANARY,
    CTR_CONFIG,
    CTR_TENSORS,
    ENCODER_CONFIG,
    ENCODER_TENSORS,
    ENCODINGS,
    MANIFEST,
    MAX_BUNDLE_BYTES,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    SPACE,
    FileEntry,
    Manifest,
    OffsetRange,
    Window,
    check_version,
    decode,
    digest,
    new_version,
    refusal,
)
from models.signing import MANIFEST_CONTEXT, MAX_SIGNATURE_BYTES, PrivateKey, PublicKey
from models.tensor_file import views

__all__ = [
    "BOOTSTRAP_VERSION",
    "Bundle",
    "BundleContents",
    "Canary",
    "FileEntry",
    "ItemEncodings",
    "Manifest",
    "OffsetRange",
    "Window",
    "canary_log_odds",
    "check_version",
    "load",
    "new_version",
    "save",
    "verify_files",
]

F32 = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Hashes = npt.NDArray[np.uint64]
Tensors = dict[str, npt.NDArray[Any]]

CANARY_TOLERANCE: Final = 1e-3
"""Largest difference of a log-odds from the expected one: far above what another machine's sums change (1e-5), far
below what changes an order."""
MAX_CANARY_RECORDS: Final = 1_024
_READ_BYTES: Final = 1 << 20
_NO_HASHES: Final = np.zeros(0, np.uint64)


@dataclass(frozen=True, slots=True, eq=False)
class ItemEncodings:
    """Base encodings that a bundle brings, because its encoder is not the one of ``item-vectors``."""

    items: Hashes
    """uint64 [n], 64-bit hashes of item ids."""
    contents: Hashes
    """uint64 [n], content hashes of the encoded texts."""
    base: Halves
    """float16 [n, B]."""


@dataclass(frozen=True, slots=True, eq=False)
class Canary:
    """Real inputs, and what the version must make of them on every machine."""

    records: list[bytes]
    """Encoded models.examples.FeaturesRecord, at least one."""
    items: Hashes
    """uint64 [n], hashes of the items and recent items in them that have a text."""
    base: Halves
    """float16 [n, B], their base encodings under the bundle's encoder."""
    expected: F32 | None = None
    """float32 [items of all records], calibrated log-odds; None: ``save`` computes them."""


class _CanaryFile(msgspec.Struct, array_like=True):
    records: list[bytes]
    items: bytes
    base: bytes
    base_dim: int
    expected: bytes


@dataclass(slots=True)
class BundleContents:
    """Everything that ``save`` writes."""

    name: str
    version: str
    created_ms: int
    space_id: str
    encoder_id: str
    scorer_config: Mapping[str, Any]
    """``CtrConfig.model_dump(mode="json")``."""
    scorer_tensors: Mapping[str, npt.NDArray[Any]]
    features: FeatureConfig
    projection: F32
    """float32 [B, D]."""
    canary: Canary
    window: Window = field(default_factory=Window)
    parent: str | None = None
    residual_items: Hashes = field(default_factory=lambda: _NO_HASHES)
    """uint64 [n], hashes of item ids, distinct."""
    residuals: F32 = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    """float32 [n, D], already shrunk: added to base @ projection."""
    carry: F32 | None = None
    """float32 [D, D]: a long-term vector of the space ``carry_from``, times this, is one of this space."""
    carry_from: str | None = None
    encoder: EncoderDelta | None = None
    encodings: ItemEncodings | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    decision: Mapping[str, Any] | None = None
    train: Mapping[str, Any] = field(default_factory=dict)

    @property
    def space(self) -> Space:
        """Return the embedding space."""
        return Space(self.space_id, self.encoder_id, self.projection, self.residual_items, self.residuals)


@dataclass(eq=False)
class Bundle:
    """A version that was read and verified. Made by ``load``."""

    folder: Path
    manifest: Manifest
    manifest_sha256: str
    space: Space
    features: FeatureConfig
    scorer_config: Mapping[str, Any]
    scorer_tensors: Tensors
    carry: F32 | None
    """float32 [D, D], for vectors of the space ``manifest.carry_from``."""
    encoder_folder: Path | None
    """For ``TextEncoder.load_delta``; None where the encoder is that of the settings."""
    encodings: ItemEncodings | None
    canary: Canary

    @property
    def version(self) -> str:
        """Return the version's name."""
        return self.manifest.version

    @cached_property
    def scorer(self) -> CtrScorer:
        """Return the CTR model. Raises BundleError (``bad-scorer``) where configuration and tensors make none."""
        return _scorer(self.scorer_config, self.scorer_tensors, str(self.folder))

    def check_canary(self) -> None:
        """Score the canary on this machine. Raises BundleError (``canary``) where it misses what it must be."""
        expected = self.canary.expected
        found = canary_log_odds(self.scorer, self.features, self.space, self.canary)
        if expected is None or found.shape != expected.shape:
            raise refusal("canary", str(self.folder), "its canary has no expected score for each item")
        off = float(np.abs(found - expected).max())
        if not off <= CANARY_TOLERANCE:
            raise refusal(
                "canary",
                str(self.folder),
                f"its canary is off by {off:.3g} in log-odds, more than {CANARY_TOLERANCE:g}: "
                "this program computes another model than the trainer did",
            )


def canary_log_odds(scorer: CtrScorer, features: FeatureConfig, space: Space, canary: Canary) -> F32:
    """Return the calibrated log-odds of every item of the canary's records, in their order, float32 [n].

    By the code that serves. Raises BundleError (``malformed``, ``canary``) for records that are none or that it cannot
    score.
    """
    try:
        raw = raw_slates([decode_features(record) for record in canary.records])
    except RecordError as error:
        raise refusal("malformed", "canary", f"a record of its canary cannot be read: {error}") from None
    order = np.argsort(canary.items, kind="stable")
    known = canary.items[order]
    vectors = SpaceVectors(space.dim)
    found = space.item_vectors(canary.base, canary.items)[order]
    vectors.set_many(np.arange(len(known)), found, np.zeros(len(known), np.uint64))

    def rows(hashes: Hashes) -> npt.NDArray[np.int32]:
        at = np.searchsorted(known, hashes)
        is_known = known[np.minimum(at, len(known) - 1)] == hashes if len(known) else np.zeros(hashes.shape, np.bool_)
        return np.where(is_known, at, -1).astype(np.int32)

    try:
        log_odds = learned_log_odds(scorer, features, vectors, raw, rows(raw.items), rows(raw.recent_items))
    except ModelError as error:
        raise refusal("canary", "canary", f"its canary cannot be scored: {error}") from None
    scored: F32 = log_odds[raw.valid]
    return scored


def save(folder: Path, contents: BundleContents, private_key: PrivateKey | None = None) -> Manifest:
    """Write a bundle as ``folder``: aside, its manifest last, renamed when all of it is on the disk and loads again.

    Raises BundleError for contents that ``load`` would refuse or a folder that has another bundle, and RegistryError
    where it cannot be written; in both cases no part of it stays.
    """
    check_version(contents.version)
    files = _files(contents)
    manifest = Manifest(
        name=contents.name,
        version=contents.version,
        parent=contents.parent,
        created_ms=contents.created_ms,
        space_id=contents.space_id,
        encoder_id=contents.encoder_id,
        base_model=contents.encoder.base_encoder_id if contents.encoder else None,
        feature_spec=spec_id(contents.features),
        files={name: FileEntry(digest(content), len(content)) for name, content in files.items()},
        window=contents.window,
        metrics={name: float(value) for name, value in contents.metrics.items()},
        decision=dict(contents.decision) if contents.decision is not None else None,
        carry_from=contents.carry_from,
        train=dict(contents.train),
    )
    encoded = manifest.encode()

    def fill(aside: Path) -> None:
        for name, content in files.items():
            (aside / name).parent.mkdir(exist_ok=True)
            write_file(aside / name, content)
        if private_key is not None:
            write_file(aside / SIGNATURE, private_key.sign(MANIFEST_CONTEXT, encoded).encode())
        write_file(aside / MANIFEST, encoded)
        load(aside)

    if folder.exists() and any(folder.iterdir()):
        raise BundleError(
            "version-exists", f"{folder} exists and was left as it is; a version is never written twice: take another"
        )
    try:
        make_folder(folder, fill)
    except OSError as error:
        raise RegistryError(
            f"the bundle cannot be written to {folder}: {error}; no part of it was kept. Make room and save it again"
        ) from error
    return manifest


def load(
    folder: Path,
    public_key: PublicKey | None = None,
    *,
    manifest_sha256: str | None = None,
    max_bytes: int = MAX_BUNDLE_BYTES,
) -> Bundle:
    """Read a bundle and verify all of it but the canary, which ``Bundle.check_canary`` scores.

    With ``public_key`` the manifest must be signed; with ``manifest_sha256`` it must be the one that a pointer names.
    Raises BundleError, with a slug for each reason; nothing of a refused bundle is used.
    """
    manifest, encoded = verify_files(folder, public_key, manifest_sha256=manifest_sha256, max_bytes=max_bytes)
    where = str(folder)
    features, scorer_config = _ctr_config(_verified(folder, manifest, CTR_CONFIG), manifest, where)
    tensors = _tensors(_verified(folder, manifest, CTR_TENSORS), where, CTR_TENSORS)
    parts = _tensors(_verified(folder, manifest, SPACE), where, SPACE)
    space = _space(parts, manifest, where)
    carry = parts.get("carry")
    if (carry is None) != (manifest.carry_from is None) or (
        carry is not None and carry.shape != (space.dim, space.dim)
    ):
        raise refusal("malformed", where, "its carry matrix does not fit its space, or does not say of which it is")
    encodings = None
    if ENCODINGS in manifest.files:
        encodings = _encodings(_tensors(_verified(folder, manifest, ENCODINGS), where, ENCODINGS), space, where)
    bundle = Bundle(
        folder=folder,
        manifest=manifest,
        manifest_sha256=digest(encoded),
        space=space,
        features=features,
        scorer_config=scorer_config,
        scorer_tensors=tensors,
        carry=None if carry is None else np.asarray(carry, np.float32),
        encoder_folder=_encoder_folder(folder, manifest),
        encodings=encodings,
        canary=_canary(_verified(folder, manifest, CANARY), space, where),
    )
    _ = bundle.scorer
    return bundle


def verify_files(
    folder: Path,
    public_key: PublicKey | None = None,
    *,
    manifest_sha256: str | None = None,
    max_bytes: int = MAX_BUNDLE_BYTES,
    content: bool = False,
) -> tuple[Manifest, bytes]:
    """Check manifest, signature, names and sizes, and with ``content`` also every file's hash; return the manifest.

    Raises BundleError as ``load`` does.
    """
    where = str(folder)
    encoded = bytes(_read(folder, MANIFEST, MAX_MANIFEST_BYTES))
    if manifest_sha256 is not None and digest(encoded) != manifest_sha256:
        raise refusal("wrong-hash", where, f"its manifest has the SHA-256 {digest(encoded)}, not {manifest_sha256}")
    if public_key is not None:
        has = (folder / SIGNATURE).is_file()
        signature = str(_read(folder, SIGNATURE, MAX_SIGNATURE_BYTES), "ascii", "replace") if has else None
        public_key.verify(MANIFEST_CONTEXT, encoded, signature, f"the manifest of bundle {where}")
    manifest = decode(encoded, where, max_bytes=max_bytes)
    _check_names(folder, manifest)
    if content:
        for name in manifest.files:
            _check_hash(folder, manifest, name)
    return manifest, encoded


def _check_names(folder: Path, manifest: Manifest) -> None:
    where = str(folder)
    found = set()
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(root, name)
            if path.is_symlink():
                raise refusal("path-escapes", where, f"{path.relative_to(folder)} in it is a link")
        found |= {Path(root, name).relative_to(folder).as_posix() for name in names}
    extra = found - manifest.files.keys() - {MANIFEST, SIGNATURE}
    if extra:
        raise refusal("unknown-file", where, f"it holds {', '.join(sorted(extra))}, which its manifest does not list")
    missing = manifest.files.keys() - found
    if missing:
        raise refusal("missing-file", where, f"it lacks {', '.join(sorted(missing))}")
    for name, entry in manifest.files.items():
        size = (folder / name).lstat().st_size
        if size != entry.bytes:
            raise refusal("wrong-size", where, f"{name} has {size} bytes, its manifest says {entry.bytes}")


def _read(folder: Path, name: str, max_bytes: int) -> memoryview:
    """Return a file's bytes, read into an array: ``file.read`` of a large file keeps Python's lock for long."""
    try:
        # Not through a link, also one that was put there after the names were checked.
        handle = os.open(folder / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(handle, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise refusal("too-large", str(folder), f"{name} has {size} bytes, more than {max_bytes}")
            content, at = np.empty(size, np.uint8).data, 0
            while at < size and (count := file.readinto(content[at:])):
                at += count
    except FileNotFoundError:
        raise refusal("missing-file", str(folder), f"it lacks {name}") from None
    except OSError as error:
        raise refusal("unreadable", str(folder), f"{name} cannot be read: {error}") from None
    return content[:at].toreadonly()


def _verified(folder: Path, manifest: Manifest, name: str) -> memoryview:
    """Return the very bytes that were hashed, so that nothing can change between the check and the use."""
    content = _read(folder, name, manifest.files[name].bytes)
    _compare(digest(content), folder, manifest, name)
    return content


def _check_hash(folder: Path, manifest: Manifest, name: str) -> None:
    found = sha256()
    try:
        with (folder / name).open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                found.update(chunk)
    except OSError as error:
        raise refusal("unreadable", str(folder), f"{name} cannot be read: {error}") from None
    _compare(found.hexdigest(), folder, manifest, name)


def _compare(found: str, folder: Path, manifest: Manifest, name: str) -> None:
    if found != manifest.files[name].sha256:
        raise refusal("wrong-hash", str(folder), f"{name} has the SHA-256 {found}, its manifest says otherwise")


def _ctr_config(content: memoryview, manifest: Manifest, where: str) -> tuple[FeatureConfig, dict[str, Any]]:
    try:
        parts = json.loads(bytes(content))
        scorer, features = dict(parts["scorer"]), dict(parts["features"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise refusal("malformed", where, f"{CTR_CONFIG} cannot be read: {error!r}") from None
    try:
        config = FeatureConfig.model_validate(features)
    except ValidationError as error:
        raise refusal(
            "feature-spec", where, f"this program cannot make its feature encoding {manifest.feature_spec!r}: {error}"
        ) from None
    require_spec(manifest.feature_spec, config)
    return config, scorer


def _tensors(content: memoryview, where: str, name: str) -> Tensors:
    try:
        tensors = views(content)
    except ValueError as error:
        raise refusal("malformed", where, f"{name} is not safetensors of numbers: {error}") from None
    for tensor_name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise refusal("not-finite", where, f"tensor {tensor_name!r} of {name} holds values that are not finite")
    return tensors


def _space(parts: Tensors, manifest: Manifest, where: str) -> Space:
    try:
        projection = np.asarray(parts["projection"], np.float32)
        items = parts.get("residual_items", _NO_HASHES)
        residuals = np.asarray(parts.get("residuals", np.zeros((0, projection.shape[1]))), np.float32)
        if projection.ndim != 2 or items.dtype != np.uint64 or len(np.unique(items)) != len(items):
            raise ValueError("the projection is no matrix, or an item has two residuals")
        return Space(manifest.space_id, manifest.encoder_id, projection, items, residuals)
    except (KeyError, ValueError, IndexError) as error:
        raise refusal("malformed", where, f"{SPACE} holds no space: {error!r}") from None


def _encodings(parts: Tensors, space: Space, where: str) -> ItemEncodings:
    try:
        items, contents, base = parts["items"], parts["contents"], parts["base"]
    except KeyError as error:
        raise refusal("malformed", where, f"{ENCODINGS} lacks {error}") from None
    right = items.dtype == contents.dtype == np.uint64 and base.dtype == np.float16
    if not right or items.shape != contents.shape or base.shape != (*items.shape, space.base_dim):
        raise refusal("malformed", where, f"{ENCODINGS} does not hold one encoding for each item")
    return ItemEncodings(items, contents, base)


def _encoder_folder(folder: Path, manifest: Manifest) -> Path | None:
    if ENCODER_TENSORS not in manifest.files:
        if manifest.base_model is not None:
            raise refusal("missing-file", str(folder), "it names a base model and brings no delta of it")
        return None
    for name in (ENCODER_CONFIG, ENCODER_TENSORS):
        _check_hash(folder, manifest, name)
    place = (folder / ENCODER_TENSORS).parent
    try:
        delta = EncoderDelta.load(place)
    except EncoderError as error:
        raise refusal("malformed", str(folder), f"its encoder cannot be read: {error}") from None
    if any(not np.isfinite(tensor).all() for tensor in delta.tensors.values()):
        raise refusal("not-finite", str(folder), "its encoder holds values that are not finite")
    if (delta.base_encoder_id, delta.encoder_id) != (manifest.base_model, manifest.encoder_id):
        raise refusal(
            "encoder", str(folder), f"its encoder makes {delta.encoder_id!r}, its manifest says {manifest.encoder_id!r}"
        )
    return place


def _canary(content: memoryview, space: Space, where: str) -> Canary:
    try:
        stored = msgspec.msgpack.decode(content, type=_CanaryFile)
        items = np.frombuffer(stored.items, "<u8").astype(np.uint64)
        if stored.base_dim != space.base_dim or not 0 < len(stored.records) <= MAX_CANARY_RECORDS:
            raise ValueError(f"{len(stored.records)} records with encodings of {stored.base_dim} dimensions")
        base = np.frombuffer(stored.base, "<f2").reshape(len(items), stored.base_dim)
        expected = np.frombuffer(stored.expected, "<f4").astype(np.float32)
    except (msgspec.DecodeError, ValueError) as error:
        raise refusal("malformed", where, f"its canary cannot be read: {error}") from None
    if not len(expected) or not np.isfinite(expected).all():
        raise refusal("not-finite", where, "its canary expects no finite score for each item")
    return Canary(stored.records, items, base, expected)


def _scorer(config: Mapping[str, Any], tensors: Tensors, where: str) -> CtrScorer:
    try:
        return CtrScorer(CtrConfig.model_validate(config), tensors)
    except (ValidationError, ModelError) as error:
        raise refusal("bad-scorer", where, f"its CTR model cannot be built: {error}") from None


def _files(contents: BundleContents) -> dict[str, bytes]:
    """Return every file but the manifest and its signature."""
    space = contents.space
    parts: Tensors = {"projection": space.projection}
    if len(space.residual_items):
        parts |= {"residual_items": space.residual_items, "residuals": space.residuals}
    if contents.carry is not None:
        parts["carry"] = np.asarray(contents.carry, np.float32)
    tensors = {name: np.asarray(value) for name, value in contents.scorer_tensors.items()}
    canary = contents.canary
    if canary.expected is None:
        scorer = _scorer(contents.scorer_config, tensors, contents.version)
        canary = replace(canary, expected=canary_log_odds(scorer, contents.features, space, canary))
    config = {"scorer": dict(contents.scorer_config), "features": contents.features.model_dump(mode="json")}
    files = {
        CTR_CONFIG: json.dumps(config, sort_keys=True, separators=(",", ":")).encode(),
        CTR_TENSORS: _safetensors(tensors),
        SPACE: _safetensors(parts),
        CANARY: _canary_bytes(canary),
    }
    if contents.encoder is not None:
        files |= {f"encoder/{name}": content for name, content in contents.encoder.files().items()}
    if contents.encodings is not None:
        known = contents.encodings
        files[ENCODINGS] = _safetensors({"items": known.items, "contents": known.contents, "base": known.base})
    return files


def _safetensors(tensors: Tensors) -> bytes:
    # Contiguous: safetensors writes the memory as it lies.
    return safetensors.save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)})


def _canary_bytes(canary: Canary) -> bytes:
    expected = np.zeros(0, np.float32) if canary.expected is None else canary.expected
    return msgspec.msgpack.encode(
        _CanaryFile(
            canary.records,
            canary.items.astype("<u8").tobytes(),
            canary.base.astype("<f2").tobytes(),
            int(canary.base.shape[1]),
            expected.astype("<f4").tobytes(),
        )
    )
