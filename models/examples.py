"""The contract between streams and trainer: features records, labels records, and slates made of them again.

A features record is what was known at the moment of one impression, raw, so that a new encoder or a new encoding can
be trained on it: hashes, counts, times. A labels record says later what came of it. Both are MessagePack arrays that
begin with a version, on the topics ``features`` and ``labels``, keyed by user. Numbers inside are packed little endian.
Axes: K items of an impression, R recent items, S slates, C items of the longest slate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from models.counter_events import HALF_LIVES, KINDS
from models.errors import RecordError
from models.features import RawSlates
from models.user_row import RECENT

VERSION: Final = 2
"""Version 1 had neither expected clicks nor the times since an item was first shown and since the user acted on it."""
LABELS_VERSION: Final = 1
LAGGED: Final = 1
"""Flag of features: processed long after it happened, or behind a later action of its user, so that the counters or the
row have seen its future."""
REPLAYED: Final = 2
"""Flag of features: the user's row or the counters already held the event, so that the state is that after it."""
SAMPLED: Final = 4
"""Flag of features: made from an action without an impression; all but the first item were drawn (models.sampling)."""
EARLY: Final = 1
"""Flag of labels: closed before its attribution window ended, for lack of room."""
BY_TIMER: Final = 2
"""Flag of labels: closed by a timer, the user being silent."""
MAX_ITEMS: Final = 0xFFFF

RANDOMISED: Final = "randomised"
EXTERNAL: Final = "external"
MODEL: Final = "model"
"""Policies that are not named by an experiment."""

Bytes2D = dict[str, tuple[str, int]]
_ITEM_FIELDS: Final[Bytes2D] = {
    "items": ("<u8", 1),
    "positions": ("<u2", 1),
    "counters": ("<f2", HALF_LIVES * KINDS),
    "age_seconds": ("<f4", 1),
    "first_seen_seconds": ("<f4", 1),
    "sims": ("<f2", 2),
    "shown_counts": ("u1", 1),
    "shown_age_seconds": ("<f4", 1),
    "acted_age_seconds": ("<f4", 1),
}
"""Type, and numbers for each item, of the fields that have a place for every item."""
_RECENT_FIELDS: Final[Bytes2D] = {
    "recent_items": ("<u8", 1),
    "recent_age_seconds": ("<f4", 1),
    "recent_codes": ("u1", 1),
}


class FeaturesRecord(msgspec.Struct, array_like=True, gc=False, kw_only=True):
    """One impression, and the raw state before it was applied."""

    version: int = VERSION
    impression_id: int
    """models.hashing.impression_id, unsigned 64 bits, never 0."""
    user_id: str
    partition: int
    offset: int
    time_ms: int
    """Event time under the clock policy."""
    broker_ms: int
    processed_ms: int
    flags: int
    """LAGGED, REPLAYED, SAMPLED."""
    surface: str
    request_id: str | None
    experiment: str | None
    policy: str
    """Who made the slate: ``RANDOMISED``, ``EXTERNAL`` (no request of ours), an experiment, or ``MODEL``."""
    session_id: str | None
    context: dict[str, Any] | None
    space_id: str
    """Of the item vectors that ``sims`` were made with."""
    items: bytes
    """u8 hashes (models.hashing.hash64) [K], each once."""
    positions: bytes
    """u2 [K], 1-based, 0 = not known."""
    propensities: bytes
    """f4 [K], NaN = none; empty where no item has one."""
    counters: bytes
    """f2 log1p of the decayed counts [K, half-lives, kinds], before this event's batch was counted."""
    age_seconds: bytes
    """f4 [K] since publication, NaN = not given."""
    first_seen_seconds: bytes
    """f4 [K] since anybody was first shown the item, NaN = never."""
    sims: bytes
    """f2 [K, 2], as models.features.RawSlates."""
    shown_counts: bytes
    """u1 [K]."""
    shown_age_seconds: bytes
    """f4 [K], NaN = never."""
    acted_age_seconds: bytes
    """f4 [K] since the user acted on it, NaN = not among the recent items."""
    recent_items: bytes
    """u8 [R'], newest first, free places left out; R' ≤ R."""
    recent_age_seconds: bytes
    """f4 [R']."""
    recent_codes: bytes
    """u1 [R'], as models.user_row."""
    user_counts: tuple[int, int, int]
    """Impressions, clicks and actions of the row."""
    scores: list[tuple[str, bytes]]
    """Model version and f4 [K] calibrated log-odds at the reference position: live, then shadows."""
    model_version: str
    """The live one when it was processed."""
    negative_rate: float | None = None
    """Of a SAMPLED one: share of all possible negatives that was drawn; None where every shown item is there."""

    def __len__(self) -> int:
        """Items of the impression, K."""
        return len(self.items) // 8


class LabelsRecord(msgspec.Struct, array_like=True, gc=False, kw_only=True):
    """What came of one impression."""

    version: int = LABELS_VERSION
    impression_id: int
    user_id: str
    time_ms: int
    """Event time of the impression."""
    closed_ms: int
    """End of its attribution window, event time."""
    revision: int
    """0 first, rising with each correction."""
    flags: int
    """EARLY, BY_TIMER."""
    clicked: bytes
    """u2 places in ``items`` of a positive action, rising."""
    refused: bytes
    """u2 places of items hidden or disliked."""
    actions: bytes
    """u1 code of the strongest positive action of each ``clicked``."""
    as_of: int = 0
    """Offset after the newest event of the user that it knows. Of an impression's records the one that knows most
    counts, of equals the last: a process that slept past its session may write an older one late."""


