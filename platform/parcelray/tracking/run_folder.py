"""The folder of one run, on a disk or on object storage: resolved job, result, model, and Ray Train's checkpoints.

On object storage a run writes its files to a temporary folder of its host, and pushes them when they are complete.
"""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from pyarrow.fs import FSSpecHandler, PyFileSystem
from rich.console import Console

from parcelray.config.identity import StoredJob, decisive, differing_keys, identity
from parcelray.config.paths import AS_WRITTEN
from parcelray.errors import SystemFailure, UserError
from parcelray.files import download_files, is_local, open_storage, read_json, upload_files, write_json, write_object

JOB, RESULT = "job.json", "result.json"
BAD_ROWS = "bad_rows.jsonl"
"""File of the rows that a training cannot use. A run that has no other file does not reserve its name."""
CHECKPOINT = "checkpoint_"
"""Prefix of the names of training checkpoints; their order by name is that of time."""
IN_PROCESS = "in-process"
"""Folder of the checkpoints of trainings without Ray; those of Ray Train are in a folder named by the identity."""


def temporary_copy(prefix: str) -> Path:
    """Creates a folder for copies of stored files, which is removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"parcelray-{prefix}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def local_folder(text: str | Path) -> Path:
    """Returns a folder of results on this host; a URI is downloaded into a temporary folder.

    Args:
        text: a folder, or a URI such as s3://bucket/runs/evaluate/NAME.

    Raises:
        UserError: there is nothing at the URI.
        SystemFailure: files are missing at the URI.
    """
    if "://" not in str(text):
        return Path(text).expanduser()
    filesystem, path = open_storage(str(text))
    if is_local(filesystem):
        return Path(path)
    folder = temporary_copy("results")
    if not download_files(filesystem, path, folder):
        if not filesystem.exists(path):
            raise UserError(f"{text} has no files; give the URI of a finished run, as `parcelray runs list` shows it.")
        raise SystemFailure(f"Files of {text} are missing; run the job that wrote it again.")
    return folder


def stored_path(path: str, folder: Path, root: Path) -> str:
    """Returns a path as the files of a run folder store it, so that a moved or copied project finds its files.

    Args:
        path: absolute path, or a URI.
        folder: the run folder, whose files store the path.
        root: folder that is moved as a whole: the storage, or the run folder itself.

    Returns:
        The path relative to the run folder if both are below the root, else the path as it is.
    """
    inside = "://" not in path and Path(path).is_relative_to(root) and folder.absolute().is_relative_to(root)
    return os.path.relpath(path, folder.absolute()) if inside else path


def storage_folder(storage: str) -> Path:
    """Returns the folder of a job's storage, for studies that read and write files on a disk.

    Raises:
        UserError: the storage is not on a disk.
    """
    filesystem, path = open_storage(storage)
    if not is_local(filesystem):
        raise UserError(f"storage is {storage}, but this study needs a folder; set storage to one, such as runs.")
    return Path(path)


@contextmanager
def study_folder(storage: str, name: str, console: Console) -> Iterator[Path]:
    """Yields the folder of this host for the files of a study; on object storage, they are uploaded at the end.

    Args:
        storage: folder or URI of a job's storage.
        name: path of the study's folder in the storage.
        console: prints the URI of the uploaded files.
    """
    filesystem, root = open_storage(storage)
    if is_local(filesystem):
        yield Path(root) / name
        return
    # The last part of the path is part of the names of MLflow runs.
    folder = temporary_copy("study") / Path(name).name
    folder.mkdir()
    yield folder
    upload_files(folder, filesystem, f"{root}/{name}")
    console.print(f"The files of {folder} are stored in {storage.rstrip('/')}/{name}", soft_wrap=True)


class RunFolder:
    """The folder `<storage>/<kind>/<name>` of a run; it belongs to one configuration.

    Args:
        job: the job; its `storage` may be a path or a URI such as s3://bucket/runs.
    """

    def __init__(self, job: StoredJob) -> None:
        self.identity = identity(job)
        self.filesystem, root = open_storage(job.storage)
        self.path = f"{root}/{job.kind}/{job.name}"
        self.is_local = is_local(self.filesystem)
        """Whether the folder is on a disk of this machine, or is mounted like one."""
        self.uri = self.path if self.is_local else str(self.filesystem.unstrip_protocol(self.path))
        """The path of a local folder, else the URI; every host may read it."""
        self._job = job

    def __reduce__(self) -> tuple[Any, ...]:
        # A temporary folder of this process means nothing in another one.
        return type(self), (self._job,)

    @cached_property
    def local(self) -> Path:
        """The folder where this process writes files of the run: the run folder, or a temporary one to push from."""
        return Path(self.path) if self.is_local else temporary_copy(f"run-{self._job.name}")

    @cached_property
    def arrow_filesystem(self) -> PyFileSystem | None:
        """The file system of object storage for Ray; None for a disk."""
        return None if self.is_local else PyFileSystem(FSSpecHandler(self.filesystem))

    def push(self, name: str = "") -> None:
        """Copies a file or folder below `local` to the run folder on object storage; a disk has it already."""
        if self.is_local:
            return
        source = self.local / name
        if source.is_dir():
            upload_files(source, self.filesystem, f"{self.path}/{name}".rstrip("/"), leave_out=(JOB, RESULT))
        else:
            self.filesystem.put_file(str(source), f"{self.path}/{name}")

    def pull(self, name: str = "") -> bool:
        """Copies a folder of object storage below `local`; a disk has it already.

        Returns:
            Whether the folder exists and is complete.
        """
        if self.is_local:
            return (self.local / name).is_dir()
        return download_files(self.filesystem, f"{self.path}/{name}".rstrip("/"), self.local / name)

    def names(self, name: str) -> list[str]:
        """Names of the files and folders in a folder of the run folder, ascending; none if it does not exist."""
        try:
            found = self.filesystem.ls(f"{self.path}/{name}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(each).rstrip("/").rpartition("/")[2] for each in found)

    def remove(self, name: str) -> None:
        """Removes a file or folder from the run folder."""
        with suppress(FileNotFoundError):
            self.filesystem.rm(f"{self.path}/{name}", recursive=True)

    def keep_checkpoints(self, count: int) -> None:
        """Removes all but the newest training checkpoints of the run."""
        for parent in (IN_PROCESS, self.identity):
            # The names of checkpoints have a number after the prefix; Ray Train's own record has not.
            found = [name for name in self.names(parent) if name.removeprefix(CHECKPOINT)[0].isdigit()]
            for name in found[: max(0, len(found) - count)]:
                self.remove(f"{parent}/{name}")

    def claim(self, pins: Mapping[str, str] | None = None) -> None:
        """Claim the folder for this job: write the resolved job into it.

        Args:
            pins: content digest of each model reference of the job; None to skip the comparison with earlier digests.

        Raises:
            UserError: the folder belongs to another configuration of the same name (the message names the differing
                keys), or a reference named another content when the run was started.
        """
        stored = self._read(JOB)
        self.check()
        kept: dict[str, str] = (stored or {}).get("pins", {})
        for reference, digest in (pins or {}).items():
            if kept.get(reference, digest) != digest:
                raise UserError(
                    f"{self.path} has the run {self.identity} with another model: the content of {reference} has"
                    f" changed ({kept[reference][:19]} then, {digest[:19]} now). Give this run another name (--set"
                    " name=...), or restore the old model to resume the old run."
                )
        content = {
            "identity": self.identity,
            "job": self._job.model_dump(mode="json", context=AS_WRITTEN),
            "pins": kept | dict(pins or {}),
        }
        if not self.is_local and stored is None:
            # Of two drivers that claim a free name at the same time, the store lets one create the file.
            with suppress(FileExistsError):
                write_object(self.filesystem, f"{self.path}/{JOB}", json.dumps(content).encode(), mode="create")
            self.check()
        self._write(JOB, content)

    @contextmanager
    def claimed(self, pins: Mapping[str, str] | None = None) -> Iterator[None]:
        """Claim the folder for a `with` block; a block that fails before it keeps anything gives the folder back.

        So a job with a typing error, such as a data path that does not exist, does not reserve the name.

        Args:
            pins: see `claim`.

        Raises:
            UserError: see `claim`.
        """
        # If the folder was claimed before, another process may be running the same job in it.
        was_free = self._read(JOB) is None
        self.claim(pins)
        try:
            yield
        except BaseException:
            if was_free and not self._has_results():
                self._release()
            raise

    def check(self) -> None:
        """Check that the folder is free or belongs to this job.

        Raises:
            UserError: it belongs to another configuration of the same name; the message names the differing keys.
        """
        resolved = self._job.model_dump(mode="json", context=AS_WRITTEN)
        existing = self._read(JOB)
        if existing is None or existing["identity"] == self.identity:
            return
        differences = "; ".join(differing_keys(decisive(existing["job"]), decisive(resolved)))
        # An earlier version may have counted a key that does not decide the result.
        if differences:
            raise UserError(
                f"{self.path} has the run {existing['identity']}, whose configuration differs from this one"
                f" ({differences}); give this run another name (--set name=...), or restore the old values to resume"
                " the old run."
            )

    def result(self) -> dict[str, Any] | None:
        """The stored result of a finished run; None before the run is finished."""
        return self._read(RESULT)

    def finish(self, result: dict[str, Any]) -> None:
        """Store the result, which marks the run as finished."""
        self._write(RESULT, result)

    def local_path(self, name: str) -> Path:
        """Path of a file or folder in the run folder, for programs that work on local disks only.

        Raises:
            UserError: the run folder is not on a disk.
        """
        return storage_folder(self._job.storage) / self._job.kind / self._job.name / name

    def _has_results(self) -> bool:
        """Whether there is any file apart from the job and Ray Train's record of a run without checkpoints."""
        files = (Path(str(file).removeprefix(f"{self.path}/")).parts for file in self.filesystem.find(self.path))
        return any(
            parts not in ((JOB,), (BAD_ROWS,))
            and (parts[0] != self.identity or any(folder.startswith(CHECKPOINT) for folder in parts[1:-1]))
            for parts in files
        )

    def _release(self) -> None:
        # The failure of the run itself is what its user has to know.
        with suppress(OSError, SystemFailure):
            # Ray Train would take its record for an earlier part of the same run.
            if self.filesystem.exists(f"{self.path}/{self.identity}"):
                self.filesystem.rm(f"{self.path}/{self.identity}", recursive=True)
            self.filesystem.rm(f"{self.path}/{JOB}")

    def _read(self, name: str) -> dict[str, Any] | None:
        path = f"{self.path}/{name}"
        data: dict[str, Any] | None = read_json(
            path, "remove this file, and run the same command again", self.filesystem
        )
        return data

    def _write(self, name: str, data: dict[str, Any]) -> None:
        write_json(f"{self.path}/{name}", data, self.filesystem)
