"""`parcelray bench train`: its measures follow from known times of the steps."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parcelray.bench import train as train_bench
from parcelray.bench.measure import time_pairs


def test_speed_is_measured_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps take 1 s in-process, and 1.25 s and 1 s on Ray Train; the first quarter of each run is slower."""
    now = 0.0
    seconds = {"in-process": iter([1.0, 1.0]), "ray-train": iter([1.25, 1.0])}

    def fit(path: str) -> Any:
        def run(job: object, clock: train_bench._StepClock) -> None:
            nonlocal now
            per_point = next(seconds[path])
            for point in range(8):
                now += per_point if point > 2 else 50.0
                clock.log_metrics({"train/loss": 1.0}, step=2 * point)
                clock.log_metrics({"val/score": 1.0}, step=2 * point + 1)

        return run

    monkeypatch.setattr(train_bench, "ray_session", nullcontext)
    monkeypatch.setattr(train_bench, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(train_bench, "_fit_in_process", fit("in-process"))
    monkeypatch.setattr(train_bench, "_fit_on_ray", fit("ray-train"))
    report = train_bench.bench_training(steps=16, repeats=2)
    assert [(measure.name, measure.value, measure.unit, measure.goal) for measure in report.measures] == [
        ("in-process steps/s", 2.0, "1/s", None),
        ("ray-train steps/s", pytest.approx(1.8), "1/s", None),
        ("ray-train over in-process", pytest.approx(0.9), "ratio", ">= 0.95"),
    ]
    assert report.measures[-1].missed


def test_the_step_bench_pairs_both_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 2 s on the reference path and 0.5 s otherwise, and multiplies two 100 x 100 matrices."""
    now = 0.0
    flushed: list[bool] = []

    def repeatable_step(job: Any, checkpoint: object, num_visual_tokens: int) -> Any:
        def step() -> float:
            nonlocal now
            now += 0.5 if job.training.kernels is None else 2.0
            return float((torch.ones(100, 100) @ torch.ones(100, 100))[0, 0])

        return step

    monkeypatch.setattr(train_bench, "repeatable_step", repeatable_step)
    monkeypatch.setattr(train_bench, "time_pairs", partial(time_pairs, clock=lambda: now))
    monkeypatch.setattr(train_bench, "matmul_flops_per_second", lambda size, dtype: 1e7)
    monkeypatch.setattr(train_bench, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(torch, "set_flush_denormal", flushed.append)
    report = train_bench.bench_step(rounds=2)
    assert [(measure.name, measure.value) for measure in report.measures] == [
        ("training step images/s", 64.0),
        ("reference path images/s", 16.0),
        ("share of matrix-product speed", pytest.approx(40.0)),
        ("speedup_over_reference_path", 4.0),
    ]
    assert not report.measures[-1].missed
    assert flushed == [True, *[False, True] * 3, False]
