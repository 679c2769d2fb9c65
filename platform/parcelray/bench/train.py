"""`parcelray bench train`: compares the training speed on Ray Train with the same loop in this process."""

import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from parcelray.bench.measure import Measure, Report, interquartile_range, machine_info
from parcelray.cluster.session import ray_session
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.train import TrainJob
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.tracking.run_folder import RunFolder
from parcelray.training.train_loop import fit_in_process

GOAL = ">= 0.95"
_WARMUP_SHARE = 0.25
"""Share of the steps that is not timed, because of imports, first batches and growing allocator pools."""


def bench_training(*, steps: int, repeats: int) -> Report:
    """Measures the steps per second of the training loop, alternately in-process and on Ray Train with one worker.

    Both run the same job from step 0: PARCEL inserted into the mini base, random budgets, fp32. They are timed between
    logged steps after the warm-up, so start-up and checkpoints are not counted.

    Args:
        steps: number of optimiser steps per run.
        repeats: number of pairs of runs.
    """
    rates: dict[str, list[float]] = {"in-process": [], "ray-train": []}
    with tempfile.TemporaryDirectory(prefix="parcelray-bench-") as name, ray_session():
        threads = torch.get_num_threads()
        # The Ray worker uses one thread for its one CPU.
        torch.set_num_threads(1)
        try:
            for index in range(repeats):
                for path, fit in (("in-process", _fit_in_process), ("ray-train", _fit_on_ray)):
                    clock = _StepClock()
                    fit(_job(steps, storage=f"{name}/{path}-{index}", num_workers=int(path == "ray-train")), clock)
                    rates[path].append(clock.rate())
        finally:
            torch.set_num_threads(threads)
    ratios = [ray / local for ray, local in zip(rates["ray-train"], rates["in-process"], strict=True)]
    measures = [_measure(f"{path} steps/s", values, "1/s") for path, values in rates.items()]
    ratio = Measure(
        "ray-train over in-process", statistics.median(ratios), "ratio", interquartile_range(ratios), GOAL, "in-process"
    )
    return Report((*measures, ratio), machine_info())


class _StepClock:
    """A metric logger that records when steps end. It runs in the worker, so driver polling does not add noise."""

    def __init__(self) -> None:
        self._file = Path(tempfile.mkstemp(prefix="parcelray-clock-")[1])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records the time of a logged training step."""
        if "train/loss" in metrics:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{step} {time.perf_counter()}\n")

    def flush(self) -> None:
        """Does nothing, because nothing is buffered."""

    def rate(self) -> float:
        """Returns the steps per second after the warm-up, and deletes the record."""
        points = [line.split() for line in self._file.read_text(encoding="utf-8").splitlines()]
        self._file.unlink()
        warm = points[int(len(points) * _WARMUP_SHARE) :]
        return (int(warm[-1][0]) - int(warm[0][0])) / (float(warm[-1][1]) - float(warm[0][1]))


def _fit_in_process(job: TrainJob, clock: _StepClock) -> None:
    fit_in_process(job, Path(job.storage), checkpoint=_start(job), logger=clock)


def _fit_on_ray(job: TrainJob, clock: _StepClock) -> None:
    from parcelray.training.trainer import fit

    folder = RunFolder(job)
    folder.claim()
    fit(job, folder, checkpoint=_start(job), logger=lambda: clock)


def _start(job: TrainJob) -> Path:
    assert isinstance(job.model, CheckpointModelConfig)
    return resolve_checkpoint(job.model.reference).path


def _job(steps: int, *, storage: str, num_workers: int) -> TrainJob:
    return TrainJob.model_validate(
        {
            "kind": "train",
            "name": "bench",
            "connector": {"type": "parcel", "num_heads": 6},
            "data": {"type": "mini"},
            "training": {"steps": steps, "images_per_step": 16, "log_every_steps": 2},
            "validation": {"samples": 1, "budgets": [64]},
            "checkpointing": {"every_steps": steps},
            "scaling": {"num_workers": num_workers},
            "tracking": {"uri": None},
            "storage": storage,
        }
    )


def _measure(name: str, values: list[float], unit: str) -> Measure:
    return Measure(name, statistics.median(values), unit, interquartile_range(values))
