"""One training job from its file to a trained, scored, recorded model: what `parcelray train` and the pipelines call."""

import functools
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from parcelray.cluster.session import num_nodes, ray_session
from parcelray.config.identity import config_hash
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.train import TrainJob
from parcelray.models.checkpoint import ResolvedCheckpoint, write_manifest
from parcelray.tracking.mlflow_tracker import tracked_run
from parcelray.tracking.provenance import flat_params, git_commit, resolve_model
from parcelray.tracking.run_folder import RunFolder
from parcelray.tracking.store import check_tracking_uri, ensure_store
from parcelray.tracking.tracker import open_tracker
from parcelray.training.in_process import fit_in_process
from parcelray.training.progress import progress_bar
from parcelray.training.report import report_training


@dataclass(frozen=True)
class TrainedRun:
    """A finished training."""

    identity: str
    model_folder: Path
    """Checkpoint folder with a manifest."""
    metrics: dict[str, float]
    mlflow_run_id: str | None
    was_done: bool
    """True if the run was finished before, and nothing was computed."""


def run_training(
    job: TrainJob,
    console: Console,
    *,
    address: str | None = None,
    parent_run_id: str | None = None,
    report: bool = True,
    on_report: Callable[[Mapping[str, float]], None] | None = None,
) -> TrainedRun:
    """Trains a job, or goes on with it, or says that it is done.

    Args:
        job: the training.
        console: for progress and messages.
        address: Ray cluster; None: RAY_ADDRESS, else a local instance. Unused with `scaling.num_workers: 0`.
        parent_run_id: MLflow run to nest under.
        report: whether to score the model as `job.report` says.
        on_report: called with the metrics at each checkpoint; picklable.

    Raises:
        UserError: the job cannot run as it is written, or its name belongs to another configuration.
        SystemFailure: the training failed for good.
    """
    folder = RunFolder(job)
    folder.claim()
    done = folder.result()
    if done is not None:
        console.print(
            f"{folder.identity} is finished; nothing to do. Its model is in {done['model']}.", highlight=False
        )
        return TrainedRun(folder.identity, Path(done["model"]), done["metrics"], done["mlflow_run_id"], was_done=True)
    uri = ensure_store(job.tracking.uri) if job.tracking.uri is not None else None
    start = resolve_start(job, uri)
    in_process = job.scaling.bounds[1] == 0
    with nullcontext() if in_process else ray_session(address):
        if uri is not None and not in_process:
            check_tracking_uri(uri, num_nodes())
        with (
            _tracked(job, folder, uri, start, parent_run_id) as run_id,
            progress_bar(console, job.name, job.training.steps) as show,
        ):
            checkpoint, metrics = _fit(
                job, folder, start, functools.partial(open_tracker, uri, run_id), show, on_report
            )
            model_folder = _keep_model(job, folder, checkpoint, start)
            if report and job.report is not None:
                metrics |= report_training(job, model_folder, open_tracker(uri, run_id), console, run_id)
    folder.finish({"model": str(model_folder), "metrics": metrics, "mlflow_run_id": run_id})
    return TrainedRun(folder.identity, model_folder, metrics, run_id, was_done=False)


def resolve_start(job: TrainJob, tracking_uri: str | None) -> ResolvedCheckpoint | None:
    """The checkpoint that the job starts from, resolved once; None for a model from scratch."""
    return resolve_model(job.model, tracking_uri) if isinstance(job.model, CheckpointModelConfig) else None


def _fit(
    job: TrainJob, folder: RunFolder, start: ResolvedCheckpoint | None, logger: Any, show: Any, on_report: Any
) -> tuple[Path, dict[str, float]]:
    path = start.path if start is not None else None
    if job.scaling.bounds[1] == 0:
        return fit_in_process(
            job,
            folder.local_path("in-process"),
            checkpoint=path,
            logger=logger(),
            on_progress=show,
            on_report=on_report,
        )
    # Ray Train takes seconds to import, which --dry-run and in-process runs should not wait for.
    from parcelray.training.trainer import fit

    return fit(job, folder, checkpoint=path, logger=logger, on_progress=show, on_report=on_report)


def _tracked(
    job: TrainJob, folder: RunFolder, uri: str | None, start: ResolvedCheckpoint | None, parent_run_id: str | None
) -> Any:
    if uri is None:
        return nullcontext(None)
    tags = {"parcel.config_hash": config_hash(job), "parcel.start": start.pinned if start is not None else "scratch"}
    commit = git_commit()
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
    return tracked_run(
        uri,
        job.tracking.experiment,
        folder.identity,
        params=flat_params(job.model_dump(mode="json")),
        tags=tags,
        parent_run_id=parent_run_id,
    )


def _keep_model(job: TrainJob, folder: RunFolder, checkpoint: Path, start: ResolvedCheckpoint | None) -> Path:
    """The last checkpoint's model with a manifest, in the run folder (a copy of it beside a remote run folder)."""
    target = folder.local_path("model") if folder.is_local else checkpoint / "kept-model"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(checkpoint / "model", target)
    write_manifest(
        target,
        config=job.model_dump(mode="json"),
        git_commit=git_commit(),
        data=job.data.model_dump(mode="json"),
        seed=job.seed,
        extra={
            "start": start.pinned if start is not None else "scratch",
            "identity": folder.identity,
            "torch": torch.__version__,
        },
    )
    if not folder.is_local:
        folder.upload(target, "model")
    elif job.scaling.bounds[1] != 0:
        shutil.rmtree(checkpoint)
    return target
