"""The record of a search: one line per finished trial, written as soon as it is finished, from which everything else is made again.

Tune's own state is a pickle, which must not be loaded from a folder that others can write to, and holds no more than this record.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from parcelray.config.search_space import Assignment
from parcelray.errors import UserError

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
        self._trials = {trial.key: trial for trial in _read(self._path)}

    @property
    def trials(self) -> Sequence[FinishedTrial]:
        """In the order in which they finished; of a point that was tried again, the last."""
        return tuple(self._trials.values())

    def get(self, key: str) -> FinishedTrial | None:
        """The trial of a point."""
        return self._trials.get(key)

    def add(self, trial: FinishedTrial) -> None:
        """Adds a trial; it is on disk when this returns. What is NaN was not measured, and is left out."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        trial = replace(trial, metrics={name: value for name, value in trial.metrics.items() if not math.isnan(value)})
        line = json.dumps(asdict(trial))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._trials.pop(trial.key, None)
        self._trials[trial.key] = trial

    def forget_failed(self) -> int:
        """Leaves out the failed trials, so that they are run again; returns how many."""
        failed = [key for key, trial in self._trials.items() if trial.error is not None]
        for key in failed:
            del self._trials[key]
        return len(failed)


def _read(path: Path) -> list[FinishedTrial]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(FinishedTrial(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                # The driver was killed while it wrote: the trial did not finish. Cut off, or the next line would be glued to it.
                with path.open("r+b") as file:
                    file.truncate(sum(len(each.encode()) for each in lines[:-1]))
                break
            raise UserError(f"{path}, line {number}, is no finished trial ({error}); remove the line, and the trial is run again.") from error
    return found
