"""Readers of benchmarks whose rows are samples already: the mini suite, NLVR, and parquet files of samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from parcelray.benchmarks.readers.base import DatasetFingerprint, RowSamples, ids_digest
from parcelray.benchmarks.tables.rows import ParquetRows
from parcelray.datasets.mini.scenes import Split
from parcelray.datasets.mini.suite import BENCHMARK, FAMILIES, family_sample, family_sample_id
from parcelray.datasets.nlvr.source import NlvrSource
from parcelray.datasets.parquet import SCHEMA, from_row
from parcelray.errors import UserError


@dataclass(frozen=True)
class MiniReader:
    """One row a sample, family after family; see `BenchmarkReader`.

    Args:
        split: of the suite.
        families: in the order of the rows.
        samples: per family.
        seed: of the scenes.
        image_size: side of the images, pixels.
    """

    split: Split
    families: tuple[str, ...] = FAMILIES
    samples: int = 500
    seed: int = 0
    image_size: int = 64

    @property
    def name(self) -> str:
        """Of the benchmark."""
        return BENCHMARK

    def pin(self) -> DatasetFingerprint:
        """See `BenchmarkReader`."""
        rows = self.order()
        return DatasetFingerprint(f"seed:{self.seed}", len(rows), ids_digest(self.cluster(row) for row in rows))

    def order(self) -> Sequence[int]:
        """See `BenchmarkReader`."""
        return range(self.samples * len(self.families))

    def cluster(self, row: int) -> str:
        """See `BenchmarkReader`; samples are independent."""
        family, index = self._place(row)
        return family_sample_id(self.split, family, index, self.seed)

    def read(self, row: int) -> RowSamples:
        """See `BenchmarkReader`."""
        family, index = self._place(row)
        return RowSamples((family_sample(self.split, family, index, self.seed, self.image_size),))

    def _place(self, row: int) -> tuple[str, int]:
        return self.families[row // self.samples], row % self.samples


@dataclass(frozen=True)
class NlvrReader:
    """The pictures of a split, those of a sentence together; see `BenchmarkReader`.

    Args:
        source: which split, view and questions.
    """

    source: NlvrSource

    @property
    def name(self) -> str:
        """Of the benchmark."""
        return "nlvr"

    def pin(self) -> DatasetFingerprint:
        """See `BenchmarkReader`."""
        rows = self.source.pictures
        return DatasetFingerprint(
            f"{self.source.split}:{self.source.view}", len(rows), ids_digest(row.id for row in rows)
        )

    def order(self) -> Sequence[int]:
        """See `BenchmarkReader`."""
        return range(len(self.source.pictures))

    def cluster(self, row: int) -> str:
        """See `BenchmarkReader`: the pictures of a sentence hang together."""
        return self.source.pictures[row].identifier

    def read(self, row: int) -> RowSamples:
        """See `BenchmarkReader`."""
        return RowSamples(
            tuple(self.source.get(group, index) for group, index in self._places.get(self.source.pictures[row].id, ()))
        )

    @cached_property
    def _places(self) -> dict[str, list[tuple[str, int]]]:
        """Where the questions about each picture are in the source."""
        places: dict[str, list[tuple[str, int]]] = {}
        for group, index, picture in self.source.questions_in_order():
            places.setdefault(picture.id, []).append((group, index))
        return places

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source}


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

    def pin(self) -> DatasetFingerprint:
        """See `BenchmarkReader`."""
        ids = self._rows.column("id")
        return DatasetFingerprint(self._rows.revision, len(ids), ids_digest(ids))

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
