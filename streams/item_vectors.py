"""Records of the ``item-vectors`` topic: one base encoding of one item by one encoder.

Key: encoder id, a zero byte, item id. Value: MessagePack {content_hash, vector: fp16 bytes}; null where the item was
removed or has no text any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from models.errors import RecordError

Halves = npt.NDArray[np.float16]


class _Value(msgspec.Struct):
    content_hash: Annotated[int, msgspec.Meta(gt=0)]
    vector: bytes


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Value)


@dataclass(frozen=True, slots=True)
class Encoding:
    """The base encoding of the text that has ``content_hash``."""

    content_hash: int
    vector: Halves
    """float16 [B]."""


def key_prefix(encoder_id: str) -> bytes:
    """Return what the keys of an encoder's records begin with."""
    return encoder_id.encode() + b"\0"


def key(encoder_id: str, item_id: str) -> bytes:
    """Return the key of an item's encoding."""
    return key_prefix(encoder_id) + item_id.encode("utf-8", "surrogatepass")


def value(content_hash: int, vector: npt.NDArray[np.float32]) -> bytes:
    """Return the value of an encoding, float [B], rounded to fp16."""
    return _ENCODER.encode(_Value(content_hash, vector.astype("<f2").tobytes()))


def encoder_id_of(record_key: bytes | None) -> str | None:
    """Return the encoder id in a record's key, None where there is none."""
    encoder_id, zero, _ = (record_key or b"").partition(b"\0")
    return encoder_id.decode("utf-8", "replace") if zero else None


def item_id_of(record_key: bytes | None, prefix: bytes) -> str | None:
    """Return the item id in a record's key, None where it is of another encoder or none of ours."""
    if record_key is None or not record_key.startswith(prefix):
        return None
    return record_key[len(prefix) :].decode("utf-8", "replace")


def content_hash_of(record_value: bytes) -> int:
    """Return the content hash in a value. Raises RecordError where it is not one of ours."""
    return _decoded(record_value).content_hash


def _decoded(record_value: bytes) -> _Value:
    try:
        return _DECODER.decode(record_value)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise RecordError("malformed", f"not an item vector: {error}") from None


def decode(record_value: bytes, base_dim: int) -> Encoding:
    """Decode a value. Raises RecordError where it is not an encoding of ``base_dim`` dimensions."""
    stored = _decoded(record_value)
    if len(stored.vector) != 2 * base_dim:
        raise RecordError("invalid", f"an item vector of {len(stored.vector)} bytes, not {2 * base_dim}")
    return Encoding(stored.content_hash, np.frombuffer(stored.vector, "<f2"))
