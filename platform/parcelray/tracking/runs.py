"""The stored runs of a folder or URI: lists them, copies them to this host, and deletes them."""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec
from rich.table import Table

from parcelray.errors import SystemFailure, UserError
from parcelray.files import modified_at, open_storage
from parcelray.tracking.run_folder import CHECKPOINT, JOB, RESULT

MODEL_FOLDER_DIGITS = 16
"""Hexadecimal digits of a model's digest in the names of the folders of its predictions."""
KINDS = ("train", "tune", "evaluate", "promote")
"""Kinds of jobs that leave runs; each has a folder in the storage."""
PREDICTIONS = "predictions"
"""Folder of the storage with the predictions of all evaluations."""
_NAME = re.compile(rf"({'|'.join(KINDS)})/[A-Za-z0-9][\w-]*")
_DAY_S = 86_400


class StoredFile(NamedTuple):
    """A file of a run."""

    name: str
    """Path in the run folder."""
    bytes: int
    modified: float
    """Seconds since 1970."""

    @property
    def checkpoint(self) -> str | None:
        """Path of the training checkpoint that the file belongs to; None for other files."""
        parts = self.name.split("/")
        index = next((index for index, part in enumerate(parts[:-1]) if part.startswith(CHECKPOINT)), None)
        return "/".join(parts[: index + 1]) if index is not None else None


@dataclass(frozen=True)
class StoredRun:
    """A run in the storage."""

    name: str
    """`KIND/NAME`, its folder in the storage."""
    identity: str
    """Identity of its configuration; empty for a promotion, which has a folder for each verdict."""
    state: str
    """`finished` or `unfinished`."""
    checkpoints: int
    """Number of training checkpoints, including those of a search's trials."""
    bytes: int
    modified: str
    """Time of the newest file in UTC, ISO 8601."""


@dataclass(frozen=True)
class RunList:
    """The runs of a storage, oldest first, and the predictions that its evaluations share."""

    storage: str
    runs: tuple[StoredRun, ...]
    predictions_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The list as JSON-serialisable values."""
        return asdict(self)

    def to_rich(self) -> Table:
        """The list as a table for the console."""
        table = Table("run", "state", "checkpoints", "size", "modified", title=self.storage)
        for run in self.runs:
            count = str(run.checkpoints) if run.checkpoints else "-"
            table.add_row(run.name, run.state, count, _size(run.bytes), run.modified.replace("T", " ")[:16])
        if self.predictions_bytes:
            table.add_row(PREDICTIONS, "shared", "-", _size(self.predictions_bytes), "")
        return table


@dataclass(frozen=True)
class Pruned:
    """What a prune deletes."""

    paths: dict[str, int]
    """Size in bytes of each deleted run, checkpoint or folder of predictions, by its path in the storage."""
    is_deleted: bool
    """False: nothing was deleted yet."""

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-serialisable values."""
        return asdict(self)

    def to_rich(self) -> Table:
        """The result as a table for the console."""
        table = Table("path", "size", title="deleted" if self.is_deleted else "would be deleted")
        for path, size in self.paths.items():
            table.add_row(path, _size(size))
        table.add_row("all", _size(sum(self.paths.values())))
        return table


def list_runs(storage: str) -> RunList:
    """Lists the runs of a folder or URI.

    Raises:
        UserError: the storage does not exist.
    """
    found = _Storage(storage)
    runs = [found.describe(name, files) for name, files in found.runs().items()]
    shards = found.files(PREDICTIONS)
    return RunList(storage, tuple(sorted(runs, key=lambda run: run.modified)), sum(file.bytes for file in shards))


