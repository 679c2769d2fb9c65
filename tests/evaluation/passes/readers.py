"""Readers that disturb an evaluation pass.

The processes that read load this module, so it needs neither torch nor transformers, which would take most of the time.
"""

import dataclasses
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parcelray.benchmarks.catalog import catalog, find
from parcelray.benchmarks.readers.base import Problem, RowSamples
from parcelray.benchmarks.readers.samples import MiniReader
from parcelray.config.evaluate import BenchmarkChoice
from parcelray.evaluation.passes.shards import PreparedBenchmark
from parcelray.evaluation.predict.generation import GenerationSettings

from ...processes import LIMIT_S

READER = MiniReader("test", ("general", "video"), samples=12)
"""Reads 24 rows without any disturbance."""
DISTURBED_ROW = 23


@dataclass(frozen=True)
class Damaged(MiniReader):
    """Two rows cannot be evaluated: the reader refuses row 3, and an image of row 7 cannot be decoded."""

    def read(self, row: int) -> RowSamples:
        """Reads a row; refuses row 3 and damages the image of row 7."""
        found = super().read(row)
        if row == 3:
            return RowSamples((), (Problem("row 3", "no answer"),))
        if row == 7:
            return RowSamples((dataclasses.replace(found.samples[0], images=(b"no image",)),))
        return found


@dataclass(frozen=True)
class KillsItsReader(Damaged):
    """Has damaged rows, and kills the process that reads one row with SIGKILL, the first time only."""

    marker: str = ""
    """File that is made before the kill."""

    def read(self, row: int) -> RowSamples:
        """Reads a row, and kills this process at the disturbed row, the first time only."""
        if row == DISTURBED_ROW and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(row)


@dataclass(frozen=True)
class Hangs(MiniReader):
    """Never returns one row."""

    marker: str = ""
    """File that is made when the row is read."""

    def read(self, row: int) -> RowSamples:
        """Reads a row; hangs at the disturbed row."""
        if row == DISTURBED_ROW:
            Path(self.marker).touch()
            time.sleep(3600)
        return super().read(row)


@dataclass(frozen=True)
class Waits(MiniReader):
    """Returns one row only once a file exists, so that a pass cannot end before a test has disturbed it."""

    marker: str = ""
    """The file."""

    def read(self, row: int) -> RowSamples:
        """Reads a row; waits for the file at the disturbed row."""
        deadline = time.monotonic() + LIMIT_S
        while row == DISTURBED_ROW and not Path(self.marker).exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.marker} was not made in {LIMIT_S:g} s")
            time.sleep(0.05)
        return super().read(row)


def disturbed(kind: type[Any], marker: Path) -> Any:
    """A reader of the same rows with a disturbance."""
    return kind(**dataclasses.asdict(READER), marker=str(marker))


def mini_benchmark(reader: MiniReader, generation: GenerationSettings) -> PreparedBenchmark:
    """All rows of a reader of the mini suite, ready to be evaluated."""
    choice = BenchmarkChoice(name="mini")
    return PreparedBenchmark(choice, find(choice.name, catalog()), reader, reader.order(), generation)
