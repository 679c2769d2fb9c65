"""Checks the supernet's ranking of splits: trains a few splits of one budget separately and compares the order.

Called by `parcelray tune --confirm`.
"""

import itertools
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy.stats import ConstantInputWarning, spearmanr

from parcelray.cluster.session import ray_session
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.paths import WITH_TEXT
from parcelray.config.tune import TuneJob
from parcelray.errors import SystemFailure, UserError
from parcelray.evaluation.run import run_evaluation
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.tracking.mlflow_tracker import MlflowRunLogger
from parcelray.tracking.run_folder import RunFolder
from parcelray.tracking.store import ensure_store
from parcelray.tuning.plots import plot_confirmation
from parcelray.tuning.run import SearchRun, run_tuning
from parcelray.tuning.training_points import trial_job
from parcelray.tuning.tune_run import objective_value


@dataclass(frozen=True)
class ConfirmedSplit:
    """One split, evaluated on the supernet and as a separately trained model."""

    anchor_grid: int
    """Side of the anchor grid."""
    supernet: float
    """Retention on the supernet, percent."""
    trained: Interval
    """Retention of the model that was trained for this split, percent."""
    is_rule: bool
    """Whether it is the split of the paper's rule."""


@dataclass(frozen=True)
class Confirmation:
    """Agreement between the supernet's ranking of splits and the ranking of separately trained models."""

    num_visual_tokens: int
    splits: Sequence[ConfirmedSplit]
    correlation: float
    """Spearman's rank correlation over the splits; NaN if all values are equal."""
    p_value: float
    """Exact one-sided p-value of the correlation."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as JSON-serialisable values."""
        return asdict(self) | {
            "splits": [asdict(split) | {"trained": split.trained._asdict()} for split in self.splits]
        }

    def to_rich(self) -> Table:
        """Returns the result as a table."""
        title = (
            f"Splits of {self.num_visual_tokens} tokens: rank correlation {self.correlation:.2f} over"
            f" {len(self.splits)} splits, p = {self.p_value:.2f}"
        )
        table = Table("anchors", "on the supernet", "trained separately [95 %]", title=title)
        for split in sorted(self.splits, key=lambda each: -each.supernet):
            name = (f"{split.anchor_grid} x {split.anchor_grid}" if split.anchor_grid else "none") + (
                ", the paper's" if split.is_rule else ""
            )
            table.add_row(
                name,
                f"{split.supernet:.1f}",
                f"{split.trained.value:.1f} [{split.trained.low:.1f}, {split.trained.high:.1f}]",
            )
        return table


def confirm_splits(job: TuneJob, run: SearchRun, console: Console, *, address: str | None = None) -> Confirmation:
    """Trains the best splits of one budget, the paper's and the worst, and compares their order with the supernet's.

    Args:
        job: the search, with `confirm`.
        run: the finished search.
        console: prints progress and the result.
        address: address of the Ray cluster; None: RAY_ADDRESS, else a local instance.

    Raises:
        UserError: the job has no `confirm`, or the search has too few splits of that budget.
        SystemFailure: a training failed.
    """
    confirm, splits = job.confirm, job.splits
    if confirm is None or splits is None:
        raise UserError(
            f"The search {job.name} has no `confirm`; add `confirm` with job, budget, best and worst to the job file."
        )
    first = job.objectives[0]
    trials = {
        int(trial.assignment[splits.anchor_grid]): trial.metrics
        for trial in run.findings.trials
        if trial.error is None and trial.metrics["tokens"] == confirm.budget
    }
    order = sorted(trials, key=lambda grid: objective_value(first, trials[grid]), reverse=True)
    rule = next((each.rule for each in run.findings.splits if each.num_visual_tokens == confirm.budget), None)
    chosen = list(
        dict.fromkeys(
            [*order[: confirm.best], *([rule] if rule in trials else []), *order[len(order) - confirm.worst :]]
        )
    )
    if len(chosen) < 3:
        raise UserError(
            f"The search {job.name} has {len(order)} finished splits of {confirm.budget} tokens, but at least three are"
            " needed to compare rankings; choose another confirm.budget."
        )
    search = _search(job, chosen)
    with ray_session(address):
        trained = run_tuning(search, console, address=address, resume=True, parent_run_id=run.mlflow_run_id)
        if trained.findings.failed:
            raise SystemFailure(f"A training of the confirmation failed: {trained.findings.failed[0].error}")
        confirmed = []
        for grid in chosen:
            trial = RunFolder(trial_job(search, trained.run_folder.uri, _assignment(confirm.budget, grid)))
            confirmed.append(
                ConfirmedSplit(
                    grid,
                    trials[grid]["retention"],
                    _retention(job, f"{trial.uri}/model", confirm.budget, grid, console, run.mlflow_run_id),
                    grid == rule,
                )
            )
    supernet_values, trained_values = [each.supernet for each in confirmed], [each.trained.value for each in confirmed]
    correlation = _rank_correlation(supernet_values, trained_values)
    result = Confirmation(confirm.budget, confirmed, correlation, _exact_p(supernet_values, trained_values))
    files = _write(result, run.folder)
    for file in files:
        run.run_folder.push(file.name)
    if job.tracking.uri is not None and run.mlflow_run_id is not None:
        _record(ensure_store(job.tracking.uri), run.mlflow_run_id, result, files)
    console.print(result.to_rich())
    return result


