from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class UserStateConfig(BaseModel):
    """How a user row is updated."""

    model_config = ConfigDict(frozen=True, extra="forbid")
