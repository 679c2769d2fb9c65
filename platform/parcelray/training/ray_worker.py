"""What runs on each worker of Ray Train, and what its controller calls.

The controller loads this module, too, before it starts the workers; it needs neither the model nor its libraries, so
they are imported where the training begins.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
from ray.train import Checkpoint, UserCallback

from parcelray.config.train import TrainJob
from parcelray.training.metric_logger import MetricLogger

if TYPE_CHECKING:
    from parcelray.datasets.collator import Batch


@dataclass(frozen=True)
class WorkerInputs:
    """What travels to the workers."""

    job: TrainJob
    checkpoint: Path | None
    logger: Callable[[], MetricLogger]
    board: Any


def train_worker(config: dict[str, Any]) -> None:
    """The loop on one worker; Ray Train's `train_loop_per_worker`.

    Args:
        config: `inputs`.
    """
    import torch

    from parcelray.models.allocator import keep_freed_memory
    from parcelray.training.batches.ray_reading import ray_batches
    from parcelray.training.start import build_resumed, build_start, step_reader, validation_samples
    from parcelray.training.train_loop import LoopInputs, train

    inputs: WorkerInputs = config["inputs"]
    job = inputs.job
    if not job.scaling.gpus_per_worker:
        keep_freed_memory()
        torch.set_num_threads(max(1, int(job.scaling.cpus_per_worker)))
    context = ray.train.get_context()
    with _restored_checkpoint() as resume_from:
        model, processor = build_start(job, inputs.checkpoint) if resume_from is None else build_resumed(resume_from)

        def batches(first_step: int, rank: int, world_size: int) -> Iterable["Batch"]:
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


class Reports(UserCallback):
    """Passes on what rank 0 reports."""

    def __init__(self, on_report: Callable[[Mapping[str, float]], None]) -> None:
        self._on_report = on_report

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """See Ray's `UserCallback`."""
        self._on_report(metrics[0])


def _rank_zero_outputs(inputs: WorkerInputs, rank: int) -> dict[str, Any]:
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
