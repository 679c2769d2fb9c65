"""The identity of a run: a hash of everything in the job that decides its result."""

import hashlib
import json
from typing import Any

from parcelray.config.connector import FORMER_CONNECTOR_VALUES
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.paths import AS_WRITTEN
from parcelray.config.promote import PromoteJob
from parcelray.config.reducer import FORMER_POSITIONS
from parcelray.config.serve import ServeJob
from parcelray.config.train import TrainJob
from parcelray.config.tune import TuneJob

StoredJob = TrainJob | EvaluateJob | TuneJob | PromoteJob
"""Jobs that leave files in a run folder."""
Job = StoredJob | ServeJob

# Storage, tracking, compute resources and what runs after the job itself do not change the result, nor does activation
# checkpointing. Jobs that were stored before the key was renamed have `rivals` instead of `baselines`.
_NOT_IDENTITY = (
    "storage",
    "storage_limits",
    "tracking",
    "scaling",
    "compute",
    "max_concurrent",
    "stall_s",
    "wait_s",
    "register",
    "baselines",
    "rivals",
    "confirm",
    "activation_checkpointing",
)

# Values that decided the result before there was a key for them, by section. They do not count, so that a job that
# states them has the identity of a job from before the key, and resumes its run.
_FORMER_VALUES: dict[str, dict[str, Any]] = {
    "connector": FORMER_CONNECTOR_VALUES,
    "training": {"group_by_tokens": False, "loss_mean": "prompts", "compile": False},
    "optimizer": {"fused": False},
}
# Limits of what is accepted decide whether a run fails, not its numbers. They count with their default, as when they
# were part of the identity.
_LIMITS = {"max_unscored": EvaluateJob.model_fields["max_unscored"].default}
# Renamed values by section and key; under their former names they count.
_FORMER_NAMES: dict[str, dict[str, dict[Any, Any]]] = {"reducer": {"positions": FORMER_POSITIONS}}


def identity(job: Job) -> str:
    """The identity `<kind>-<name>-<hash8>` of a resolved job; jobs with the same identity are the same run."""
    return f"{job.kind}-{job.name}-{config_hash(job)}"


def config_hash(job: Job) -> str:
    """First 8 hex digits of the sha256 of the canonical JSON of everything that decides the result.

    Unset values are left out. A key that a later version adds does not change the identity of existing jobs. Paths
    count as they were written, so that a relative path gives the same identity in every folder and on every machine.
    """
    data = job.model_dump(mode="json", exclude_none=True, context=AS_WRITTEN)
    text = json.dumps(decisive(data), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def decisive(job: dict[str, Any], section: str = "") -> dict[str, Any]:
    """The part of a resolved job that decides its result, applied to nested jobs as well.

    Args:
        job: the job, or one of its sections.
        section: key of the section; empty for the job itself.
    """
    former = _FORMER_VALUES.get(section, {})
    kept = {
        key: decisive(value, key) if isinstance(value, dict) else _LIMITS.get(key, value)
        for key, value in job.items()
        if key not in _NOT_IDENTITY and not (key in former and former[key] == value)
    }
    if section == "training" and "freeze" in kept:
        # Before `freeze`, there was only a switch for the tower.
        parts = kept.pop("freeze")
        others = [part for part in parts if part != "tower"]
        kept |= {"freeze_vision": "tower" in parts} | ({"freeze": others} if others else {})
    names = _FORMER_NAMES.get(section, {})
    return kept | {key: names[key].get(kept[key], kept[key]) for key in names.keys() & kept.keys()}


def _without_nulls(value: Any) -> Any:
    """Removes keys without a value from objects in lists: a later version may have added them."""
    if isinstance(value, list):
        return [
            {key: _without_nulls(each) for key, each in entry.items() if each is not None}
            if isinstance(entry, dict)
            else _without_nulls(entry)
            for entry in value
        ]
    return value


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Key paths whose values differ, each as `path: old -> new`; a missing key has its former value."""
    lines = []
    former = _FORMER_VALUES.get(prefix.rstrip(".").rpartition(".")[2], {})
    for key in sorted(old.keys() | new.keys()):
        before, after = (_without_nulls(each.get(key, former.get(key))) for each in (old, new))
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines
