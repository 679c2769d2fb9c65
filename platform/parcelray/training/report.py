"""Evaluates a trained model on the test split of its training data: scores, table, figure and MLflow metrics."""

from collections.abc import Sequence

from rich.console import Console

from parcelray.config.data import (
    BenchmarkDataConfig,
    ConversationsDataConfig,
    HubDataConfig,
    MiniDataConfig,
    MixtureDataConfig,
    NlvrDataConfig,
    SingleDataConfig,
)
from parcelray.config.evaluate import BLIND, BenchmarkChoice, BudgetName, EvaluateJob, PassConfig
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.paths import WITH_TEXT
from parcelray.config.train import TrainJob
from parcelray.console import percent
from parcelray.evaluation.frontier import frontier_table, write_frontier
from parcelray.evaluation.run import run_evaluation
from parcelray.evaluation.scoring.aggregate import Frontier, frontier_point
from parcelray.evaluation.scoring.intervals import all_correct_interval
from parcelray.evaluation.scoring.majority import majority_scores
from parcelray.evaluation.scoring.split_scores import SplitScores, cluster_of
from parcelray.models.vlm import image_size_of
from parcelray.tracking.mlflow_tracker import MlflowRunLogger
from parcelray.tracking.run_folder import RunFolder

_FAMILIES = 4
"""Number of families of the mini suite."""


def report_training(
    job: TrainJob, folder: RunFolder, console: Console, tracking_uri: str | None, run_id: str | None
) -> dict[str, float]:
    """Evaluate the model as `job.report` defines, print the scores, and record them.

    The table has the model at each budget, and as baselines the majority class and the model without an image.

    Args:
        job: a training with a report.
        folder: the run folder with the trained checkpoint; the report's files are written into it.
        console: for the table.
        tracking_uri: the tracking store; None for a run without tracking.
        run_id: the training's MLflow run, which the evaluation's run is nested under; None for a run without tracking.

    Returns:
        The overall test score at each budget, by metric name.
    """
    assert job.report is not None
    # The evaluation may run on other hosts than the training, so it gets the model where every host finds it.
    evaluation = held_out_evaluation(job, f"{folder.uri}/model", ("blind", *job.report.budgets), job.report.samples)
    run = run_evaluation(evaluation, console, parent_run_id=run_id, tables=False)
    splits = run.summary.splits
    method = job.connector.type if job.connector is not None else job.name
    points = [
        frontier_point(
            "majority", BLIND, majority_scores(job.data, splits, image_size_of(folder.local / "model")), None
        ),
        frontier_point("blind", BLIND, splits, None),
        *(frontier_point(method, budget, splits, None) for budget in job.report.budgets),
    ]
    frontier = Frontier(tuple(points), reference=None)
    table, figure = write_frontier(frontier, folder.local, f"{job.name}: test score against visual tokens per image")
    for file in (table, figure):
        folder.push(file.name)
    console.print(frontier_table(frontier))
    metrics = {
        f"test/score@{point.num_visual_tokens}": point.overall.value for point in points if point.method == method
    }
    metrics |= _consistency(splits, console)
    if tracking_uri is not None and run_id is not None:
        logger = MlflowRunLogger(tracking_uri, run_id)
        logger.log_metrics(metrics, job.training.steps)
        logger.log_artifact(table)
        logger.log_figure_file(figure)
        logger.close()
    return metrics


def held_out_evaluation(job: TrainJob, model: str, budgets: Sequence[int | BudgetName], samples: int) -> EvaluateJob:
    """The evaluation job of a trained model on the test split of its training data.

    Args:
        job: the training.
        model: folder or URI of the trained model.
        budgets: visual tokens per image.
        samples: number of samples per family of the mini suite, or of pictures of NLVR (each with all its questions).
    """
    in_process = job.scaling.bounds[1] == 0
    data = job.data
    sources = [member.data for member in data.sources] if isinstance(data, MixtureDataConfig) else [data]
    benchmarks = [_benchmark(data, samples) for data in sources]
    families = {data.prompt_family for data in sources if isinstance(data, BenchmarkDataConfig)}
    return EvaluateJob(
        kind="evaluate",
        name=f"{job.name}-test",
        model=CheckpointModelConfig(reference=model),
        benchmarks=_labelled(benchmarks),
        catalog=tuple(path for data in sources if isinstance(data, BenchmarkDataConfig) for path in data.catalog),
        prompt_family=families.pop() if families else "paligemma",
        budgets=tuple(dict.fromkeys(budgets)),
        max_unscored=1.0,
        compute=PassConfig(
            actors=0 if in_process else max(1, job.scaling.bounds[0]), gpus_per_actor=job.scaling.gpus_per_worker
        ),
        tracking=job.tracking,
        storage=job.storage,
    )


def _labelled(choices: Sequence[BenchmarkChoice]) -> tuple[BenchmarkChoice, ...]:
    """Numbers the benchmarks of a mixture that have the same name."""
    names = [choice.name for choice in choices]
    return tuple(
        choice if names.count(choice.name) == 1 else choice.model_copy(update={"label": f"{choice.name}_{number}"})
        for number, choice in enumerate(choices)
    )


def _benchmark(data: SingleDataConfig, samples: int) -> BenchmarkChoice:
    if isinstance(data, MiniDataConfig):
        return BenchmarkChoice(
            name="mini", source={"families": list(data.families), "samples": samples, "seed": data.seed}
        )
    if isinstance(data, NlvrDataConfig):
        return BenchmarkChoice(
            name="nlvr",
            data=data.path,
            limit=samples,
            source={"view": data.view, "questions": list(data.questions), "seed": data.seed},
        )
    if isinstance(data, ConversationsDataConfig | HubDataConfig):
        source = {"data": data.model_dump(mode="json", context=WITH_TEXT), "split": "test"}
        return BenchmarkChoice(name="rows", limit=samples, source=source)
    if isinstance(data, BenchmarkDataConfig):
        return BenchmarkChoice(name=data.name, data=data.data, limit=samples)
    return BenchmarkChoice(name="samples", data=data.path, limit=_FAMILIES * samples)


def _consistency(splits: Sequence[SplitScores], console: Console) -> dict[str, float]:
    """NLVR's second score: the share of sentences with all images right, at each budget, with its interval."""
    metrics = {}
    for split in splits:
        for budget, score in split.scores.items():
            if "consistency" in score.totals:
                interval = all_correct_interval(score.values, [cluster_of(sample) for sample in split.samples])
                metrics[f"test/consistency@{budget}"] = interval.value
                name = f"{budget} visual tokens" if budget != BLIND else "blind"
                shown = percent(100 * interval.value, 100 * interval.low, 100 * interval.high)
                console.print(f"Consistency, {name}: {shown} of {interval.n} sentences")
    return metrics
