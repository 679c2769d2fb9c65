"""Training in this process, without Ray.

For machines that have only torch and transformers, for debugging, and as the yardstick of `parcelray bench train`.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from parcelray.config.train import TrainJob
from parcelray.datasets.collator import Batch
from parcelray.models.allocator import keep_freed_memory
from parcelray.training.batches.reading import in_process_batches
from parcelray.training.metric_logger import MetricLogger
from parcelray.training.progress import Progress
from parcelray.training.start import build_resumed, build_start, step_reader, validation_samples
from parcelray.training.train_loop import LoopInputs, train


def fit_in_process(
    job: TrainJob,
    folder: Path,
    *,
    checkpoint: Path | None,
    logger: MetricLogger,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_report: Callable[[Mapping[str, float]], None] | None = None,
) -> tuple[Path, dict[str, float]]:
    """Trains a job to its end, going on from the newest checkpoint in `folder`.

    Args:
        job: the training.
        folder: keeps the checkpoints.
        checkpoint: the folder that `job.model` was resolved to; None for a model from scratch.
        logger: receives the metrics.
        on_progress: called at every metric point.
        on_report: called with the metrics at each checkpoint.

    Returns:
        The newest checkpoint folder and the last metrics.
    """
    keep_freed_memory()
    newest = _newest(folder)
    model, processor = build_start(job, checkpoint) if newest is None else build_resumed(newest)

    def batches(first_step: int, rank: int, world_size: int) -> Iterable[Batch]:
        return in_process_batches(step_reader(job, processor, rank, world_size), first_step, job.training.steps)

    def report(metrics: dict[str, float], source: Path | None, validate: bool) -> None:
        if source is not None:
            _keep(source, folder / f"checkpoint_{int(metrics['step']):08d}", job.checkpointing.keep)
        if on_report is not None:
            on_report(metrics)

    metrics = train(
        job,
        LoopInputs(
            model=model,
            processor=processor,
            batches=batches,
            validation=validation_samples(job, processor),
            resume_from=newest,
            report=report,
            logger=logger,
            on_progress=on_progress,
            cpu_only=not torch.cuda.is_available(),
        ),
    )
    done = _newest(folder)
    assert done is not None, "the last step reports a checkpoint"
    return done, metrics


def _newest(folder: Path) -> Path | None:
    return max(folder.glob("checkpoint_*"), default=None)


def _keep(source: Path, target: Path, count: int) -> None:
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    for old in sorted(target.parent.glob("checkpoint_*"))[:-count]:
        shutil.rmtree(old)
