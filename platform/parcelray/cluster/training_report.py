"""The scores of a trained model on the test split, beside the majority class and the blind model: table, picture, MLflow."""

from pathlib import Path

from rich.console import Console

from parcelray.benchmarks.metrics.consistency import consistency
from parcelray.config.data import NlvrDataConfig
from parcelray.config.train import TrainJob
from parcelray.evaluation.aggregate import Frontier, frontier_point
from parcelray.evaluation.held_out import held_out, image_size_of, score_majority
from parcelray.evaluation.intervals import Interval, wilson
from parcelray.evaluation.predictor import BLIND
from parcelray.evaluation.score import Score
from parcelray.evaluation.stored_scores import scored
from parcelray.reports.frontier_files import write_frontier
from parcelray.reports.tables import frontier_table
from parcelray.tracking.tracker import Tracker


def report_training(job: TrainJob, model_folder: Path, tracker: Tracker, console: Console) -> dict[str, float]:
    """Scores the model as `job.report` says, shows and records the result.

    Args:
        job: with a report.
        model_folder: the trained checkpoint; the report's files go beside it.
        tracker: of the training's run.
        console: for the table.

    Returns:
        The overall test score at each budget, by metric name.
    """
    assert job.report is not None
    folder = model_folder.parent
    samples = held_out(job.data, job.report.samples, model_folder)
    console.print(f"Scoring {len(samples)} test samples at {', '.join(map(str, job.report.budgets))} visual tokens and blind", highlight=False)
    scores = scored(model_folder, samples, [*job.report.budgets, BLIND], folder / "scores.json")
    method = job.connector.type if job.connector is not None else job.name
    points = [
        frontier_point("majority", 0, score_majority(job.data, samples, image_size_of(model_folder)), None),
        frontier_point("blind", 0, scores[BLIND], None),
        *(frontier_point(method, budget, scores[budget], None) for budget in job.report.budgets),
    ]
    frontier = Frontier(tuple(points), reference=None)
    numbers, picture = write_frontier(frontier, folder, f"{job.name}: test score against visual tokens per image")
    console.print(frontier_table(frontier))
    metrics = {f"test/score@{point.num_visual_tokens}": point.overall.value for point in points if point.method == method}
    if isinstance(job.data, NlvrDataConfig):
        metrics |= _consistency(scores, console)
    tracker.log_metrics(metrics, job.training.steps)
    tracker.log_artifact(numbers)
    tracker.log_figure_file(picture)
    tracker.close()
    return metrics


def _consistency(scores: dict[int, list[Score]], console: Console) -> dict[str, float]:
    """NLVR's second score: the share of sentences with all their images right."""
    metrics = {}
    for budget, values in scores.items():
        interval = consistency_interval(values)
        metrics[f"test/consistency@{budget}"] = interval.value
        name = f"{budget} visual tokens" if budget != BLIND else "blind"
        console.print(
            f"Consistency, {name}: {100 * interval.value:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}] of {interval.n} sentences",
            highlight=False,
        )
    return metrics


def consistency_interval(scores: list[Score]) -> Interval:
    """Share of NLVR sentences with all images right, with Wilson's interval over sentences."""
    statements = [(score.scene, score.value) for score in scores if score.task == "statement"]
    sentences = len({scene for scene, _ in statements})
    return wilson(round(consistency(statements) * sentences), sentences) if sentences else wilson(0, 0)
