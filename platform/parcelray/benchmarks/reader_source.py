"""A `SampleSource` over the rows of a benchmark: its training split, with the prompts of its evaluation."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from parcelray.benchmarks.readers.base import BenchmarkReader, RowSamples
from parcelray.config.data import HeldOut
from parcelray.datasets.held_out import SPLITS, RowSplit, assigned_splits
from parcelray.datasets.sample import Sample
from parcelray.datasets.source import BadRowsError, SampleGroup, groups_by_images
from parcelray.errors import UserError


@dataclass(frozen=True)
class ReaderSource:
    """Reads one part of a benchmark's rows; all questions of a sample's rows are its turns.

    Args:
        reader: reader of the benchmark's training split.
        held_out: rows that are held out; rows of one cluster are in the same split.
        split: the part to read.
        max_bad_rows: largest fraction of rows that may be skipped.
        rows_per_sample: largest number of rows of a sample; rows of one sample are of one cluster and share an image.
    """

    reader: BenchmarkReader
    held_out: HeldOut
    split: RowSplit
    max_bad_rows: float
    rows_per_sample: int = 1

    @property
    def groups(self) -> tuple[SampleGroup, ...]:
        """One finite group for each number of images; every sample is read equally often."""
        return groups_by_images({count: len(samples) for count, samples in self._samples_of.items()})

    @property
    def max_skipped(self) -> int:
        """Largest number of rows that may be skipped."""
        return int(self.max_bad_rows * len(self._rows))

    def get(self, group: str, index: int) -> Sample:
        """Reads sample `index` of a group.

        Raises:
            BadRowsError: a row of the sample has no question that can be used.
            UserError: the rows of the sample have different images.
        """
        rows = self._rows_of(self._samples_of[int(group.removeprefix("images-"))][index])
        read = [self.reader.read(int(row)) for row in rows]
        self._check(rows, read)
        first, *later = [sample for each in read for sample in each.samples if sample.images == each.samples[0].images]
        turns = tuple((sample.prompt, sample.answers[0]) for sample in later)
        return replace(first, later_turns=turns)

    def questions(self, count: int) -> list[Sample]:
        """Reads about `count` questions, spread over the rows of the split."""
        rows = self._rows
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)) if len(rows) else ()
        samples = [sample for row in chosen for sample in self.reader.read(int(rows[row])).samples]
        return samples[:count]

    def _check(self, rows: NDArray[np.int64], read: Sequence[RowSamples]) -> None:
        problems: dict[str, str] = {}
        for row, each in zip(rows, read, strict=True):
            if not each.samples or not each.samples[0].answers:
                problems |= {problem.row: problem.reason for problem in each.problems} or {f"row-{row}": "no answer"}
        if problems:
            # The other rows are skipped with them, so they are reported, too.
            others = {each.samples[0].id for each in read if each.samples} - problems.keys()
            raise BadRowsError(problems | dict.fromkeys(sorted(others), "in a sample with a row that cannot be used"))
        names = [each.samples[0].id for each in read if each.samples[0].images != read[0].samples[0].images]
        if names:
            raise UserError(
                f"{read[0].samples[0].id} and {names[0]} of {self.reader.name} have different images, but are rows of"
                " one cluster; set data.rows_per_sample: 1."
            )

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        order = self.reader.order()
        parts = assigned_splits([self.reader.cluster(row) for row in order], self.held_out)
        rows_R: NDArray[np.int64] = np.array(order, dtype=np.int64)[parts == SPLITS.index(self.split)]
        return rows_R

    def _rows_of(self, sample: int) -> NDArray[np.int64]:
        return self._rows[self._bounds[sample] : self._bounds[sample + 1]]

    @cached_property
    def _bounds(self) -> NDArray[np.int64]:
        """Where the rows of each sample start in `_rows`, and the end: neighbours in parts of about equal size."""
        if self.rows_per_sample == 1:
            return np.arange(len(self._rows) + 1)
        bounds = [0]
        for _, members in itertools.groupby(self.reader.cluster(int(row)) for row in self._rows):
            start, size = bounds[-1], len(list(members))
            count = -(-size // self.rows_per_sample)
            bounds += [start + size * part // count for part in range(1, count + 1)]
        return np.array(bounds)

    @cached_property
    def _samples_of(self) -> dict[int, NDArray[np.int64]]:
        """Samples by number of images; one whose first row cannot be read counts as one with the usual number."""
        known = getattr(self.reader, "images_per_row", None)
        samples_S = np.arange(len(self._bounds) - 1)
        if known is not None:
            return {known: samples_S}
        first = [self.reader.read(int(self._rows_of(int(sample))[0])).samples for sample in samples_S]
        counts = np.array([len(samples[0].images) if samples else 1 for samples in first])
        return {int(count): samples_S[counts == count] for count in np.unique(counts)}
