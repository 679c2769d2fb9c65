"""Scores answers that were made elsewhere (by vLLM, by an API, for a paper) with the metric of a benchmark."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from parcelray.benchmarks.catalog import catalog, find, prompt_family
from parcelray.benchmarks.open import open_reader
from parcelray.benchmarks.tables.cells import CHOICE_FORMS, OPTION_FORMS, expected_answers
from parcelray.benchmarks.tables.images import BadCell
from parcelray.benchmarks.tables.rows import JsonlRows, Row
from parcelray.config.benchmark import AnswersConfig, BenchmarkConfig, PromptFamily, of_family
from parcelray.config.loader import validate
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.evaluation.scoring.evaluation import split_naming
from parcelray.evaluation.scoring.split_scores import BudgetScore, GivenAnswer, ScoringRules, SplitScores, score_splits

if TYPE_CHECKING:
    from rich.table import Table

_BUDGET = 0
"""Answers from elsewhere have no budget of visual tokens; all are scored under this one."""
_NAMED = 5
"""Number of ids that a note names."""
_TARGETS = ("target", "targets", "target_index")
_OTHER_TARGETS = ("box", "mask")
"""Metadata that are the target of a benchmark for boxes or masks."""


class AnswerToKnownSample(BaseModel):
    """One line of a file with answers to the samples of the benchmark's data."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, use_attribute_docstrings=True)

    id: str
    """Id of the sample, as in the file samples.parquet of an evaluation."""
    answer: str
    """The answer, which may be empty."""


class AnswerWithTarget(BaseModel):
    """One line of a file whose answers bring their targets along. Further keys are metadata, for example `category`."""

    model_config = ConfigDict(extra="allow", frozen=True, coerce_numbers_to_str=True, use_attribute_docstrings=True)

    answer: str
    """The answer, which may be empty."""
    id: str = ""
    """Id of the sample; default: `line N`."""
    question: str = ""
    """Text of the question."""
    target: str = ""
    """The correct answer, if there is one."""
    targets: tuple[str, ...] = ()
    """The correct answers, if there are several, for example those of ten annotators; empty: the sample is unscored."""
    target_index: int | None = Field(default=None, ge=0)
    """Position of the correct choice, from 0."""
    choices: tuple[str, ...] = ()
    """The choices, in order; an empty text is a choice that is not shown."""
    cluster: str = ""
    """Name that is equal for questions about the same image.

    Default: the key `image_id`; without it, every question is on its own.
    """
    task: str = ""
    """Kind of question, for benchmarks that report scores by kind."""
    metric: str = ""
    """Metric and variant, for benchmarks whose kinds of question have different ones."""


@dataclass(frozen=True)
class Joined:
    """Samples with one answer each, and the ids that do not fit."""

    samples: Sequence[Sample]
    texts: Sequence[str]
    missing: tuple[str, ...] = ()
    """Ids of samples without an answer; they are scored as an empty answer."""
    unknown: tuple[str, ...] = ()
    """Ids of answers to no sample; they are left out."""
    doubled: tuple[str, ...] = ()
    """Ids with more than one answer; the first answer is scored."""
    problems: tuple[str, ...] = ()
    """Ids of rows of the data that cannot be read; they are left out."""


