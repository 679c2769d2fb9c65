"""The interface of benchmark readers: each row of a benchmark gives samples, or the reason why it gives none."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from parcelray.datasets.sample import Sample


class Problem(NamedTuple):
    """A row that cannot be evaluated or scored. Problems are reported and counted, never scored as 0."""

    row: str
    """Id of the row, or of the question within the row."""
    reason: str
    """The reason, in words."""


class RowSamples(NamedTuple):
    """The samples and problems of one row of a benchmark."""

    samples: tuple[Sample, ...]
    """One sample per question of the row. The samples of a row usually share their images."""
    problems: tuple[Problem, ...] = ()
    """Questions of the row that cannot be evaluated."""


class DatasetFingerprint(NamedTuple):
    """Identifies the data that a result was computed on. A changed fingerprint means that the data changed."""

    revision: str
    """Revision of the source: a commit of the hub, a digest of local files, or the seed of a procedural suite."""
    rows: int
    """Number of rows of the whole split."""
    ids: str
    """SHA-256 of the row ids in their order."""


class BenchmarkReader(Protocol):
    """Reads the rows of one benchmark.

    Instances are picklable and cheap to copy to Ray workers. The workers open the files themselves.
    """

    @property
    def name(self) -> str:
        """Name of the benchmark."""

    def fingerprint(self) -> DatasetFingerprint:
        """Returns the fingerprint of the data. Reads no images."""

    def order(self) -> Sequence[int]:
        """Returns the row indices, with rows that share images next to each other. Reads no images."""

    def cluster(self, row: int) -> str:
        """Returns the cluster of a row. Rows of one cluster share an image or a sentence: they are not independent."""

    def read(self, row: int) -> RowSamples:
        """Reads one row with its images still encoded. The result is the same in every process."""


def ids_digest(ids: Iterable[str]) -> str:
    """Returns the SHA-256 of row ids in the given order."""
    digest = hashlib.sha256()
    for name in ids:
        digest.update(name.encode() + b"\0")
    return digest.hexdigest()


def chosen_rows(reader: BenchmarkReader, limit: int | None, seed: int = 0) -> Sequence[int]:
    """Returns all rows of a benchmark, or the rows of a random subset of its clusters.

    Clusters are never split, and the rows of a smaller limit are a subset of the rows of a larger limit.

    Args:
        reader: reader of the benchmark.
        limit: smallest number of rows to return; None: all rows.
        seed: seed of the random choice.
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
