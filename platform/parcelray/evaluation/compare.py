"""Compares finished evaluations: two evaluations on the same samples, or one method over training seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from parcelray.config.evaluate import budget_name
from parcelray.errors import UserError
from parcelray.evaluation.scoring.evaluation import Evaluation, load_evaluation
from parcelray.evaluation.scoring.paired import Comparison, compare
from parcelray.evaluation.scoring.summary import Summary, rescore
from parcelray.tracking.run_folder import local_folder

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


@dataclass(frozen=True)
class ComparedEvaluations:
    """The comparison of every split that two evaluations share, at every requested pair of budgets."""

    first: str
    second: str
    pairs: tuple[tuple[int, int, tuple[Comparison, ...]], ...]
    """Budget of the first, budget of the second, and the comparisons."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the comparisons as JSON-serialisable values."""
        return {
            "first": self.first,
            "second": self.second,
            "pairs": [
                {
                    "first_budget": one,
                    "second_budget": other,
                    "splits": [_to_dict(comparison) for comparison in comparisons],
                }
                for one, other, comparisons in self.pairs
            ],
        }

    def to_rich(self) -> "Group":
        """Returns one table per pair of budgets for the console."""
        from rich.console import Group

        return Group(
            *(
                _comparison_table(
                    comparisons, f"{self.first} at {budget_name(one)}", f"{self.second} at {budget_name(other)}"
                )
                for one, other, comparisons in self.pairs
            )
        )


class SeedSpread(NamedTuple):
    """Mean and standard deviation of a number over seeds."""

    mean: float
    std: float
    """Sample standard deviation; NaN for a single seed."""
    n: int


@dataclass(frozen=True)
class SeedTable:
    """Scores and mean retention of one method over training seeds."""

    budgets: tuple[int, ...]
    scores: dict[str, dict[int, SeedSpread]]
    """Scores by split and budget, on the paper's scale."""
    retention: dict[int, SeedSpread]
    """Mean retention over splits, by budget."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the table as JSON-serialisable values."""
        return {
            "scores": {
                name: {str(budget): spread._asdict() for budget, spread in row.items()}
                for name, row in self.scores.items()
            },
            "mean_retention": {str(budget): spread._asdict() for budget, spread in self.retention.items()},
        }

    def to_rich(self) -> "Table":
        """Returns the table for the console."""
        from rich.table import Table

        count = next(iter(self.retention.values())).n
        table = Table("split", *map(budget_name, self.budgets), title=f"Mean and standard deviation over {count} seeds")
        for name, row in self.scores.items():
            table.add_row(name, *(_cell(row[budget]) for budget in self.budgets))
        table.add_row("mean retention (%)", *(_cell(self.retention[budget]) for budget in self.budgets))
        return table


def compare_evaluations(first: str, second: str) -> ComparedEvaluations:
    """Compares two evaluations on the same samples.

    Args:
        first: folder or URI of an evaluation, with `@BUDGET` for one budget; without it, every budget that both have.
        second: folder of the other evaluation, or of the same at another budget.

    Raises:
        UserError: a folder holds no evaluation, or the evaluations have no split or budget in common.
    """
    (one, one_budget), (other, other_budget) = _named(first), _named(second)
    pairs = _pairs(one, one_budget, other, other_budget)
    ours, theirs = one.score(), {split.name: split for split in other.score()}
    shared = [split for split in ours if split.name in theirs]
    if not shared:
        raise UserError(
            f"{one.name} and {other.name} have no split in common; compare evaluations of the same benchmarks."
        )
    found = tuple((a, b, tuple(compare(split, a, theirs[split.name], b) for split in shared)) for a, b in pairs)
    return ComparedEvaluations(one.name, other.name, found)


