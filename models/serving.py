"""What one model version serves with, whole and unchanging: a swap is the assignment of another one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from models.bootstrap import Floats, Space
from models.catalogue import SpaceVectors
from models.hashing import hash64
from models.log_odds import hand_set_log_odds, learned_log_odds
from models.retrieval import VectorIndex

if TYPE_CHECKING:
    from models.ctr import CtrScorer
    from models.features import FeatureConfig, RawSlates
    from models.ranking import RankingConfig


@dataclass(frozen=True, slots=True)
class Scored:
    """What was said of candidates, [B, C] each: the score that orders them, and the CTR, float32."""

    scores: Floats
    ctr: Floats
    attention: Floats | None = None
    """What the model looked at, float32 [B, C, R]; None: no such model."""


@dataclass(frozen=True, slots=True, eq=False)
class ServingModel:
    """One version with everything that it needs: its space and scorer, and the items' vectors in that space.

    Vectors and index follow the catalogue while any role names the version; two versions of one space share them.
    """

    version: str
    generation: int
    """Of the pointer that gave it its role; rows are stamped with that of the live one. 0: the bootstrap at a start."""
    space: Space
    scorer: CtrScorer | None
    """None: the hand-set score of RankingConfig."""
    features: FeatureConfig | None
    """What the scorer's features are encoded with; None where there is no scorer."""
    vectors: SpaceVectors
    vector_index: VectorIndex
    carry: tuple[int, Floats] | None = None
    """Hash of the id of the space whose long-term vectors can be carried over, and the matrix, float32 [D, D]."""
    window_end_ms: int | None = None
    """Event time of the newest example that it learned from; None where it learned from none."""

    @property
    def space_id(self) -> str:
        """Return the id of the embedding space."""
        return self.space.space_id

    @property
    def space_hash(self) -> int:
        """Return the form of ``space_id`` that user rows carry."""
        return hash64(self.space.space_id)

    @property
    def encoder_id(self) -> str:
        """Return the id of the encoder that the space is of."""
        return self.space.encoder_id

    def log_odds(
        self,
        raw: RawSlates,
        item_rows: npt.NDArray[np.int32],
        recent_rows: npt.NDArray[np.int32],
        ranking: RankingConfig,
        attention: Floats | None = None,
        item_vectors: Floats | None = None,
        x: Floats | None = None,
    ) -> Floats:
        """Return what this version says of slates: calibrated log-odds at the reference position, float32 [S, C].

        ``item_rows`` int32 [S, C], ``recent_rows`` int32 [S, R]: rows of the items of ``raw``, -1 for none. Without a
        scorer, the hand-set score as log-odds. 0 where not valid. ``attention`` float32 [S, C, R] is filled with the
        weights that a scorer gives the recents; ``item_vectors`` float32 [S, C, D] of the items and ``x`` float32
        [S, C, F], the columns of ``raw`` as ``features`` says, are looked up and made if None.
        """
        if self.scorer is None or self.features is None:
            return hand_set_log_odds(raw, ranking)
        return learned_log_odds(
            self.scorer, self.features, self.vectors, raw, item_rows, recent_rows, attention, item_vectors, x
        )

    def is_same_version(self, other: ServingModel) -> bool:
        """Return whether ``other`` is this version, under whatever generation."""
        return self.version == other.version and self.vectors is other.vectors and self.scorer is other.scorer

    def under(self, generation: int) -> ServingModel:
        """Return the same version under the generation of another pointer."""
        return self if generation == self.generation else replace(self, generation=generation)
