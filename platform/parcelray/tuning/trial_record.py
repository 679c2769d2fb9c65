"""The record of a search: one line per finished trial, written as soon as it is finished, from which everything else is made again.

Tune's own state is a pickle, which must not be loaded from a folder that others can write to, and holds no more than
this record.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from parcelray.config.search_space import Assignment
from parcelray.tuning.json_lines import append_line, read_lines

_FILE = "trials.jsonl"


@dataclass(frozen=True)
class FinishedTrial:
    """One trial."""

    key: str
    """Of its point, see `point_key`."""
    assignment: Assignment
    """What it changed in the job."""
    metrics: Mapping[str, float]
    """What it measured; empty if it failed."""
    seconds: float
    """That it took."""
    error: str | None = None
    """Last line of what it failed with; None: it did not."""
    stopped: bool = False
    """Whether early stopping ended it; its metrics are those of its last report."""


def point_key(assignment: Assignment) -> str:
    """First 12 hexadecimal digits of the SHA-256 of a point."""
    return hashlib.sha256(json.dumps(assignment, sort_keys=True).encode()).hexdigest()[:12]


class TrialRecord:
    """The finished trials of a search in a folder; reading them again gives the same.

    Args:
        folder: of the search.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        found = read_lines(
            self._path, FinishedTrial, what="finished trial", remedy="remove the line, and the trial is run again"
        )
        self._trials = {trial.key: trial for trial in found}

    @property
    def trials(self) -> Sequence[FinishedTrial]:
        """In the order in which they finished; of a point that was tried again, the last."""
        return tuple(self._trials.values())

    def get(self, key: str) -> FinishedTrial | None:
        """The trial of a point."""
        return self._trials.get(key)

    def add(self, trial: FinishedTrial) -> None:
        """Adds a trial; it is on disk when this returns. What is NaN was not measured, and is left out."""
        trial = replace(trial, metrics={name: value for name, value in trial.metrics.items() if not math.isnan(value)})
        append_line(self._path, asdict(trial))
        self._trials.pop(trial.key, None)
        self._trials[trial.key] = trial

    def forget_failed(self) -> int:
        """Leaves out the failed trials, so that they are run again; returns how many."""
        failed = [key for key, trial in self._trials.items() if trial.error is not None]
        for key in failed:
            del self._trials[key]
        return len(failed)
