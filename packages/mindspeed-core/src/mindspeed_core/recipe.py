"""Recipes: YAML and `key=value` overrides become one frozen value, and every error is told at once."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every recipe section: frozen, and a key it does not declare is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
