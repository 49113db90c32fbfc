"""What the stages of the recommender hand on about the requests of one call.

Axes as in models/ranking.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from models.candidates import Refusal
from models.context_lists import BatchLeanings
from models.fresh_slots import Drawn, place
from models.plans import Part
from models.ranking import F32, I32, UserRows
from models.slates import SlateRequest


@dataclass(slots=True)
class Batch:
    """Requests that go through the stages together: all with named candidates, or all retrieved at one width."""

    requests: Sequence[SlateRequest]
    numbers: Sequence[int]
    """Of their plans."""
    states: UserRows
    given: bool
    width: int
    now_ms: int
    ks: npt.NDArray[np.int64]
    """Items wanted, int64 [B]."""


@dataclass(slots=True)
class Offer:
    """The requests of a batch for which the same decides what candidates there are, and what was found out of it."""

    part: Part
    requests: Sequence[SlateRequest]
    refuse: Refusal
    leanings: BatchLeanings | None
    pinned: I32 = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    """Rows of pinned items, int32 [B, P]; of the requests of this part, as what is drawn for slots of new items."""
    drawn: Drawn | None = None

    def place(
        self,
        rows: I32,
        columns: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        ks: npt.NDArray[np.int64],
        propensities: F32,
    ) -> None:
        """Put what was drawn into its slots, in place: of the whole batch's arrays, this part's requests."""
        if self.drawn is None:
            return
        at = self.part.at
        own = columns[at], counts[at], propensities[at]
        place(self.drawn, rows[at], own[0], own[1], ks[at], own[2])
        columns[at], counts[at], propensities[at] = own
