"""One method trained with several seeds: mean and standard deviation over its evaluations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from parcelray.errors import UserError
from parcelray.evaluation.scoring.summary import Summary

if TYPE_CHECKING:
    from rich.table import Table


class SeedSpread(NamedTuple):
    """A number over seeds."""

    mean: float
    std: float
    """Sample standard deviation; NaN for a single seed."""
    n: int


@dataclass(frozen=True)
class SeedTable:
    """Scores and mean retention over seeds."""

    budgets: tuple[int, ...]
    scores: dict[str, dict[int, SeedSpread]]
    """By split and budget, on the paper's scale."""
    retention: dict[int, SeedSpread]
    """Mean retention over splits, by budget."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "scores": {
                name: {str(budget): spread._asdict() for budget, spread in row.items()}
                for name, row in self.scores.items()
            },
            "mean_retention": {str(budget): spread._asdict() for budget, spread in self.retention.items()},
        }

    def to_rich(self) -> "Table":
        """For the console."""
        from rich.table import Table

        count = next(iter(self.retention.values())).n
        table = Table(
            "split",
            *(str(budget) if budget else "blind" for budget in self.budgets),
            title=f"Mean and standard deviation over {count} seeds",
        )
        for name, row in self.scores.items():
            table.add_row(name, *(_cell(row[budget]) for budget in self.budgets))
        table.add_row("mean retention (%)", *(_cell(self.retention[budget]) for budget in self.budgets))
        return table


def over_seeds(summaries: Sequence[Summary]) -> SeedTable:
    """Joins evaluations of the same benchmarks at the same budgets.

    Raises:
        UserError: they do not belong together.
    """
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
    return SeedTable(
        budgets=budgets,
        scores={
            name: {
                budget: _spread([summary.splits[place].scores[budget].estimate.value for summary in summaries])
                for budget in budgets
            }
            for place, name in enumerate(names)
        },
        retention={
            budget: _spread([summary.mean_retention(budget).value for summary in summaries]) for budget in budgets
        },
    )


def _spread(values: Sequence[float]) -> SeedSpread:
    return SeedSpread(
        float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan, len(values)
    )


def _cell(spread: SeedSpread) -> str:
    return f"{spread.mean:.1f}" if math.isnan(spread.std) else f"{spread.mean:.1f} +- {spread.std:.1f}"
