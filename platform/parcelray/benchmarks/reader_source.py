"""A `SampleSource` over the rows of a benchmark: its training split, with the prompts of its evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from parcelray.benchmarks.readers.base import BenchmarkReader
from parcelray.config.data import HeldOut
from parcelray.datasets.held_out import SPLITS, RowSplit, assigned_splits
from parcelray.datasets.sample import Sample
from parcelray.datasets.source import BadRowsError, SampleGroup, groups_by_images


@dataclass(frozen=True)
class ReaderSource:
    """Reads one part of a benchmark's rows; all questions of a row are one sample with several turns.

    Args:
        reader: reader of the benchmark's training split.
        held_out: rows that are held out; rows of one cluster are in the same split.
        split: the part to read.
        max_bad_rows: largest fraction of rows that may be skipped.
    """

    reader: BenchmarkReader
    held_out: HeldOut
    split: RowSplit
    max_bad_rows: float

    @property
    def groups(self) -> tuple[SampleGroup, ...]:
        """One finite group for each number of images; every row is read equally often."""
        return groups_by_images({count: len(rows) for count, rows in self._rows_of.items()})

    @property
    def max_skipped(self) -> int:
        """Largest number of rows that may be skipped."""
        return int(self.max_bad_rows * len(self._rows))

    def get(self, group: str, index: int) -> Sample:
        """Reads sample `index` of a group.

        Raises:
            BadRowsError: the row has no question that can be used.
        """
        samples = self._read(int(self._rows_of[int(group.removeprefix("images-"))][index]))
        first, *later = [sample for sample in samples if sample.images == samples[0].images]
        turns = tuple((sample.prompt, sample.answers[0]) for sample in later)
        return replace(first, later_turns=turns)

    def questions(self, count: int) -> list[Sample]:
        """Reads about `count` questions, spread over the rows of the split."""
        rows = self._rows
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)) if len(rows) else ()
        samples = [sample for row in chosen for sample in self.reader.read(int(rows[row])).samples]
        return samples[:count]

    def _read(self, row: int) -> Sequence[Sample]:
        found = self.reader.read(row)
        if not found.samples or not found.samples[0].answers:
            problems = {problem.row: problem.reason for problem in found.problems}
            raise BadRowsError(problems or {f"row-{row}": "no answer"})
        return found.samples

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        order = self.reader.order()
        parts = assigned_splits([self.reader.cluster(row) for row in order], self.held_out)
        rows_R: NDArray[np.int64] = np.array(order, dtype=np.int64)[parts == SPLITS.index(self.split)]
        return rows_R

    @cached_property
    def _rows_of(self) -> dict[int, NDArray[np.int64]]:
        """Rows by number of images; a row without samples counts as one with the usual number."""
        known = getattr(self.reader, "images_per_row", None)
        if known is not None:
            return {known: self._rows}
        counts = [
            len(samples[0].images) if (samples := self.reader.read(int(row)).samples) else 1 for row in self._rows
        ]
        return {int(count): self._rows[np.array(counts) == count] for count in np.unique(counts)}
