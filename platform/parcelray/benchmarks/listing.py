"""The output of `parcelray benchmarks`: the list of splits, and the check of a benchmark's data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parcelray.benchmarks.catalog import catalog, find, prompt_family
from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.open import open_reader
from parcelray.benchmarks.readers.base import DatasetFingerprint, Problem
from parcelray.config.benchmark import BenchmarkConfig, TableSource
from parcelray.datasets.images import decode_image
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

_SETS = ("parcel", "paligemma", "llava", "local")
_SHOWN = 20


@dataclass(frozen=True)
class Listing:
    """The list of benchmark splits, sorted by family and name."""

    benchmarks: tuple[BenchmarkConfig, ...]

    @classmethod
    def of(cls, user_files: Iterable[Path], only: str | None) -> "Listing":
        """Lists all splits, or the splits of one set.

        Args:
            user_files: YAML files of the user, or folders of them.
            only: name of the set; None: all splits.

        Raises:
            UserError: the set does not exist.
        """
        if only is not None and only not in _SETS:
            raise UserError(f"There is no set {only!r}; legal: {', '.join(_SETS)}.")
        selected = [config for config in catalog(user_files).values() if only is None or only in config.sets]
        return cls(tuple(sorted(selected, key=lambda config: (config.family, config.name))))

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `--json`."""
        return {"benchmarks": [config.model_dump(mode="json", exclude_defaults=True) for config in self.benchmarks]}

    def to_rich(self) -> "Table":
        """Returns the table for the console."""
        from rich.table import Column, Table
        from rich.text import Text

        table = Table(
            Column("benchmark", no_wrap=True),
            "family",
            "sets",
            "metric",
            "rows",
            "prompts for",
            "data",
            title=f"{len(self.benchmarks)} splits",
        )
        for config in self.benchmarks:
            source = config.source
            rows = f"{source.rows:,}" if isinstance(source, TableSource) and source.rows else "-"
            data = (source.hub or "local files") if isinstance(source, TableSource) else source.type
            families = ", ".join(config.prompts) or "all"
            cells = (config.name, config.family, ", ".join(config.sets), _metrics(config), rows, families, data)
            # The console reads [...] in a plain string as markup.
            table.add_row(*map(Text, cells))
        return table


def _metrics(config: BenchmarkConfig) -> str:
    """Names the metric of a split, or one metric per line and prompt family."""
    if isinstance(config.metric, dict) and len(config.metrics()) > 1:
        return "\n".join(f"{family} {metric}" for family, metric in config.metric.items())
    return next(iter(config.metrics()), "not scored" if config.unscorable else "several")


@dataclass(frozen=True)
class DataCheck:
    """The result of reading a benchmark's data."""

    benchmark: str
    fingerprint: DatasetFingerprint
    rows_expected: int | None
    rows_read: int
    questions: int
    problems: tuple[Problem, ...]
    example: Sample | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `--json`."""
        example = self.example
        return {
            "benchmark": self.benchmark,
            "pin": self.fingerprint._asdict(),
            "rows_expected": self.rows_expected,
            "rows_read": self.rows_read,
            "questions": self.questions,
            "problems": [problem._asdict() for problem in self.problems],
            "example": (
                None
                if example is None
                else {
                    "id": example.id,
                    "prompt": example.prompt,
                    "answers": list(example.answers),
                    "metric": example.metric,
                    "images": len(example.images),
                }
            ),
        }

    def to_rich(self) -> "Table":
        """Returns the table for the console."""
        from rich.table import Table
        from rich.text import Text

        expected = (
            ""
            if self.rows_expected in (None, self.fingerprint.rows)
            else f" (the published split has {self.rows_expected:,})"
        )
        lines = [
            ("rows", f"{self.fingerprint.rows:,}{expected}"),
            ("revision", self.fingerprint.revision),
            ("ids", self.fingerprint.ids[:16]),
            ("read", f"{self.rows_read:,} rows, {self.questions:,} questions"),
        ]
        if self.example is not None:
            lines += [
                ("first question", self.example.prompt),
                ("answers", " | ".join(self.example.answers[:5])),
                ("metric", self.example.metric or "not scored"),
                ("images", str(len(self.example.images))),
            ]
        lines.append(("problems", str(len(self.problems)) if self.problems else "none"))
        lines += self.problems[:_SHOWN]
        table = Table("data of", self.benchmark, show_header=True)
        for line in lines:
            # The console reads [...] in a plain string as markup, and prompts contain it.
            table.add_row(*map(Text, line))
        return table


def check_data(name: str, data: Path | None, user_files: Iterable[Path], rows: int, family: str) -> DataCheck:
    """Reads the first rows of a benchmark, decodes their images and scores an empty answer to each question.

    Args:
        name: name of the benchmark.
        data: file or folder of the data; None: the hub, or procedural data.
        user_files: YAML files of the user, or folders of them.
        rows: number of rows to read.
        family: model family, which selects the prompt template, the expected answers and the metric.

    Raises:
        UserError: the benchmark is unknown, its data are not found, or columns are missing.
    """
    config = find(name, catalog(user_files))
    reader = open_reader(config, family=prompt_family(family), data=data)
    fingerprint = reader.fingerprint()
    problems: list[Problem] = []
    samples: list[Sample] = []
    example = None
    chosen = list(reader.order())[:rows]
    for row in chosen:
        read = reader.read(row)
        problems += read.problems
        for sample in read.samples:
            example = example or sample
            samples.append(replace(sample, images=()))
            problems += _undecodable(sample)
    problems += _unscorable(samples)
    expected = config.source.rows if isinstance(config.source, TableSource) else None
    return DataCheck(name, fingerprint, expected, len(chosen), len(samples), tuple(problems), example)


def _undecodable(sample: Sample) -> list[Problem]:
    try:
        for image in sample.images:
            decode_image(image)
    except UserError as error:
        return [Problem(sample.id, str(error))]
    return []


def _unscorable(samples: Sequence[Sample]) -> list[Problem]:
    """The samples that their metrics cannot score, each alone and then all together."""
    by_metric: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.metric:
            by_metric.setdefault(sample.metric, []).append(sample)
    problems: list[Problem] = []
    for name, members in by_metric.items():
        alone = [problem for sample in members for problem in _refusal(name, [sample])]
        problems += alone or _refusal(name, members)
    return problems


def _refusal(name: str, samples: Sequence[Sample]) -> list[Problem]:
    """Why a metric refuses empty answers to some samples; empty: it scores them."""
    try:
        metric(name)([""] * len(samples), samples)
    except UserError as error:
        return [Problem(samples[0].id if len(samples) == 1 else name, str(error))]
    return []
