"""Candidates to an order: features of each pair of user and item, one score, rules, the best k.

Axes: B requests, C candidates, D dimensions of a vector, S items shown lately, R recent items,
V kinds of taste (TASTES), K positions of a slate. A row of -1 is padding everywhere.
Nothing here writes state: the same inputs give the same order, whatever else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from models.columns import at_columns
from models.events import ACTIONS
from models.item_index import ItemIndex
from models.user_row import ACTION_MASK, NEGATIVE, POSITIVE

UserRows = npt.NDArray[Any]
"""User rows: a structured array of models.user_row.ROW, [n]."""
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]

TASTES: Final = ("short_term", "long_term", "profile", "query")
"""Order of the vectors that describe what a request is after; also names of candidate sources."""
SHORT_TERM, LONG_TERM, PROFILE, QUERY = range(4)  # both wishes, PROFILE and QUERY, are read as one stretch
SCORE_STEPS: Final = 1e5
"""Scores are compared in steps of 1e-5, so that the last bits of a matrix product never decide an order."""
CTR_EDGE: Final = 1e-6
NO_ROW: Final = -2
"""Padding of sets of rows: equal to no candidate, and not to the padding of candidates."""
FEW_ROWS: Final = 16
_LAST: Final = np.iinfo(np.int64).max
"""Behind every key of a score and a row, with room for as many of padding as there are columns."""
UNWANTED_PENALTY: Final = np.float32(1e4)
"""Puts an item that would be left out behind all others, where the request names its candidates."""
UNWANTED_ACTIONS: Final = tuple(ACTIONS.index(name) + 1 for name in ("hide", "dislike"))
"""Codes, as rows keep them, of actions after which an item is left out as long as the row remembers it."""


def _refused_codes() -> Bools:
    """Return which codes of an action say that the user does not want the item, bool [256]."""
    codes = np.arange(256)
    refused: Bools = ((codes & NEGATIVE) != 0) | np.isin(codes & ACTION_MASK, UNWANTED_ACTIONS)
    return refused


_REFUSED: Final = _refused_codes()


class RankingConfig(BaseModel):
    """Weights of the score, and what a user's own recent past rules out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    short_term_weight: float = Field(1.0, ge=0, le=100, description="Weight of similarity to the short-term vector.")
    long_term_weight: float = Field(0.5, ge=0, le=100, description="Weight of similarity to the long-term vector.")
    profile_weight: float = Field(1.0, ge=0, le=100, description="Weight of similarity to the profile text.")
    query_weight: float = Field(2.0, ge=0, le=100, description="Weight of similarity to the query.")
    least_evidence: float = Field(
        0.02,
        ge=0,
        le=1,
        description="A user vector that counts less than this share of full is as none: a profile speaks again.",
    )
    full_norm: float = Field(
        0.05,
        gt=0,
        le=10,
        description="Norm from which a user vector counts in full; a weaker one (little evidence, or old) counts less.",
    )
    ctr_weight: float = Field(
        0.15, ge=0, le=100, description="Weight of the smoothed CTR, for each unit of its log-odds."
    )
    popularity_weight: float = Field(
        0.3, ge=0, le=100, description="Weight of decayed popularity (1 for the most popular item, logarithmic)."
    )
    shown_window_seconds: float = Field(
        21_600.0, ge=0, description="How long an item counts as shown lately, in seconds after it was last shown."
    )
    shown_limit: int = Field(
        3, ge=1, le=255, description="Shown lately this often and not clicked: the item is left out of the slate."
    )
    shown_penalty: float = Field(
        0.1,
        ge=0,
        le=100,
        description="Taken from the hand-set score for each time that the item was shown lately; a CTR model has "
        "learned its own.",
    )
    query_log_odds: float = Field(
        8.0,
        ge=0,
        le=1_000,
        description="With a CTR model: log-odds added for each unit of similarity to the query, which the model does "
        "not know.",
    )
    profile_log_odds: float = Field(
        4.0,
        ge=0,
        le=1_000,
        description="With a CTR model: log-odds added for each unit of similarity to the profile text.",
    )
    context_log_odds: float = Field(
        0.5,
        ge=0,
        le=10,
        description="With a CTR model, which does not know contexts, and popularity_context: log-odds added for each "
        "unit of the logarithm of how much more an item is acted on in the request's context than overall. By hand: "
        "ctr_weight.",
    )
    half_trust_exposure: float = Field(
        0.0,
        ge=0,
        le=1_000,
        description="With a CTR model that learned from slates which others made: the exposure, in that of a usual "
        "candidate which is shown now, at which it is believed by half. 2 did well on real logs; 0: always in full.",
    )
    clicked_window_seconds: float = Field(
        604_800.0,
        ge=0,
        description="Items that the user clicked, bought, rated … within this many seconds are left out.",
    )

    @property
    def reading(self) -> tuple[float, ...]:
        """What decides how a user's row is read: its vectors as tastes, its past as what to leave out."""
        windows = self.shown_window_seconds, self.shown_limit, self.clicked_window_seconds
        return self.full_norm, self.least_evidence, *windows

    def taste_weights(self) -> F32:
        """Return the weights of similarity, float32 [V], in the order of TASTES."""
        return np.array(
            [self.short_term_weight, self.long_term_weight, self.profile_weight, self.query_weight], np.float32
        )


