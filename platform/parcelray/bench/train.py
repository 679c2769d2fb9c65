"""`parcelray bench train`: the training step against the reference path, and Ray Train against the same loop here."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from parcelray.bench.measure import Measure, Report, interquartile_range, machine_info, time_pairs
from parcelray.cluster.session import ray_session
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.train import TrainJob
from parcelray.models.allocator import keep_freed_memory
from parcelray.models.checkpoint import ResolvedCheckpoint, resolve_checkpoint
from parcelray.profiling.machine import matmul_flops_per_second
from parcelray.tracking.metric_logger import NoMetrics
from parcelray.tracking.run_folder import RunFolder
from parcelray.training.train_loop import fit_in_process, repeatable_step

GOAL = ">= 0.95"
_WARMUP_SHARE = 0.25
"""Share of the steps that is not timed, because of imports, first batches and growing allocator pools."""

STEP_GOAL = ">= 2.5"
_IMAGES, _BUDGET = 32, 256
_MATRIX_SIZE = 1024
"""Side of the square matrices whose product is the measure of the machine's speed."""


def bench_step(*, rounds: int) -> Report:
    """Measures one training step (forward, backward, optimiser) with one thread, alternately on two paths.

    Both take the same step: 32 images, PARCEL at 256 tokens inserted into the mini base, `precision: bf16`. The
    reference path is a job with `training.kernels: stock` without flushing of denormal numbers: torch's fused attention
    under bf16 autocast.

    Args:
        rounds: number of timed pairs of steps.
    """
    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="parcelray-bench-") as name:
            own, reference = (_step(name, kernels) for kernels in (None, "stock"))
            # The counter does not know every fused kernel.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                own()
            timing = time_pairs(reference, own, rounds)
        speed = max(matmul_flops_per_second(_MATRIX_SIZE, dtype=each) for each in (torch.bfloat16, torch.float32))
        machine = machine_info()
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    share = 100 * counter.get_total_flops() / timing.median_b / speed
    measures = (
        _images_per_second("training step", timing.median_b, timing.spread_b),
        _images_per_second("reference path", timing.median_a, timing.spread_a),
        Measure("share of matrix-product speed", share, "%", against=f"{speed / 1e9:.0f} GFLOP/s"),
        Measure(
            "speedup_over_reference_path", timing.ratio, "ratio", timing.spread_ratio, STEP_GOAL, "stock, bf16 autocast"
        ),
    )
    return Report(measures, machine | {"max_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "all")})


def _step(storage: str, kernels: str | None) -> Callable[[], float]:
    job = _job(2, storage=storage, num_workers=0, kernels=kernels, precision="bf16", images_per_step=_IMAGES)
    step = repeatable_step(job, _start(job).path, _BUDGET)

    def run() -> float:
        torch.set_flush_denormal(kernels is None)
        return step()

    return run


def _images_per_second(name: str, seconds: float, spread_s: float) -> Measure:
    rate = _IMAGES / seconds
    return Measure(f"{name} images/s", rate, "1/s", rate * spread_s / seconds)


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


class _StepClock(NoMetrics):
    """A metric logger that records when steps end. It runs in the worker, so driver polling does not add noise."""

    def __init__(self) -> None:
        self._file = Path(tempfile.mkstemp(prefix="parcelray-clock-")[1])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records the time of a logged training step."""
        if "train/loss" in metrics:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{step} {time.perf_counter()}\n")

    def rate(self) -> float:
        """Returns the steps per second after the warm-up, and deletes the record."""
        points = [line.split() for line in self._file.read_text(encoding="utf-8").splitlines()]
        self._file.unlink()
        warm = points[int(len(points) * _WARMUP_SHARE) :]
        return (int(warm[-1][0]) - int(warm[0][0])) / (float(warm[-1][1]) - float(warm[0][1]))


def _fit_in_process(job: TrainJob, clock: _StepClock) -> None:
    fit_in_process(job, Path(job.storage), checkpoint=_start(job).path, logger=clock)


def _fit_on_ray(job: TrainJob, clock: _StepClock) -> None:
    from parcelray.training.trainer import fit

    folder = RunFolder(job)
    folder.claim()
    fit(job, folder, start=_start(job).pin, logger=lambda: clock)


def _start(job: TrainJob) -> ResolvedCheckpoint:
    assert isinstance(job.model, CheckpointModelConfig)
    return resolve_checkpoint(job.model.reference)


def _job(steps: int, *, storage: str, num_workers: int, **training: object) -> TrainJob:
    return TrainJob.model_validate(
        {
            "kind": "train",
            "name": "bench",
            "connector": {"type": "parcel", "num_heads": 6},
            "data": {"type": "mini"},
            "training": {"steps": steps, "images_per_step": 16, "log_every_steps": 2} | training,
            "validation": {"samples": 1, "budgets": [64]},
            "checkpointing": {"every_steps": steps},
            "scaling": {"num_workers": num_workers},
            "tracking": {"uri": None},
            "storage": storage,
        }
    )


def _measure(name: str, values: list[float], unit: str) -> Measure:
    return Measure(name, statistics.median(values), unit, interquartile_range(values))
