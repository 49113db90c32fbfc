"""Randomised users: who they are, and the draw of their slates. The answer to the feedback loop.

A small, rotating share of users always gets slates drawn at random from what was retrieved and what the rules allow.
What they do is evidence that no model's choice has shaped. Axes as in models/ranking.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from models.hashing import hash64
from models.item_index import ItemIndex
from models.ranking import F32, I32, Bools, is_in
from models.slates import SlateRequest

RANDOMISED: Final = "randomised"
"""``experiment`` of a slate that was drawn at random."""
_DAY_MS: Final = 86_400_000

U64 = npt.NDArray[np.uint64]


class ExplorationConfig(BaseModel):
    """Who gets randomised slates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    randomised_share: float = Field(
        0.01, ge=0, le=1, description="Share of users whose slates are drawn at random; 0 turns it off."
    )
    rotation_days: float = Field(
        7.0, gt=0, le=3_650, description="How long the same users are chosen, in days of broker time."
    )
    salt: str = Field(
        "millstream", max_length=256, description="Changes who is chosen; the same on all workers and for the trainer."
    )


def is_randomised(user_id: str, time_ms: int, config: ExplorationConfig) -> bool:
    """Tell whether a user's slates are drawn at random at ``time_ms``: by a hash of user and period, nothing stored."""
    if config.randomised_share <= 0:
        return False
    period = int(time_ms // (config.rotation_days * _DAY_MS))
    text = f"{config.salt}\0{period}\0{user_id}".encode("utf-8", "surrogatepass")
    value = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return value < config.randomised_share * 2.0**64


def draw_seed(topic: str, partition: int, offset: int, user_id: str) -> int:
    """Return the seed of the draw that the record at (topic, partition, offset) causes, 64 bits.

    Derived, not drawn: a slate that is made again after a crash draws the same from the same candidates.
    """
    text = f"draw\0{topic}\0{partition}\0{offset}\0{user_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def draw(
    seed: int, hashes: U64, first: Bools, second: Bools, k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Draw ``k`` of one request's candidates uniformly, without replacement, in random order.

    ``hashes`` uint64 [C]: of the items; ``first`` bool [C]: the candidates; ``second`` bool [C]: those that only fill
    what the first ones leave. Returns the chosen columns int64 [≤ k] and the propensity of each, float32.

    Each item's priority is a hash of seed and item, uniform and independent of all else; the smallest come first. So
    every order of the n candidates is as likely as any other, and the marginal probability that a given item stands
    in a given slot is P(item i in slot j) = (n − 1)! / n! = 1 / n for each j ≤ n. That is the propensity; it needs no
    estimate. The slots after the first n are drawn in the same way from the m second ones: 1 / m.
    """
    priorities = mixed(hashes ^ np.uint64(seed))
    chosen, propensities = [], []
    for members in (np.flatnonzero(first), np.flatnonzero(second & ~first)):
        order = members[np.lexsort((members, priorities[members]))][:k]
        k -= len(order)
        chosen.append(order)
        propensities.append(np.full(len(order), 1.0 / max(len(members), 1), np.float32))
    return np.concatenate(chosen), np.concatenate(propensities)


def draw_slates(
    requests: Sequence[SlateRequest],
    rows: I32,
    unwanted: I32,
    index: ItemIndex,
    columns: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
) -> F32 | None:
    """Replace, in place, the columns [B, K] of randomised users by drawn ones, as many as they have, ``counts`` [B].

    ``rows`` int32 [B, C]: the candidates; ``unwanted`` int32 [B, X]: what the user's past rules out comes last, and
    only where the request itself named it. Returns the propensities [B, K], NaN where nothing was drawn, or None where
    nobody is randomised.
    """
    randomised = [(b, request.draw_seed) for b, request in enumerate(requests) if request.draw_seed is not None]
    if not randomised:
        return None
    propensities = np.full(columns.shape, np.nan, np.float32)
    for b, seed in randomised:
        valid = rows[b] >= 0
        ruled_out = is_in(rows[b : b + 1], unwanted[b : b + 1])[0]
        hashes = np.array([hash64(index.item_id(row)) if row >= 0 else 0 for row in rows[b].tolist()], np.uint64)
        chosen, chances = draw(seed, hashes, valid & ~ruled_out, valid & ruled_out, int(counts[b]))
        columns[b, : len(chosen)] = chosen
        propensities[b, : len(chosen)] = chances
    return propensities


def mixed(values: U64) -> U64:
    """Return 64-bit values mixed so that each bit depends on all: the finaliser of SplitMix64 (Steele et al. 2014)."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed_values: U64 = z ^ (z >> np.uint64(31))
    return mixed_values
