from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class EncoderConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
