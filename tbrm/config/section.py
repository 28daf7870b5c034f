"""What every section of a config is, and the error that says what is wrong with one."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A recipe or an override that cannot be used; the message says which key, what it got and what it wants."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
