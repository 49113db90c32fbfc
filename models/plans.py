"""How slates are made for each surface and arm, and which requests of a batch a stage can serve together.

Arms of an experiment differ in a setting or two, as a rule. What a stage costs is mostly what it costs for one request:
so each is run once for all whose settings are alike in what it reads, whatever their arms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.surfaces import Plan, RecommenderConfig, SurfaceConfig

Settings = Callable[[Plan], object]
"""What a stage reads of a plan; compared by ==."""


@dataclass(frozen=True, slots=True)
class Part:
    """The requests of a batch that a stage serves together: ``at`` their places, as an index of arrays [B, …]."""

    plan: Plan
    number: int
    """The same for parts of other batches that agree in what the stage reads."""
    at: slice | npt.NDArray[np.intp]
    members: Sequence[int]


class Plans:
    """The plans that requests asked for so far, numbered."""

    def __init__(self, config: RecommenderConfig) -> None:
        self._config = config
        self._plans: list[Plan] = []
        self._numbers: dict[tuple[str | None, str | None], int] = {}
        self._surfaces: dict[tuple[str | None, str | None], SurfaceConfig] = {}
        self._alike: dict[Settings, list[int]] = {}

    def __getitem__(self, number: int) -> Plan:
        return self._plans[number]

    def number_of(self, surface: str | None, arm: str | None) -> int:
        """Return the number of the plan of a surface in an arm: the same one for all that do the same."""
        key = surface if surface in self._config.surfaces else None, arm
        number = self._numbers.get(key)
        if number is None:
            plan = self._config.plan(*key)
            if plan not in self._plans:
                self._plans.append(plan)
            number = self._numbers[key] = self._plans.index(plan)
        return number

    def surface(self, surface: str | None, arm: str | None) -> SurfaceConfig:
        """Return the values of a surface in an arm, sizes included."""
        key = surface if surface in self._config.surfaces else None, arm
        found = self._surfaces.get(key)
        if found is None:
            found = self._surfaces[key] = self._config.surface(*key)
        return found

    def alike(self, number: int, settings: Settings) -> int:
        """Return the number of the first plan that agrees with one in these settings."""
        known = self._alike.get(settings)
        if known is None:
            known = self._alike[settings] = []
        while len(known) <= number:
            own = settings(self._plans[len(known)])
            first = (n for n, plan in enumerate(self._plans) if settings(plan) == own)
            known.append(next(first))
        return known[number]

    def parts(self, numbers: Sequence[int], settings: Settings) -> list[Part]:
        """Return the requests whose plans have these ``numbers`` [B] by settings, in the order of their first ones."""
        own = [self.alike(number, settings) for number in numbers]
        if own.count(own[0]) == len(own):
            return [Part(self._plans[own[0]], own[0], slice(None), range(len(own)))]
        places: dict[int, list[int]] = {}
        for place, number in enumerate(own):
            places.setdefault(number, []).append(place)
        return [Part(self._plans[n], n, np.array(members), members) for n, members in places.items()]


def together(plan: Plan) -> object:
    """Tell what must agree for requests to go through the stages in one batch: the reading of users, and the model."""
    return plan.ranking.reading, plan.bundle


def offer(plan: Plan) -> object:
    """Tell what decides which candidates there are."""
    return plan.quotas, plan.rules, plan.fresh_slots


def newcomers(plan: Plan) -> object:
    """Tell what decides which new items slots are drawn from."""
    return plan.rules, plan.fresh_slots


def weights(plan: Plan) -> object:
    """Tell what decides their scores."""
    return plan.ranking


def order(plan: Plan) -> object:
    """Tell what decides, beside scores, in which order they come."""
    return plan.rules, plan.diversity
