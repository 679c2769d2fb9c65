"""The study of vision encoders: token redundancy, and retention of the same reduction methods at the same budgets."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from parcelray.config.evaluate import EvaluateJob
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.studies.attention import study_redundancy
from parcelray.studies.encoder_plot import EncoderPoint, plot_encoders
from parcelray.studies.reduction.results import ReductionStudy
from parcelray.studies.reduction.study import run_reduction_study
from parcelray.tracking.mlflow_tracker import MlflowRunLogger, tracked_run
from parcelray.tracking.run_folder import study_folder
from parcelray.tracking.store import ensure_store

METHODS = ("cluster", "average pooling", "spatial", "DivPrune")
"""Methods that read only the tokens, so that every encoder supports them; random sampling is always added."""
CONFOUNDED = (
    "The encoder is not the only difference. Each tower was trained together with its own projector and decoder, from"
    " random weights and with one seed, so differences are differences between whole models. The towers also differ in"
    " depth, width and pooling, as their families do. A model with a lower full score has less to lose: retention is"
    " relative to the full score of each model. Compare encoders only if their intervals do not overlap."
)


def run_encoder_study(
    models: Mapping[str, str], job: EvaluateJob, console: Console, *, images: int = 64
) -> list[EncoderPoint]:
    """Measures the redundancy of each model, runs the reduction study on each of them, and joins the results.

    Args:
        models: references of vanilla models by the name of their encoder.
        job: benchmarks and use of the cluster; the study sets the model, the reducer and the budgets.
        console: prints tables and progress.
        images: number of images of the redundancy profile.

    Raises:
        UserError: see `run_evaluation` and `study_redundancy`.
    """
    with study_folder(job.storage, "studies/encoders", console) as folder:
        profiles = study_redundancy(list(models.values()), console, count=images, folder=folder, tracking=job.tracking)
        points: list[EncoderPoint] = []
        for name, reference in models.items():
            changes = {"name": f"encoders-{name.lower()}", "model": {"type": "checkpoint", "reference": reference}}
            own = EvaluateJob.model_validate(job.model_dump() | changes)
            points += encoder_points(name, run_reduction_study(own, console, methods=METHODS, equal_budgets=True))
        table, picture, note = folder / "encoders.csv", folder / "encoders.png", folder / "confounded.txt"
        _write(points, table)
        plot_encoders(
            [point for point in points if point.method != "full"],
            picture,
            title="Retention of each encoder's model under token reduction",
        )
        note.write_text(CONFOUNDED + "\n", encoding="utf-8")
        console.print(encoder_table(points))
        console.print(CONFOUNDED)
        if job.tracking.uri is not None:
            uri = ensure_store(job.tracking.uri)
            with tracked_run(uri, job.tracking.experiment, "study-encoders", params=dict(models)) as run_id:
                tracker = MlflowRunLogger(uri, run_id)
                for point in points:
                    tracker.log_metrics(
                        {f"{point.encoder}/{point.method.replace(' ', '_')}/retention": point.retention.value},
                        point.num_visual_tokens,
                    )
                for name, reference in models.items():
                    measures = profiles[reference].measures
                    tracker.log_metrics(
                        {f"{name}/{_metric(measure)}": value.value for measure, value in measures.items()}, 0
                    )
                tracker.log_artifact(table)
                tracker.log_artifact(note)
                tracker.log_figure_file(picture)
                tracker.close()
    console.print(f"Table and figure of all encoders: {folder}")
    return points


def encoder_points(encoder: str, study: ReductionStudy) -> list[EncoderPoint]:
    """Returns the points of a reduction study that have a retention: full model, random sampling and all methods."""
    return [
        EncoderPoint(encoder, point.method, point.num_visual_tokens, point.overall, point.retention)
        for point in study.frontier.points
        if point.retention is not None
    ]


def encoder_table(points: Sequence[EncoderPoint]) -> Table:
    """Returns a table with one row per encoder and method, and one column per budget."""
    budgets = sorted({point.num_visual_tokens for point in points})
    table = Table(
        "encoder",
        "method",
        *map(str, budgets),
        title="Percent of the same model's full score by visual tokens [95 %]; full: the score",
    )
    for encoder, method in dict.fromkeys((point.encoder, point.method) for point in points):
        own = {point.num_visual_tokens: point for point in points if (point.encoder, point.method) == (encoder, method)}
        shown = {budget: point.score if method == "full" else point.retention for budget, point in own.items()}
        table.add_row(encoder, method, *(_percent(shown[budget]) if budget in shown else "" for budget in budgets))
    return table


def _write(points: Sequence[EncoderPoint], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(
            [
                "encoder",
                "method",
                "num_visual_tokens",
                "score",
                "score_low",
                "score_high",
                "retention",
                "retention_low",
                "retention_high",
            ]
        )
        rows.writerows(
            [point.encoder, point.method, point.num_visual_tokens, *point.score[:3], *point.retention[:3]]
            for point in points
        )


def _percent(interval: Interval) -> str:
    return f"{interval.value:.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def _metric(measure: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in measure)
