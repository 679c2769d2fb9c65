"""The training of a point: its job, its segments, and the metrics of the trained model."""

from pathlib import Path
from typing import Any

import pytest

from parcelray.config.search_space import Assignment
from parcelray.config.tune import TuneJob
from parcelray.tuning.training_points import BeforeTheEnd, train_point, training_resources, trial_job
from parcelray.tuning.training_trial import Segment
from parcelray.tuning.trial_resources import TrialResources

from ..training.conftest import TINY


def _job(folder: Path, parameters: dict[str, Any], **changes: Any) -> TuneJob:
    data = {
        "kind": "tune",
        "name": "s",
        "space": {"kind": "search_space", "name": "s", "job": "j", "parameters": parameters},
        "base": TINY | {"training": {"steps": 10, "images_per_step": 8}},
        "algorithm": {"type": "grid"},
        "objectives": [{"metric": "train/loss", "mode": "min"}],
        "tracking": {"uri": None},
        "storage": str(folder),
    }
    return TuneJob.model_validate(data | changes)


STEPS = {"training.steps": {"type": "choice", "values": [7, 9]}}


def test_a_searched_number_of_steps_is_trained(tmp_path: Path) -> None:
    job = _job(tmp_path, STEPS)
    assert [trial_job(job, str(tmp_path), {"training.steps": steps}).training.steps for steps in (7, 9)] == [7, 9]


def test_segments_divide_the_steps_and_have_different_seeds(tmp_path: Path) -> None:
    job = _job(
        tmp_path,
        {"optimizer.learning_rate": {"type": "real", "low": 1e-4, "high": 1e-3}},
        algorithm={"type": "random", "trials": 1},
    )
    parts = [
        trial_job(job, str(tmp_path), {}, segment=Segment(index, 4, "mini_base" if index else None))
        for index in range(4)
    ]
    assert [part.training.steps for part in parts] == [2, 3, 2, 3]
    assert [part.seed for part in parts] == [3, 4, 5, 6]
    assert len({part.name for part in parts}) == 4
    assert Segment(3, 4).steps(10) == (7, 10)


def test_only_the_last_segment_rounds_its_model(tmp_path: Path) -> None:
    parameters = {"optimizer.learning_rate": {"type": "real", "low": 1e-4, "high": 1e-3}}
    base = TINY | {"training": {"steps": 10, "images_per_step": 8}, "checkpointing": {"model_dtype": "bfloat16"}}
    job = _job(tmp_path, parameters, base=base, algorithm={"type": "random", "trials": 1})
    segments = [Segment(0, 2), Segment(1, 2, "mini_base"), Segment()]
    jobs = [trial_job(job, str(tmp_path), {}, segment=segment) for segment in segments]
    assert [each.checkpointing.model_dtype for each in jobs] == [None, "bfloat16", "bfloat16"]


def test_a_space_over_workers_needs_the_resources_of_its_largest_point(tmp_path: Path) -> None:
    parameters = {
        "scaling.num_workers": {"type": "integer", "low": 1, "high": 3},
        "scaling.cpus_per_worker": {"type": "choice", "values": [1.0, 2.0]},
    }
    assert training_resources(_job(tmp_path, parameters)) == TrialResources(
        0.01, workers=3, worker_cpus=2.0, helper_cpus=3
    )


def test_the_report_of_the_last_step_is_not_passed_on() -> None:
    reports: list[Any] = []
    report = BeforeTheEnd(reports.append, steps=4)
    for step in (1.0, 2.0, 4.0):
        report({"step": step})
    assert reports == [{"step": 1.0}, {"step": 2.0}]


def test_a_trained_model_is_evaluated_and_has_costs(tmp_path: Path) -> None:
    evaluation = {
        "kind": "evaluate",
        "name": "after",
        "benchmarks": [
            {"name": "mini", "source": {"samples": 3, "families": ["general", "video"]}, "max_new_tokens": 2}
        ],
        "budgets": [16, 64],
        "compute": {"actors": 0},
    }
    objectives = [{"metric": "score/video", "mode": "max"}, {"metric": "gflops@16", "mode": "min"}]
    base = TINY | {"training": {"steps": 2, "images_per_step": 8}, "validation": {"samples": 1, "budgets": [16]}}
    job = _job(tmp_path, STEPS, objectives=objectives, evaluation=evaluation, base=base)
    reports: list[Any] = []
    assignment: Assignment = {"training.steps": 2}
    metrics, model = train_point(job, str(tmp_path), ((), 0), assignment, reports.append)
    assert (Path(model) / "model.safetensors").is_file()
    assert {
        "score/video",
        "score/general",
        "score@64",
        "gflops@16",
        "kv_cache_bytes@16",
        "val/score@16",
        "gflops",
        "tokens",
    } <= metrics.keys()
    assert metrics["step"] == pytest.approx(2)
    assert 0 < metrics["gflops@16"] < metrics["gflops"]
