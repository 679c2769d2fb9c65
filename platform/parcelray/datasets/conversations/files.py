"""Files of training data on a local disk or any fsspec URI: patterns, parts of files, tar members, and images."""

import base64
import binascii
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from parcelray.errors import SystemFailure, UserError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_NAMED = 80
"""Largest length of a name in a message."""


class UnreadableImage(UserError):
    """An image of a row does not exist. Failures of the storage itself are `SystemFailure`: they are not the row's."""


class TarPart(NamedTuple):
    """The place of one member of a tar file."""

    file: str
    offset: int
    size: int


def expand(pattern: str) -> list[str]:
    """Returns the files of a path or URI in their order.

    Args:
        pattern: a file; a folder, for all JSON, parquet or tar files in it; `*`, `?` and `[...]`; or a range of numbers
            as in WebDataset: `shard-{000..015}.tar`.

    Raises:
        UserError: there are no such files, or a folder has files of several kinds.
    """
    files = [file for part in _ranges(pattern) for file in _files(part)]
    if not files:
        raise UserError(f"{pattern} does not exist; give a file, a folder, a pattern or an fsspec URI of the data.")
    return files


def _ranges(pattern: str) -> list[str]:
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [
        part for number in numbers for part in _ranges(f"{pattern[: found.start()]}{number}{pattern[found.end() :]}")
    ]


def _files(pattern: str) -> list[str]:
    filesystem, path = _opened(pattern)
    with failures_named(pattern):
        if any(letter in path for letter in "*?["):
            return [str(filesystem.unstrip_protocol(file)) for file in sorted(filesystem.glob(path))]
        if not filesystem.isdir(path):
            return [pattern] if filesystem.exists(path) else []
        names = sorted(str(name) for name in filesystem.ls(path, detail=False))
    kinds = {
        suffixes: [name for name in names if name.endswith(suffixes)]
        for suffixes in ((".jsonl", ".json"), (".parquet",), (".tar",))
    }
    present = [files for files in kinds.values() if files]
    if len(present) > 1:
        raise UserError(
            f"{pattern} has files of several kinds ({', '.join(files[0] for files in present)}); name those of the rows"
            " with a pattern such as *.parquet."
        )
    return [str(filesystem.unstrip_protocol(file)) for files in present for file in files]


def _opened(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise UserError(f"{uri} cannot be opened ({error}); install the package of its protocol, or copy it.") from None
    return filesystem, path


@contextmanager
def failures_named(name: str) -> Iterator[None]:
    """Turns the errors of a file system into one sentence; a missing file stays a `FileNotFoundError`."""
    try:
        yield
    except _MISSING:
        raise
    except OSError as error:
        raise SystemFailure(
            f"{name[:_NAMED]} cannot be read ({(str(error) or type(error).__name__).splitlines()[0]}); check the"
            " storage and its credentials, then run the same command again."
        ) from error


def read_part(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """Reads the bytes from `start` to `end` of a file, or the whole file.

    Raises:
        FileNotFoundError: the file does not exist.
        SystemFailure: the storage cannot be read.
    """
    filesystem, path = _opened(uri)
    with failures_named(uri):
        content: bytes = filesystem.cat_file(path, start=start, end=end)
        return content


def open_file(uri: str) -> Any:
    """Opens a file for reading from its start to its end."""
    filesystem, path = _opened(uri)
    with failures_named(uri):
        return filesystem.open(path, "rb")


def size_of(uri: str) -> int:
    """Returns the size of a file in bytes."""
    filesystem, path = _opened(uri)
    with failures_named(uri):
        return int(filesystem.size(path))


def tar_members(file: str) -> Iterator[tuple[str, TarPart]]:
    """Yields names and places of the files in a tar file, reading only the headers.

    Raises:
        UserError: the file is not an uncompressed tar file.
    """
    try:
        with failures_named(file), open_file(file) as opened, tarfile.open(fileobj=opened, mode="r:") as archive:
            for member in archive:
                if member.isreg():
                    yield member.name, TarPart(file, member.offset_data, member.size)
                archive.members = []  # type: ignore[attr-defined]
    except tarfile.TarError as error:
        raise UserError(
            f"{file} is not an uncompressed tar file ({error}); write the shards again, or name others."
        ) from None


class ImageStore(Protocol):
    """Images by name."""

    def read(self, name: str) -> bytes:
        """Returns an encoded image.

        Raises:
            UnreadableImage: there is no such image.
            SystemFailure: the storage cannot be read.
        """
        ...

    def lacks(self, name: str) -> bool:
        """Whether it is known without a request to a remote storage that there is no such image."""
        ...


@dataclass(frozen=True)
class FolderImages:
    """Images below a folder; absolute paths and URIs are read from where they are."""

    root: str

    def read(self, name: str) -> bytes:
        """See `ImageStore`."""
        try:
            return read_part(self._uri(name))
        except (*_MISSING, ValueError):
            raise _no_file(name) from None

    def lacks(self, name: str) -> bool:
        """See `ImageStore`."""
        filesystem, path = _opened(self._uri(name))
        return isinstance(filesystem, LocalFileSystem) and not filesystem.isfile(path)

    def _uri(self, name: str) -> str:
        is_whole = name.startswith("/") or _URI.match(name)
        return name if is_whole else f"{self.root.rstrip('/')}/{name}"


@dataclass(frozen=True)
class TarImages:
    """Images in tar files, by the names of their members."""

    parts: dict[str, TarPart]

    def read(self, name: str) -> bytes:
        """See `ImageStore`."""
        if name not in self.parts:
            raise _no_file(name)
        part = self.parts[name]
        return read_part(part.file, part.offset, part.offset + part.size)

    def lacks(self, name: str) -> bool:
        """See `ImageStore`."""
        return name not in self.parts


def data_uri(text: str) -> bytes:
    """Decodes an image in a `data:` URI.

    Raises:
        UnreadableImage: it is not base64.
    """
    head, _, content = text.partition(",")
    try:
        if not head.endswith(";base64"):
            raise binascii.Error("it is not base64")
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise UnreadableImage(f"the data: URI of an image cannot be decoded ({error})") from None


def _no_file(name: str) -> UnreadableImage:
    return UnreadableImage(f"the image {name[:_NAMED]} does not exist")