@dataclass(frozen=True)
class AnswerScores:
    """The scores of a file of answers."""

    answers: Path
    config: BenchmarkConfig
    family: PromptFamily
    splits: Sequence[SplitScores]
    lines: int
    """Number of answers in the file."""
    joined: "Joined"

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `--json`."""
        return {
            "benchmark": self.config.name,
            "family": self.family,
            "answers": str(self.answers),
            "lines": self.lines,
            "missing": list(self.joined.missing),
            "unknown": list(self.joined.unknown),
            "doubled": list(self.joined.doubled),
            "problems": list(self.joined.problems),
            "splits": [
                {
                    "name": split.name,
                    "metric": split.metric,
                    "samples": len(split.samples),
                    **split.scores[_BUDGET].estimate.interval._asdict(),
                    "std_error": split.scores[_BUDGET].estimate.std_error,
                    "totals": dict(split.scores[_BUDGET].totals),
                    "unscored": split.scores[_BUDGET].unscored,
                    "unparsed": split.scores[_BUDGET].unparsed,
                    "empty": split.scores[_BUDGET].empty,
                    "values": [None if math.isnan(value) else value for value in split.scores[_BUDGET].values],
                }
                for split in self.splits
            ],
        }

    def to_rich(self) -> "Table":
        """Returns the table for the console, with the notes below it."""
        from rich.markup import escape
        from rich.table import Column, Table

        table = Table(
            Column("split", no_wrap=True),
            "metric",
            *(
                Column(name, justify="right")
                for name in (escape(self.answers.stem), "n", "unscored", "unparsed", "empty")
            ),
            title="Scores [95 %], on the scale of the papers",
            caption=escape("\n".join(f"Note: {note}." for note in self.notes())) or None,
            caption_justify="left",
        )
        for split in self.splits:
            score = split.scores[_BUDGET]
            interval = score.estimate.interval
            counts = (interval.n, score.unscored, score.unparsed, score.empty)
            shown = f"{interval.value:.1f} [{interval.low:.1f}, {interval.high:.1f}]"
            table.add_row(split.name, split.metric, escape(shown), *map(str, counts))
            for name, value in _sub_scores(score).items():
                table.add_row("", name, f"{value:.1f}")
        return table

    def notes(self) -> list[str]:
        """Returns what has to be known before the scores are compared with others."""
        texts = (
            (self.joined.missing, "samples have no answer and are scored as an empty answer"),
            (self.joined.unknown, "answers belong to no sample and are left out"),
            (self.joined.doubled, "ids have more than one answer, of which the first is scored"),
            (self.joined.problems, "rows of the data cannot be read and are left out"),
        )
        return [f"{len(ids)} {text}: {_some(ids)}" for ids, text in texts if ids]


def score_answers(
    name: str,
    answers: Path,
    *,
    family: str,
    data: Path | None = None,
    user_files: Iterable[Path] = (),
    metric: str | None = None,
    mask_decoder: Path | None = None,
) -> AnswerScores:
    """Scores a JSON-lines file of answers by the metric of a benchmark.

    Args:
        name: name of the benchmark.
        answers: file whose lines have the keys of `AnswerToKnownSample` or of `AnswerWithTarget`. The data of the
            benchmark are read in the first case only.
        family: model family whose prompts the answers belong to; it selects the metric.
        data: file or folder of the data; None: the hub, or procedural data.
        user_files: YAML files of the user, or folders of them.
        metric: metric and variant that replace the benchmark's own; None: its own.
        mask_decoder: the .npz file that `refseg_miou` needs.

    Raises:
        UserError: the benchmark is unknown or cannot be scored, a line is not legal, or the data cannot be read.
    """
    config = find(name, catalog(user_files))
    prompts = prompt_family(family)
    if config.unscorable is not None and metric is None:
        raise UserError(f"{name} cannot be scored: {config.unscorable}; name a metric with --metric to score it.")
    lines = _lines(answers)
    if any(key in line for line in lines.values() for key in (*_TARGETS, *_OTHER_TARGETS)):
        joined = _with_targets(config, prompts, metric, lines, answers)
    else:
        joined = _to_known_samples(config, prompts, data, lines, answers)
    rules = ScoringRules(
        metric=metric,
        split_of=split_naming(config),
        average_over=config.average_over,
        mask_decoder=mask_decoder,
        whole=not joined.problems,
        problems=len(joined.problems),
    )
    splits = score_splits(joined.samples, {_BUDGET: [GivenAnswer(text) for text in joined.texts]}, rules)
    return AnswerScores(answers, config, prompts, splits, len(lines), joined)


def _lines(file: Path) -> dict[int, Row]:
    """The rows of the file by the number of their line."""
    if not file.is_file():
        raise UserError(f"--answers is {file}, which is not a file; give a file with one JSON object per line.")
    rows = JsonlRows(file)
    if not len(rows):
        raise UserError(f"{file} has no lines; write one JSON object per line with the keys id and answer.")
    return {
        number: {key: value for key, value in rows.row(index).items() if value is not None}
        for index, number in enumerate(rows.line_numbers)
    }


def _to_known_samples(
    config: BenchmarkConfig, family: PromptFamily, data: Path | None, lines: Mapping[int, Row], file: Path
) -> Joined:
    given: dict[str, str] = {}
    doubled: dict[str, None] = {}
    for number, line in lines.items():
        row = validate(AnswerToKnownSample, line, f"{file}, line {number}")
        if row.id in given:
            doubled[row.id] = None
        else:
            given[row.id] = row.answer
    reader = open_reader(config, family=family, data=data)
    # Refuses doubled ids, and filters that no row passes.
    reader.fingerprint()
    read = [reader.read(row) for row in reader.order()]
    samples = [replace(sample, images=()) for each in read for sample in each.samples]
    known = {sample.id for sample in samples}
    problems = [problem.row for each in read for problem in each.problems]
    if not known & given.keys():
        raise UserError(
            f"No id of {file} (the first is {next(iter(given))!r}) is an id of {config.name} (the first is"
            f" {next(iter(known), None)!r}); give the ids of its data, or the targets beside each answer."
        )
    return Joined(
        samples,
        [given.get(sample.id, "") for sample in samples],
        missing=tuple(sample.id for sample in samples if sample.id not in given),
        unknown=tuple(name for name in given if name not in known and name not in problems),
        doubled=tuple(doubled),
        problems=tuple(problems),
    )


def _with_targets(
    config: BenchmarkConfig, family: PromptFamily, metric: str | None, lines: Mapping[int, Row], file: Path
) -> Joined:
    rows = [validate(AnswerWithTarget, line, f"{file}, line {number}") for number, line in lines.items()]
    samples = [
        _sample(config, family, metric, row, f"{file}, line {number}", f"line {number}")
        for number, row in zip(lines, rows, strict=True)
    ]
    counts = Counter(sample.id for sample in samples)
    first = {sample.id: number for number, sample in reversed(list(enumerate(samples)))}
    kept = [number for number, sample in enumerate(samples) if first[sample.id] == number]
    return Joined(
        [samples[number] for number in kept],
        [rows[number].answer for number in kept],
        doubled=tuple(name for name, count in counts.items() if count > 1),
    )


def _sample(
    config: BenchmarkConfig, family: PromptFamily, metric: str | None, row: AnswerWithTarget, source: str, default: str
) -> Sample:
    named = [key for key in _TARGETS if key in row.model_fields_set]
    metadata = dict(row.model_extra or {})
    if len(named) > 1 or not (named or any(key in metadata for key in _OTHER_TARGETS)):
        raise UserError(
            f"{source} has {' and '.join(named) or 'no target'}; set exactly one of target, targets and target_index."
        )
    metric = metric or config.metric_of(family) or row.metric
    if not metric:
        raise UserError(
            f"{source} has no metric, and {config.name} has several; set metric in the line, such as nlvr2:words."
        )
    if row.choices:
        metadata["choices"] = list(row.choices)
    targets = (row.target,) if named == ["target"] else row.targets
    if row.target_index is not None:
        metadata["target_index"] = row.target_index
        try:
            targets = _targets_at(config, family, row.target_index, row.choices)
        except BadCell as problem:
            raise UserError(f"{source}: {problem}; correct target_index or choices.") from None
    return Sample(
        id=row.id or default,
        benchmark=config.name,
        family=config.family,
        task=row.task or config.name,
        images=(),
        prompt=row.question,
        answers=tuple(targets),
        metric=metric,
        scene=row.cluster or str(metadata.get("image_id", "")),
        metadata=metadata,
    )


def _targets_at(config: BenchmarkConfig, family: PromptFamily, index: int, choices: Sequence[str]) -> tuple[str, ...]:
    """Returns the correct answer in the form that the prompt of the family asks for: the choice's text or letter."""
    answers = config.columns.answers if config.columns is not None else None
    form = of_family(answers.form, family) if answers is not None else None
    if answers is None or form not in CHOICE_FORMS:
        answers = AnswersConfig(column="", form="choice_letter")
    return expected_answers(answers, family, choices[index] if form in OPTION_FORMS else index, choices)


def _sub_scores(score: BudgetScore) -> dict[str, float]:
    """The totals that the table shows: not the score itself, and not those of single categories."""
    headline, *others = score.totals
    return {name: score.totals[name] for name in others if "/" not in name and name != headline}


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")
