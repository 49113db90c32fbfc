"""Experiments: which arm a user is in, for as long as the experiment runs, and what that arm does differently."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from models.errors import BundleError
from models.manifest import BOOTSTRAP_VERSION, check_version

CONTROL: Final = "control"
"""Arm of the users whom no other arm takes: nothing is changed."""
HOLD_OUT: Final = "hold_out"
"""Arm of the users who are kept out of every experiment of this salt: nothing is ever changed for them."""
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,100}")

Model = TypeVar("Model", bound=BaseModel)


class Arm(BaseModel):
    """One arm: who is in it, and what changes for them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(gt=0, le=1, description="Share of the users.")
    ranking: dict[str, Any] = Field(
        default_factory=dict, description="Fields of recommender.ranking that have other values in this arm."
    )
    surface: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of every surface that have other values: quotas, rules, diversity, fresh_slots, k, …; "
        "sections are merged field by field.",
    )
    bundle: str = Field(
        "", description="Version in the registry whose model scores for them; empty: that which is live, as for all."
    )

    @field_validator("bundle")
    @classmethod
    def _is_version(cls, value: str) -> str:
        if value and value != BOOTSTRAP_VERSION:
            try:
                check_version(value)
            except BundleError as error:
                raise ValueError(error.detail) from None
        return value


class ExperimentConfig(BaseModel):
    """The experiment that runs. One at a time; several changes are several arms."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("", description="Name, as slates and reports say it; empty: no experiment runs.")
    arms: dict[str, Arm] = Field(
        default_factory=dict, description="By name. Users whom none of them takes are the arm `control`."
    )
    hold_out_share: float = Field(
        0.0, ge=0, lt=1, description="Share of users who are kept out of this and every other experiment."
    )
    salt: str = Field("millstream", max_length=256, description="Changes who is in which arm; the same on all workers.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.name and not _NAME.fullmatch(self.name):
            raise ValueError(f"the experiment's name {self.name!r} must be 1 to 100 letters, digits, '.', '_' or '-'")
        for arm in self.arms:
            if arm in (CONTROL, HOLD_OUT) or not _NAME.fullmatch(arm):
                raise ValueError(f"an arm cannot be called {arm!r}; use other letters, digits, '.', '_' or '-'")
        if sum(arm.share for arm in self.arms.values()) > 1 + 1e-9:
            raise ValueError("the shares of the arms are more than 1 together")
        return self

    def arm_of(self, user_id: str) -> str | None:
        """Return the arm of a user, None where no experiment runs: by a hash, nothing stored, the same on all workers.

        The arms lie side by side in the order in which they are named: a share that grows at the last one moves no
        other user but those of `control`.
        """
        if not self.name:
            return None
        if self.hold_out_share and _fraction(self.salt, HOLD_OUT, user_id) < self.hold_out_share:
            return HOLD_OUT
        at = _fraction(self.salt, self.name, user_id)
        for name, arm in self.arms.items():
            if at < arm.share:
                return name
            at -= arm.share
        return CONTROL

    @property
    def bundles(self) -> tuple[str, ...]:
        """Return the versions that arms name, each once, in their order; none where no experiment runs."""
        return tuple(dict.fromkeys(arm.bundle for arm in self.arms.values() if arm.bundle)) if self.name else ()

    def label(self, arm: str) -> str:
        """Return what slates, impressions and features say of an arm."""
        return f"{self.name}/{arm}"


def changed(base: Model, changes: Mapping[str, Any]) -> Model:
    """Return ``base`` with other values, sections merged field by field. Raises ValueError naming what cannot be."""
    try:
        return type(base).model_validate(_merged(base.model_dump(), changes))
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
        raise ValueError(told) from None


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        held = merged.get(name)
        merged[name] = _merged(held, value) if isinstance(held, Mapping) and isinstance(value, Mapping) else value
    return merged


def _fraction(salt: str, name: str, user_id: str) -> float:
    """Return a number within 0 and 1 that looks drawn, the same for the same arguments."""
    text = f"experiment\0{salt}\0{name}\0{user_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") / 2.0**64
