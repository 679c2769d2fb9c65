"""Readers of benchmarks whose rows are samples already: the mini suite, NLVR, files of samples, and training rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from parcelray.benchmarks.readers.base import DatasetFingerprint, Problem, RowSamples, ids_digest
from parcelray.benchmarks.tables.rows import ParquetRows
from parcelray.datasets.conversations.source import ConversationSource, single_questions
from parcelray.datasets.mini.scenes import Split
from parcelray.datasets.mini.suite import BENCHMARK, FAMILIES, family_sample, family_sample_id
from parcelray.datasets.nlvr.source import NlvrSource
from parcelray.datasets.parquet import SCHEMA, from_row, row_problem
from parcelray.datasets.source import BadRowsError
from parcelray.errors import UserError


@dataclass(frozen=True)
class MiniReader:
    """Reads the mini suite: one sample per row, one family after the other. See `BenchmarkReader`.

    Args:
        split: split of the suite.
        families: families in the order of the rows.
        samples: number of samples per family.
        seed: seed of the scenes.
        image_size: side of the images in pixels.
    """

    split: Split
    families: tuple[str, ...] = FAMILIES
    samples: int = 500
    seed: int = 0
    image_size: int = 64

    @property
    def name(self) -> str:
        """Name of the benchmark."""
        return BENCHMARK

    def fingerprint(self) -> DatasetFingerprint:
        """See `BenchmarkReader`."""
        rows = self.order()
        return DatasetFingerprint(f"seed:{self.seed}", len(rows), ids_digest(self.cluster(row) for row in rows))

    def order(self) -> Sequence[int]:
        """See `BenchmarkReader`."""
        return range(self.samples * len(self.families))

    def cluster(self, row: int) -> str:
        """See `BenchmarkReader`. Every sample is its own cluster."""
        family, index = self._family_and_index(row)
        return family_sample_id(self.split, family, index, self.seed)

    def read(self, row: int) -> RowSamples:
        """See `BenchmarkReader`."""
        family, index = self._family_and_index(row)
        return RowSamples((family_sample(self.split, family, index, self.seed, self.image_size),))

    def _family_and_index(self, row: int) -> tuple[str, int]:
        return self.families[row // self.samples], row % self.samples


@dataclass(frozen=True)
class NlvrReader:
    """Reads NLVR: one row per picture, with the statement and all derived questions about it. See `BenchmarkReader`.

    Args:
        source: the NLVR data with split, view and questions.
    """

    source: NlvrSource

    @property
    def name(self) -> str:
        """Name of the benchmark."""
        return "nlvr"

    def fingerprint(self) -> DatasetFingerprint:
        """See `BenchmarkReader`."""
        rows = self.source.pictures
        return DatasetFingerprint(
            f"{self.source.split}:{self.source.view}", len(rows), ids_digest(row.id for row in rows)
        )

    def order(self) -> Sequence[int]:
        """See `BenchmarkReader`."""
        return range(len(self.source.pictures))

    def cluster(self, row: int) -> str:
        """See `BenchmarkReader`. The pictures of one sentence form a cluster."""
        return self.source.pictures[row].sentence_id

    def read(self, row: int) -> RowSamples:
        """See `BenchmarkReader`."""
        return RowSamples(
            tuple(
                self.source.get(group, index)
                for group, index in self._samples_of_picture.get(self.source.pictures[row].id, ())
            )
        )

    @cached_property
    def _samples_of_picture(self) -> dict[str, list[tuple[str, int]]]:
        """Group and index in the source of every question, by picture id."""
        by_picture: dict[str, list[tuple[str, int]]] = {}
        for group, index, picture in self.source.questions_in_order():
            by_picture.setdefault(picture.id, []).append((group, index))
        return by_picture

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source}


@dataclass(frozen=True)
class SamplesReader:
    """Reads parquet files of samples, such as an exported mini suite: one sample per row. See `BenchmarkReader`.

    Args:
        name: name of the benchmark.
        path: folder of parquet files.

    Raises:
        UserError: the folder has no parquet files, or a required column is missing.
    """

    name: str
    path: Path

    def fingerprint(self) -> DatasetFingerprint:
        """See `BenchmarkReader`."""
        ids = self._rows.column("id")
        return DatasetFingerprint(self._rows.revision, len(ids), ids_digest(ids))

    def order(self) -> Sequence[int]:
        """See `BenchmarkReader`. Samples of one scene are next to each other."""
        first_rows: dict[str, int] = {}
        for row, scene in enumerate(self._scenes):
            first_rows.setdefault(scene, row)
        return sorted(range(len(self._scenes)), key=lambda row: (first_rows[self._scenes[row]], row))

    def cluster(self, row: int) -> str:
        """See `BenchmarkReader`."""
        return self._scenes[row]

    def read(self, row: int) -> RowSamples:
        """See `BenchmarkReader`."""
        cells = self._rows.row(row)
        if (reason := row_problem(cells)) is not None:
            return RowSamples((), (Problem(cells["id"] or f"row {row}", reason),))
        return RowSamples((from_row(cells),))

    @cached_property
    def _scenes(self) -> list[str]:
        return [scene or name for scene, name in zip(self._rows.column("scene"), self._rows.column("id"), strict=True)]

    @cached_property
    def _rows(self) -> ParquetRows:
        files = tuple(sorted(self.path.glob("*.parquet")))
        if not files:
            raise UserError(
                f"{self.path} contains no parquet files; give the folder of an exported suite, which contains"
                " validation/ and test/."
            )
        rows = ParquetRows(files)
        missing = [name for name in SCHEMA.names if name not in rows.columns]
        if missing:
            raise UserError(
                f"{self.path} lacks the columns {', '.join(missing)}; required are {', '.join(SCHEMA.names)}."
            )
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "path": self.path}


@dataclass(frozen=True)
class RowsReader:
    """Reads the rows of a training as a benchmark: each turn is one question. See `BenchmarkReader`.

    Rows whose structure cannot be used are problems if all rows are evaluated; otherwise they are in no split.

    Args:
        name: name of the benchmark.
        source: the rows of one split.
    """

    name: str
    source: ConversationSource

    def fingerprint(self) -> DatasetFingerprint:
        """See `BenchmarkReader`."""
        ids = [self.cluster(row) for row in self.order()]
        return DatasetFingerprint(f"{self.source.revision}:{self.source.split}", len(ids), ids_digest(ids))

    def order(self) -> Sequence[int]:
        """See `BenchmarkReader`. Rows that cannot be used follow the others."""
        usable = self.source.rows.tolist()
        usable.sort(key=lambda row: (int(self.source.clusters_R[row]), row))
        return [*usable, *(len(self.source.clusters_R) + number for number in range(len(self._unusable)))]

    def cluster(self, row: int) -> str:
        """See `BenchmarkReader`."""
        return f"row-{self.source.clusters_R[row] if row < len(self.source.clusters_R) else row}"

    def read(self, row: int) -> RowSamples:
        """See `BenchmarkReader`."""
        if row >= len(self.source.clusters_R):
            return RowSamples((), (self._unusable[row - len(self.source.clusters_R)],))
        try:
            sample = replace(self.source.sample_of(row), benchmark=self.name)
        except BadRowsError as error:
            return RowSamples((), tuple(Problem(*problem) for problem in error.problems.items()))
        return RowSamples(tuple(single_questions(sample)))

    @cached_property
    def _unusable(self) -> list[Problem]:
        return [Problem(*problem) for problem in self.source.problems.items()] if self.source.split == "all" else []
