"""Base class of all configuration models: frozen, and strict about unknown keys."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A frozen pydantic model that rejects unknown keys and documents each field by the docstring under it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


BY_KEY = "by key"
"""Tag of the variant of a union that is a mapping with free keys, such as one value per prompt family."""
RENAMED_KEYS = {"rivals": "baselines", "rows_per_bundle": "rows_per_shard", "freeze_vision": "freeze"}
"""New names of renamed job-file keys, by old name; an old key is refused with an error that gives the new one."""
