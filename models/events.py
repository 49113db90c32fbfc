"""Public records: what a client may send and what it gets back, decoded and validated in one pass.

MessagePack or JSON, told apart by the ``content-type`` header or the first byte. Unknown fields are
ignored (additive change keeps the version); everything else that does not fit is refused with a
``RecordError`` whose ``reason`` is a slug from ``REASONS``.
"""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any, Final, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta
from pydantic import BaseModel, ConfigDict, Field

from models.errors import RecordError

SCHEMA_VERSION: Final = 1
MAX_RECORD_BYTES: Final = 1_000_000
MAX_ITEMS: Final = 500
"""Items in one impression; the widest of MIND's real impressions has about 300."""
MAX_CANDIDATES: Final = 1_000
MAX_K: Final = 200
EARLIEST_MS: Final = 0
LATEST_MS: Final = 4_102_444_800_000  # 2100-01-01

REASONS: Final = {
    "null-value": "the value is null where a record is needed",
    "too-large": "the record has more bytes than the limit",
    "malformed": "the bytes are neither the JSON nor the MessagePack that they claim to be",
    "invalid": "a field is missing, of the wrong type or outside its limits",
    "key-mismatch": "the record's key is not the id in its value",
    "wrong-partition": "the key belongs to another partition: the producer does not use murmur2",
    "event-time-absurd": "the event time is further from broker time than the policy allows",
    "processing-error": "our own code failed on this event alone; the traceback is in the header",
    "fatal-event": "the process died on this event again and again",
}

Id = Annotated[str, Meta(min_length=1, max_length=256)]
ShortText = Annotated[str, Meta(max_length=256)]
Time = Annotated[int, Meta(ge=EARLIEST_MS, le=LATEST_MS)] | Annotated[dt.datetime, Meta(tz=True)]
Finite = Annotated[float, Meta(ge=-1e15, le=1e15)]
"""A float that is neither NaN nor infinite: msgspec refuses both, since no comparison holds for NaN."""
Scalar = Annotated[str, Meta(max_length=1_000)] | Annotated[int, Meta(ge=-(2**53), le=2**53)] | Finite | bool | None
Context = Annotated[dict[ShortText, Scalar], Meta(max_length=64)]
ActionName = Literal["click", "like", "dislike", "hide", "share", "purchase", "rating", "dwell"]
ACTIONS: Final[tuple[ActionName, ...]] = ("click", "like", "dislike", "hide", "share", "purchase", "rating", "dwell")


class ImpressedItem(msgspec.Struct, omit_defaults=True):
    """One item of a slate that a user saw."""

    item_id: Id
    position: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    """1-based; absent where the log does not know it."""
    propensity: Annotated[float, Meta(gt=0, le=1)] | None = None
    """Probability with which the policy chose this item for this position."""


class Impression(msgspec.Struct, tag="impression", tag_field="type", omit_defaults=True, kw_only=True):
    """A slate shown to a user."""

    event_id: Id
    event_time: Time
    user_id: Id
    request_id: Id | None = None
    """The ``recommendation_id`` that was shown, if it was ours."""
    surface: ShortText | None = None
    items: Annotated[list[ImpressedItem], Meta(min_length=1, max_length=MAX_ITEMS)]
    experiment: ShortText | None = None
    session_id: ShortText | None = None
    context: Context | None = None


class Action(msgspec.Struct, tag="action", tag_field="type", omit_defaults=True, kw_only=True):
    """Something that a user did with one item."""

    event_id: Id
    event_time: Time
    user_id: Id
    item_id: Id
    action: ActionName
    value: Finite | None = None
    """Rating in stars (0 to 5) or dwell time in seconds; other actions ignore it."""
    request_id: Id | None = None
    surface: ShortText | None = None
    session_id: ShortText | None = None
    context: Context | None = None


class Filters(msgspec.Struct, omit_defaults=True, kw_only=True):
    """What a requested slate may consist of; each field narrows, an absent one does not."""

    categories: Annotated[list[ShortText], Meta(max_length=64)] | None = None
    tags: Annotated[list[ShortText], Meta(max_length=64)] | None = None
    published_after: Time | None = None
    min_price: Finite | None = None
    max_price: Finite | None = None


class Request(msgspec.Struct, tag="request", tag_field="type", omit_defaults=True, kw_only=True):
    """Somebody asks for a slate."""

    event_id: Id
    event_time: Time
    user_id: Id
    request_id: Id
    surface: ShortText | None = None
    k: Annotated[int, Meta(ge=1, le=MAX_K)] | None = None
    query: Annotated[str, Meta(max_length=2_000)] | None = None
    candidates: Annotated[list[Id], Meta(min_length=1, max_length=MAX_CANDIDATES)] | None = None
    """Rank these instead of retrieving."""
    exclude: Annotated[list[Id], Meta(max_length=MAX_CANDIDATES)] | None = None
    filters: Filters | None = None
    context: Context | None = None


Event = Impression | Action | Request


