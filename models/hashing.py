"""Hashes that are stored or sent: they must never change, and do not depend on PYTHONHASHSEED."""

from __future__ import annotations

import hashlib
from functools import lru_cache


@lru_cache(maxsize=1 << 17)
def hash64(text: str) -> int:
    """Return the unsigned 64-bit BLAKE2b hash of ``text``; never 0, which means "empty" in a row."""
    value = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    return value or 1


def short_hash(hash_64: int) -> int:
    """Return the low 32 bits of a 64-bit hash, 0 replaced by 1: the form that compact rings keep."""
    return (hash_64 & 0xFFFFFFFF) or 1


def recommendation_id(topic: str, partition: int, offset: int, user_id: str) -> str:
    """Return the id of the slate that the record at (topic, partition, offset) causes for ``user_id``.

    Derived, not drawn: a slate that is sent again after a crash has the same id, so that a consumer
    recognises it. 32 hexadecimal digits.
    """
    text = f"{topic}\0{partition}\0{offset}\0{user_id}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def impression_id(epoch: int, partition: int, offset: int) -> int:
    """Return the id of the impression at (partition, offset) of the ``events`` topic whose id hashes to ``epoch``.

    Derived, not drawn: a record that is sent again after a crash has the same id. Unsigned 64 bits, never 0.
    """
    return hash64(f"{epoch}\0{partition}\0{offset}")
