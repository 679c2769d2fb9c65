"""The runs of the elastic study: their jobs, and the sharing of the work between processes."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.identity import config_hash
from parcelray.config.loader import load_job_of
from parcelray.config.train import TrainJob
from parcelray.errors import UserError
from parcelray.studies.elastic import choice, runs
from parcelray.studies.elastic.choice import choice_jobs
from parcelray.studies.elastic.runs import (
    SYSTEMS,
    Run,
    evaluate_runs,
    only_worker,
    runs_of,
    train_runs,
    training_of,
)

JOBS = Path(__file__).resolve().parents[3] / "jobs"


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    """The training job of the study, with its results in a temporary folder."""
    return load_job_of(TrainJob, JOBS / "train" / "elastic.yaml", [f"storage={tmp_path}", "tracking.uri=null"])


def test_all_systems_are_trained_alike(job: TrainJob) -> None:
    jobs = {run.system: training_of(run, job) for run in runs_of(list(SYSTEMS), [2], 1500)}
    assert [each.name for each in jobs.values()] == [f"elastic-{name}-1500-seed2" for name in SYSTEMS]
    own = {"name", "connector", "budget", "validation"}
    common = [each.model_dump(exclude=own) for each in jobs.values()]
    assert all(each == common[0] for each in common), "same base, data, seed, optimizer, steps"
    assert common[0]["data"]["seed"] == common[0]["seed"] == 2
    assert jobs["vanilla"].connector is None
    assert jobs["mqt_local"].budget == jobs["parcel"].budget
    kinds = {name: each.connector.model_dump() for name, each in jobs.items() if each.connector is not None}
    assert {name: (each.get("start"), each["positions"]) for name, each in kinds.items()} == {
        "parcel": ("local", "image"),
        "m3": (None, "image"),
        "mqt": ("sincos", "contiguous"),
        "mqt_local": ("local", "image"),
    }
    hashes = {config_hash(training_of(run, job)) for run in runs_of(list(SYSTEMS), [1, 2], 1500)}
    assert len(hashes) == 2 * len(SYSTEMS)


def test_unknown_systems_are_refused() -> None:
    with pytest.raises(UserError, match="some of the systems vanilla, parcel, m3, mqt, mqt_local"):
        runs_of(["parcels"], [1], 10)


def test_processes_share_the_runs(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    output = io.StringIO()
    console = Console(file=output, width=200)
    todo = runs_of(["parcel", "m3"], [1], 10)

    def train(each: TrainJob, *arguments: Any, **options: Any) -> None:
        trained.append(each.name)
        if len(trained) == 1:
            train_runs(todo, job, console)  # What a second process would do meanwhile.

    monkeypatch.setattr(runs, "run_training", train)
    train_runs(todo, job, console)
    # The second process skips what the first one holds. The training itself finds finished runs.
    assert trained == ["elastic-parcel-10-seed1", "elastic-m3-10-seed1", "elastic-m3-10-seed1"]
    assert output.getvalue().count("another process is working on it; skipped") == 1
    with only_worker(training_of(todo[0], job), console) as mine:
        assert mine, "the lock is free again"


def test_nothing_is_evaluated_while_a_training_is_missing(job: TrainJob) -> None:
    evaluation = load_job_of(EvaluateJob, JOBS / "evaluate" / "elastic.yaml")
    with pytest.raises(UserError, match="train --systems m3 --seeds 4 --steps 10` first"):
        evaluate_runs([Run("m3", 4, 10)], job, evaluation, Console(file=io.StringIO()))


def test_variants_have_equal_compute(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plan:
        def __init__(self, each: TrainJob) -> None:
            self.flops = each.training.steps * (2 if each.distillation is not None else 1)

    monkeypatch.setattr(choice, "training_plan", Plan)
    jobs = choice_jobs(job, 300)
    assert len(jobs) == 15
    assert {key[2]: each.training.steps for key, each in jobs.items()} == {"no": 300, "yes": 150}
    assert len({each.name for each in jobs.values()}) == len({config_hash(each) for each in jobs.values()}) == 15
    assert jobs["local", "log-uniform", "no"].budget == job.budget
