"""The base of every configuration model: frozen, and strict about unknown keys."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A frozen pydantic model that refuses unknown keys and documents its fields by the docstring under each."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


RENAMED_KEYS = {"rivals": "baselines", "rows_per_bundle": "rows_per_shard"}
"""New names of renamed job-file keys, by old name; an old key is refused with an error that gives the new one."""
