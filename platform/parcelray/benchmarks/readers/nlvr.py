"""NLVR as a benchmark: one row a picture, with the statement and every derived question about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from parcelray.benchmarks.readers.base import DataPin, RowSamples, ids_digest
from parcelray.datasets.nlvr.source import NlvrSource


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

    def pin(self) -> DataPin:
        """See `BenchmarkReader`."""
        rows = self.source.pictures
        return DataPin(f"{self.source.split}:{self.source.view}", len(rows), ids_digest(row.id for row in rows))

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
