"""Training on Ray Train (V2): the same loop on every worker, restarted from the newest checkpoint when a worker dies."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, ValidationConfig
from ray.train.torch import TorchConfig, TorchTrainer

from parcelray.config.train import TrainJob
from parcelray.errors import SystemFailure, UserError
from parcelray.tracking.run_folder import RunFolder
from parcelray.training.metric_logger import MetricLogger
from parcelray.training.progress import Progress
from parcelray.training.progress_board import progress_board
from parcelray.training.ray_worker import Reports, WorkerInputs, train_worker


def fit(
    job: TrainJob,
    folder: RunFolder,
    *,
    checkpoint: Path | None,
    logger: Callable[[], MetricLogger],
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_report: Callable[[Mapping[str, float]], None] | None = None,
) -> tuple[Path, dict[str, float]]:
    """Trains a job on the Ray instance that this process is connected to.

    The folder's identity names the Ray Train run, so the same call after a crash of the driver goes on from the newest
    checkpoint.

    Args:
        job: the training.
        folder: its run folder, already claimed for this job.
        checkpoint: the folder that `job.model` was resolved to, readable on every node; None for a model from scratch.
        logger: makes the metric logger, called on rank 0.
        on_progress: called in this process, about twice a second.
        on_report: called with the metrics at each checkpoint, in the process of Ray Train's controller; picklable.

    Returns:
        A local copy of the last checkpoint, in a folder of its own that the caller removes, and the last metrics.

    Raises:
        UserError: the cluster can never hold the workers.
        SystemFailure: the training failed more often than `scaling.max_failures`.
    """
    _check_capacity(job)
    with progress_board(on_progress) as board:
        # The annotations are those of the first version of Ray Train, which knew no validation.
        trainer = TorchTrainer(  # type: ignore[call-arg]
            train_worker,
            train_loop_config={"inputs": WorkerInputs(job, checkpoint, logger, board)},
            scaling_config=_scaling(job),
            run_config=_run_config(job, folder, on_report),
            torch_config=TorchConfig(backend="nccl" if job.scaling.gpus_per_worker else "gloo"),
            validation_config=_validation(job, logger),
        )
        try:
            result = trainer.fit()
        except ray.train.WorkerGroupError as error:
            raise _failure(error) from error
    if result.checkpoint is None:
        raise SystemFailure(
            f"The run {folder.identity} ended without a checkpoint; see the Ray Train logs under {folder.path}."
        )
    # Not `to_directory`: its lock is for processes that share the copy.
    target = tempfile.mkdtemp(prefix="parcelray-result-")
    pyarrow.fs.copy_files(result.checkpoint.path, target, source_filesystem=result.checkpoint.filesystem)
    return Path(target), dict(result.metrics or {})


def _scaling(job: TrainJob) -> ScalingConfig:
    scaling = job.scaling
    resources = {"CPU": scaling.cpus_per_worker} | ({"GPU": scaling.gpus_per_worker} if scaling.gpus_per_worker else {})
    # A pair makes the group elastic (Ray Train V2); the annotation in Ray knows only the fixed count.
    num_workers: Any = scaling.num_workers
    return ScalingConfig(num_workers=num_workers, use_gpu=scaling.gpus_per_worker > 0, resources_per_worker=resources)


def _validation(job: TrainJob, logger: Callable[[], MetricLogger]) -> ValidationConfig | None:
    """Validation in a task that needs no CPU of its own: those are for the workers and their data, and it may wait for none of them."""
    if not job.validation.in_background:
        return None
    from parcelray.training.validation import BackgroundValidation

    return ValidationConfig(
        fn=BackgroundValidation(job, logger),
        ray_remote_kwargs={"num_cpus": 0, "num_gpus": job.validation.background_gpus},
    )


def _run_config(job: TrainJob, folder: RunFolder, on_report: Callable[[Mapping[str, float]], None] | None) -> RunConfig:
    filesystem = None if folder.is_local else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(folder.filesystem))
    return RunConfig(
        name=folder.identity,
        storage_path=str(folder.path),
        storage_filesystem=filesystem,
        failure_config=FailureConfig(max_failures=job.scaling.max_failures),
        checkpoint_config=CheckpointConfig(num_to_keep=job.checkpointing.keep),
        callbacks=[Reports(on_report)] if on_report is not None else None,  # type: ignore[list-item]
    )


def _check_capacity(job: TrainJob) -> None:
    """Ray Train waits for ever for workers that no node can hold, so an impossible request is refused here (pain P1)."""
    available: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    workers = job.scaling.bounds[0]
    for name, each in (("CPU", job.scaling.cpus_per_worker), ("GPU", job.scaling.gpus_per_worker)):
        if workers * each > available.get(name, 0.0):
            raise UserError(
                f"scaling asks for {workers} workers of {each:g} {name} each, but the Ray cluster has"
                f" {available.get(name, 0.0):g} {name} in all; lower scaling.num_workers or"
                f" scaling.{name.lower()}s_per_worker, or use a larger cluster."
            )


def _failure(error: ray.train.WorkerGroupError) -> Exception:
    """The first cause: a user's mistake found on a worker stays one sentence."""
    for cause in error.worker_failures.values():
        inner = getattr(cause, "cause", cause)
        if isinstance(inner, UserError):
            return inner
    first = next(iter(error.worker_failures.values()), error)
    return SystemFailure(f"The training failed: {str(first).strip().splitlines()[-1]}")
