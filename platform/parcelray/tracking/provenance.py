"""Where a run comes from: the checkpoint that it starts from or asks, the commit of the code, and the configuration as flat parameters."""

import functools
import subprocess
from pathlib import Path
from typing import Any

from parcelray.config.model import CheckpointModelConfig
from parcelray.models.checkpoint import RegistryResolver, ResolvedCheckpoint, resolve_checkpoint
from parcelray.tracking.registry import resolve_registry


def resolve_model(model: CheckpointModelConfig, tracking_uri: str | None) -> ResolvedCheckpoint:
    """The checkpoint of a job, resolved once.

    Args:
        model: its reference.
        tracking_uri: of the registry that `models:/...` is looked up in; None: such references are refused.
    """
    resolver: RegistryResolver | None = (
        functools.partial(resolve_registry, tracking_uri=tracking_uri) if tracking_uri is not None else None
    )
    return resolve_checkpoint(model.reference, registry_resolver=resolver)


def git_commit() -> str | None:
    """The commit of the code that runs, with `-dirty` where files differ from it; None outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def flat_params(values: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool | None]:
    """Nested mappings to `a.b` keys; lists as text."""
    flat: dict[str, str | int | float | bool | None] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flat_params(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool | None) else str(value)
    return flat
