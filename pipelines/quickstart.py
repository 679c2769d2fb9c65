"""Tunes, compares and registers elastic models on a laptop (`make quickstart`).

The third stage of the PARCEL paper at laptop size: transfer tuning of the shipped models PARCEL, M3, MQT and vanilla on
a local Ray, with a budget drawn in each step. All are evaluated at five budgets. The winner is registered, and its
answers to one question at every budget are printed. `--from-base` instead runs the stage before, the elastic stage from
the mini base, in short form.

A second run computes nothing; an interrupted run resumes. Jobs that `--set` changes are trained under a new name; the
other jobs are not trained again.

    python pipelines/quickstart.py [--from-base] [--set a.b=c ...]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from parcelray.benchmarks.training_data import held_out_samples
from parcelray.cli.scripts import overrides_of, run_script
from parcelray.cluster.session import ray_session
from parcelray.config.identity import config_hash
from parcelray.config.loader import changed, load_job_of
from parcelray.config.train import TrainJob
from parcelray.evaluation.frontier import frontier_markdown, frontier_table, write_frontier
from parcelray.evaluation.predict import PYFUNC_FILE
from parcelray.evaluation.predict.predictor import Predictor
from parcelray.evaluation.scoring.aggregate import Frontier
from parcelray.files import atomic_write, is_written, open_storage
from parcelray.models.vlm import image_size_of, load_processor, load_vlm
from parcelray.studies.elastic.runs import SYSTEMS
from parcelray.studies.elastic.ship import SHIPPED
from parcelray.tracking.mlflow_tracker import MlflowRunLogger, tracked_run
from parcelray.tracking.registry import promote, register_model, resolve_registry
from parcelray.tracking.run_folder import study_folder
from parcelray.tracking.store import ensure_store
from parcelray.training.compare import WINNER_RULE, build_frontier, ranking, train_and_evaluate

ROOT = Path(__file__).resolve().parent.parent
MODEL_NAME = "parcelray-mini"
FROM_BASE = "--from-base"
ORDER = ("parcel", "mqt", "m3", "vanilla")
"""The longest evaluations first, so that two processes end at about the same time."""
SHORT_STAGE = (
    "training.steps=60",
    "schedule.warmup_steps=5",
    "validation={samples: 4, budgets: [16, 64, 256]}",
    "report={samples: 150, budgets: [16, 32, 64, 128, 256]}",
    "checkpointing.every_steps=20",
)
"""Changes of jobs/train/elastic.yaml for the short form of the elastic stage."""


def job_of(overrides: Sequence[str], *, from_base: bool) -> TrainJob:
    """Returns the job of PARCEL."""
    if from_base:
        return load_job_of(TrainJob, ROOT / "jobs" / "train" / "elastic.yaml", [*SHORT_STAGE, *overrides])
    return load_job_of(TrainJob, ROOT / "jobs" / "train" / "quickstart.yaml", overrides)


def comparison_jobs(parcel: TrainJob, *, from_base: bool) -> dict[str, TrainJob]:
    """Returns the jobs of all methods: same data, steps and seed, budgets as in the elastic stage of each.

    Args:
        parcel: the job of PARCEL.
        from_base: whether the methods start from the mini base with new connectors, not from the shipped models.
    """
    jobs = {}
    for method in ORDER:
        start: dict[str, str | None] = {"name": f"quickstart-base-{method}"}
        if not from_base:
            start = {"name": f"quickstart-{method}", "model.reference": SHIPPED[method], "connector": None}
        jobs[method] = changed(parcel, dict(SYSTEMS[method].changes) | start, method)
    return jobs


def named_jobs(parcel: TrainJob, *, from_base: bool) -> dict[str, TrainJob]:
    """Returns the jobs of the comparison; a job that differs from the shipped job files gets a new name.

    A name belongs to one configuration.
    """
    jobs = comparison_jobs(parcel, from_base=from_base)
    for method, known in comparison_jobs(job_of([], from_base=from_base), from_base=from_base).items():
        hashed = config_hash(jobs[method])
        if hashed != config_hash(known):
            jobs[method] = jobs[method].model_copy(update={"name": f"{known.name}-{hashed}"})
    return jobs


def run(job: TrainJob, console: Console, *, from_base: bool = False) -> None:
    """Runs the parts of the pipeline that are not finished yet."""
    assert job.report is not None
    filesystem, root = open_storage(job.storage)
    study = "quickstart-base" if from_base else "quickstart"
    stored = f"{root}/{study}"
    jobs = named_jobs(job, from_base=from_base)
    uri = ensure_store(job.tracking.uri or "sqlite:///runs/mlflow.db")
    name = f"pipeline-{study}-{config_hash(job)}"
    finished = f"{stored}/{name}.done"
    if is_written(finished, filesystem):
        console.print(
            f"{name} is done; nothing to compute. Remove {stored} and {job.storage}/train/{study}-* to start again.\n",
        )
        console.print(filesystem.cat_file(finished).decode(), markup=False)
        return
    with tracked_run(
        uri, job.tracking.experiment, name, params={"methods": ", ".join(jobs), "steps": job.training.steps}
    ) as run_id:
        with ray_session():
            runs = train_and_evaluate(jobs, console, parent_run_id=run_id)
        frontier = build_frontier(jobs, runs)
        with study_folder(job.storage, study, console) as folder:
            table, picture = write_frontier(frontier, folder, "Mini suite: score against visual tokens and compute")
            (folder / "frontier.md").write_text(frontier_markdown(frontier) + "\n", encoding="utf-8")
        _record(uri, run_id, frontier, table, picture)
        ranked = ranking(frontier, job.report)
        winner = ranked[0][0]
        trained = runs[winner].run
        version = register_model(
            uri, trained.model_folder, MODEL_NAME, trained.mlflow_run_id or run_id, pyfunc_file=PYFUNC_FILE
        )
        promote(uri, MODEL_NAME, version)
        report = Console(record=True, highlight=False, width=console.width, file=console.file)
        report.print(frontier_table(frontier))
        means = ", ".join(f"{method} {mean:.1f}" for method, mean in ranked)
        report.print(f"Winner: {winner}, by the rule: {WINNER_RULE}: {means}")
        report.print(
            f"Picture: {stored}/{picture.name}\nRegistered: models:/{MODEL_NAME}/{version} ({winner}), alias champion",
        )
        _answer(job, uri, report)
    with atomic_write(finished, filesystem) as file:
        file.write(report.export_text().encode())


def _record(uri: str, run_id: str, frontier: Frontier, table: Path, picture: Path) -> None:
    tracker = MlflowRunLogger(uri, run_id)
    for point in frontier.points:
        metrics = {f"test/{point.method}/score": point.overall.value}
        if point.retention is not None:
            metrics[f"test/{point.method}/retention"] = point.retention.value
        # The step is the budget, so that MLflow plots the score against the budget.
        tracker.log_metrics(metrics, point.num_visual_tokens)
    tracker.log_artifact(table)
    tracker.log_figure_file(picture)
    tracker.close()


def _answer(job: TrainJob, uri: str, console: Console) -> None:
    """Prints the answers of the registered champion to one test question at every budget that it supports."""
    assert job.report is not None
    path, pinned = resolve_registry(f"models:/{MODEL_NAME}@champion", uri)
    sample = held_out_samples(job.data, "test", 1, image_size_of(path))[0]
    model = load_vlm(path).eval()
    budgets = [budget for budget in job.report.budgets if budget in model.supported_budgets]
    console.print(
        f'\n{pinned} on test sample {sample.id}: "{sample.prompt}" (right: {" or ".join(sample.answers)})',
    )
    for budget, answers in Predictor(model, load_processor(path)).generate_budgets([sample], budgets).items():
        console.print(f"  {budget:>3} visual tokens: {answers[0]}")


def main() -> int:
    """Runs the quickstart with the command-line arguments."""
    from_base = FROM_BASE in sys.argv[1:]
    overrides = [argument for argument in sys.argv[1:] if argument != FROM_BASE]
    return run_script(
        lambda console: run(job_of(overrides_of(overrides), from_base=from_base), console, from_base=from_base)
    )


if __name__ == "__main__":
    sys.exit(main())
