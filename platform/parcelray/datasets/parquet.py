"""Samples in parquet files: the schema, conversion of rows, and a source that reads a folder of shards."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from parcelray.datasets.boxes import Box
from parcelray.datasets.sample import Sample
from parcelray.datasets.source import BadRowsError, SampleGroup
from parcelray.errors import SystemFailure, UserError

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("benchmark", pa.string()),
        ("family", pa.string()),
        ("task", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("prompt", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("metric", pa.string()),
        ("scene", pa.string()),
        ("metadata", pa.string()),
    ]
)
"""Schema with one sample per row. `images` has the format of Hugging Face image features; `metadata` is JSON.

Files may have other types that can be cast to these, and images as lists of binary values.
"""

_LARGEST = 1e6
"""Largest side of a region's box; excludes NaN and infinity, which have no patch."""
_ROWS_OF_TEXT = 65536
_ROWS_WITH_IMAGES = 64
"""Rows in memory at once while their structure is checked, without and with the bytes of the images."""


def to_table(samples: Iterable[Sample]) -> pa.Table:
    """Converts samples to an Arrow table with `SCHEMA`."""
    return pa.Table.from_pylist([_to_row(sample) for sample in samples], schema=SCHEMA)


def from_row(row: dict[str, Any]) -> Sample:
    """Converts a row of `SCHEMA` without problems (see `row_problem`) to a sample; the image paths are dropped.

    An image without bytes becomes an empty one, which cannot be decoded. Values that a `Sample` may lack may be null.
    """
    images = tuple(
        (image if isinstance(image, bytes) else (image or {}).get("bytes")) or b"" for image in row["images"]
    )
    values = {
        **row,
        "images": images,
        "answers": tuple(row["answers"]),
        "metadata": json.loads(row["metadata"] or "{}"),
    }
    return Sample(**{name: value for name, value in values.items() if value is not None})


def row_problem(row: Mapping[str, Any]) -> str | None:
    """Returns the reason why a row of `SCHEMA` gives no sample; None if it gives one. Image bytes are not read."""
    for name in ("id", "benchmark", "family", "task", "prompt"):
        if row[name] is None:
            return f"no {name}"
    if not row["images"]:
        return "no image"
    if not all(image is None or isinstance(image, bytes | dict) for image in row["images"]):
        return "its images are not stored as bytes"
    if not row["answers"] or not row["answers"][0]:
        return "no answer"
    if row["metadata"] is None:
        return None
    try:
        metadata = json.loads(row["metadata"])
    except json.JSONDecodeError as error:
        return f"its metadata is not JSON ({error})"
    except (ValueError, RecursionError) as error:  # A number of too many digits, or too deep nesting.
        return f"its metadata cannot be decoded ({error})"
    if not isinstance(metadata, dict):
        return "its metadata is not a JSON object"
    return _regions_problem(metadata.get("regions", []), len(row["images"]))


@dataclass(frozen=True)
class ParquetSource:
    """A `SampleSource` over a folder of parquet shards or one parquet file.

    The groups are named `images-<n>` after the number of images. The weight of a group is its fraction of the rows, and
    its samples are ordered by shard name and row. Only the path is sent to a worker: each process reads the shards into
    memory once, on first use.
    """

    path: Path
    """Folder of the shards, or one file."""

    pattern: str = "*.parquet"
    """Pattern of the files to read, for example `video-*.parquet`."""

    @property
    def groups(self) -> tuple[SampleGroup, ...]:
        """One finite group for each number of images, in ascending order."""
        tables = self._tables
        total = sum(table.num_rows for table in tables.values())
        return tuple(
            SampleGroup(_group_name(n), n, table.num_rows / total, table.num_rows) for n, table in tables.items()
        )

    def get(self, group: str, index: int) -> Sample:
        """Reads row `index` of a group.

        Raises:
            UserError: the group is not one of `groups`, or the files do not contain samples.
            SystemFailure: a file is damaged.
            IndexError: the index is out of range.
        """
        for number, table in self._tables.items():
            if _group_name(number) == group:
                if not 0 <= index < table.num_rows:
                    raise IndexError(f"index {index} is out of range for group {group!r} with {table.num_rows} samples")
                return from_row(table.slice(index, 1).to_pylist()[0])
        raise UserError(f"{self.path} has no group {group!r}; legal: {', '.join(g.name for g in self.groups)}.")

    def check(self) -> None:
        """Checks the structure of all rows, reading the files in batches and no image bytes.

        Raises:
            BadRowsError: the message names the first rows that give no sample.
            UserError: the files do not contain samples.
            SystemFailure: a file is damaged.
        """
        problems = {}
        for file in _files(self.path, self.pattern):
            for number, row in enumerate(_light_rows(file)):
                if (reason := row_problem(row)) is not None:
                    problems[f"{row['id'] or '(no id)'} (row {number} of {file.parent.name}/{file.name})"] = reason
        if problems:
            raise BadRowsError(problems)

    @cached_property
    def _tables(self) -> dict[int, pa.Table]:
        table = pa.concat_tables([_read(file) for file in _files(self.path, self.pattern)])
        counts = pc.fill_null(pc.list_value_length(table["images"]), 0)
        return {number: table.filter(pc.equal(counts, number)) for number in sorted(pc.unique(counts).to_pylist())}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "pattern": self.pattern}


