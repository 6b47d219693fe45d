"""The base of this room's configurations."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen configuration that refuses unknown fields: it is hashed into a stage's key."""

    model_config = ConfigDict(frozen=True, extra="forbid")
