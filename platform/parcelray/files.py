"""Files of runs: storage on disks and object stores, atomic writes, and failures of the machine."""

import errno
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from parcelray.errors import SystemFailure, UserError

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

_LISTING_WAIT_S = 30.0
_CLIENTS = frozenset({"botocore", "aiobotocore", "aiohttp", "gcsfs", "google"})
"""Libraries whose errors are failures of object storage; s3fs names them as the cause of its own errors."""
INDEX = ".files.json"
"""Name of the index of an uploaded folder: the size of each file in bytes, by its path in the folder."""
_PACKAGES = {"s3": "parcelray[s3]", "gs": "gcsfs"}
"""Package that a scheme needs, where it is not installed with parcelray."""

# By name, because it takes a second to import. The file systems of other schemes repeat requests themselves.
fsspec.register_implementation(
    "s3", "parcelray.s3_storage.PatientS3FileSystem", clobber=True, errtxt="s3fs is not installed"
)


def open_storage(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the file system of a folder or URI, and the path on it without a slash at its end.

    Listings are not cached, because other processes write to the same storage. Credentials and the address of the store
    come from the environment of each process (for s3: `AWS_*`), never from a job file.

    Raises:
        UserError: no installed package supports the scheme of the URI.
    """
    scheme, separator, _ = uri.partition("://")
    options = {"use_listings_cache": False} if separator and scheme != "file" else {}
    try:
        filesystem, path = fsspec.core.url_to_fs(uri, **options)
    except ImportError as error:
        raise UserError(
            f"{uri} needs a package that is not installed ({error}); run `pip install {_PACKAGES.get(scheme, scheme)}`"
            " on every host."
        ) from error
    except ValueError as error:
        raise UserError(f"{uri} is not storage ({error}); use a folder, s3://BUCKET/FOLDER or gs://...") from error
    return filesystem, str(path).rstrip("/")


def is_local(filesystem: fsspec.AbstractFileSystem) -> bool:
    """Whether a file system is a disk of this machine, or is mounted like one."""
    return isinstance(filesystem, LocalFileSystem)


def modified_at(info: Mapping[str, Any]) -> float:
    """Returns when a file was last written, seconds since 1970, from the entry of a listing."""
    value = next(info[key] for key in ("mtime", "LastModified", "created") if info.get(key) is not None)
    return float(value.timestamp() if isinstance(value, datetime) else value)


def listing_wait_s(filesystem: fsspec.AbstractFileSystem) -> float:
    """Longest time until a listing shows a new file, seconds: 0 on a disk and in memory, half a minute elsewhere."""
    return 0.0 if isinstance(filesystem, LocalFileSystem | MemoryFileSystem) else _LISTING_WAIT_S


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
    if filesystem is None or is_local(filesystem):
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
    # An object appears when its upload is complete, so a temporary name is not needed.
    content = io.BytesIO()
    yield content
    write_object(filesystem, str(path), content.getvalue())


def write_object(
    filesystem: fsspec.AbstractFileSystem,
    path: str,
    content: bytes,
    *,
    mode: Literal["overwrite", "create"] = "overwrite",
) -> None:
    """Writes a whole file of a remote file system, and the folders above it where the file system has real folders.

    Args:
        filesystem: file system of the file.
        path: path on it.
        content: the bytes.
        mode: `create` refuses a file that exists.

    Raises:
        FileExistsError: the file exists, with `create`.
    """
    try:
        filesystem.pipe_file(path, content, mode=mode)
    except FileNotFoundError:
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(path, content, mode=mode)


def upload_files(
    folder: Path, filesystem: fsspec.AbstractFileSystem, target: str, *, leave_out: Sequence[str] = ()
) -> None:
    """Copies the files of a local folder to object storage; the index of the files is written last.

    With the index, `download_files` needs no listing, and it recognises an upload that did not end.

    Args:
        folder: the local folder.
        filesystem: file system of the target.
        target: folder on it; its other objects are left as they are.
        leave_out: names of files at the top of the folder that are not copied.
    """
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {name: (folder / name).stat().st_size for name in names if name not in leave_out and name != INDEX}
    sources, targets = [str(folder / name) for name in sizes], [f"{target}/{name}" for name in sizes]
    try:
        filesystem.put(sources, targets)
    except FileNotFoundError:
        for parent in sorted({path.rpartition("/")[0] for path in targets}):
            filesystem.makedirs(parent, exist_ok=True)
        filesystem.put(sources, targets)
    write_json(f"{target}/{INDEX}", sizes, filesystem)


def download_files(filesystem: fsspec.AbstractFileSystem, source: str, folder: Path) -> bool:
    """Copies a folder of object storage to a local folder.

    Args:
        filesystem: file system of the source.
        source: folder on it. If it has an index, the files that the index names are copied, also those that a listing
            does not show yet; otherwise those of a listing.
        folder: the local folder; files of the same size in it are not copied again.

    Returns:
        Whether every file of the source is there in its full size; False if the source has no files.
    """
    sizes: dict[str, int] | None = read_json(f"{source}/{INDEX}", "remove it", filesystem)
    if sizes is None:
        found = filesystem.find(source, detail=True)
        sizes = {name.removeprefix(f"{source}/"): info["size"] for name, info in found.items()}
    for name in sizes:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"The index of {source} lists {name}, which is outside of the folder; remove {INDEX}.")
    missing = [name for name, size in sizes.items() if not _has_size(folder / name, size)]
    for name in missing:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    try:
        filesystem.get([f"{source}/{name}" for name in missing], [str(folder / name) for name in missing])
    except FileNotFoundError:
        return False
    return bool(sizes) and all(_has_size(folder / name, size) for name, size in sizes.items())


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def write_json(path: str | Path, content: Any, filesystem: fsspec.AbstractFileSystem | None = None) -> None:
    """Writes JSON with an indentation of two spaces and a final line break, atomically."""
    text = json.dumps(content, indent=2) + "\n"
    with atomic_write(path, filesystem) as file:
        file.write(text.encode())


def is_written(path: str | Path, filesystem: fsspec.AbstractFileSystem | None = None) -> bool:
    """Whether a file exists and is not empty; an empty one is what a power loss or a full disk leaves of a write."""
    if filesystem is None:
        return Path(path).is_file() and Path(path).stat().st_size > 0
    try:
        info = filesystem.info(str(path))
    except FileNotFoundError:
        return False
    return bool(info["type"] == "file" and info["size"] > 0)


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


def explained_failure(error: Exception) -> str | None:
    """Describes a failure of the machine or of its storage in one sentence; None for another error.

    A missing file, for example, is no failure of the machine.
    """
    causes = (type(each).__module__.partition(".")[0] for each in (error, error.__cause__))
    if not _CLIENTS.isdisjoint(causes):
        return (
            f"the object storage failed ({(str(error).splitlines() or [type(error).__name__])[0]}); check its address,"
            " the bucket and the credentials in the environment (for s3: AWS_*), then run the same command again."
        )
    if not isinstance(error, OSError):
        return None
    reason = _FAILURES.get(error.errno or 0)
    if reason is None:
        return None
    name = error.filename2 or error.filename
    place = name.decode(errors="replace") if isinstance(name, bytes) else name
    return f"{place if place is not None else error.strerror or error}: {reason}, then run the same command again."
