"""Surfaces and their settings: how slates are made, and by which plan one surface makes them."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from models.candidates import Quotas
from models.co_clicks import CoClicksConfig
from models.diversity import DiversityConfig
from models.events import MAX_CANDIDATES, MAX_K
from models.experiments import ExperimentConfig, changed
from models.fresh_slots import FreshSlots
from models.ranking import RankingConfig
from models.reason_texts import Language
from models.rules import RulesConfig


class SurfaceConfig(BaseModel):
    """One place of the product in which slates are shown."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    k: int = Field(20, ge=1, le=MAX_K, description="Items in a slate where the request does not say.")
    candidates: int = Field(200, ge=1, le=MAX_CANDIDATES, description="Candidates scored for one slate of usual size.")
    quotas: Quotas = Field(default_factory=Quotas, description="How the sources of candidates take turns.")
    rules: RulesConfig = Field(default_factory=RulesConfig, description="What may be shown, boosts, pinned items.")
    diversity: DiversityConfig = Field(default_factory=DiversityConfig, description="Debias, sameness, categories.")
    fresh_slots: FreshSlots = Field(default_factory=FreshSlots, description="Slots that are drawn from new items.")
    reason_language: Language = Field("en", description="Language of the reasons: en or zh.")


class RecommenderConfig(BaseModel):
    """How slates are made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default_surface: str = Field("default", max_length=256, description="Surface of an event that names none.")
    surfaces: dict[str, SurfaceConfig] = Field(
        default_factory=lambda: {"default": SurfaceConfig()},
        description="Surfaces by name. One that is not named here has the values of the default one.",
    )
    ranking: RankingConfig = Field(default_factory=RankingConfig, description="Score and rules.")
    experiment: ExperimentConfig = Field(default_factory=ExperimentConfig, description="The experiment that runs.")
    co_clicks: CoClicksConfig = Field(default_factory=CoClicksConfig, description="Of the source co_click.")
    popular_items: int = Field(1_000, ge=1, le=100_000, description="Length of the list of popular items.")
    popularity_half_life_index: int = Field(
        1,
        ge=0,
        le=3,
        description="Which half-life of the counters popularity and CTR use; 0 is the first, shortest one.",
    )
    popularity_context: tuple[str, ...] = Field(
        (),
        max_length=4,
        description='Keys of the context of events by whose values popularity is counted too; "surface" is that of the '
        "event. None: nothing is counted.",
    )
    popularity_context_prior: float = Field(
        100.0,
        gt=0,
        le=1e6,
        description="Decayed actions in a context at which its own popularity and that of all weigh the same.",
    )
    popularity_context_values: int = Field(
        64, ge=1, le=10_000, description="Values of a key that are kept; up to twice as many are held."
    )
    popularity_context_items: int = Field(
        500,
        ge=10,
        le=10_000,
        description="Items of a value that are kept; up to twice as many are held, 200 bytes each: 25 MB a key.",
    )
    refresh_seconds: float = Field(1.0, ge=0, le=600, description="Least time between two lists of popular items.")
    fallback_ctr: float = Field(
        0.01, gt=0, lt=1, description="CTR stated in a degraded slate for an item that is not in the popular list."
    )
    reason_similarity: float = Field(
        0.25,
        ge=-1,
        le=1,
        description="Least similarity at which a clicked item is named as the reason of another; with a CTR model one "
        "that it looked at, without one the nearest.",
    )

    _arms: dict[tuple[str, str], SurfaceConfig] = PrivateAttr(default_factory=dict)
    _rankings: dict[str, RankingConfig] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _default_exists(self) -> RecommenderConfig:
        if self.default_surface not in self.surfaces:
            raise ValueError(f"default_surface {self.default_surface!r} is not one of the surfaces")
        return self

    @model_validator(mode="after")
    def _keys_differ(self) -> RecommenderConfig:
        if len(set(self.popularity_context)) < len(self.popularity_context):
            raise ValueError("popularity_context names a key twice")
        return self

    @model_validator(mode="after")
    def _arms_possible(self) -> RecommenderConfig:
        for arm, change in self.experiment.arms.items():
            try:
                self._rankings[arm] = changed(self.ranking, change.ranking)
                for name, surface in self.surfaces.items():
                    self._arms[name, arm] = changed(surface, change.surface)
            except ValueError as error:
                raise ValueError(f"the arm {arm!r} of the experiment asks for what cannot be: {error}") from None
        return self

    @property
    def uses_co_clicks(self) -> bool:
        """Whether any surface, in any arm, has the source co_click."""
        return any(s.quotas.co_click > 0 for s in (*self.surfaces.values(), *self._arms.values()))

    @property
    def draws_slots(self) -> bool:
        """Whether any surface, in any arm, keeps slots for new items."""
        return any(s.fresh_slots.slots for s in (*self.surfaces.values(), *self._arms.values()))

    def surface(self, name: str | None, arm: str | None = None) -> SurfaceConfig:
        """Return the values of a surface in an arm; those of the default one where the name is unknown or None."""
        known = name if name is not None and name in self.surfaces else self.default_surface
        return self._arms.get((known, arm or "")) or self.surfaces[known]

    def plan(self, surface: str | None, arm: str | None = None) -> Plan:
        """Return by what the slates of a surface are made for the users of an arm."""
        chosen = self.surface(surface, arm)
        return Plan(
            self._rankings.get(arm or "", self.ranking),
            chosen.quotas,
            chosen.rules,
            chosen.diversity,
            chosen.fresh_slots,
            chosen.reason_language,
            self.experiment.arms[arm].bundle if arm in self.experiment.arms else "",
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """All that slates of one group have in common, sizes apart."""

    ranking: RankingConfig
    quotas: Quotas
    rules: RulesConfig
    diversity: DiversityConfig
    fresh_slots: FreshSlots
    reason_language: Language
    bundle: str = ""
    """Version whose model scores; empty: the live one."""
