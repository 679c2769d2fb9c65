"""Rows of training data at random positions: JSON and JSON lines, tar shards (WebDataset), and Hugging Face data sets.

Each store lists its rows once, in order and without the bytes of images, and then reads single rows by their position.
The memory that a process needs therefore does not grow with the images.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from parcelray.datasets.conversations.files import TarPart, open_file, read_part, tar_members
from parcelray.errors import UserError

_CHUNK = 1 << 20
"""Bytes of a JSON file that are parsed together."""
_ROWS_LISTED = 1000
"""Rows of a data set whose texts are in memory at once while rows are listed."""
_SEPARATORS = re.compile(r"[\s,]*")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_BOM = b"\xef\xbb\xbf"


class Position(NamedTuple):
    """Where a store finds a row: a file and a part of it, or the number of the row."""

    file: int
    start: int
    end: int = 0


class ListedRow(NamedTuple):
    """A row without the bytes of its images."""

    position: Position
    cells: Mapping[str, Any] | None
    """Values by key; an image with bytes has its name, or a text that no other image has. None: not readable."""
    reason: str = ""
    """Why the row is not readable."""


class RowStore(Protocol):
    """Rows of training data. Instances can be pickled."""

    def listed(self, *, digests: bool = False) -> Iterator[ListedRow]:
        """Yields all rows in order.

        Args:
            digests: whether images whose bytes are in the row get a digest of them as name, which reads all images.

        Raises:
            UserError: a file has another format.
        """
        ...

    def read(self, position: Position) -> dict[str, Any]:
        """Returns one row with the bytes of its images, if the store has them."""
        ...


@dataclass(frozen=True)
class JsonRows:
    """Files with a JSON array of objects, or with one JSON object per line."""

    files: tuple[str, ...]

    def listed(self, *, digests: bool = False) -> Iterator[ListedRow]:
        """See `RowStore`."""
        for number, file in enumerate(self.files):
            with open_file(file) as opened:
                start = 0
                head = opened.read(_CHUNK)
                if head.startswith(_BOM):
                    start, head = len(_BOM), head[len(_BOM) :]
                if head.lstrip().startswith(b"["):
                    yield from _array(number, file, opened, head, start)
                else:
                    yield from _lines(number, opened, head, start)

    def read(self, position: Position) -> dict[str, Any]:
        """See `RowStore`."""
        row: dict[str, Any] = json.loads(read_part(self.files[position.file], position.start, position.end))
        return row


def _lines(number: int, opened: Any, head: bytes, start: int) -> Iterator[ListedRow]:
    rest = head
    line = 0
    while rest:
        *complete, rest = rest.split(b"\n")
        chunk = opened.read(_CHUNK)
        if not chunk and rest:
            complete.append(rest)
        for text in complete:
            line += 1
            if text.strip():
                yield _listed(Position(number, start, start + len(text)), text, f"line {line}")
            start += len(text) + 1
        rest = rest + chunk if chunk else b""


def _array(number: int, file: str, opened: Any, head: bytes, start: int) -> Iterator[ListedRow]:
    """Yields the objects of an array whose text is never in memory as a whole.

    Latin-1 keeps one character per byte, so that positions in the text are positions in the file.
    """
    decoder = json.JSONDecoder()
    text = head.decode("latin-1")
    at = text.index("[") + 1
    while True:
        separators = _SEPARATORS.match(text, at)
        at = separators.end() if separators is not None else at
        if text.startswith("]", at):
            return
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            more = opened.read(max(_CHUNK, len(text) - at))
            if not more:
                raise UserError(
                    f"{file} is not a JSON array of objects: at byte {start + at}, {error}; correct the file."
                ) from None
            start, text, at = start + at, text[at:] + more.decode("latin-1"), 0
            continue
        yield _listed(Position(number, start + at, start + end), text[at:end].encode("latin-1"), f"byte {start + at}")
        at = end


def _listed(position: Position, text: bytes, place: str) -> ListedRow:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return ListedRow(position, None, f"{place} is not JSON ({error})")
    if not isinstance(row, dict):
        return ListedRow(position, None, f"{place} is not a JSON object")
    return ListedRow(position, row)


@dataclass(frozen=True)
class TarRows:
    """Tar shards in WebDataset's layout: `KEY.json` with the row, and its images `KEY.jpg`, `KEY.1.png`, ...

    A row without files of its own has the names of other members.
    """

    files: tuple[str, ...]

    def listed(self, *, digests: bool = False) -> Iterator[ListedRow]:
        """See `RowStore`."""
        for number, file in enumerate(self.files):
            for name, part in self._members:
                if part.file == file and name.endswith(".json"):
                    position = Position(number, part.offset, part.offset + part.size)
                    row = _listed(position, read_part(file, position.start, position.end), name)
                    yield row if row.cells is None else row._replace(cells=self._with_images(row.cells, name))

    def read(self, position: Position) -> dict[str, Any]:
        """See `RowStore`."""
        file = self.files[position.file]
        return self._with_images(
            json.loads(read_part(file, position.start, position.end)), self._names[position.file, position.start]
        )

    @cached_property
    def images(self) -> dict[str, TarPart]:
        """Places of all members by name."""
        return dict(self._members)

    @cached_property
    def _members(self) -> list[tuple[str, TarPart]]:
        return [member for file in self.files for member in tar_members(file)]

    @cached_property
    def _names(self) -> dict[tuple[int, int], str]:
        numbers = {file: number for number, file in enumerate(self.files)}
        return {(numbers[part.file], part.offset): name for name, part in self._members if name.endswith(".json")}

    @cached_property
    def _images_of(self) -> dict[str, list[str]]:
        """Names of the image members of each key, in the order of their names."""
        found: dict[str, list[str]] = {}
        for name, _ in self._members:
            if name.lower().endswith(_IMAGE_SUFFIXES):
                found.setdefault(_key(name), []).append(name)
        return {key: sorted(names) for key, names in found.items()}

    def _with_images(self, row: Mapping[str, Any], name: str) -> dict[str, Any]:
        own = self._images_of.get(_key(name))
        # The files of the sample replace the names that its images had before the shards were written.
        return dict(row) if own is None else {**row, "image": None, "images": own}


def _key(name: str) -> str:
    """WebDataset's key of a member: its name up to the first dot after the last slash."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.split(".")[0]))


