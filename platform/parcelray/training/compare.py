"""Compares several trainings with a reference that is trained for as many steps: scores over visual-token budgets."""

from collections.abc import Mapping, Sequence

from rich.console import Console

from parcelray.config.evaluate import BLIND, BudgetName
from parcelray.config.train import ReportConfig, TrainJob
from parcelray.evaluation.run import run_evaluation
from parcelray.evaluation.scoring.aggregate import Frontier, frontier_point
from parcelray.evaluation.scoring.majority import majority_scores
from parcelray.evaluation.scoring.split_scores import SplitScores
from parcelray.models.vlm import image_size_of
from parcelray.training.report import held_out_evaluation
from parcelray.training.run import TrainedRun, run_training

REFERENCE = "vanilla"
"""Name of the training without compression, against which retention is measured."""


def train_all(
    jobs: Mapping[str, TrainJob], console: Console, *, address: str | None, parent_run_id: str | None
) -> dict[str, TrainedRun]:
    """Train each job that is not finished yet, one after the other; returns the runs by method."""
    return {
        method: run_training(job, console, address=address, parent_run_id=parent_run_id, report=False)
        for method, job in jobs.items()
    }


def build_frontier(
    jobs: Mapping[str, TrainJob], runs: Mapping[str, TrainedRun], report: ReportConfig, console: Console
) -> Frontier:
    """Score every run at every budget, with retention against the reference at all visual tokens.

    The frontier also has two baselines: the majority class, and the reference without an image.

    Args:
        jobs: jobs by method; one of the methods is `REFERENCE`.
        runs: finished trainings by method.
        report: budgets and number of samples.
        console: for progress messages.
    """

    def splits_of(method: str, budgets: Sequence[int | BudgetName]) -> Sequence[SplitScores]:
        run = runs[method]
        evaluation = held_out_evaluation(jobs[method], run.model, budgets, report.samples)
        return run_evaluation(evaluation, console, parent_run_id=run.mlflow_run_id, tables=False).summary.splits

    base = runs[REFERENCE].model_folder
    full = max(jobs[REFERENCE].budget.values())
    reference = splits_of(REFERENCE, ("blind", full))
    points = [
        frontier_point("majority", BLIND, majority_scores(jobs[REFERENCE].data, reference, image_size_of(base)), None),
        frontier_point("blind", BLIND, reference, None),
        frontier_point(REFERENCE, full, reference, (reference, full)),
    ]
    for method in runs:
        if method != REFERENCE:
            splits = splits_of(method, report.budgets)
            points += [frontier_point(method, budget, splits, (reference, full)) for budget in report.budgets]
    return Frontier(points=tuple(points), reference=REFERENCE)


def best_method(frontier: Frontier) -> str:
    """The method with the highest mean score over its budgets, without reference and baselines."""
    scores: dict[str, list[float]] = {}
    for point in frontier.points:
        if point.method not in (REFERENCE, "blind", "majority"):
            scores.setdefault(point.method, []).append(point.overall.value)
    return max(scores, key=lambda method: sum(scores[method]) / len(scores[method]))
