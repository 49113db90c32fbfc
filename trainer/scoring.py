"""What a model says of logged impressions: the same code that serves, for calibration, for the gate, for evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from models.bootstrap import EMBEDDING_WEIGHT, Space, unit
from models.bundle import ItemEncodings
from models.catalogue import SpaceVectors
from models.ctr import CtrScorer
from models.encoder import TextEncoder
from models.encoder_delta import EncoderDelta
from models.examples import FeaturesRecord
from models.features import FeatureConfig
from models.hashing import hash64
from models.log_odds import learned_log_odds
from trainer.batches import OnProgress, padded_slates
from trainer.encodings import OutputCache, base_encodings, delta_encodings

F32 = npt.NDArray[np.float32]
Hashes = npt.NDArray[np.uint64]
Embeddings = Mapping[int, Sequence[float]]
"""Vectors that items bring themselves, by hash."""


def encode_items(
    encoder: TextEncoder,
    texts: Mapping[int, str],
    cache: OutputCache,
    on_progress: OnProgress = lambda done, total: None,
    delta: EncoderDelta | None = None,
) -> ItemEncodings:
    """Return the base encodings of items by their texts, as the workers hold them; empty texts are left out.

    ``delta``: what a bundle changed of ``encoder``, which stays as it is.
    """
    found = {item: text for item, text in sorted(texts.items()) if text}
    if delta is None:
        base = base_encodings(encoder, list(found.values()), cache, on_progress)
    else:
        base = delta_encodings(encoder, delta, list(found.values()), cache, on_progress)
    contents = np.fromiter(map(hash64, found.values()), np.uint64, len(found))
    return ItemEncodings(np.fromiter(found, np.uint64, len(found)), contents, base)


class ItemTable:
    """Items of a window in one space, found by hash."""

    def __init__(self, space: Space, encodings: ItemEncodings, embeddings: Embeddings | None = None) -> None:
        """Make the vectors as a worker makes them: text, residual, and what the item brings itself."""
        embeddings = embeddings or {}
        order = np.argsort(encodings.items, kind="stable")
        items = np.union1d(encodings.items, np.fromiter(embeddings, np.uint64, len(embeddings)))
        vectors = np.zeros((len(items), space.dim), np.float32)
        at = np.searchsorted(items, encodings.items[order])
        vectors[at] = space.item_vectors(encodings.base[order], encodings.items[order])
        own = own_vectors(space, items, embeddings)
        has, has_text = own.any(axis=1), vectors.any(axis=1)
        both, alone = has & has_text, has & ~has_text
        vectors[both] = unit(vectors[both] + EMBEDDING_WEIGHT * own[both])
        # As it is: scaled once more, its last bits were others than the worker's.
        vectors[alone] = own[alone]
        self.items: Hashes = items
        self.vectors = SpaceVectors(space.dim)
        self.vectors.set_many(np.arange(len(items)), vectors, np.ones(len(items), np.uint64))

    def rows(self, hashes: Hashes) -> npt.NDArray[np.int32]:
        """Return the rows of items by hash, any shape, -1 for one that is not known."""
        if not len(self.items):
            return np.full(hashes.shape, -1, np.int32)
        at = np.minimum(np.searchsorted(self.items, hashes), len(self.items) - 1)
        return np.where(self.items[at] == hashes, at, -1).astype(np.int32)


def own_vectors(space: Space, items: Hashes, embeddings: Embeddings) -> F32:
    """Return what items' own embeddings are in the space, float32 [n, D], unit norm; zero where there is none."""
    own = np.zeros((len(items), space.dim), np.float32)
    for row, item in enumerate(items.tolist() if embeddings else ()):
        embedding = embeddings.get(item)
        vector = None if embedding is None else space.item_vector(None, embedding)
        if vector is not None:
            own[row] = vector
    return own


def score(scorer: CtrScorer, features: FeatureConfig, items: ItemTable, records: Sequence[FeaturesRecord]) -> list[F32]:
    """Return the calibrated log-odds of each impression's items, float32 [K] each, as a worker computes them.

    Raises ModelError where a score is not finite.
    """
    scores: list[F32] = []
    for _, raw in padded_slates(records):
        found = learned_log_odds(
            scorer, features, items.vectors, raw, items.rows(raw.items), items.rows(raw.recent_items)
        )
        scores += [row[valid] for row, valid in zip(found, raw.valid, strict=True)]
    return scores
