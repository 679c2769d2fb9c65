"""The record of a search: one JSON line per finished trial, written as soon as the trial is finished.

All results of a search are computed from this record. On object storage, which cannot append to a file, each line is an
object, so that two drivers that run the same search do not overwrite each other's trials. Ray Tune's own state is not
used: it is a pickle, which must not be loaded from a folder that others can write to, and it holds nothing more.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from parcelray.config.search_space import Assignment
from parcelray.errors import UserError
from parcelray.files import is_local, open_storage, write_object

RECORD_FILE = "trials.jsonl"

_Line = TypeVar("_Line")


@dataclass(frozen=True)
class FinishedTrial:
    """One finished or failed trial."""

    key: str
    """Key of its point (see `point_key`)."""
    assignment: Assignment
    """Values that the trial set in the job, by key path."""
    metrics: Mapping[str, float]
    """Measured metrics by name; empty if the trial failed."""
    seconds: float
    """Duration of the trial."""
    error: str | None = None
    """Last line of the error that the trial failed with; None if it succeeded."""
    stopped: bool = False
    """Whether early stopping ended the trial; its metrics are then those of its last report."""


def point_key(assignment: Assignment) -> str:
    """Returns the first 12 hexadecimal digits of the SHA-256 of a point."""
    return hashlib.sha256(json.dumps(assignment, sort_keys=True).encode()).hexdigest()[:12]


class TrialRecord:
    """The finished trials of a search, stored in `trials.jsonl` of its run folder.

    Args:
        folder: run folder of the search, or its URI.

    Raises:
        UserError: the file has a line that is not a finished trial.
    """

    def __init__(self, folder: str | Path) -> None:
        self._lines = LineFile(folder, RECORD_FILE)
        trials = self._lines.read(
            FinishedTrial, what="a finished trial", remedy="remove the line to run the trial again"
        )
        self._trials = {trial.key: trial for trial in trials}

    @property
    def trials(self) -> Sequence[FinishedTrial]:
        """The trials in the order in which they finished; of a point that was retried, only the last trial."""
        return tuple(self._trials.values())

    def get(self, key: str) -> FinishedTrial | None:
        """Returns the trial of a point by its key; None if it is not finished."""
        return self._trials.get(key)

    def add(self, trial: FinishedTrial) -> None:
        """Adds a trial, and returns once it is on disk. Metrics that are NaN were not measured and are left out."""
        trial = replace(trial, metrics={name: value for name, value in trial.metrics.items() if not math.isnan(value)})
        self._lines.append(asdict(trial))
        self._trials.pop(trial.key, None)
        self._trials[trial.key] = trial

    def forget_failed(self) -> int:
        """Drops the failed trials from memory, so that they are run again, and returns their number."""
        failed = [key for key, trial in self._trials.items() if trial.error is not None]
        for key in failed:
            del self._trials[key]
        return len(failed)


class LineFile:
    """A JSON Lines file on a disk; on object storage, a folder of objects with one line each, in the order of time.

    Args:
        folder: folder of the file, or a URI.
        name: name of the file.
    """

    def __init__(self, folder: str | Path, name: str) -> None:
        self._filesystem, root = open_storage(str(folder))
        self._path = f"{root}/{name}"
        # A record that was copied from object storage to a disk keeps its form.
        self._is_folder = not is_local(self._filesystem) or Path(self._path).is_dir()

    def append(self, content: Mapping[str, Any]) -> None:
        """Appends one line, and returns once it is stored."""
        text = json.dumps(content) + "\n"
        if self._is_folder:
            # The process id separates two drivers of the same search.
            write_object(self._filesystem, f"{self._path}/{time.time_ns():020d}-{os.getpid()}.json", text.encode())
            return
        path = Path(self._path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def read(self, make: Callable[..., _Line], *, what: str, remedy: str) -> list[_Line]:
        """Reads the lines; an empty list if there are none.

        A last line that was cut off, because the driver was killed while writing it, is removed from the file.

        Args:
            make: makes an item from the content of a line, passed as keyword arguments.
            what: what a line describes, for the error message.
            remedy: what to do about a line that describes something else, for the error message.

        Raises:
            UserError: a complete line is not valid.
        """
        lines = list(self._stored())
        items = []
        for number, (name, line) in enumerate(lines, 1):
            try:
                items.append(make(**json.loads(line)))
            except (json.JSONDecodeError, TypeError) as error:
                if number == len(lines) and not line.endswith("\n") and not self._is_folder:
                    # Otherwise the next line would be appended to the fragment.
                    with Path(self._path).open("r+b") as file:
                        file.truncate(sum(len(each.encode()) for _, each in lines[:-1]))
                    break
                raise UserError(f"{name} is not {what} ({error}); {remedy}.") from error
        return items

    def _stored(self) -> Iterator[tuple[str, str]]:
        """Yields the lines, each with a name for messages."""
        if self._is_folder:
            names = self._filesystem.find(self._path)
            # Reads all objects at the same time.
            contents = self._filesystem.cat(names) if names else {}
            yield from ((name, contents[name].decode()) for name in sorted(contents))
        elif Path(self._path).is_file():
            lines = Path(self._path).read_text(encoding="utf-8").splitlines(keepends=True)
            yield from ((f"{self._path}, line {number},", line) for number, line in enumerate(lines, 1))
