"""Finished evaluations side by side, from their folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parcelray.errors import UserError
from parcelray.evaluation.results import rescore
from parcelray.evaluation.scoring import seeds
from parcelray.evaluation.scoring.evaluation import Evaluation, load_evaluation
from parcelray.evaluation.scoring.paired import Comparison, compare
from parcelray.evaluation.tables import budget_name, comparison_table

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class ComparedEvaluations:
    """Every split that two evaluations share, at every pair of budgets that was asked for."""

    first: str
    second: str
    pairs: tuple[tuple[int, int, tuple[Comparison, ...]], ...]
    """Budget of the first, budget of the second, and the comparisons."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
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
        """For the console."""
        from rich.console import Group

        return Group(
            *(
                comparison_table(
                    list(comparisons), f"{self.first} at {budget_name(one)}", f"{self.second} at {budget_name(other)}"
                )
                for one, other, comparisons in self.pairs
            )
        )


def compare_evaluations(first: str, second: str) -> ComparedEvaluations:
    """Compares two evaluations on the same samples.

    Args:
        first: folder, with `@BUDGET` for one budget; without, every budget that both have.
        second: the same.

    Raises:
        UserError: a folder holds no evaluation, or there is nothing in common.
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


def over_seeds(folders: Sequence[Path]) -> seeds.SeedTable:
    """Mean and standard deviation over evaluations of models that differ in their seed."""
    return seeds.over_seeds([rescore(folder, {}, need_within=0.0) for folder in folders])


def _named(text: str) -> tuple[Evaluation, int | None]:
    folder, at, budget = text.rpartition("@")
    if not at:
        return load_evaluation(Path(text)), None
    evaluation = load_evaluation(Path(folder))
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
        "mcnemar": comparison.mcnemar._asdict() if comparison.mcnemar is not None else None,
    }