def _to_row(sample: Sample) -> dict[str, Any]:
    row = {name: getattr(sample, name) for name in SCHEMA.names}
    row["images"] = [{"bytes": image, "path": None} for image in sample.images]
    row["metadata"] = json.dumps(sample.metadata)
    return row


def _group_name(num_images: int) -> str:
    return f"images-{num_images}"


def _files(path: Path, pattern: str) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.glob(pattern))
    if not files:
        raise UserError(
            f"{path} contains no files that match {pattern}; give a parquet file, or a folder of shards with the"
            " columns of a Sample."
        )
    return files


def _regions_problem(regions: Any, num_images: int) -> str | None:
    """The reason why the labelled regions of a row (see `Collator`) cannot be used; None if they can."""
    if not isinstance(regions, list) or len(regions) > num_images:
        return f"its regions are not a list with at most one entry for each of its {num_images} images"
    for region in (each for entry in regions for each in (entry if isinstance(entry, list) else [None])):
        if not isinstance(region, dict) or not isinstance(region.get("word"), str) or not region["word"]:
            return "a region has no word"
        box = region.get("box")
        if (
            not isinstance(box, list)
            or len(box) != len(Box._fields)
            or not all(isinstance(x, int | float) and abs(x) <= _LARGEST for x in box)
        ):
            return "a region has no box of four numbers"
    return None


def _light_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file without the bytes of their images, which take nearly all of its size."""
    _check_columns(file)
    with _damage_named(file):
        content = pq.ParquetFile(file)
        paths = [content.schema.column(index).path for index in range(len(content.schema))]
        # Of the images only the paths are read, which tell how many there are. Images without paths have to be read.
        images = [path for path in paths if path.startswith("images.") and path.endswith(".path")]
        texts = pa.schema([each for each in SCHEMA if each.name != "images"])
        batch_size = _ROWS_OF_TEXT if images else _ROWS_WITH_IMAGES
        for batch in content.iter_batches(batch_size, columns=[*texts.names, *(images or ["images"])]):
            table = pa.Table.from_batches([batch])
            rows = _cast(file, table, texts).to_pylist()
            for row, images_of_row in zip(rows, table["images"].to_pylist(), strict=True):
                yield {**row, "images": images_of_row}


def _read(file: Path) -> pa.Table:
    _check_columns(file)
    with _damage_named(file):
        table = pq.read_table(file, columns=SCHEMA.names)
    if _is_list_of_bytes(table.schema.field("images").type):
        number = table.schema.get_field_index("images")
        table = table.set_column(number, "images", _with_structs(table["images"]))
    return _cast(file, table, SCHEMA)


def _check_columns(file: Path) -> None:
    try:
        with _damage_named(file):
            schema = pq.read_schema(file)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{file} is not a parquet file ({error}); give shards with the columns {', '.join(SCHEMA.names)}."
        ) from error
    missing = [name for name in SCHEMA.names if name not in schema.names]
    if missing:
        raise UserError(
            f"{file} lacks the columns {', '.join(missing)}; give shards with the columns {', '.join(SCHEMA.names)}."
        )
    with _types_named(file):
        for field in SCHEMA:
            given = schema.field(field.name).type
            if field.name != "images" or not _is_list_of_bytes(given):
                _check_type(given, field.type)


def _check_type(given: pa.DataType, wanted: pa.DataType) -> None:
    """Raises an Arrow error if values of a type cannot be cast; the entries of lists are not cast with a null list."""
    pa.nulls(1, given).cast(wanted)
    if pa.types.is_list(wanted) and hasattr(given, "value_type"):
        _check_type(given.value_type, wanted.value_type)


def _is_list_of_bytes(given: pa.DataType) -> bool:
    if not (pa.types.is_list(given) or pa.types.is_large_list(given)):
        return False
    return bool(pa.types.is_binary(given.value_type) or pa.types.is_large_binary(given.value_type))


def _with_structs(images: pa.ChunkedArray) -> pa.ChunkedArray:
    """Converts lists of encoded images to lists of structs with bytes and a null path."""
    wanted = SCHEMA.field("images").type
    chunks = []
    for chunk in images.cast(pa.list_(pa.binary())).chunks:
        paths = pa.nulls(len(chunk.values), pa.string())
        structs = pa.StructArray.from_arrays([chunk.values, paths], names=["bytes", "path"])
        chunks.append(pa.ListArray.from_arrays(chunk.offsets, structs, mask=chunk.is_null()).cast(wanted))
    return pa.chunked_array(chunks, type=wanted)


def _cast(file: Path, table: pa.Table, schema: pa.Schema) -> pa.Table:
    with _types_named(file):
        return table.select(schema.names).cast(schema)


@contextmanager
def _types_named(file: Path) -> Iterator[None]:
    """Turns the errors of a cast into one sentence."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise UserError(
            f"{file} has a column of another type ({error}); give shards with the columns"
            f" {', '.join(f'{each.name} ({each.type})' for each in SCHEMA)}. Images may also be list<binary>."
        ) from error


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    """Turns the errors of reading damaged pages into one sentence."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise SystemFailure(
            f"{file} is damaged or cannot be read ({str(error).splitlines()[0]}); write or copy it again."
        ) from error
