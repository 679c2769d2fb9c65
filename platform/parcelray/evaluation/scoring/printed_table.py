"""Aggregates the per-benchmark scores of a published table by the rules of this project."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parcelray.errors import UserError
from parcelray.evaluation.scoring.summary import most_sensitive

if TYPE_CHECKING:
    from rich.table import Table

_KEYS = ("benchmark", "family", "reference")


@dataclass(frozen=True)
class PrintedTable:
    """Scores of methods on benchmarks, with the uncompressed reference."""

    benchmarks: tuple[str, ...]
    families: Mapping[str, str]
    """Family, by benchmark."""
    reference: Mapping[str, float]
    """Score of the reference, by benchmark."""
    methods: Mapping[str, Mapping[str, float]]
    """Scores by method and benchmark; scores that the table lacks are missing."""

    def retention(self, method: str) -> dict[str, float]:
        """Computes 100 x score / reference for each benchmark with both scores."""
        scores = self.methods[method]
        return {
            name: 100 * scores[name] / self.reference[name]
            for name in self.benchmarks
            if name in scores and self.reference.get(name)
        }

    def mean_retention(self, method: str, family: str | None = None) -> float:
        """Computes the unweighted mean over the benchmarks of a family or over all; NaN if there are none."""
        kept = [value for name, value in self.retention(method).items() if family in (None, self.families[name])]
        return math.fsum(kept) / len(kept) if kept else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Returns the aggregates as JSON-serialisable values."""
        families = list(dict.fromkeys(self.families.values()))
        return {
            method: {
                "benchmarks": len(self.retention(method)),
                "mean_retention": self.mean_retention(method),
                "families": {family: self.mean_retention(method, family) for family in families},
                "retention": self.retention(method),
                "most_sensitive": most_sensitive(self.retention(method)),
            }
            for method in self.methods
        }

    def to_rich(self) -> "Table":
        """Returns the aggregates as a table for the console."""
        from rich.table import Table

        families = list(dict.fromkeys(self.families.values()))
        table = Table(
            "method",
            "benchmarks",
            "mean retention (%)",
            *families,
            "most sensitive",
            title="Unweighted means of 100 x score / reference",
        )
        for method, row in self.to_dict().items():
            means = [f"{row['families'][family]:.1f}" for family in families]
            table.add_row(
                method, str(row["benchmarks"]), f"{row['mean_retention']:.1f}", *means, ", ".join(row["most_sensitive"])
            )
        return table


def aggregate_table(file: Path) -> PrintedTable:
    """Reads a CSV with the columns benchmark, family, reference, and one per method; empty cells are missing scores.

    Raises:
        UserError: the file is not such a table.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened)
            rows, columns = list(reader), list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{file} cannot be read as CSV ({error}); give a table with the columns {', '.join(_KEYS)} and one for each"
            " method."
        ) from None
    missing = [key for key in _KEYS if key not in columns]
    methods = [column for column in columns if column not in _KEYS]
    if missing or not methods:
        wanted = ", ".join(missing) if missing else "a column for a method"
        raise UserError(f"{file} lacks {wanted}; it needs the columns {', '.join(_KEYS)} and one for each method.")
    return PrintedTable(
        benchmarks=tuple(row["benchmark"] for row in rows),
        families={row["benchmark"]: row["family"] for row in rows},
        reference=_scores(file, rows, "reference"),
        methods={method: _scores(file, rows, method) for method in methods},
    )


def _scores(file: Path, rows: Sequence[Mapping[str, str]], column: str) -> dict[str, float]:
    scores = {}
    for row in rows:
        text = (row[column] or "").strip()
        if text:
            try:
                scores[row["benchmark"]] = float(text)
            except ValueError:
                raise UserError(
                    f"{file}: {column} of {row['benchmark']} is {text!r}; give a number, or leave the cell empty."
                ) from None
    return scores
