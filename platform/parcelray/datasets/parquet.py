"""Samples in parquet files: the schema, conversion of rows, and a source that reads a folder of shards."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from parcelray.datasets.sample import Sample
from parcelray.datasets.source import SampleGroup
from parcelray.errors import UserError

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
"""Schema with one sample per row. `images` has the format of Hugging Face image features; `metadata` is JSON."""


def to_table(samples: Iterable[Sample]) -> pa.Table:
    """Converts samples to an Arrow table with `SCHEMA`."""
    return pa.Table.from_pylist([_to_row(sample) for sample in samples], schema=SCHEMA)


def from_row(row: dict[str, Any]) -> Sample:
    """Converts a row of `SCHEMA` to a sample; the image paths are dropped."""
    images = tuple(image["bytes"] for image in row["images"])
    return Sample(
        **{**row, "images": images, "answers": tuple(row["answers"]), "metadata": json.loads(row["metadata"])}
    )


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
            IndexError: the index is out of range.
        """
        for number, table in self._tables.items():
            if _group_name(number) == group:
                if not 0 <= index < table.num_rows:
                    raise IndexError(f"index {index} is out of range for group {group!r} with {table.num_rows} samples")
                return from_row(table.slice(index, 1).to_pylist()[0])
        raise UserError(f"{self.path} has no group {group!r}; legal: {', '.join(g.name for g in self.groups)}.")

    @cached_property
    def _tables(self) -> dict[int, pa.Table]:
        table = pa.concat_tables([_read(file) for file in _files(self.path, self.pattern)])
        counts = pc.list_value_length(table["images"])
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


def _read(file: Path) -> pa.Table:
    try:
        names = pq.read_schema(file).names
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{file} is not a parquet file ({error}); give shards with the columns {', '.join(SCHEMA.names)}."
        ) from error
    missing = [name for name in SCHEMA.names if name not in names]
    if missing:
        raise UserError(
            f"{file} lacks the columns {', '.join(missing)}; give shards with the columns {', '.join(SCHEMA.names)}."
        )
    return pq.read_table(file, columns=SCHEMA.names).cast(SCHEMA)
