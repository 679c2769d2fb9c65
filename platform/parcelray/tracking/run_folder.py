"""The folder of one run, on a local disk or any fsspec URI: its resolved job, its result, and Ray Train's checkpoints below it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from parcelray.config.identity import StoredJob, decisive, differing_keys, identity
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

    def claim(self, pins: Mapping[str, str] | None = None) -> None:
        """Takes the folder for this job.

        Args:
            pins: digests of the contents that the job's references stand for, by reference; None: they are not looked
                at.

        Raises:
            UserError: it belongs to another configuration of the same name (the message has the differing keys), or to
                other contents.
        """
        self.check()
        kept: dict[str, str] = (self._read(_JOB) or {}).get("pins", {})
        for reference, digest in (pins or {}).items():
            if kept.get(reference, digest) != digest:
                raise UserError(
                    f"{self.path} holds the run {self.identity} of another model: what {reference} names has changed"
                    f" since ({kept[reference][:19]} then, {digest[:19]} now); give this one another name (--set"
                    " name=...), or put the old model back to go on with the old run."
                )
        self._write(
            _JOB, {"identity": self.identity, "job": self._job.model_dump(mode="json"), "pins": kept | dict(pins or {})}
        )

    def check(self) -> None:
        """Looks whether the folder is free or this job's.

        Raises:
            UserError: it belongs to another configuration of the same name; the message has the differing keys.
        """
        resolved = self._job.model_dump(mode="json")
        existing = self._read(_JOB)
        if existing is not None and existing["identity"] != self.identity:
            differences = "; ".join(differing_keys(decisive(existing["job"]), decisive(resolved)))
            raise UserError(
                f"{self.path} holds the run {existing['identity']}, whose configuration differs from this one"
                f" ({differences}); give this one another name (--set name=...), or restore the old values to go on"
                " with the old run."
            )

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
            raise UserError(
                f"{self.path} is not a local folder; fetch the run's model folder, or set storage to a local path."
            )
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