class Item(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One catalogue record of the ``items`` topic; a null value removes the item."""

    item_id: Id
    title: Annotated[str, Meta(max_length=4_000)] = ""
    text: Annotated[str, Meta(max_length=100_000)] | None = None
    categories: Annotated[list[ShortText], Meta(max_length=64)] | None = None
    tags: Annotated[list[ShortText], Meta(max_length=256)] | None = None
    entities: Annotated[list[ShortText], Meta(max_length=256)] | None = None
    published_at: Time | None = None
    expires_at: Time | None = None
    is_hidden: bool = False
    price: Finite | None = None
    attributes: Context | None = None
    embedding: Annotated[list[Finite], Meta(min_length=1, max_length=4_096)] | None = None
    """A vector that the client computed elsewhere: image, audio."""


class User(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One profile record of the ``users`` topic; a null value removes the profile."""

    user_id: Id
    attributes: Context | None = None
    text: Annotated[str, Meta(max_length=20_000)] | None = None
    consent: bool | None = None


class Trigger(msgspec.Struct):
    """The record that a slate answers."""

    event_id: str
    topic: str
    partition: int
    offset: int


class Reason(msgspec.Struct, omit_defaults=True):
    """Why an item is in a slate."""

    kind: str
    text: str
    item_ids: list[str] | None = None


class RecommendedItem(msgspec.Struct):
    """One position of a slate."""

    item_id: str
    position: int
    score: float
    """For ordering only."""
    ctr: float
    """Calibrated, at a reference position."""
    source: str
    propensity: float | None
    """None in a deterministic slot."""
    reason: Reason


class ExplorationDraw(msgspec.Struct):
    """How the drawn slots of a slate were drawn; the items in them have a propensity."""

    pool: list[str]
    """Ids of the items that could have been drawn."""
    draws: int
    """Draws that the propensities were counted from."""


class Recommendation(msgspec.Struct, kw_only=True):
    """A slate on the ``recommendations`` topic."""

    recommendation_id: str
    user_id: str
    request_id: str | None
    generated_at: int
    expires_at: int
    surface: str
    degraded: bool
    trigger: Trigger
    model_version: str
    space_id: str
    experiment: str | None
    items: list[RecommendedItem]
    exploration: ExplorationDraw | None = None
    """None where no slot was drawn from the fresh pool."""


class ClockPolicy(BaseModel):
    """How a client's event time is reconciled with broker time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Literal["live", "trusted"] = Field(
        "live",
        description="live: clamp event time to broker time within the limits below, refuse absurd ones. "
        "trusted: take it as it is (imports, backfills); only times after broker time are refused.",
    )
    max_past_seconds: float = Field(
        86_400.0, ge=0, description="live: an older event time is moved up to this many seconds before broker time."
    )
    max_future_seconds: float = Field(
        5.0, ge=0, description="live: a later event time is moved down to this many seconds after broker time."
    )
    absurd_past_seconds: float = Field(
        30 * 86_400.0, gt=0, description="live: older than this many seconds before broker time is refused."
    )
    absurd_future_seconds: float = Field(
        86_400.0, gt=0, description="both policies: later than this many seconds after broker time is refused."
    )

    def event_time_ms(self, client_ms: int, broker_ms: int) -> int:
        """Return the event time to use, in epoch milliseconds.

        Raises RecordError("event-time-absurd") where the policy refuses the client's time.
        """
        if not EARLIEST_MS <= client_ms <= LATEST_MS:
            raise RecordError("event-time-absurd", f"event_time lies outside 1970 to 2100: {client_ms} ms")
        ahead_ms = client_ms - broker_ms
        if ahead_ms > self.absurd_future_seconds * 1000:
            raise RecordError(
                "event-time-absurd",
                f"event_time is {ahead_ms / 1000:.0f} s after broker time; at most {self.absurd_future_seconds:.0f} s",
            )
        if self.policy == "trusted":
            return client_ms
        if -ahead_ms > self.absurd_past_seconds * 1000:
            raise RecordError(
                "event-time-absurd",
                f"event_time is {-ahead_ms / 1000:.0f} s before broker time; at most {self.absurd_past_seconds:.0f} s "
                "(an import of old logs needs the policy 'trusted')",
            )
        low = broker_ms - int(self.max_past_seconds * 1000)
        high = broker_ms + int(self.max_future_seconds * 1000)
        return min(max(client_ms, low), high)


def epoch_ms(time: int | dt.datetime) -> int:
    """Return a record's time in epoch milliseconds."""
    return time if isinstance(time, int) else round(time.timestamp() * 1000)


T = TypeVar("T")
_JSON_START: Final = frozenset(b'{[" \t\r\n-0123456789tfn')


def is_json(value: bytes, content_type: str | None = None) -> bool:
    """Tell JSON from MessagePack by content type, else by the first byte.

    A MessagePack map starts with 0x80-0x8f, 0xde or 0xdf, none of which can start a JSON text.
    """
    if content_type:
        return "json" in content_type.lower()
    return bool(value) and value[0] in _JSON_START


class Codec(Generic[T]):
    """Decoder and validator of one record type."""

    def __init__(self, record_type: Any) -> None:
        self._json = msgspec.json.Decoder(record_type)
        self._msgpack = msgspec.msgpack.Decoder(record_type)

    def decode(self, value: bytes | None, content_type: str | None = None) -> T:
        """Decode and validate one value. Raises RecordError with a reason for whatever does not fit."""
        if value is None:
            raise RecordError("null-value", "a record is needed, the value is null")
        if len(value) > MAX_RECORD_BYTES:
            raise RecordError("too-large", f"{len(value)} bytes; the limit is {MAX_RECORD_BYTES}")
        decoder = self._json if is_json(value, content_type) else self._msgpack
        try:
            return decoder.decode(value)  # type: ignore[no-any-return]
        except msgspec.ValidationError as error:
            raise RecordError("invalid", str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RecordError("malformed", str(error)) from None
        except (RecursionError, OverflowError, ValueError) as error:
            raise RecordError("malformed", f"{type(error).__name__}: {error}") from None


EVENT_CODEC: Final[Codec[Event]] = Codec(Event)
ITEM_CODEC: Final[Codec[Item]] = Codec(Item)
USER_CODEC: Final[Codec[User]] = Codec(User)
RECOMMENDATION_CODEC: Final[Codec[Recommendation]] = Codec(Recommendation)
