"""The parts that Ray's processes of a training load: the workers, the controller's callback, and the progress actor.

The controller and the actor need neither the model nor its libraries, which take seconds to import. So this module
imports those only inside the functions that run on a worker or in a validation task.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from pyarrow.fs import LocalFileSystem, copy_files
from ray.train import Checkpoint, UserCallback
from ray.train.collective import broadcast_from_rank_zero

from parcelray.cluster.session import on_this_node
from parcelray.config.train import TrainJob
from parcelray.errors import SystemFailure, UserError
from parcelray.files import listing_wait_s
from parcelray.models.checkpoint import ModelPin
from parcelray.tracking.metric_logger import MetricLogger, NoMetrics
from parcelray.tracking.opening import model_folder

_COMMITTED = ray.train.CheckpointConsistencyMode.COMMITTED
_POLL_S = 0.5
"""Interval at which the driver polls the progress, in seconds."""


@dataclass(frozen=True)
class WorkerInputs:
    """The inputs that are sent to every worker."""

    job: TrainJob
    start: ModelPin | None
    """What `job.model` was resolved to; None for a model from scratch."""
    logger: Callable[[], MetricLogger]
    """Creates the metric logger; called on rank 0 only."""
    progress: Any
    """Handle of the `ProgressActor`."""


def train_worker(config: dict[str, Any]) -> None:
    """Run the training loop on one worker; this is Ray Train's `train_loop_per_worker`.

    Ray Train starts the workers again after every error. One that the user must correct is recorded in the progress
    actor, so that the workers of the next attempt end at once.

    Args:
        config: has one key, `inputs`, with the `WorkerInputs`.
    """
    progress = config["inputs"].progress
    if ray.get(progress.user_error.remote()) is not None:
        return
    try:
        _train(config["inputs"])
    except Exception as error:
        if (found := user_error_of(error)) is not None:
            ray.get(progress.record.remote(found))
        raise


def user_error_of(error: BaseException) -> UserError | None:
    """Returns the error that the user must correct, also if it arose in a task of Ray; None for another failure."""
    cause = getattr(error, "cause", error)
    return cause if isinstance(cause, UserError) else None


def _train(inputs: WorkerInputs) -> None:
    import torch

    from parcelray.training.batches.ray_reading import ray_batches
    from parcelray.training.start import set_allocator
    from parcelray.training.train_loop import LoopInputs, train

    scaling = inputs.job.scaling
    if not scaling.gpus_per_worker:
        set_allocator(inputs.job)
        torch.set_num_threads(max(1, int(scaling.cpus_per_worker)))
    is_first = ray.train.get_context().get_world_rank() == 0
    on_progress = inputs.progress.update.remote if is_first else lambda step, state: None
    on_notice = inputs.progress.notice.remote if is_first else lambda line: None
    with _restored_checkpoint(on_notice) as resume_from:
        # A resumed training reads its own checkpoint, so its host needs no copy of the start, except under adapters.
        needs_start = resume_from is None or inputs.job.training.lora is not None
        start = (
            model_folder(inputs.start, functools.partial(on_progress, 0))
            if inputs.start is not None and needs_start
            else None
        )
        train(
            inputs.job,
            LoopInputs(
                checkpoint=start,
                resume_from=resume_from,
                batches=functools.partial(ray_batches, concurrency=scaling.data_tasks_per_worker),
                report=_report,
                logger=inputs.logger() if is_first else NoMetrics(),
                on_progress=on_progress,
                on_notice=on_notice,
                cpu_only=not scaling.gpus_per_worker,
            ),
        )


def _report(metrics: dict[str, float], folder: Path | None, validate: bool) -> None:
    if folder is None:
        ray.train.report(metrics)
    else:
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(str(folder)), validation=validate)


@contextmanager
def _restored_checkpoint(on_notice: Callable[[str], None]) -> Iterator[Path | None]:
    """Yields the newest complete checkpoint of the run on this host, equal on all ranks; None at the start of a run."""
    newest = ray.train.get_checkpoint()
    if newest is None:
        yield None
        return
    from parcelray.training.checkpointing import is_complete

    with ExitStack() as stack:
        path = _fetched(newest, stack)
        # All ranks resume from the same step, also if rank 0 alone finds a damaged file.
        if not broadcast_from_rank_zero(is_complete(path)):
            earlier = [
                each.checkpoint
                for each in ray.train.get_all_reported_checkpoints(_COMMITTED)
                # Ray's checkpoints have no equality of their own.
                if each.checkpoint.path != newest.path
            ]
            if earlier:
                on_notice(f"The checkpoint {newest.path} is damaged; the one before it is used.")
                path = _fetched(earlier[-1], stack)
        if not is_complete(path):
            raise SystemFailure(
                f"The checkpoint {newest.path} is damaged, and there is no complete one before it; remove the run"
                " folder to train again from the start."
            )
        yield path


def _fetched(checkpoint: Checkpoint, stack: ExitStack) -> Path:
    """Returns a checkpoint on this host. The processes of a host share one copy from object storage."""
    from parcelray.training.checkpointing import fetch, is_complete

    path = Path(stack.enter_context(checkpoint.as_directory()))
    filesystem: Any = checkpoint.filesystem
    if not isinstance(filesystem, LocalFileSystem) and not is_complete(path):
        wait_s = listing_wait_s(filesystem.handler.fs)
        fetch(lambda copy: copy_files(checkpoint.path, str(copy), filesystem), path, wait_s=wait_s)
    return path


@dataclass(frozen=True)
class ControllerCallback(UserCallback):
    """What the controller of Ray Train does after a report or a failure of the workers; see Ray's `UserCallback`."""

    progress: Any
    """Handle of the `ProgressActor`."""
    on_report: Callable[[Mapping[str, float]], None] | None
    """Called with the metrics that rank 0 reports with a checkpoint."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Pass on the metrics."""
        if self.on_report is not None:
            self.on_report(metrics[0])

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Tell the driver why the workers start again; an error that the user must correct ends the training."""
        if any(user_error_of(error) is not None for error in worker_exceptions.values()):
            return
        for rank, error in sorted(worker_exceptions.items()):
            self.progress.notice.remote(f"The worker of rank {rank} failed: {_reason(error)}")
        self.progress.notice.remote(
            "All workers start again from the newest checkpoint, unless they have failed more than scaling.max_failures"
            " times."
        )


def _reason(error: Exception) -> str:
    """The last line of an error; if a worker died, without Ray's paragraph on possible causes."""
    cause = getattr(error, "health_check_failure", error)
    text = str(cause).strip() or type(cause).__name__
    return text.splitlines()[-1].strip().partition(" Worker exit detail:")[0]