@dataclass(frozen=True)
class DatasetRows:
    """A Hugging Face data set: an id on the hub, a folder from `save_to_disk`, or parquet files.

    The `datasets` library maps it into memory, so only the pages that are read take memory.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    files: tuple[str, ...] = ()
    """Parquet files; empty: a folder or a data set on the hub."""

    def listed(self, *, digests: bool = False) -> Iterator[ListedRow]:
        """See `RowStore`."""
        for first in range(0, len(self._dataset), _ROWS_LISTED):
            batch = self._dataset[first : first + _ROWS_LISTED]
            columns = {
                name: _light(batch.column(name), f"{name}-{first}", digests).to_pylist() for name in batch.column_names
            }
            for row in range(batch.num_rows):
                yield ListedRow(Position(0, first + row), {name: cells[row] for name, cells in columns.items()})

    def read(self, position: Position) -> dict[str, Any]:
        """See `RowStore`."""
        row: dict[str, Any] = self._dataset[position.start : position.start + 1].to_pylist()[0]
        return row | {name: None if row[name] is None else names[row[name]] for name, names in self._classes.items()}

    @cached_property
    def _classes(self) -> dict[str, list[str]]:
        import datasets

        features = self._dataset.features
        return {name: each.names for name, each in features.items() if isinstance(each, datasets.ClassLabel)}

    @cached_property
    def _dataset(self) -> Any:
        import datasets

        try:
            loaded = self._load(datasets)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
            raise UserError(
                f"{self.path} (split {self.split}) cannot be loaded: {reason}. Give a folder from save_to_disk, parquet"
                " files, or the id of a data set on the Hugging Face hub."
            ) from None
        # Arrow tables have the encoded images.
        return loaded.with_format("arrow")

    def _load(self, datasets: Any) -> Any:
        if self.files:
            return datasets.load_dataset("parquet", data_files=list(self.files), split="train")
        if os.path.isfile(os.path.join(self.path, "dataset_dict.json")):
            splits = datasets.load_from_disk(self.path)
            if self.split not in splits:
                raise ValueError(f"it has the splits {', '.join(splits)}")
            return splits[self.split]
        if os.path.isfile(os.path.join(self.path, "state.json")):
            return datasets.load_from_disk(self.path)
        return datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision)


def _light(column: pa.ChunkedArray | pa.Array, label: str, digests: bool) -> pa.Array:
    """Replaces images by names: the digest of the bytes, the path next to them, or a text that no other image has."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = _light(array.values, label, digests)
        return type(array).from_arrays(array.offsets, inner, mask=array.is_null())
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        if set(names) == {"bytes", "path"}:
            own = _light(array.field("bytes"), label, digests)
            paths = array.field("path").cast(pa.string())
            texts = pc.coalesce(own, paths) if digests else pc.coalesce(paths, own)
            return pc.if_else(array.is_valid(), texts, None)
        fields = [_light(array.field(name), f"{label}-{name}", digests) for name in names]
        return pa.StructArray.from_arrays(fields, names=names, mask=array.is_null())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pa.array([_name(cell, f"{label}-{index}", digests) for index, cell in enumerate(array)], pa.string())
    return array


def _name(cell: Any, label: str, digests: bool) -> str | None:
    if not cell.is_valid:
        return None
    return hashlib.sha256(cell.as_buffer()).hexdigest() if digests else label
