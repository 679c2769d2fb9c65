"""Runs one training job to a trained, scored and recorded model; called by `parcelray train` and the pipelines."""

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from parcelray.benchmarks.training_data import check_rows
from parcelray.cluster.session import num_nodes, ray_session
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.paths import AS_WRITTEN
from parcelray.config.train import TrainJob
from parcelray.console import step_progress
from parcelray.datasets.source import BadRowsError
from parcelray.files import atomic_write
from parcelray.models.checkpoint import ResolvedCheckpoint, write_manifest
from parcelray.models.vlm import write_converted
from parcelray.tracking.metric_logger import MetricLogger, open_metric_logger
from parcelray.tracking.mlflow_tracker import git_commit, job_run
from parcelray.tracking.registry import resolve_model
from parcelray.tracking.run_folder import BAD_ROWS, RunFolder
from parcelray.tracking.store import check_tracking_uri, ensure_store
from parcelray.training.checkpointing import read_state
from parcelray.training.report import report_training
from parcelray.training.train_loop import fit_in_process

_MODEL = "model"
"""Folder of the trained model in the run folder."""


@dataclass(frozen=True)
class TrainedRun:
    """A finished training."""

    identity: str
    model_folder: Path
    """Folder of the trained checkpoint, with a manifest."""
    metrics: dict[str, float]
    mlflow_run_id: str | None
    was_done: bool
    """Whether the run was already finished, so that nothing was computed."""


def run_training(
    job: TrainJob,
    console: Console,
    *,
    address: str | None = None,
    parent_run_id: str | None = None,
    report: bool = True,
    on_report: Callable[[Mapping[str, float]], None] | None = None,
) -> TrainedRun:
    """Train a job, or resume it, or return at once if it is finished.

    Args:
        job: the training.
        console: for progress and messages.
        address: Ray cluster; None for RAY_ADDRESS or else a local instance. Unused with `scaling.num_workers: 0`.
        parent_run_id: MLflow run to nest under.
        report: whether to score the model as `job.report` defines.
        on_report: called with the metrics at each checkpoint; picklable.

    Raises:
        UserError: the job is not valid, or its name belongs to another configuration.
        SystemFailure: the training failed more often than `scaling.max_failures`.
    """
    folder = RunFolder(job)
    with folder.claimed():
        done = folder.result()
        if done is not None:
            # Results of earlier versions have the absolute path of the same folder, which may have been moved since.
            model_folder = folder.local_path(_MODEL) if folder.is_local else Path(done["model"])
            console.print(f"{folder.identity} is finished; nothing to do. Its model is in {model_folder}.")
            return TrainedRun(folder.identity, model_folder, done["metrics"], done["mlflow_run_id"], was_done=True)
        uri = ensure_store(job.tracking.uri) if job.tracking.uri is not None else None
        start = resolve_start(job, uri)
        in_process = job.scaling.bounds[1] == 0
        bad_rows: dict[str, str] = {}
        with _bad_rows_kept(folder, bad_rows), nullcontext() if in_process else ray_session(address):
            bad_rows |= check_rows(job.data)
            if uri is not None and not in_process:
                check_tracking_uri(uri, num_nodes())
            with (
                job_run(
                    job,
                    uri,
                    folder.identity,
                    params=job.model_dump(mode="json", context=AS_WRITTEN),
                    tags={"parcel.start": start.pinned if start is not None else "scratch"},
                    parent_run_id=parent_run_id,
                ) as run_id,
                step_progress(console, job.name, job.training.steps) as on_progress,
            ):
                logger = functools.partial(open_metric_logger, uri, run_id)
                checkpoint, metrics = _fit(job, folder, start, logger, on_progress, on_report)
                _keep_bad_rows(folder, bad_rows | read_state(checkpoint).skipped_rows, console)
                model_folder = _keep_model(job, folder, checkpoint, start)
                if report and job.report is not None:
                    metrics |= report_training(job, model_folder, console, uri, run_id)
        stored = _MODEL if folder.is_local else str(model_folder)
        folder.finish({"model": stored, "metrics": metrics, "mlflow_run_id": run_id})
        return TrainedRun(folder.identity, model_folder, metrics, run_id, was_done=False)


@contextmanager
def _bad_rows_kept(folder: RunFolder, before: dict[str, str]) -> Iterator[None]:
    """Writes the rows that end a training, and those `before` them, to a file, as the message names only the first."""
    try:
        yield
    except BadRowsError as error:
        _keep_bad_rows(folder, before | error.problems)
        raise


def _keep_bad_rows(folder: RunFolder, rows: Mapping[str, str], console: Console | None = None) -> None:
    """Writes the rows that cannot be used, one JSON object per line with id and reason; none: no file."""
    if not rows:
        return
    path = f"{folder.path}/{BAD_ROWS}"
    lines = "".join(json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in rows.items())
    with atomic_write(path, None if folder.is_local else folder.filesystem) as file:
        file.write(lines.encode())
    if console is not None:
        console.print(f"{len(rows)} rows of the training data were skipped; {path} has their ids and the reasons.")


def resolve_start(job: TrainJob, tracking_uri: str | None) -> ResolvedCheckpoint | None:
    """Resolve the checkpoint that the job starts from; None for a model from scratch."""
    return resolve_model(job.model, tracking_uri) if isinstance(job.model, CheckpointModelConfig) else None


def _fit(
    job: TrainJob,
    folder: RunFolder,
    start: ResolvedCheckpoint | None,
    logger: Callable[[], MetricLogger],
    on_progress: Callable[[int, str], None],
    on_report: Callable[[Mapping[str, float]], None] | None,
) -> tuple[Path, dict[str, float]]:
    """Train in this process or on Ray Train; returns the last checkpoint and the last metrics."""
    path = start.path if start is not None else None
    if job.scaling.bounds[1] == 0:
        local = folder.local_path("in-process")
        return fit_in_process(
            job, local, checkpoint=path, logger=logger(), on_progress=on_progress, on_report=on_report
        )
    # Ray Train takes seconds to import, so in-process runs and --dry-run do not load it.
    from parcelray.training.trainer import fit

    return fit(job, folder, checkpoint=path, logger=logger, on_progress=on_progress, on_report=on_report)


def _keep_model(job: TrainJob, folder: RunFolder, checkpoint: Path, start: ResolvedCheckpoint | None) -> Path:
    """Copy the last checkpoint's model to the run folder, in the data type of the job, and write its manifest.

    Returns:
        The local folder of the model; with a remote run folder it is a copy in the checkpoint's folder.
    """
    target = folder.local_path(_MODEL) if folder.is_local else checkpoint / "kept-model"
    shutil.rmtree(target, ignore_errors=True)
    if job.checkpointing.model_dtype is None:
        shutil.copytree(checkpoint / "model", target)
    else:
        write_converted(checkpoint / "model", target, getattr(torch, job.checkpointing.model_dtype))
    write_manifest(
        target,
        config=job.model_dump(mode="json", context=AS_WRITTEN),
        git_commit=git_commit(),
        data=job.data.model_dump(mode="json", context=AS_WRITTEN),
        seed=job.seed,
        extra={
            "start": start.pinned if start is not None else "scratch",
            "identity": folder.identity,
            "torch": torch.__version__,
        },
    )
    if not folder.is_local:
        folder.upload(target, _MODEL)
    elif job.scaling.bounds[1] != 0:
        shutil.rmtree(checkpoint)
    return target
