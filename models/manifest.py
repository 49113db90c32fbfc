"""What a bundle says of itself: its list of files with checksums, where it comes from, what it learned from.

``manifest.json`` is written last and read first. It is JSON with sorted names, so that the same facts are the same
bytes; pointers and signatures are over those bytes. Unknown fields are ignored (additive changes keep the format).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final

import msgspec

from models.errors import BundleError

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "manifest.sig"
CTR_CONFIG: Final = "ctr.json"
CTR_TENSORS: Final = "ctr.safetensors"
SPACE: Final = "space.safetensors"
CANARY: Final = "canary.msgpack"
ENCODER_CONFIG: Final = "encoder/config.json"
ENCODER_TENSORS: Final = "encoder/delta.safetensors"
ENCODINGS: Final = "encodings.safetensors"
REQUIRED: Final = frozenset({CTR_CONFIG, CTR_TENSORS, SPACE, CANARY})
OPTIONAL: Final = frozenset({ENCODER_CONFIG, ENCODER_TENSORS, ENCODINGS})
BOOTSTRAP_VERSION: Final = "bootstrap-0"
"""The version that every program has without a registry: no bundle may take its name."""
PARTIAL_SUFFIX: Final = ".partial"
MAX_BUNDLE_BYTES: Final = 8 << 30
MAX_MANIFEST_BYTES: Final = 4 << 20
"""Room for the offsets of 1,000 partitions of three topics, and for the metrics."""
MAX_SMALL_FILE_BYTES: Final = 64 << 20
"""Of every file but the tensors of the space, the encoder and the encodings."""
_LARGE: Final = frozenset({SPACE, ENCODER_TENSORS, ENCODINGS})
_VERSION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class FileEntry(msgspec.Struct, frozen=True):
    """What a file of the bundle must be."""

    sha256: str
    bytes: int


class OffsetRange(msgspec.Struct, frozen=True):
    """Records of one partition: from ``start`` up to, without, ``end``."""

    topic: str
    partition: int
    start: int
    end: int


class Window(msgspec.Struct, frozen=True):
    """What was learned from, exactly enough to be read again. Times are of impressions, event time."""

    ranges: list[OffsetRange] = []
    from_ms: int = 0
    to_ms: int = 0
    impressions: int = 0
    examples: int = 0
    """Impressed items with an outcome."""
    users: int = 0

    @property
    def topics(self) -> list[str]:
        """Return the topics that were read."""
        return sorted({r.topic for r in self.ranges})


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One bundle's facts. ``files`` has every file but the manifest and its signature."""

    format: int = FORMAT
    name: str
    version: str
    parent: str | None = None
    created_ms: int
    space_id: str
    encoder_id: str
    """Of the base encodings that the projection is applied to."""
    base_model: str | None = None
    """Id of the encoder that the delta in ``encoder/`` is applied to; None without one."""
    feature_spec: str
    files: dict[str, FileEntry]
    window: Window
    metrics: dict[str, float] = {}
    decision: dict[str, Any] | None = None
    carry_from: str | None = None
    """Id of the space whose vectors ``carry`` [D, D] takes into this one."""
    train: dict[str, Any] = {}
    """Settings that it was trained with."""

    @property
    def total_bytes(self) -> int:
        """Return the size of all files without the manifest."""
        return sum(entry.bytes for entry in self.files.values())

    def encode(self) -> bytes:
        """Return the canonical bytes."""
        return msgspec.json.encode(self, order="sorted")


class _Format(msgspec.Struct):
    format: int


def new_version(created_ms: int) -> str:
    """Return a version's name by its time, UTC: names in order are versions in order."""
    at = datetime.fromtimestamp(created_ms / 1000, UTC)
    return f"{at:%Y%m%dT%H%M%S}{created_ms % 1000:03d}Z"


def check_version(version: str) -> str:
    """Return a version whose name can be a folder and a record. Raises BundleError (``bad-version``)."""
    if not _VERSION.fullmatch(version) or version.endswith(PARTIAL_SUFFIX) or version == BOOTSTRAP_VERSION:
        raise BundleError(
            "bad-version",
            f"{version!r} cannot name a bundle; nothing was done. "
            f"Take letters, digits, dots, dashes and underscores, and not {BOOTSTRAP_VERSION!r}",
        )
    return version


def digest(content: bytes | memoryview) -> str:
    """Return the SHA-256 of bytes, 64 hexadecimal digits."""
    return sha256(content).hexdigest()


def decode(content: bytes, where: str, *, max_bytes: int = MAX_BUNDLE_BYTES) -> Manifest:
    """Decode a manifest and check what it claims, before any other file is looked at.

    Raises BundleError: ``malformed``, ``unknown-format``, ``path-escapes``, ``unknown-file``, ``missing-file``,
    ``too-large``, ``bad-version``.
    """
    try:
        if len(content) > MAX_MANIFEST_BYTES:
            raise refusal("too-large", where, f"its manifest has {len(content)} bytes, over {MAX_MANIFEST_BYTES}")
        found = msgspec.json.decode(content, type=_Format).format
        if found != FORMAT:
            raise refusal(
                "unknown-format", where, f"its format is {found}, this program reads {FORMAT}; run the newer program"
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except msgspec.DecodeError as error:
        raise refusal("malformed", where, f"its manifest cannot be read: {error}") from None
    check_version(manifest.version)
    _check_files(manifest, where, max_bytes)
    return manifest


def refusal(reason: str, where: str, detail: str) -> BundleError:
    """Return the error of a bundle that is not taken."""
    return BundleError(
        reason,
        f"bundle {where}: {detail}. It was not taken, the model in use stays; "
        "publish it again or announce another version",
    )


def _check_files(manifest: Manifest, where: str, max_bytes: int) -> None:
    for name, entry in manifest.files.items():
        if name.startswith(("/", "~")) or "\\" in name or ":" in name or ".." in name.split("/"):
            raise refusal("path-escapes", where, f"its file {name!r} would lie outside its folder")
        if name not in REQUIRED | OPTIONAL:
            raise refusal("unknown-file", where, f"its manifest lists {name!r}, which no bundle has")
        limit = max_bytes if name in _LARGE else MAX_SMALL_FILE_BYTES
        if not 0 < entry.bytes <= limit:
            raise refusal("too-large", where, f"its file {name!r} would have {entry.bytes} bytes; the limit is {limit}")
    if manifest.total_bytes > max_bytes:
        raise refusal("too-large", where, f"it would have {manifest.total_bytes} bytes; the limit is {max_bytes}")
    missing = REQUIRED - manifest.files.keys()
    if (ENCODER_CONFIG in manifest.files) != (ENCODER_TENSORS in manifest.files):
        missing |= {ENCODER_CONFIG, ENCODER_TENSORS} - manifest.files.keys()
    if missing:
        raise refusal("missing-file", where, f"its manifest does not list {', '.join(sorted(missing))}")
