"""The folder of one run, on a local disk or any fsspec URI: its resolved job, its result, and Ray Train's checkpoints below it."""

import json
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from parcelray.config.loader import StoredJob, decisive, differing_keys, identity
from parcelray.errors import UserError

_JOB, _RESULT = "job.json", "result.json"


class RunFolder:
    """`<storage>/<kind>/<name>`: one name, one configuration, one folder.

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

    def claim(self) -> None:
        """Takes the folder for this job.

        Raises:
            UserError: it belongs to another configuration of the same name; the message has the differing keys.
        """
        resolved = self._job.model_dump(mode="json")
        existing = self._read(_JOB)
        if existing is not None and existing["identity"] != self.identity:
            differences = "; ".join(differing_keys(decisive(existing["job"]), decisive(resolved)))
            raise UserError(
                f"{self.path} holds the run {existing['identity']}, whose configuration differs from this one ({differences}); "
                "give this one another name (--set name=...), or restore the old values to go on with the old run."
            )
        self._write(_JOB, {"identity": self.identity, "job": resolved})

    def result(self) -> dict[str, Any] | None:
        """What a finished run recorded; None before it is finished."""
        return self._read(_RESULT)

    def finish(self, result: dict[str, Any]) -> None:
        """Records that the run is finished."""
        self._write(_RESULT, result)

    def local_path(self, name: str) -> Path:
        """A folder for this run's local products, such as the trained model.

        Raises:
            UserError: the run folder is not on a local disk.
        """
        if not self.is_local:
            raise UserError(f"{self.path} is not a local folder; fetch the run's model folder, or set storage to a local path.")
        return Path(self.path) / name

    def upload(self, folder: Path, name: str) -> None:
        """Copies a local folder into the run folder."""
        self.filesystem.put(f"{folder}/", f"{self.path}/{name}/", recursive=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        path = f"{self.path}/{name}"
        if not self.filesystem.exists(path):
            return None
        with self.filesystem.open(path, "r") as file:
            data: dict[str, Any] = json.load(file)
        return data

    def _write(self, name: str, data: dict[str, Any]) -> None:
        self.filesystem.makedirs(self.path, exist_ok=True)
        # Written aside and moved: an interrupted write must not leave half a file under the final name.
        aside = f"{self.path}/.{name}.partial"
        with self.filesystem.open(aside, "w") as file:
            json.dump(data, file, indent=2)
        self.filesystem.mv(aside, f"{self.path}/{name}")
