"""What a slate is made from, and the slate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.events import ExplorationDraw, Filters, RecommendedItem, Request
from models.ranking import F32


@dataclass(slots=True)
class SlateRequest:
    """One slate to make. ``row`` is the place of the user's row in the rows that are passed along."""

    user_id: str
    row: int
    surface: str | None = None
    k: int | None = None
    """Items wanted; None: as the surface says."""
    candidates: Sequence[str] | None = None
    """Item ids to rank instead of retrieving; unknown ones are passed over."""
    exclude: Sequence[str] = ()
    """Item ids that must not appear."""
    filters: Filters | None = None
    query_vector: F32 | None = None
    """float32 [D], of the query in the catalogue's space."""
    profile_vector: F32 | None = None
    """float32 [D], of the profile text; used where the user has no vector of their own."""
    request: Request | None = None
    context: tuple[int, ...] = ()
    """Values by which popularity is counted (ContextPopularity.values_of); empty: of none."""
    arm: str | None = None
    """Arm of the user in the experiment that runs (models.experiments); None: none runs."""
    slot_seed: int | None = None
    """Slots that the surface keeps for new items are drawn with this seed; None: they are ranked as all others."""
    draw_seed: int | None = None
    """Of a randomised user: the slate is drawn with this seed (models.exploration.draw_seed); None: ranked."""

    @classmethod
    def of(
        cls,
        request: Request,
        row: int,
        query_vector: F32 | None = None,
        profile_vector: F32 | None = None,
    ) -> SlateRequest:
        """Return what a request record asks for."""
        return cls(
            user_id=request.user_id,
            row=row,
            surface=request.surface,
            k=request.k,
            candidates=request.candidates,
            exclude=request.exclude or (),
            filters=request.filters,
            query_vector=query_vector,
            profile_vector=profile_vector,
            request=request,
        )


@dataclass(slots=True)
class Slate:
    """An ordered list of items; ``degraded`` where it was made without the user's vectors and rules of score."""

    items: list[RecommendedItem]
    degraded: bool
    surface: str
    experiment: str | None = None
    """RANDOMISED where the items were drawn instead of ranked, else experiment and arm; None where none runs."""
    exploration: ExplorationDraw | None = None
    """How the slots for new items were drawn; None: there were none."""
    model_version: str | None = None
    """Of the model that made the scores; None: no model was asked."""
