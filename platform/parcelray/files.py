"""Files of runs: atomic writes, reading of files that an interruption left empty, and failures of the machine."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from parcelray.errors import SystemFailure

_FAILURES = {
    errno.ENOSPC: "there is no space left on its disk; free some space, or use storage on another disk",
    errno.EDQUOT: "the disk quota is exhausted; free some space, or use storage on another disk",
    errno.EROFS: "its file system is read-only; use storage that can be written to",
    errno.EACCES: "permission is denied; use a path that this user may read and write",
    errno.EPERM: "permission is denied; use a path that this user may read and write",
    errno.ENOTDIR: "a part of this path is a file, but must be a folder; use another path",
    errno.EEXIST: "it is a file, but must be a folder; use another path",
    errno.EISDIR: "it is a folder, but must be a file; use another path",
    errno.EIO: "its disk reports an input/output error; use another disk",
    errno.ESTALE: "its network file system is not available; mount it again",
    errno.ENAMETOOLONG: "its name is too long for the file system; use a shorter path",
    errno.EMFILE: "this process has too many open files; raise the limit (`ulimit -n`)",
}


@contextmanager
def atomic_write(path: str | Path, filesystem: fsspec.AbstractFileSystem | None = None) -> Iterator[IO[bytes]]:
    """Opens a file for writing that appears under its name only when it is complete.

    Every file that a resumed run reads is written with this function: a crash, a full disk or another writer leaves
    the old file or the new one, never a part of it. Missing parent folders are created.

    Args:
        path: the file to write.
        filesystem: file system of the path; None: the local one.

    Yields:
        The binary file to write to.
    """
    if filesystem is None or isinstance(filesystem, LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return
    folder, _, name = str(path).rpartition("/")
    filesystem.makedirs(folder, exist_ok=True)
    temporary = f"{folder}/.{name}.{os.getpid()}.partial"
    with filesystem.open(temporary, "wb") as file:
        yield file
    filesystem.mv(temporary, str(path))


def write_json(path: str | Path, content: Any, filesystem: fsspec.AbstractFileSystem | None = None) -> None:
    """Writes JSON with an indentation of two spaces and a final line break, atomically."""
    text = json.dumps(content, indent=2) + "\n"
    with atomic_write(path, filesystem) as file:
        file.write(text.encode())


def is_written(path: str | Path, filesystem: fsspec.AbstractFileSystem | None = None) -> bool:
    """Whether a file exists and is not empty; an empty one is what a power loss or a full disk leaves of a write."""
    if filesystem is None:
        return Path(path).is_file() and Path(path).stat().st_size > 0
    return bool(filesystem.isfile(str(path)) and filesystem.size(str(path)) > 0)


def read_json(path: str | Path, remedy: str, filesystem: fsspec.AbstractFileSystem | None = None) -> Any | None:
    """Reads a JSON file; None if it is missing or empty.

    Args:
        path: the file.
        remedy: what to do about a file that is cut off, for the error message.
        filesystem: file system of the path; None: the local one.

    Raises:
        SystemFailure: the file is not JSON.
    """
    if not is_written(path, filesystem):
        return None
    try:
        with filesystem.open(str(path), "rb") if filesystem is not None else Path(path).open("rb") as file:
            return json.loads(file.read())
    except ValueError as error:
        raise SystemFailure(f"{path} is damaged: it is not JSON ({error}); {remedy}.") from error


def explained_failure(error: OSError) -> str | None:
    """Describes a failure of the machine in one sentence; None for an error that is not one, such as a missing file."""
    reason = _FAILURES.get(error.errno or 0)
    if reason is None:
        return None
    name = error.filename2 or error.filename
    place = name.decode(errors="replace") if isinstance(name, bytes) else name
    return f"{place if place is not None else error.strerror or error}: {reason}, then run the same command again."