def pull_run(
    run: str,
    storage: str,
    target: Path,
    *,
    checkpoints: bool = False,
    on_file: Callable[[str], None] = lambda name: None,
) -> Path:
    """Copies a run to a folder of this host, where every command finds it as if it had run here.

    Of an evaluation, the predictions of its model and benchmarks are copied too. Files that are there are not copied
    again, so an interrupted copy is resumed by the same call.

    Args:
        run: `KIND/NAME`, or the URI of a run folder.
        storage: folder or URI of the storage; unused if `run` is a URI.
        target: the folder that receives `KIND/NAME`.
        checkpoints: whether to copy training checkpoints too.
        on_file: called with the name of each copied file.

    Returns:
        The run folder on this host.

    Raises:
        UserError: there is no such run.
        SystemFailure: a file was not copied completely.
    """
    if "://" in run:
        storage, kind, name = run.rstrip("/").rsplit("/", 2)
        run = f"{kind}/{name}"
    found = _Storage(storage)
    files = [file for file in found.existing(run) if checkpoints or file.checkpoint is None]
    found.copy(run, files, target, on_file)
    for folder in found.predictions_of(run):
        found.copy(folder, found.files(folder), target, on_file)
    return target / run


def prune_runs(
    storage: str,
    names: Sequence[str] = (),
    *,
    older_than_days: float | None = None,
    checkpoints: bool = False,
    predictions: bool = False,
    delete: bool = False,
) -> Pruned:
    """Deletes runs, or parts of them.

    Args:
        storage: folder or URI of the storage.
        names: the runs, each as `KIND/NAME`; none: all runs that are older than `older_than_days`.
        older_than_days: age of the newest file of a run from which it is deleted, days; None: every named run.
        checkpoints: whether to delete only the training checkpoints, and those only of finished runs.
        predictions: whether to delete, instead of runs, the predictions that no evaluation or search of the storage
            uses.
        delete: whether to delete; False: only find what would be deleted.

    Raises:
        UserError: a run does not exist, or neither runs nor an age are given.
    """
    found = _Storage(storage)
    if predictions:
        if names:
            raise UserError("--predictions deletes unused predictions, not runs; leave out the names of runs.")
        paths = found.unused_predictions(older_than_days or 0.0)
    else:
        if not names and older_than_days is None:
            raise UserError("Nothing is selected; name runs as KIND/NAME, or set --older-than DAYS.")
        runs = {name: found.existing(name) for name in names} if names else found.runs()
        paths = {}
        for name, files in runs.items():
            if older_than_days is not None and _newest(files) > time.time() - older_than_days * _DAY_S:
                continue
            if checkpoints and not _is_finished(name, files):
                continue
            paths |= _checkpoints(name, files) if checkpoints else {name: sum(file.bytes for file in files)}
    if delete:
        for path in paths:
            found.delete(path)
    return Pruned(paths, delete)