def _search(job: TuneJob, grids: Sequence[int]) -> TuneJob:
    """Returns the trainings as a search, so that they use the cluster, the record and the tracking of a search."""
    assert job.confirm is not None
    budget = job.confirm.budget
    base = job.confirm.job.model_dump(mode="json", context=WITH_TEXT)
    base |= {"budget": {"type": "uniform", "budgets": [budget]}}
    base["validation"] |= {"budgets": [budget]}
    values = [_assignment(budget, grid)["connector.routing"] for grid in grids]
    data = {
        "kind": "tune",
        "name": f"{job.name[:50]}-confirm",
        "seed": job.seed,
        "space": {
            "kind": "search_space",
            "name": "confirm",
            "job": "confirm",
            "parameters": {"connector.routing": {"type": "choice", "values": values}},
        },
        "base": base,
        "algorithm": {"type": "grid"},
        "objectives": [{"metric": f"val/score@{budget}", "mode": "max"}],
        "max_concurrent": job.max_concurrent,
        "tracking": job.tracking.model_dump(mode="json", context=WITH_TEXT),
        "storage": job.storage,
    }
    return TuneJob.model_validate(data)


def _assignment(budget: int, grid: int) -> dict[str, Any]:
    return {"connector.routing": [{"min_budget": budget, "max_budget": budget, "anchor_grid": grid}]}


def _retention(job: TuneJob, model: str, budget: int, grid: int, console: Console, parent: str | None) -> Interval:
    """Evaluates a trained model on the samples of the search and returns its retention."""
    base = job.base
    assert isinstance(base, EvaluateJob)
    changes = {
        "name": f"{job.name[:40]}-confirm-{budget}-{grid}",
        "model": CheckpointModelConfig(reference=model),
        "reference": base.reference or base.model,
        "anchor_grid": None,
        "budgets": (budget,),
        "tracking": job.tracking,
        "storage": job.storage,
    }
    summary = run_evaluation(
        EvaluateJob.model_validate(base.model_dump() | changes), console, parent_run_id=parent, tables=False
    ).summary
    return summary.mean_retention(budget).interval


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns Spearman's rank correlation; NaN if all values of a sequence are equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(spearmanr(first, second).statistic)


def _exact_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the one-sided p-value over all permutations; the usual approximation is wrong for so few points."""
    observed = _rank_correlation(first, second)
    permuted = [_rank_correlation(first, order) for order in itertools.permutations(second)]
    return float(sum(each >= observed - 1e-12 for each in permuted) / len(permuted))


def _record(uri: str, run_id: str, result: Confirmation, files: Sequence[Path]) -> None:
    """Adds the result to the MLflow run of the search."""
    tracker = MlflowRunLogger(uri, run_id)
    budget = result.num_visual_tokens
    metrics = {"rank_correlation": result.correlation, "p_value": result.p_value}
    tracker.log_metrics({f"confirmation/{name}": value for name, value in metrics.items() if value == value}, budget)
    for each in sorted(result.splits, key=lambda split: split.anchor_grid):
        # The step is the side of the anchor grid, so that MLflow plots each metric over the splits.
        tracker.log_metrics(
            {f"confirmation/supernet@{budget}": each.supernet, f"confirmation/trained@{budget}": each.trained.value},
            each.anchor_grid,
        )
    tracker.close()
    for file in files:
        tracker.log_figure_file(file) if file.suffix == ".png" else tracker.log_artifact(file)


def _write(result: Confirmation, folder: Path) -> list[Path]:
    (folder / "confirmation.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    plot_confirmation(
        [
            (
                each.supernet,
                each.trained.value,
                each.trained.low,
                each.trained.high,
                f"{each.anchor_grid} x {each.anchor_grid}" if each.anchor_grid else "none",
            )
            for each in result.splits
        ],
        folder / "confirmation.png",
        title=(
            f"Splits of {result.num_visual_tokens} tokens: Spearman {result.correlation:.2f} (p = {result.p_value:.2f})"
        ),
    )
    return [folder / "confirmation.json", folder / "confirmation.png"]