class UserReader(Protocol):
    """What the recommender reads of user rows; the module models.user_state is one."""

    def user_vectors(self, rows: UserRows, now_ms: int | npt.NDArray[np.int64]) -> tuple[F32, F32, Bools]:
        """Return short-term and long-term vectors float32 [n, D] as of ``now_ms`` (one time, or one for each row), and
        whether there is any, [n].
        """

    def shown(self, rows: UserRows) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Return short hashes of items shown lately [n, S] (0 = none), how often, and when last (ms)."""

    def recent(self, rows: UserRows) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Return hashes of recent items [n, R] (0 = none), action codes as models.user_row says, and times (ms)."""


@dataclass(slots=True)
class Past:
    """What each user's own recent past says about items.

    ``unwanted`` int32 [B, X]: rows to leave out (clicked lately, hidden, disliked, shown too often).
    ``shown`` int32 [B, S] and ``shown_counts`` float32 [B, S]: rows shown lately and how often.
    Both are padded with -2, which equals no candidate.
    ``recent`` int32 [B, R]: rows of the items acted on, newest first, -1 for those not known; ``liked`` int32 [B, R]:
    the same where the action was a positive one, -1 elsewhere; ``actions`` uint8 [B, R]: codes of those actions.
    """

    unwanted: I32
    shown: I32
    shown_counts: F32
    recent: I32
    liked: I32
    actions: npt.NDArray[np.uint8]


@dataclass(slots=True)
class Features:
    """What the score is made of, float32: similarity [B, C, V], the others [B, C]; ``ctr`` is within (0, 1)."""

    similarity: F32
    ctr: F32
    popularity: F32
    shown_counts: F32

    def take(self, at: slice | npt.NDArray[np.intp]) -> Features:
        """Return those of the requests at ``at``."""
        return Features(self.similarity[at], self.ctr[at], self.popularity[at], self.shown_counts[at])


def past_of(reader: UserReader, states: UserRows, index: ItemIndex, now_ms: int, config: RankingConfig) -> Past:
    """Return what the rows of B users say about items at ``now_ms``."""
    hashes, codes, times_ms = reader.recent(states)
    recent = index.rows_by_hash(hashes.ravel().tolist(), hashes.size).reshape(hashes.shape)
    refused = is_refused(codes)
    known = recent >= 0
    used = known & ~refused
    lately = used & (now_ms - times_ms <= config.clicked_window_seconds * 1000)

    short_hashes, counts, shown_ms = reader.shown(states)
    shown = index.rows_by_short_hash(short_hashes.ravel().tolist(), short_hashes.size).reshape(short_hashes.shape)
    shown[shown < 0] = NO_ROW
    answered = is_in(shown, np.where(used, recent, -1))
    in_window = now_ms - shown_ms <= config.shown_window_seconds * 1000
    times = (counts * (in_window & ~answered)).astype(np.float32)
    acted = np.where(lately | (refused & known), recent, np.int32(NO_ROW))
    too_often = np.where(times >= config.shown_limit, shown, np.int32(NO_ROW))
    unwanted = np.concatenate([acted, too_often], axis=1)
    return Past(
        unwanted=unwanted[:, np.logical_or.reduce(unwanted >= 0, axis=0)],
        shown=shown,
        shown_counts=times,
        recent=recent,
        liked=np.where(used & ((codes & POSITIVE) != 0), recent, np.int32(-1)),
        actions=codes & np.uint8(ACTION_MASK),
    )


def is_refused(codes: npt.NDArray[np.uint8]) -> Bools:
    """Tell which recent actions say that the user does not want the item: hide, dislike, a low rating."""
    return _REFUSED[codes]


def unit(vector: F32) -> F32:
    """Return a vector [D] scaled to norm 1, or zeros where it has none."""
    norm = float(np.linalg.norm(vector))
    return np.asarray(vector, np.float32) / np.float32(norm) if norm > 0 else np.zeros_like(vector, np.float32)


