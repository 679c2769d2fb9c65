"""What was asked: the samples of a pass without their images, each with the key of its answer at every budget.

With these and the stored answers everything can be scored again, without the model and without the data.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from parcelray.benchmarks.readers.base import DatasetFingerprint, Problem
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError

_TEXTS = ("id", "benchmark", "family", "task", "prompt", "metric", "scene")
_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _TEXTS),
        ("answers", pa.list_(pa.string())),
        ("metadata", pa.string()),
        ("num_images", pa.int32()),
        ("keys", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Record:
    """One question that was asked."""

    sample: Sample
    """Without its images."""
    num_images: int
    """How many it has."""
    keys: Mapping[int, str]
    """Key of the answer, by budget."""


class Asked(NamedTuple):
    """One benchmark of a pass."""

    records: Sequence[Record]
    """In the order of the reader."""
    problems: Sequence[Problem]
    """What could not be asked."""
    pin: DatasetFingerprint
    """What the data are."""
    rows: int
    """Rows that were read: all of the pin's, or a part."""


def record(sample: Sample, keys: Mapping[int, str]) -> Record:
    """A sample's record."""
    return Record(replace(sample, images=()), len(sample.images), keys)


def write_asked(asked: Asked, folder: Path) -> None:
    """Writes a benchmark's records, problems and pin into a folder, the pin last."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {name: getattr(each.sample, name) for name in _TEXTS}
        | {
            "answers": list(each.sample.answers),
            "metadata": json.dumps(each.sample.metadata),
            "num_images": each.num_images,
            "keys": json.dumps({str(budget): key for budget, key in each.keys.items()}),
        }
        for each in asked.records
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), folder / "samples.parquet")
    (folder / "problems.json").write_text(
        json.dumps([problem._asdict() for problem in asked.problems], indent=2) + "\n", encoding="utf-8"
    )
    (folder / "data.json").write_text(
        json.dumps({"pin": asked.pin._asdict(), "rows": asked.rows}, indent=2) + "\n", encoding="utf-8"
    )


def read_asked(folder: Path) -> Asked | None:
    """The inverse of `write_asked`; None if nothing was written."""
    if not (folder / "data.json").is_file():
        return None
    data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    problems = json.loads((folder / "problems.json").read_text(encoding="utf-8"))
    records = [_from_row(row) for row in pq.read_table(folder / "samples.parquet").to_pylist()]
    return Asked(records, [Problem(**problem) for problem in problems], DatasetFingerprint(**data["pin"]), data["rows"])


def check_pin(name: str, found: DatasetFingerprint, expected: DatasetFingerprint | None) -> None:
    """Refuses data that drifted from those of an earlier result.

    Raises:
        UserError: naming what differs.
    """
    if expected is None or found == expected:
        return
    changes = [
        f"{field} {before} -> {now}"
        for field, before, now in zip(DatasetFingerprint._fields, expected, found, strict=True)
        if before != now
    ]
    raise UserError(
        f"{name}: the data are not those of this evaluation's earlier run ({'; '.join(changes)}); get the pinned data"
        " again, or give the job another name."
    )


def _from_row(row: dict[str, Any]) -> Record:
    sample = Sample(
        **{name: row[name] for name in _TEXTS},
        images=(),
        answers=tuple(row["answers"]),
        metadata=json.loads(row["metadata"]),
    )
    return Record(sample, row["num_images"], {int(budget): key for budget, key in json.loads(row["keys"]).items()})
