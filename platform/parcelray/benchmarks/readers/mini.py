"""The mini suite as a benchmark: as many samples of each family as wanted."""

from collections.abc import Sequence
from dataclasses import dataclass

from parcelray.benchmarks.readers.base import DataPin, RowSamples, ids_digest
from parcelray.datasets.mini.scenes import Split
from parcelray.datasets.mini.suite import BENCHMARK, FAMILIES, family_sample, family_sample_id


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

    def pin(self) -> DataPin:
        """See `BenchmarkReader`."""
        rows = self.order()
        return DataPin(f"seed:{self.seed}", len(rows), ids_digest(self.cluster(row) for row in rows))

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
