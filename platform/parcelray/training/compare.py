"""Compares several trainings with a reference that is trained for as many steps: scores over visual-token budgets."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from parcelray.cluster.tasks import run_in_workers
from parcelray.config.evaluate import BLIND
from parcelray.config.train import ReportConfig, TrainJob
from parcelray.evaluation.frontier import BASELINES
from parcelray.evaluation.run import run_evaluation
from parcelray.evaluation.scoring.aggregate import Frontier, FrontierPoint, frontier_point
from parcelray.evaluation.scoring.evaluation import load_evaluation
from parcelray.evaluation.scoring.majority import majority_scores
from parcelray.evaluation.scoring.split_scores import SplitScores
from parcelray.models.vlm import config_of, connector_of, image_size_of
from parcelray.profiling.backbone_shapes import from_transformers_config
from parcelray.profiling.flops import cost
from parcelray.tracking.run_folder import local_folder
from parcelray.training.report import held_out_evaluation
from parcelray.training.run import TrainedRun, run_training

REFERENCE = "vanilla"
"""Name of the training without compression, against which retention is measured."""
WINNER_RULE = (
    "the highest mean, over the offered budgets, of the best score at or below that budget (0 if a model has none)"
)
_AT_ONCE = 2
_TEXT_TOKENS = 32
"""Tokens of the prompt for which FLOPs are given."""


class ComparedRun(NamedTuple):
    """A finished training with its evaluation."""

    run: TrainedRun
    evaluation: str
    """Folder or URI of the evaluation."""


def train_and_evaluate(
    jobs: Mapping[str, TrainJob], console: Console, *, parent_run_id: str | None
) -> dict[str, ComparedRun]:
    """Trains each job in its own process and evaluates the model at the budgets of `report`; two at the same time.

    Args:
        jobs: jobs by method, which train in their process (`scaling.num_workers: 0`) and have a report.
        console: for a line when a method is finished.
        parent_run_id: MLflow run to nest under.
    """
    tasks = {method: functools.partial(_train_and_evaluate, job, parent_run_id) for method, job in jobs.items()}
    found = {}
    console.print(f"Training and evaluating {', '.join(jobs)}, {_AT_ONCE} at the same time, one thread each")
    for method, compared in run_in_workers(tasks, at_once=_AT_ONCE):
        steps = jobs[method].training.steps
        console.print(f"{method}: {'was finished' if compared.run.was_done else f'{steps} steps'}; evaluated")
        found[method] = compared
    return {method: found[method] for method in jobs}


def _train_and_evaluate(job: TrainJob, parent_run_id: str | None) -> ComparedRun:
    assert job.report is not None
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere:
        console = Console(file=nowhere)
        run = run_training(job, console, parent_run_id=parent_run_id, report=False)
        supported = connector_of(run.model_folder).supported_budgets
        budgets = [budget for budget in job.report.budgets if budget in supported]
        evaluation = held_out_evaluation(job, run.model, ("blind", *budgets), job.report.samples)
        done = run_evaluation(evaluation, console, parent_run_id=run.mlflow_run_id, tables=False)
    return ComparedRun(run, done.uri)


def build_frontier(jobs: Mapping[str, TrainJob], runs: Mapping[str, ComparedRun]) -> Frontier:
    """Scores every run at its budgets, with retention against the reference at all visual tokens.

    The frontier also has two baselines: the majority class, and the reference without an image.

    Args:
        jobs: jobs by method; one of the methods is `REFERENCE`.
        runs: finished runs by method.
    """
    splits: dict[str, Sequence[SplitScores]] = {
        method: load_evaluation(local_folder(compared.evaluation)).score() for method, compared in runs.items()
    }
    base, full = splits[REFERENCE], max(splits[REFERENCE][0].scores)
    size = image_size_of(runs[REFERENCE].run.model_folder)
    points = [
        frontier_point("majority", BLIND, majority_scores(jobs[REFERENCE].data, base, size), None),
        frontier_point("blind", BLIND, base, None),
    ]
    for method, compared in runs.items():
        config = config_of(compared.run.model_folder)
        shape, connector = from_transformers_config(config), config.connector_config
        for budget in sorted(budget for budget in splits[method][0].scores if budget):
            flops = cost(shape, connector, budget, num_text_tokens=_TEXT_TOKENS).total
            point = frontier_point(method, budget, splits[method], (base, full))
            points.append(replace(point, gflops=flops / 1e9))
    return Frontier(points=tuple(points), reference=REFERENCE)


def ranking(frontier: Frontier, report: ReportConfig) -> list[tuple[str, float]]:
    """Ranks the methods by `WINNER_RULE`, best first, with the mean that decides.

    Args:
        frontier: scores of the methods; the baselines are left out.
        report: its budgets are the offered ones.
    """
    methods: dict[str, list[FrontierPoint]] = {}
    for point in frontier.points:
        if point.method not in BASELINES:
            methods.setdefault(point.method, []).append(point)
    means = {
        method: sum(
            max((point.overall.value for point in points if point.num_visual_tokens <= budget), default=0.0)
            for budget in report.budgets
        )
        / len(report.budgets)
        for method, points in methods.items()
    }
    return sorted(means.items(), key=lambda item: -item[1])
