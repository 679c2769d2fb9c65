"""Trains, compares and registers elastic models on a laptop (`make quickstart`).

Trains PARCEL, M3 and MQT from the mini base on a local Ray, and compares them at three budgets with the vanilla base
trained for as many steps. Registers the best model, and prints its answers to one question at every budget.

A second run computes nothing; an interrupted run resumes. Jobs that `--set` changes are trained under a new name; the
other jobs are not trained again.
"""

import sys
from pathlib import Path

from rich.console import Console

from parcelray.benchmarks.training_data import held_out_samples
from parcelray.cli.scripts import overrides_of, run_script
from parcelray.cluster.session import ray_session
from parcelray.config.connector import M3ConnectorConfig, MqtConnectorConfig
from parcelray.config.identity import config_hash
from parcelray.config.loader import load_job_of
from parcelray.config.train import TrainJob, UniformBudgets
from parcelray.evaluation.frontier import frontier_table, write_frontier
from parcelray.evaluation.predict import PYFUNC_FILE
from parcelray.evaluation.predict.predictor import Predictor
from parcelray.evaluation.scoring.aggregate import Frontier
from parcelray.files import atomic_write, is_local, is_written, open_storage, upload_files
from parcelray.models.vlm import image_size_of, load_processor, load_vlm
from parcelray.tracking.mlflow_tracker import MlflowRunLogger, tracked_run
from parcelray.tracking.registry import promote, register_model, resolve_registry
from parcelray.tracking.run_folder import temporary_copy
from parcelray.tracking.store import ensure_store
from parcelray.training.compare import REFERENCE, best_method, build_frontier, train_all

ROOT = Path(__file__).resolve().parent.parent
JOB = ROOT / "jobs" / "train" / "quickstart.yaml"
MODEL_NAME = "parcelray-mini"


def comparison_jobs(parcel: TrainJob) -> dict[str, TrainJob]:
    """Returns the jobs of PARCEL and its baselines: same base, data, steps and seed; MQT starts as published."""
    return {
        REFERENCE: _variant(
            parcel, REFERENCE, connector=None, budget=UniformBudgets(budgets=(256,)), validation={"budgets": (256,)}
        ),
        "parcel": parcel,
        "m3": _variant(parcel, "m3", connector=M3ConnectorConfig(), budget=UniformBudgets(budgets=(4, 16, 64, 256))),
        "mqt": _variant(
            parcel,
            "mqt",
            connector=MqtConnectorConfig(num_heads=6, start="sincos", positions="contiguous"),
            budget=UniformBudgets(budgets={"start": 2, "stop": 256, "step": 2}),
        ),
    }


def named_jobs(parcel: TrainJob, shipped: TrainJob) -> dict[str, TrainJob]:
    """Returns the jobs of the comparison; a job that differs from the shipped one gets a new name.

    A name belongs to one configuration.
    """
    jobs = comparison_jobs(parcel)
    for method, known in comparison_jobs(shipped).items():
        changed = config_hash(jobs[method])
        if jobs[method].name == known.name and changed != config_hash(known):
            jobs[method] = jobs[method].model_copy(update={"name": f"{known.name}-{changed}"})
    return jobs


def run(job: TrainJob, console: Console) -> None:
    """Runs the parts of the pipeline that are not finished yet."""
    assert job.report is not None
    filesystem, root = open_storage(job.storage)
    stored = f"{root}/quickstart"
    folder = Path(stored) if is_local(filesystem) else temporary_copy("quickstart")
    jobs = named_jobs(job, load_job_of(TrainJob, JOB))
    uri = ensure_store(job.tracking.uri or "sqlite:///runs/mlflow.db")
    name = f"pipeline-quickstart-{config_hash(job)}"
    finished = f"{stored}/{name}.done"
    if is_written(finished, filesystem):
        console.print(
            f"{name} is done; nothing to compute. Remove {stored} and {job.storage}/train/quickstart-* to start"
            " again.\n",
        )
        console.print(filesystem.cat_file(finished).decode(), markup=False)
        return
    with tracked_run(
        uri, job.tracking.experiment, name, params={"methods": ", ".join(jobs), "steps": job.training.steps}
    ) as run_id:
        with ray_session():
            runs = train_all(jobs, console, address=None, parent_run_id=run_id)
            frontier = build_frontier(jobs, runs, job.report, console)
        table, picture = write_frontier(frontier, folder, "Mini suite: score against visual tokens per image")
        if not is_local(filesystem):
            upload_files(folder, filesystem, stored)
        _record(uri, run_id, frontier, table, picture)
        winner = best_method(frontier)
        version = register_model(
            uri, runs[winner].model_folder, MODEL_NAME, runs[winner].mlflow_run_id or run_id, pyfunc_file=PYFUNC_FILE
        )
        promote(uri, MODEL_NAME, version)
        report = Console(record=True, highlight=False, width=console.width, file=console.file)
        report.print(frontier_table(frontier))
        report.print(
            f"Picture: {stored}/{picture.name}\nRegistered: models:/{MODEL_NAME}/{version} ({winner}), alias champion",
        )
        _answer(job, uri, report)
    with atomic_write(finished, filesystem) as file:
        file.write(report.export_text().encode())


def _variant(job: TrainJob, method: str, **changes: object) -> TrainJob:
    data = job.model_dump() | {"name": f"quickstart-{method}"}
    for key, value in changes.items():
        data[key] = data[key] | value if isinstance(value, dict) else value
    return TrainJob.model_validate(data)


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
    """Prints the answers of the registered champion to one test question at every budget."""
    assert job.report is not None
    path, pinned = resolve_registry(f"models:/{MODEL_NAME}@champion", uri)
    sample = held_out_samples(job.data, "test", 1, image_size_of(path))[0]
    predictor = Predictor(load_vlm(path).eval(), load_processor(path))
    console.print(
        f'\n{pinned} on test sample {sample.id}: "{sample.prompt}" (right: {" or ".join(sample.answers)})',
    )
    for budget, answers in predictor.generate_budgets([sample], job.report.budgets).items():
        console.print(f"  {budget:>3} visual tokens: {answers[0]}")


def main() -> int:
    """Runs the quickstart; `--set a.b=c` overrides keys of its job file."""
    return run_script(lambda console: run(load_job_of(TrainJob, JOB, overrides_of(sys.argv[1:])), console))


if __name__ == "__main__":
    sys.exit(main())
