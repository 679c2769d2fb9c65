"""Training on Ray Train (V2): the same loop on every worker, restarted from the newest checkpoint when a worker dies."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback, ValidationConfig
from ray.train.torch import TorchConfig, TorchTrainer

from parcelray.config.train import TrainJob
from parcelray.data.collator import Batch
from parcelray.data.ray_reading import ray_batches
from parcelray.errors import SystemFailure, UserError
from parcelray.training.allocator import keep_freed_memory
from parcelray.training.metric_logger import MetricLogger
from parcelray.training.progress import Progress
from parcelray.training.progress_board import progress_board
from parcelray.training.run_folder import RunFolder
from parcelray.training.start import build_resumed, build_start, step_reader, validation_samples
from parcelray.training.train_loop import LoopInputs, train
from parcelray.training.validation import BackgroundValidation


@dataclass(frozen=True)
class _WorkerInputs:
    """What travels to the workers."""

    job: TrainJob
    checkpoint: Path | None
    logger: Callable[[], MetricLogger]
    board: Any


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

    The folder's identity names the Ray Train run, so the same call after a crash of the driver goes on from the newest checkpoint.

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
            _train_worker,
            train_loop_config={"inputs": _WorkerInputs(job, checkpoint, logger, board)},
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
        raise SystemFailure(f"The run {folder.identity} ended without a checkpoint; see the Ray Train logs under {folder.path}.")
    target = Path(tempfile.mkdtemp(prefix="parcelray-result-"))
    return Path(result.checkpoint.to_directory(str(target))), dict(result.metrics or {})


def _train_worker(config: dict[str, Any]) -> None:
    inputs: _WorkerInputs = config["inputs"]
    job = inputs.job
    if not job.scaling.gpus_per_worker:
        keep_freed_memory()
        torch.set_num_threads(max(1, int(job.scaling.cpus_per_worker)))
    context = ray.train.get_context()
    with _restored_checkpoint() as resume_from:
        model, processor = build_start(job, inputs.checkpoint) if resume_from is None else build_resumed(resume_from)

        def batches(first_step: int, rank: int, world_size: int) -> Iterable[Batch]:
            reader = step_reader(job, processor, rank, world_size)
            return ray_batches(reader, first_step, job.training.steps, concurrency=job.scaling.data_tasks_per_worker)

        loop_inputs = LoopInputs(
            model=model,
            processor=processor,
            batches=batches,
            validation=validation_samples(job, processor),
            resume_from=resume_from,
            report=_report,
            cpu_only=not job.scaling.gpus_per_worker,
            **_rank_zero_outputs(inputs, context.get_world_rank()),
        )
        train(job, loop_inputs)


def _rank_zero_outputs(inputs: _WorkerInputs, rank: int) -> dict[str, Any]:
    if rank != 0:
        return {}
    return {"logger": inputs.logger(), "on_progress": lambda progress: inputs.board.update.remote(progress)}


def _report(metrics: dict[str, float], folder: Path | None, validate: bool) -> None:
    if folder is None:
        ray.train.report(metrics)
    else:
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(str(folder)), validation=validate)


@contextmanager
def _restored_checkpoint() -> Iterator[Path | None]:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as name:
        yield Path(name)


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
    return ValidationConfig(fn=BackgroundValidation(job, logger), ray_remote_kwargs={"num_cpus": 0, "num_gpus": job.validation.background_gpus})


def _run_config(job: TrainJob, folder: RunFolder, on_report: Callable[[Mapping[str, float]], None] | None) -> RunConfig:
    filesystem = None if folder.is_local else pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(folder.filesystem))
    return RunConfig(
        name=folder.identity,
        storage_path=str(folder.path),
        storage_filesystem=filesystem,
        failure_config=FailureConfig(max_failures=job.scaling.max_failures),
        checkpoint_config=CheckpointConfig(num_to_keep=job.checkpointing.keep),
        callbacks=[_Reports(on_report)] if on_report is not None else None,  # type: ignore[list-item]
    )


class _Reports(UserCallback):
    """Passes on what rank 0 reports."""

    def __init__(self, on_report: Callable[[Mapping[str, float]], None]) -> None:
        self._on_report = on_report

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._on_report(metrics[0])


def _check_capacity(job: TrainJob) -> None:
    """Ray Train waits for ever for workers that no node can hold, so an impossible request is refused here (pain P1)."""
    available: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    workers = job.scaling.bounds[0]
    for name, each in (("CPU", job.scaling.cpus_per_worker), ("GPU", job.scaling.gpus_per_worker)):
        if workers * each > available.get(name, 0.0):
            raise UserError(
                f"scaling asks for {workers} workers of {each:g} {name} each, but the Ray cluster has {available.get(name, 0.0):g} {name} in all; "
                f"lower scaling.num_workers or scaling.{name.lower()}s_per_worker, or use a larger cluster."
            )


def _failure(error: ray.train.WorkerGroupError) -> Exception:
    """The first cause: a user's mistake found on a worker stays one sentence."""
    for cause in error.worker_failures.values():
        inner = getattr(cause, "cause", cause)
        if isinstance(inner, UserError):
            return inner
    first = next(iter(error.worker_failures.values()), error)
    return SystemFailure(f"The training failed: {str(first).strip().splitlines()[-1]}")
