"""What every section of the recipe is."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, no silent conversions between types: `true` is no number, nor are `"3"` or
    `3.0` where a whole one is meant. A whole number stands for a number all the same. Infinity and NaN are no settings.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _tuple_of_list(cls, value: Any) -> Any:
        """TOML and JSON have lists only; a frozen section keeps tuples."""
        return tuple(value) if isinstance(value, list) else value
