"""What every section of the recipe is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, no silent conversions between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
