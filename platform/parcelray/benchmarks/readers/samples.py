"""Samples in parquet as a benchmark: what the mini suite's export writes, or anybody's data in the same columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from parcelray.benchmarks.readers.base import DataPin, RowSamples, ids_digest
from parcelray.benchmarks.tables.rows import ParquetRows
from parcelray.datasets.parquet import SCHEMA, from_row
from parcelray.errors import UserError


@dataclass(frozen=True)
class SamplesReader:
    """One row a sample; see `BenchmarkReader`.

    Args:
        name: of the benchmark.
        path: folder of parquet files.

    Raises:
        UserError: the folder holds no parquet files, or they lack a column of a sample.
    """

    name: str
    path: Path

    def pin(self) -> DataPin:
        """See `BenchmarkReader`."""
        ids = self._rows.column("id")
        return DataPin(self._rows.revision, len(ids), ids_digest(ids))

    def order(self) -> Sequence[int]:
        """See `BenchmarkReader`; samples of one scene stand together."""
        places: dict[str, int] = {}
        for row, scene in enumerate(self._scenes):
            places.setdefault(scene, row)
        return sorted(range(len(self._scenes)), key=lambda row: (places[self._scenes[row]], row))

    def cluster(self, row: int) -> str:
        """See `BenchmarkReader`."""
        return self._scenes[row]

    def read(self, row: int) -> RowSamples:
        """See `BenchmarkReader`."""
        return RowSamples((from_row(self._rows.row(row)),))

    @cached_property
    def _scenes(self) -> list[str]:
        return [scene or name for scene, name in zip(self._rows.column("scene"), self._rows.column("id"), strict=True)]

    @cached_property
    def _rows(self) -> ParquetRows:
        files = tuple(sorted(self.path.glob("*.parquet")))
        if not files:
            raise UserError(
                f"{self.path} holds no parquet files; give the folder of an exported suite, with validation/ and test/"
                " in it."
            )
        rows = ParquetRows(files)
        missing = [name for name in SCHEMA.names if name not in rows.columns]
        if missing:
            raise UserError(
                f"{self.path} lacks the columns {', '.join(missing)}; a sample has {', '.join(SCHEMA.names)}."
            )
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "path": self.path}