@dataclass(frozen=True)
class BackgroundValidation:
    """Scores a training checkpoint while the training continues; Ray Train calls it in a separate task.

    Args:
        job: the training.
        start: what `job.model` was resolved to; None for a model from scratch.
        logger: creates the metric logger of the training's run.
    """

    job: TrainJob
    start: ModelPin | None
    logger: Callable[[], MetricLogger]

    def __call__(self, checkpoint: Any, **kwargs: Any) -> dict[str, float]:
        """Score the checkpoint and log the scores at its step; returns them by metric name.

        Args:
            checkpoint: a checkpoint of `ray.train`.
            kwargs: further arguments of Ray Train; there are none.
        """
        from parcelray.training.train_loop import validate_checkpoint

        start = None
        if self.start is not None and self.job.training.lora is not None:
            start = model_folder(self.start)
        with checkpoint.as_directory() as name:
            step, metrics = validate_checkpoint(self.job, Path(name), start)
        logger = self.logger()
        logger.log_metrics(metrics, step)
        logger.close()
        return metrics


@ray.remote(num_cpus=0)
class ProgressActor:
    """Holds progress and notices for the driver; workers and driver may be on different nodes."""

    def __init__(self) -> None:
        self._newest: tuple[int, str] | None = None
        self._notices: list[str] = []
        self._error: UserError | None = None

    def update(self, step: int, state: str) -> None:
        """Keep the number of finished steps and the text on the current state."""
        self._newest = (step, state)

    def notice(self, line: str) -> None:
        """Keep a sentence on what the user should know."""
        self._notices.append(line)

    def news(self, num_notices: int) -> tuple[tuple[int, str] | None, list[str]]:
        """The newest progress of rank 0, None before the first, and all notices after the first `num_notices`."""
        return self._newest, self._notices[num_notices:]

    def record(self, error: UserError) -> None:
        """Keep the error that ends the training."""
        self._error = self._error or error

    def user_error(self) -> UserError | None:
        """The error that ends the training; None: there is none."""
        return self._error


@contextmanager
def watched_progress(on_progress: Callable[[int, str], None], on_notice: Callable[[str], None]) -> Iterator[Any]:
    """Start a `ProgressActor`; call `on_progress` in this process when its progress changes, `on_notice` per notice.

    Yields:
        The actor's handle, on which workers call `update.remote(step, state)` and `notice.remote(line)`.
    """
    actor = ProgressActor.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
    stop = threading.Event()

    def poll() -> None:
        shown, num_notices = None, 0
        while not stop.wait(_POLL_S):
            newest, notices = ray.get(actor.news.remote(num_notices))
            num_notices += len(notices)
            for line in notices:
                on_notice(line)
            if newest is not None and newest != shown:
                shown = newest
                on_progress(*newest)

    thread = threading.Thread(target=poll, name="parcelray-progress", daemon=True)
    thread.start()
    try:
        yield actor
    finally:
        stop.set()
        thread.join()
        ray.kill(actor)
