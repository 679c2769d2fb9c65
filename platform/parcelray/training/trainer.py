"""Training on Ray Train (V2): one loop per worker, restarted from the newest checkpoint when a worker dies."""

import contextlib
import logging
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import ray
import ray.exceptions
import ray.train
from pyarrow.fs import copy_files
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, ValidationConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from parcelray.config.train import TrainJob
from parcelray.errors import SystemFailure, UserError
from parcelray.files import listing_wait_s, read_json
from parcelray.models.checkpoint import ModelPin
from parcelray.tracking.lineage import submitted_job
from parcelray.tracking.metric_logger import MetricLogger
from parcelray.tracking.run_folder import RunFolder
from parcelray.training.checkpointing import fetch
from parcelray.training.ray_worker import (
    BackgroundValidation,
    ControllerCallback,
    WorkerInputs,
    train_worker,
    user_error_of,
    watched_progress,
)

logger = logging.getLogger(__name__)

_ABORT_S = 30.0
"""Longest time that Ctrl-C waits for the end of the workers, seconds."""


def fit(
    job: TrainJob,
    folder: RunFolder,
    *,
    start: ModelPin | None,
    logger: Callable[[], MetricLogger],
    on_progress: Callable[[int, str], None] = lambda step, state: None,
    on_notice: Callable[[str], None] = lambda line: None,
    on_report: Callable[[Mapping[str, float]], None] | None = None,
) -> tuple[Path, dict[str, float]]:
    """Train a job to its end on the Ray instance that this process is connected to.

    The Ray Train run is named after the folder's identity, so the same call after a crash of the driver resumes from
    the newest checkpoint.

    Args:
        job: the training.
        folder: the run folder, already claimed for this job.
        start: what `job.model` was resolved to; each worker opens it on its host. None for a model from scratch.
        logger: creates the metric logger; called on rank 0.
        on_progress: called in this process with the number of finished steps and a short text, about twice a second.
        on_notice: called in this process with a sentence on what the user should know, such as the death of a worker.
        on_report: called with the metrics at each checkpoint, in the process of Ray Train's controller; picklable.

    Returns:
        A local copy of the last checkpoint, in a temporary folder that the caller removes, and the last metrics.

    Raises:
        UserError: a worker met an error that the user must correct, such as rows that cannot be used.
        SystemFailure: the training failed more often than `scaling.max_failures`, or Ray's record of its checkpoints
            is damaged.
    """
    _check_snapshot(folder)
    with watched_progress(on_progress, on_notice) as progress:
        # Ray's annotations are those of the first version of Ray Train, which had no validation.
        trainer = _InterruptibleTrainer(  # type: ignore[call-arg]
            train_worker,
            train_loop_config={"inputs": WorkerInputs(job, start, logger, progress)},
            scaling_config=_scaling(job),
            run_config=_run_config(job, folder, ControllerCallback(progress, on_report)),
            torch_config=TorchConfig(backend="nccl" if job.scaling.gpus_per_worker else "gloo"),
            validation_config=_validation(job, start, logger),
        )
        handler = signal.getsignal(signal.SIGINT)
        try:
            result = trainer.fit()
        except ray.train.WorkerGroupError as error:
            raise _failure(error) from error
        else:
            refused: UserError | None = ray.get(progress.user_error.remote())
            if refused is not None:
                raise refused
        finally:
            # Without this, a Ctrl-C in the evaluation after the training would go to the controller that has ended.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, handler)
    if result.checkpoint is None:
        raise SystemFailure(
            f"The run {folder.identity} ended without a checkpoint; see Ray Train's logs in {folder.path}."
        )
    # `to_directory` would add a lock file for processes that share the copy.
    target = Path(tempfile.mkdtemp(prefix="parcelray-result-"))
    stored = result.checkpoint
    wait_s = listing_wait_s(folder.filesystem)
    if not fetch(lambda copy: copy_files(stored.path, str(copy), stored.filesystem), target, wait_s=wait_s):
        shutil.rmtree(target)
        raise SystemFailure(f"The last checkpoint {stored.path} is damaged; remove it, and run the same command again.")
    return target, dict(result.metrics or {})


class _InterruptibleTrainer(TorchTrainer):
    """Ray's trainer, which on Ctrl-C aborts the run and raises KeyboardInterrupt.

    Ray's own handler exits with code 0 or 1, depending on where the signal arrives, so that the caller can tell an
    interrupted run neither from a finished nor from a failed one.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        signal.signal(signal.SIGINT, interrupt_handler(lambda: ray.get(controller.abort.remote(), timeout=_ABORT_S)))


def interrupt_handler(abort: Callable[[], object]) -> Callable[[int, FrameType | None], None]:
    """A handler of SIGINT that ends a run and raises KeyboardInterrupt; a second Ctrl-C does not wait for the end.

    Args:
        abort: ends the run; may raise `RayActorError`, since the controller ends its own process.
    """

    def handle(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            abort()
        raise KeyboardInterrupt

    return handle


def _scaling(job: TrainJob) -> ScalingConfig:
    scaling = job.scaling
    resources = {"CPU": scaling.cpus_per_worker} | ({"GPU": scaling.gpus_per_worker} if scaling.gpus_per_worker else {})
    # A pair (minimum, maximum) makes the worker group elastic; Ray's annotation allows only a fixed number.
    num_workers: Any = scaling.num_workers
    return ScalingConfig(num_workers=num_workers, use_gpu=scaling.gpus_per_worker > 0, resources_per_worker=resources)


def _validation(job: TrainJob, start: ModelPin | None, logger: Callable[[], MetricLogger]) -> ValidationConfig | None:
    """Validation in a background task that reserves no CPU, so that it never waits for the workers and data tasks."""
    if not job.validation.in_background:
        return None
    return ValidationConfig(
        fn=BackgroundValidation(job, start, logger),
        ray_remote_kwargs={"num_cpus": 0, "num_gpus": job.validation.background_gpus},
    )


def _run_config(job: TrainJob, folder: RunFolder, callback: ControllerCallback) -> RunConfig:
    return RunConfig(
        name=folder.identity,
        storage_path=folder.path,
        storage_filesystem=folder.arrow_filesystem,
        failure_config=FailureConfig(max_failures=job.scaling.max_failures),
        checkpoint_config=CheckpointConfig(num_to_keep=job.checkpointing.keep),
        callbacks=[callback],  # type: ignore[list-item]
    )


def _check_snapshot(folder: RunFolder) -> None:
    """Removes an empty record of the checkpoints, which Ray Train writes in place and would fail to read.

    Raises:
        SystemFailure: the record is cut off.
    """
    path = f"{folder.path}/{folder.identity}/{CHECKPOINT_MANAGER_SNAPSHOT_FILENAME}"
    remedy = f"restore it, or remove the folder {folder.path} to train again from the start"
    if read_json(path, remedy, folder.filesystem) is None and folder.filesystem.exists(path):
        folder.filesystem.rm(path)


def _failure(error: ray.train.WorkerGroupError) -> Exception:
    """The first worker's failure; a user error keeps its type, so that it is printed as one sentence.

    In a submitted job, all tracebacks go to the log of the job, because workers on other hosts keep logs of their own.
    """
    if submitted_job():
        for rank, failure in sorted(error.worker_failures.items()):
            logger.error("The worker of rank %d failed:\n%s", rank, str(failure).strip())
    for cause in error.worker_failures.values():
        if (found := user_error_of(cause)) is not None:
            return found
    first = next(iter(error.worker_failures.values()), error)
    return SystemFailure(f"The training failed: {str(first).strip().splitlines()[-1]}")
