"""The folder of one run, on a local disk or any fsspec URI: resolved job, result, and Ray Train's checkpoints."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from parcelray.config.identity import StoredJob, decisive, differing_keys, identity
from parcelray.config.paths import AS_WRITTEN
from parcelray.errors import UserError
from parcelray.files import read_json, write_json

_JOB, _RESULT = "job.json", "result.json"
BAD_ROWS = "bad_rows.jsonl"
"""File of the rows that a training cannot use. A run that has no other file does not reserve its name."""


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


class RunFolder:
    """The folder `<storage>/<kind>/<name>` of a run; it belongs to one configuration.

    Args:
        job: the job; its `storage` may be a path or a URI such as s3://bucket/runs.
    """

    def __init__(self, job: StoredJob) -> None:
        self.identity = identity(job)
        self.filesystem, root = fsspec.core.url_to_fs(job.storage)
        self.path = f"{root.rstrip('/')}/{job.kind}/{job.name}"
        self._job = job

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a disk of this machine."""
        return isinstance(self.filesystem, LocalFileSystem)

    def claim(self, pins: Mapping[str, str] | None = None) -> None:
        """Claim the folder for this job: write the resolved job into it.

        Args:
            pins: content digest of each model reference of the job; None to skip the comparison with earlier digests.

        Raises:
            UserError: the folder belongs to another configuration of the same name (the message names the differing
                keys), or a reference named another content when the run was started.
        """
        self.check()
        kept: dict[str, str] = (self._read(_JOB) or {}).get("pins", {})
        for reference, digest in (pins or {}).items():
            if kept.get(reference, digest) != digest:
                raise UserError(
                    f"{self.path} has the run {self.identity} with another model: the content of {reference} has"
                    f" changed ({kept[reference][:19]} then, {digest[:19]} now). Give this run another name (--set"
                    " name=...), or restore the old model to resume the old run."
                )
        self._write(
            _JOB,
            {
                "identity": self.identity,
                "job": self._job.model_dump(mode="json", context=AS_WRITTEN),
                "pins": kept | dict(pins or {}),
            },
        )

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
        was_free = self._read(_JOB) is None
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
        existing = self._read(_JOB)
        if existing is not None and existing["identity"] != self.identity:
            differences = "; ".join(differing_keys(decisive(existing["job"]), decisive(resolved)))
            raise UserError(
                f"{self.path} has the run {existing['identity']}, whose configuration differs from this one"
                f" ({differences}); give this run another name (--set name=...), or restore the old values to resume"
                " the old run."
            )

    def result(self) -> dict[str, Any] | None:
        """The stored result of a finished run; None before the run is finished."""
        return self._read(_RESULT)

    def finish(self, result: dict[str, Any]) -> None:
        """Store the result, which marks the run as finished."""
        self._write(_RESULT, result)

    def local_path(self, name: str) -> Path:
        """Path of a file or folder in the run folder where it is now, such as the trained model.

        Raises:
            UserError: the run folder is not on a local disk.
        """
        if not self.is_local:
            raise UserError(
                f"{self.path} is not a local folder; set storage to a local path, or download what you need from it."
            )
        return Path(self.path) / name

    def upload(self, folder: Path, name: str) -> None:
        """Copy a local folder into the run folder."""
        self.filesystem.put(f"{folder}/", f"{self.path}/{name}/", recursive=True)

    def _has_results(self) -> bool:
        """Whether there is any file apart from the job and Ray Train's record of a run without checkpoints."""
        files = (Path(str(file).removeprefix(f"{self.path}/")).parts for file in self.filesystem.find(self.path))
        return any(
            parts not in ((_JOB,), (BAD_ROWS,))
            and (parts[0] != self.identity or any(folder.startswith("checkpoint_") for folder in parts[1:-1]))
            for parts in files
        )

    def _release(self) -> None:
        # The failure of the run itself is what its user has to know.
        with suppress(OSError):
            # Ray Train would take its record for an earlier part of the same run.
            if self.filesystem.exists(f"{self.path}/{self.identity}"):
                self.filesystem.rm(f"{self.path}/{self.identity}", recursive=True)
            self.filesystem.rm(f"{self.path}/{_JOB}")

    def _read(self, name: str) -> dict[str, Any] | None:
        path = f"{self.path}/{name}"
        data: dict[str, Any] | None = read_json(
            path, "remove this file, and run the same command again", self.filesystem
        )
        return data

    def _write(self, name: str, data: dict[str, Any]) -> None:
        write_json(f"{self.path}/{name}", data, self.filesystem)
