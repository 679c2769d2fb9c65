"""What evaluation reads from: a benchmark's rows, each giving the questions about its images, or the reason why it cannot."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from parcelray.datasets.sample import Sample


class Problem(NamedTuple):
    """A question that cannot be asked or scored: kept apart and counted, never a silent 0."""

    row: str
    """Which row, as the data name it."""
    reason: str
    """What is wrong with it."""


class RowSamples(NamedTuple):
    """What one row of a benchmark gives."""

    samples: tuple[Sample, ...]
    """The questions of the row; they show the same images as a rule."""
    problems: tuple[Problem, ...] = ()
    """What is wrong with the row."""


class DatasetFingerprint(NamedTuple):
    """What the data of a result are; another pin under the same name is a drift."""

    revision: str
    """Revision of the source: a commit of the hub, a digest of local files, or the seed of a procedural suite."""
    rows: int
    """Rows of the whole split."""
    ids: str
    """SHA-256 over the row ids in order."""


class BenchmarkReader(Protocol):
    """One benchmark's rows.

    Instances are picklable and cheap to copy to Ray workers, which open the files themselves.
    """

    @property
    def name(self) -> str:
        """Of the benchmark."""

    def pin(self) -> DatasetFingerprint:
        """What the data are; reads no images."""

    def order(self) -> Sequence[int]:
        """The rows, those that show the same images next to each other; reads no images."""

    def cluster(self, row: int) -> str:
        """What the row shares with those that are not independent of it: an image, a sentence."""

    def read(self, row: int) -> RowSamples:
        """One row with its images, still encoded; the same in every process."""


def ids_digest(ids: Iterable[str]) -> str:
    """SHA-256 over row ids in order."""
    digest = hashlib.sha256()
    for name in ids:
        digest.update(name.encode() + b"\0")
    return digest.hexdigest()


def chosen_rows(reader: BenchmarkReader, limit: int | None, seed: int = 0) -> Sequence[int]:
    """The rows of a benchmark, or those of a random part of its clusters.

    Clusters are whole, and those of a smaller limit are among those of a larger one.

    Args:
        reader: of the benchmark.
        limit: rows, at least; None: all.
        seed: of the choice.
    """
    if limit is None:
        return reader.order()
    members: dict[str, list[int]] = {}
    for row in reader.order():
        members.setdefault(reader.cluster(row), []).append(row)
    names = sorted(members)
    random.Random(seed).shuffle(names)
    chosen: list[int] = []
    for name in names:
        if len(chosen) >= limit:
            break
        chosen += members[name]
    return chosen