class _Storage:
    """The runs and predictions below a folder or URI."""

    def __init__(self, storage: str) -> None:
        self._storage = storage
        self._filesystem: fsspec.AbstractFileSystem
        self._filesystem, self._root = open_storage(storage)
        if not self._filesystem.exists(self._root):
            raise UserError(f"The storage {storage} does not exist; give the `storage` of a job with --storage.")

    def files(self, folder: str) -> list[StoredFile]:
        """All files in a folder of the storage; none if it does not exist."""
        path = f"{self._root}/{folder}"
        return [
            StoredFile(name.removeprefix(f"{path}/"), info["size"], modified_at(info))
            for name, info in sorted(self._filesystem.find(path, detail=True).items())
        ]

    def runs(self) -> dict[str, list[StoredFile]]:
        """The files of all runs, by `KIND/NAME`."""
        found: dict[str, list[StoredFile]] = {}
        for kind in KINDS:
            for file in self.files(kind):
                name, _, rest = file.name.partition("/")
                if rest:
                    found.setdefault(f"{kind}/{name}", []).append(file._replace(name=rest))
        return found

    def existing(self, run: str) -> list[StoredFile]:
        """The files of one run.

        Raises:
            UserError: the run does not exist, or the name is not of the form KIND/NAME.
        """
        if _NAME.fullmatch(run) is None:
            raise UserError(
                f"{run!r} is not a run; write KIND/NAME, such as train/tiny. KIND is one of {', '.join(KINDS)}."
            )
        files = self.files(run)
        if not files:
            raise UserError(f"{self._storage} has no run {run}; `parcelray runs list` shows its runs.")
        return files

    def describe(self, name: str, files: Sequence[StoredFile]) -> StoredRun:
        """The properties of a run."""
        has_job = any(file.name == JOB for file in files)
        job = json.loads(self._filesystem.cat_file(f"{self._root}/{name}/{JOB}")) if has_job else {}
        newest = datetime.fromtimestamp(_newest(files), UTC)
        return StoredRun(
            name,
            job.get("identity", ""),
            "finished" if _is_finished(name, files) else "unfinished",
            len(_checkpoints(name, files)),
            sum(file.bytes for file in files),
            newest.isoformat(timespec="seconds"),
        )

    def copy(self, folder: str, files: Sequence[StoredFile], target: Path, on_file: Callable[[str], None]) -> None:
        """Copies files of a folder to the same folder below `target`; a file that is there is not copied again.

        Raises:
            UserError: the name of an object leads out of the folder.
            SystemFailure: a file was not copied completely.
        """
        for file in files:
            if ".." in PurePosixPath(file.name).parts:
                raise UserError(f"{folder} has an object {file.name}, which is outside of the run; remove it.")
            path = target / folder / file.name
            if path.is_file() and path.stat().st_size == file.bytes:
                continue
            on_file(f"{folder}/{file.name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            self._filesystem.get_file(f"{self._root}/{folder}/{file.name}", str(partial))
            if partial.stat().st_size != file.bytes:
                raise SystemFailure(f"{folder}/{file.name} was not copied completely; run the same command again.")
            partial.replace(path)

    def predictions_of(self, run: str) -> list[str]:
        """Folders of the predictions that an evaluation uses, in the storage; none for other runs."""
        return [folder for data in self._evaluations(run) for folder in _folders_of(data)]

    def unused_predictions(self, older_than_days: float) -> dict[str, int]:
        """Folders of predictions, with their sizes, that neither an evaluation nor a search of the storage uses."""
        used: set[str] = set()
        models: set[str] = set()
        for name in self.runs():
            used.update(self.predictions_of(name))
            if name.startswith("tune/"):
                job = json.loads(self._filesystem.cat_file(f"{self._root}/{name}/{JOB}"))
                models.update(_model_folder(digest) for digest in job.get("pins", {}).values())
        found: dict[str, list[StoredFile]] = {}
        for file in self.files(PREDICTIONS):
            found.setdefault(f"{PREDICTIONS}/{file.name.rpartition('/')[0]}", []).append(file)
        return {
            folder: sum(file.bytes for file in files)
            for folder, files in found.items()
            if folder not in used
            and folder.rpartition("/")[2] not in models
            and _newest(files) <= time.time() - older_than_days * _DAY_S
        }

    def delete(self, path: str) -> None:
        """Deletes a file or folder of the storage."""
        self._filesystem.rm(f"{self._root}/{path}", recursive=True)

    def _evaluations(self, run: str) -> Iterator[dict[str, Any]]:
        if run.startswith("evaluate/"):
            for name in ("evaluation.json", "reference/evaluation.json"):
                path = f"{self._root}/{run}/{name}"
                if self._filesystem.exists(path):
                    yield json.loads(self._filesystem.cat_file(path))


def _folders_of(evaluation: dict[str, Any]) -> list[str]:
    model = _model_folder(evaluation["digest"])
    return [f"{PREDICTIONS}/{each['config']['name']}/{model}" for each in evaluation["benchmarks"]]


def _model_folder(digest: str) -> str:
    return digest.removeprefix("sha256:")[:MODEL_FOLDER_DIGITS]


def _newest(files: Sequence[StoredFile]) -> float:
    return max(file.modified for file in files)


def _is_finished(name: str, files: Sequence[StoredFile]) -> bool:
    # A promotion has only verdicts.
    return name.startswith("promote/") or any(file.name == RESULT for file in files)


def _checkpoints(run: str, files: Sequence[StoredFile]) -> dict[str, int]:
    """Sizes of the training checkpoints of a run by path in the storage."""
    sizes: dict[str, int] = {}
    for file in files:
        if file.checkpoint is not None:
            sizes[f"{run}/{file.checkpoint}"] = sizes.get(f"{run}/{file.checkpoint}", 0) + file.bytes
    return sizes


def _size(count: int) -> str:
    """A number of bytes as text, such as 1.5 GiB."""
    value, units = float(count), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while value >= 1000 and unit != "GiB":
        value, unit = value / 1024, next(units)
    return f"{value:.3g} {unit}" if unit != "B" else f"{count} B"
