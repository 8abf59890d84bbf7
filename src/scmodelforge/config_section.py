"""`Section`: what every part of a config is."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A part of the config. Unknown keys are errors, and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _yaml(cls, value: Any) -> Any:
        if value is None:
            return {}  # "training:" with nothing below it
        if not isinstance(value, dict):
            return value
        numbers = {key for key, field in cls.model_fields.items() if field.annotation in _NUMBERS}
        # pydantic would take true for 1; as text it is refused
        return {k: str(v).lower() if isinstance(v, bool) and k in numbers else v for k, v in value.items()}


_NUMBERS = (int, float, int | None, float | None)