def compare_seeds(folders: Sequence[str | Path]) -> SeedTable:
    """Averages evaluations of models that differ only in their training seed.

    Raises:
        UserError: the evaluations have different splits or budgets, or two of them have the same weights.
    """
    summaries = [rescore(folder, {}, need_within=0.0) for folder in folders]
    first = summaries[0]
    names, budgets = [split.name for split in first.splits], first.budgets
    for other in summaries[1:]:
        if [split.name for split in other.splits] != names or other.budgets != budgets:
            raise UserError(
                f"{other.evaluation.name} has other splits or budgets than {first.evaluation.name}; give evaluations of"
                " the same job with other models."
            )
    if len({summary.evaluation.digest for summary in summaries}) < len(summaries):
        raise UserError("Two of the evaluations are of the same weights; give one evaluation for each seed.")

    def score(summary: Summary, index: int, budget: int) -> float:
        return summary.splits[index].scores[budget].estimate.value

    return SeedTable(
        budgets=budgets,
        scores={
            name: {budget: _spread([score(summary, index, budget) for summary in summaries]) for budget in budgets}
            for index, name in enumerate(names)
        },
        retention={
            budget: _spread([summary.mean_retention(budget).value for summary in summaries]) for budget in budgets
        },
    )


def _named(text: str) -> tuple[Evaluation, int | None]:
    """The evaluation and the budget that `FOLDER` or `FOLDER@BUDGET` names."""
    folder, at, budget = text.rpartition("@")
    if not at:
        return load_evaluation(local_folder(text)), None
    evaluation = load_evaluation(local_folder(folder))
    number = {"blind": "0", "full": str(evaluation.full)}.get(budget, budget)
    if not number.isdigit() or int(number) not in evaluation.budgets:
        raise UserError(
            f"{text}: {budget!r} is not a budget of this evaluation; it has"
            f" {', '.join(budget_name(each) for each in evaluation.budgets)}."
        )
    return evaluation, int(number)


def _pairs(
    one: Evaluation, one_budget: int | None, other: Evaluation, other_budget: int | None
) -> list[tuple[int, int]]:
    """The pairs of budgets to compare: the named ones, or every budget that both evaluations have."""
    if one_budget is not None or other_budget is not None:
        return [
            (
                one_budget if one_budget is not None else max(one.budgets),
                other_budget if other_budget is not None else max(other.budgets),
            )
        ]
    shared = [budget for budget in one.budgets if budget in other.budgets]
    if not shared:
        raise UserError(f"{one.name} and {other.name} have no budget in common; name one of each as FOLDER@BUDGET.")
    return [(budget, budget) for budget in shared]


def _to_dict(comparison: Comparison) -> dict[str, Any]:
    return comparison._asdict() | {
        "first": comparison.first._asdict(),
        "second": comparison.second._asdict(),
        "difference": comparison.difference._asdict(),
    }


def _comparison_table(comparisons: Sequence[Comparison], first: str, second: str) -> "Table":
    """One row per split: both scores, the paired difference and its p-value."""
    from rich.table import Column, Table

    table = Table(
        Column("split", no_wrap=True),
        "metric",
        first,
        second,
        "difference [95 %]",
        "p",
        "better: first / second",
        "n",
    )
    for each in comparisons:
        gap = each.difference
        table.add_row(
            each.split,
            each.metric,
            f"{each.first.value:.1f}",
            f"{each.second.value:.1f}",
            f"{gap.value:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]",
            _p_value(each.p_value),
            f"{each.first_better} / {each.second_better}",
            str(each.n),
        )
    return table


def _p_value(value: float) -> str:
    return "-" if math.isnan(value) else ("< 0.001" if value < 0.001 else f"{value:.3f}")


def _spread(values: Sequence[float]) -> SeedSpread:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return SeedSpread(float(np.mean(values)), std, len(values))


def _cell(spread: SeedSpread) -> str:
    return f"{spread.mean:.1f}" if math.isnan(spread.std) else f"{spread.mean:.1f} +- {spread.std:.1f}"