def scale_tastes(vectors: F32, full_norm: float) -> F32:
    """Return user vectors [..., D] scaled to norm 1, or less where their norm is below ``full_norm``.

    A user vector's norm is its evidence: it grows with each click and decays with time.
    """
    norms = np.sqrt(np.add.reduce(vectors * vectors, axis=-1, keepdims=True))
    scaled: F32 = (vectors / np.maximum(norms, full_norm)).astype(np.float32, copy=False)
    return scaled


def similarity(item_vectors: F32, tastes: F32) -> F32:
    """Return dot products of items [B, C, D] with tastes [B, V, D], float32 [B, C, V]."""
    products: F32 = np.matmul(item_vectors, tastes.transpose(0, 2, 1))
    return products


def is_in(rows: I32, sets: I32) -> Bools:
    """Tell for each row [B, C] whether it is in the set of its request [B, X]; bool [B, C]."""
    # All at once: a sixth of the time of a pass for each X where there is one request, as much for sixty of them.
    found: Bools = np.logical_or.reduce(sets[:, :, None] == rows[:, None, :], axis=1)
    return found


def among(rows: I32, few: I32) -> Bools:
    """Tell which rows, of any shape, are one of ``few`` rows [n]; for few rows many times as fast as np.isin."""
    if len(few) > FEW_ROWS:
        return np.isin(rows, few)
    found = np.zeros(rows.shape, np.bool_)
    for row in few.tolist():
        found |= rows == row
    return found


def counts_of(rows: I32, sets: I32, counts: F32) -> F32:
    """Return for each row [B, C] the sum of ``counts`` [B, X] where ``sets`` [B, X] holds it; float32 [B, C]."""
    found: F32 = ((sets[:, :, None] == rows[:, None, :]) * counts[:, :, None]).sum(axis=1)
    return found


def score(features: Features, config: RankingConfig) -> F32:
    """Return the score of each pair, float32 [B, C]: a weighted sum, for ordering only.

    score = Σ_v w_v·sim_v + w_ctr·logit(ctr) + w_pop·popularity − penalty·times shown lately.
    """
    ctr = clip_ctr(features.ctr)
    total: F32 = features.similarity @ config.taste_weights()
    total += np.float32(config.ctr_weight) * np.log(ctr / (1 - ctr))
    total += np.float32(config.popularity_weight) * features.popularity
    total -= np.float32(config.shown_penalty) * features.shown_counts
    return np.nan_to_num(total, copy=False, nan=0.0, posinf=1e4, neginf=-1e4)


def wish_log_odds(vectors: F32, rows: I32, tastes: F32, config: RankingConfig) -> F32:
    """Return what query and profile add to a model's log-odds of rows [B, C], float32 [B, C]; any value for padding.

    ``vectors`` float32 [n, D], by row; ``tastes`` [B, V, D].
    """
    added = np.zeros(rows.shape, np.float32)
    if not np.count_nonzero(tastes[:, PROFILE : QUERY + 1]):
        return added
    wishes = tastes[:, PROFILE] * np.float32(config.profile_log_odds)
    wishes += tastes[:, QUERY] * np.float32(config.query_log_odds)
    some = np.flatnonzero(wishes.any(axis=1))
    if len(some):
        added[some] = np.matmul(vectors[np.maximum(rows[some], 0)], wishes[some][:, :, None])[:, :, 0]
    return added


def clip_ctr(ctr: F32) -> F32:
    """Return CTR values kept inside (0, 1), float32 as given."""
    # Two ufuncs: for a single slate np.clip takes three times as long.
    return np.minimum(np.maximum(ctr, np.float32(CTR_EDGE)), np.float32(1 - CTR_EDGE))


def top_k(scores: F32, rows: I32, valid: Bools, k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the columns of the best ``k`` of each request, best first, int64 [B, min(k, C)], and how many count [B].

    Ties (scores equal to 1e-5) are broken by the row number, lowest first; the valid rows of a request are different
    ones. Columns from the count on are padding.
    """
    steps = np.minimum(np.maximum(scores, np.float32(-2e4)), np.float32(2e4))
    steps *= np.float32(-SCORE_STEPS)
    keys = np.rint(steps, out=steps).astype(np.int64)
    keys <<= 32
    keys |= rows
    width = rows.shape[1]
    if np.count_nonzero(valid) < valid.size:
        keys = np.where(valid, keys, _LAST - width + np.arange(width))
    k = min(k, width)
    counts = np.minimum(np.add.reduce(valid, axis=1), k)
    # No two keys are equal, as the rows are different: a stable sort would take up to three times as long.
    if k == width:
        return keys.argsort(axis=1), counts
    columns = np.argpartition(keys, k - 1, axis=1)[:, :k] if k else np.zeros((len(rows), 0), np.int64)
    return at_columns(columns, at_columns(keys, columns).argsort(axis=1)), counts
