"""The scores of a trained model on the test split, beside the majority class and the blind model: table, picture, MLflow."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from parcelray.config.train import TrainJob
from parcelray.evaluation.frontier_files import write_frontier
from parcelray.evaluation.frontier_table import frontier_table
from parcelray.evaluation.predict.predictor import BLIND
from parcelray.evaluation.run import run_evaluation
from parcelray.evaluation.scoring.aggregate import Frontier, frontier_point
from parcelray.evaluation.scoring.intervals import Interval, wilson
from parcelray.evaluation.scoring.majority import majority_scores
from parcelray.evaluation.scoring.split_scores import SplitScores
from parcelray.models.vlm import image_size_of
from parcelray.tracking.tracker import Tracker
from parcelray.training.held_out import held_out_evaluation


def report_training(
    job: TrainJob, model_folder: Path, tracker: Tracker, console: Console, run_id: str | None
) -> dict[str, float]:
    """Evaluates the model as `job.report` says, shows and records the result.

    Args:
        job: with a report.
        model_folder: the trained checkpoint; the report's files go beside it.
        tracker: of the training's run.
        console: for the table.
        run_id: the training's MLflow run, which the evaluation's is nested under.

    Returns:
        The overall test score at each budget, by metric name.
    """
    assert job.report is not None
    evaluation = held_out_evaluation(job, model_folder, ("blind", *job.report.budgets), job.report.samples)
    run = run_evaluation(evaluation, console, parent_run_id=run_id, tables=False)
    splits = run.summary.splits
    method = job.connector.type if job.connector is not None else job.name
    points = [
        frontier_point("majority", BLIND, majority_scores(job.data, splits, image_size_of(model_folder)), None),
        frontier_point("blind", BLIND, splits, None),
        *(frontier_point(method, budget, splits, None) for budget in job.report.budgets),
    ]
    frontier = Frontier(tuple(points), reference=None)
    numbers, picture = write_frontier(
        frontier, model_folder.parent, f"{job.name}: test score against visual tokens per image"
    )
    console.print(frontier_table(frontier))
    metrics = {
        f"test/score@{point.num_visual_tokens}": point.overall.value for point in points if point.method == method
    }
    metrics |= _consistency(splits, console)
    tracker.log_metrics(metrics, job.training.steps)
    tracker.log_artifact(numbers)
    tracker.log_figure_file(picture)
    tracker.close()
    return metrics


def _consistency(splits: Sequence[SplitScores], console: Console) -> dict[str, float]:
    """NLVR's second score: the share of sentences with all their images right."""
    metrics = {}
    for split in splits:
        for budget, score in split.scores.items():
            if "consistency" in score.totals:
                interval = consistency_interval(split, budget)
                metrics[f"test/consistency@{budget}"] = interval.value
                name = f"{budget} visual tokens" if budget != BLIND else "blind"
                console.print(
                    f"Consistency, {name}: {100 * interval.value:.1f} % [{100 * interval.low:.1f},"
                    f" {100 * interval.high:.1f}] of {interval.n} sentences",
                    highlight=False,
                )
    return metrics


def consistency_interval(split: SplitScores, budget: int) -> Interval:
    """Share of sentences with all images right, with Wilson's interval over sentences."""
    sentences = len({sample.scene for sample in split.samples})
    return wilson(round(split.scores[budget].totals["consistency"] / split.scale * sentences), sentences)
