"""easy-VQA (Victor Zhou, 2019, MIT): 5,000 images of 64 pixels with one coloured shape, and questions about them.

The package `easy-vqa` has the files: `<split>/questions.json` with `[question, answer, image number]`, and
`<split>/images/<number>.png`.
"""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from parcelray.benchmarks.readers.base import DatasetFingerprint, Problem, RowSamples, ids_digest
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError

_NAME = "easy_vqa"


def easy_vqa_folder() -> Path:
    """Returns the data folder of the installed package, without importing it.

    Raises:
        UserError: the package is not installed.
    """
    found = importlib.util.find_spec(_NAME)
    if found is None or found.origin is None:
        raise UserError(
            "easy-VQA needs the package easy-vqa, which is not installed; run pip install 'parcelray[easy-vqa]', or"
            " give the folder with train/ and test/ with data:."
        )
    return Path(found.origin).parent / "data"


@dataclass(frozen=True)
class EasyVqaReader:
    """Reads one question per row. See `BenchmarkReader`.

    Args:
        split: `train` or `test`.
        folder: folder with train/ and test/.
    """

    split: str
    folder: Path
    images_per_row = 1

    @property
    def name(self) -> str:
        """Name of the benchmark."""
        return _NAME

    def fingerprint(self) -> DatasetFingerprint:
        """See `BenchmarkReader`."""
        ids = [self._id(row) for row in self.order()]
        digest = hashlib.sha256(self._file.read_bytes()).hexdigest()[:16]
        return DatasetFingerprint(f"files:{digest}", len(ids), ids_digest(ids))

    def order(self) -> Sequence[int]:
        """See `BenchmarkReader`. Questions about one image are next to each other."""
        return sorted(range(len(self._questions)), key=lambda row: (self._questions[row][2], row))

    def cluster(self, row: int) -> str:
        """See `BenchmarkReader`. The questions about one image form a cluster."""
        return f"{self.split}-{self._questions[row][2]}"

    def read(self, row: int) -> RowSamples:
        """See `BenchmarkReader`."""
        question, answer, number = self._questions[row]
        try:
            image = (self.folder / self.split / "images" / f"{number}.png").read_bytes()
        except OSError as error:
            return RowSamples(
                (), (Problem(self._id(row), f"the image {number}.png cannot be read ({error.strerror})"),)
            )
        sample = Sample(
            id=self._id(row),
            benchmark=_NAME,
            family=_NAME,
            task=_task(question),
            images=(image,),
            prompt=question,
            answers=(answer,),
            scene=self.cluster(row),
        )
        return RowSamples((sample,))

    def _id(self, row: int) -> str:
        return f"{self.split}-{row}"

    @property
    def _file(self) -> Path:
        return self.folder / self.split / "questions.json"

    @cached_property
    def _questions(self) -> list[tuple[str, str, int]]:
        if not self._file.is_file():
            raise UserError(f"{self._file} does not exist; give the data folder of the package easy-vqa with data:.")
        rows: list[list[Any]] = json.loads(self._file.read_text(encoding="utf-8"))
        return [(str(question), str(answer), int(number)) for question, answer, number in rows]

    def __getstate__(self) -> dict[str, Any]:
        return {"split": self.split, "folder": self.folder}


def _task(question: str) -> str:
    if not question.startswith("what"):
        return "yes_no"
    return "color" if question.startswith(("what color", "what is the color")) else "shape"