def encode(record: FeaturesRecord | LabelsRecord) -> bytes:
    """Return the value of a record."""
    return _ENCODER.encode(record)


def decode_features(value: bytes) -> FeaturesRecord:
    """Return a features record. Raises RecordError for what is none, or of another version."""
    record: FeaturesRecord = _decode(_FEATURES, value, VERSION)
    _check_features(record)
    return record


def decode_labels(value: bytes) -> LabelsRecord:
    """Return a labels record. Raises RecordError for what is none, or of another version."""
    record: LabelsRecord = _decode(_LABELS, value, LABELS_VERSION)
    if len(record.clicked) % 2 or len(record.refused) % 2 or len(record.actions) * 2 != len(record.clicked):
        raise RecordError("invalid", f"labels of impression {record.impression_id} whose parts differ in length")
    return record


def label_values(labels: LabelsRecord, items: int) -> npt.NDArray[np.float32]:
    """Return 1 for each item with a positive action, else 0, float32 [items].

    Raises RecordError where a place lies outside the impression: the two records are not of one.
    """
    clicked = np.frombuffer(labels.clicked, "<u2")
    values = np.zeros(items, np.float32)
    if clicked.size and int(clicked.max()) >= items:
        raise RecordError(
            "invalid",
            f"labels of impression {labels.impression_id} name place {clicked.max()} of {items} items; left out",
        )
    values[clicked] = 1.0
    return values


def raw_slates(records: Sequence[FeaturesRecord]) -> RawSlates:
    """Return the raw state of impressions, in their order, padded to the longest.

    Raises RecordError where the fields of a record differ in length; ``decode_features`` lets none through.
    """
    sizes = np.fromiter(map(len, records), np.intp, len(records))
    raw = RawSlates.empty(len(records), int(sizes.max(initial=0)))
    raw.valid[:] = np.arange(raw.valid.shape[1]) < sizes[:, None]
    recents = np.fromiter((len(r.recent_codes) for r in records), np.intp, len(records))
    held = np.arange(RECENT) < recents[:, None]
    try:
        for fields, mask in ((_ITEM_FIELDS, raw.valid), (_RECENT_FIELDS, held)):
            for name, (kind, width) in fields.items():
                flat = np.frombuffer(b"".join([getattr(r, name) for r in records]), kind)
                target = getattr(raw, name)
                target[mask] = flat.reshape(-1, *target.shape[2:]) if width > 1 else flat
    except ValueError:
        for record in records:
            _check_features(record)
        raise
    raw.user_counts[:] = np.array([r.user_counts for r in records], np.uint32).reshape(-1, 3)
    raw.time_ms[:] = [r.time_ms for r in records]
    return raw


def state_fields(raw: RawSlates, slate: int) -> dict[str, Any]:
    """Return the fields of a features record that hold raw state, of one slate: what ``raw_slates`` reads again.

    The slate's items stand first among its places, as do the recent items among theirs.
    """
    k, recents = int(raw.valid[slate].sum()), int((raw.recent_items[slate] != 0).sum())
    fields: dict[str, Any] = {
        name: getattr(raw, name)[slate, :count].astype(kind).tobytes()
        for parts, count in ((_ITEM_FIELDS, k), (_RECENT_FIELDS, recents))
        for name, (kind, _) in parts.items()
    }
    return fields | {"user_counts": tuple(raw.user_counts[slate].tolist())}


def _decode(decoder: msgspec.msgpack.Decoder[Any], value: bytes, version: int) -> Any:
    try:
        record = decoder.decode(value)
        found = record.version
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError) as error:
        # Of another version the fields may be others too: their order tells nothing then, but the first is the version.
        found = _version(value)
        if found in (None, version):
            raise RecordError("malformed", f"no record of an example: {error}") from None
    if found != version:
        raise RecordError("invalid", f"a record of version {found}; this program reads {version}: it was left out")
    return record


def _version(value: bytes) -> int | None:
    """Return the first field of a record that could not be decoded, where it is a whole number."""
    try:
        fields = msgspec.msgpack.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError):
        return None
    return fields[0] if isinstance(fields, list) and fields and isinstance(fields[0], int) else None


def _check_features(record: FeaturesRecord) -> None:
    items, recent = len(record), len(record.recent_codes)
    right = 0 < items <= MAX_ITEMS and recent <= RECENT and min(record.user_counts) >= 0
    right = right and max(record.user_counts) < 2**32 and abs(record.time_ms) < 2**62
    for fields, count in ((_ITEM_FIELDS, items), (_RECENT_FIELDS, recent)):
        for name, (kind, width) in fields.items():
            right = right and len(getattr(record, name)) == count * width * np.dtype(kind).itemsize
    right = right and len(record.propensities) in (0, 4 * items)
    right = right and all(len(values) == 4 * items for _, values in record.scores)
    if not right:
        raise RecordError("invalid", f"features of impression {record.impression_id} whose parts differ in length")


_ENCODER: Final = msgspec.msgpack.Encoder()
_FEATURES: Final = msgspec.msgpack.Decoder(FeaturesRecord)
_LABELS: Final = msgspec.msgpack.Decoder(LabelsRecord)
