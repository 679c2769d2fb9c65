"""Trials that train: in their own process, on Ray Train workers, with early stopping, and as a population."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console

from parcelray.config.tune import TuneJob
from parcelray.errors import SystemFailure, UserError
from parcelray.tuning.resumable_scheduler import ReportHistory
from parcelray.tuning.run import SearchRun, run_tuning

from ..training.conftest import TINY

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

RATES = [1e-4, 3e-3]


def _job(storage: Path, **changes: Any) -> TuneJob:
    base = TINY | {
        "name": "base",
        "optimizer": {"type": "adamw"},
        "training": {"steps": 4, "images_per_step": 4, "log_every_steps": 1},
        "validation": {"every_steps": 1, "samples": 1, "budgets": [16]},
        "checkpointing": {"every_steps": 1},
        "scaling": {"num_workers": 0},
        "tracking": {"uri": None},
        "report": None,
    }
    base |= changes.pop("base", {})
    data = {
        "kind": "tune",
        "name": "rates",
        "space": {
            "kind": "search_space",
            "name": "rates",
            "job": "none",
            "parameters": {"optimizer.learning_rate": {"type": "choice", "values": RATES}},
        },
        "base": base,
        "algorithm": {"type": "grid"},
        "objectives": [{"metric": "train/loss", "mode": "min"}],
        "tracking": {"uri": f"sqlite:///{storage}/mlflow.db"},
        "storage": str(storage),
    }
    return TuneJob.model_validate(data | changes)


def _run(job: TuneJob, **options: Any) -> SearchRun:
    return run_tuning(job, Console(file=io.StringIO(), width=200), **options)


@pytest.mark.parametrize(
    "stopping",
    [
        {"type": "asha", "grace_steps": 1, "reduction": 2},
        # ResumableScheduler is tested for ASHA and the median rule in test_resumable_scheduler.py, without Ray.
        pytest.param({"type": "hyperband", "reduction": 2}, marks=pytest.mark.nightly),
        pytest.param({"type": "median", "grace_steps": 1, "min_trials": 2}, marks=pytest.mark.nightly),
    ],
    ids=lambda each: each["type"],
)
def test_trainings_report_at_their_checkpoints_and_may_be_stopped(
    ray_session: None, tiny_start: dict[str, Any], tmp_path: Path, stopping: dict[str, Any]
) -> None:
    job = _job(tmp_path, base={"model": tiny_start}, early_stopping=stopping)
    run = _run(job)
    trials = run.findings.trials
    assert sorted(trial.assignment["optimizer.learning_rate"] for trial in trials) == RATES
    assert [trial.error for trial in trials] == [None] * 2
    assert all(trial.metrics["train/loss"] > 0 for trial in trials)
    finished = [trial for trial in trials if trial.metrics["step"] == 4]
    assert finished, "at least one is trained to its end"
    assert [trial.stopped for trial in finished] == [False] * len(finished), (
        "a training that reached its end is not marked as stopped"
    )
    assert len(list((run.folder / "trials" / "train").glob("*/model/model.safetensors"))) >= len(finished), (
        "its model is saved"
    )
    assert all("gflops@16" in trial.metrics for trial in finished)
    client = MlflowClient(job.tracking.uri)
    assert run.mlflow_run_id is not None
    experiment = client.get_run(run.mlflow_run_id).info.experiment_id
    children = [each for each in client.search_runs([experiment]) if each.info.run_name.startswith("trial-")]
    assert {each.info.status for each in children} == {"FINISHED"}
    steps = [[metric.step for metric in client.get_metric_history(each.info.run_id, "train/loss")] for each in children]
    assert all(each == sorted(each) and each[0] == 1 for each in steps), (
        "each run has a curve from its first checkpoint on"
    )
    if stopping["type"] != "hyperband":
        # A resumed search replays these reports to early stopping; HyperBand's brackets cannot be restored.
        reports = ReportHistory(run.folder).reports
        assert {report.key: report.steps for report in reports if report.ended} == {
            trial.key: trial.metrics["step"] for trial in trials
        }
        assert -reports[-1].value == trials[-1].metrics["train/loss"]


@pytest.mark.nightly
def test_trials_on_ray_train_workers_run_as_many_at_a_time_as_the_cluster_can_hold(
    ray_session: None, tmp_path: Path
) -> None:
    job = _job(tmp_path, base={"scaling": {"num_workers": 1}}, algorithm={"type": "random", "trials": 2})
    text = io.StringIO()
    run = run_tuning(job, Console(file=text, width=200))
    assert "2 trials, 1 at the same time" in text.getvalue(), (
        "each takes a worker and a reader, of 4 CPUs, and 0.01 for its driver"
    )
    assert [trial.error for trial in run.findings.trials] == [None, None]
    assert all(trial.metrics["step"] == 4 for trial in run.findings.trials)


def test_trials_that_the_cluster_cannot_hold_are_refused(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"A trial needs .* 4 workers of 1 CPU each .*, but the Ray cluster has only 1 node of 4 CPU"
    ):
        _run(_job(tmp_path, base={"scaling": {"num_workers": 4}}))


@pytest.mark.nightly
def test_a_population_trains_in_segments_and_worse_members_continue_from_better_ones(
    ray_session: None, tmp_path: Path
) -> None:
    # A choice and a condition, which Tune's own mutations do not support.
    parameters = {
        "optimizer.type": {"type": "choice", "values": ["adamw", "sgd"]},
        "optimizer.beta2": {"type": "choice", "values": [0.95, 0.999], "when": {"optimizer.type": ["adamw"]}},
        "optimizer.learning_rate": {"type": "choice", "values": RATES},
    }
    space = {"kind": "search_space", "name": "rates", "job": "none", "parameters": parameters}
    job = _job(tmp_path, algorithm={"type": "pbt", "population": 2, "segments": 2}, space=space)
    run = _run(job)
    assert [trial.error for trial in run.findings.trials] == [None, None]
    assert [trial.metrics["step"] for trial in run.findings.trials] == [4, 4]
    jobs = [json.loads(path.read_text())["job"] for path in (run.folder / "trials" / "train").glob("*/job.json")]
    assert {each["training"]["steps"] for each in jobs} == {2}
    assert sorted(each["seed"] for each in jobs) == [3, 3, 4, 4], "each segment has its own data"
    trained = [_searched(each) for each in jobs if each["seed"] == 4]
    assert all(
        _searched({"optimizer": {"type": "adamw", "beta2": None} | _nested(trial.assignment)}) in trained
        for trial in run.findings.trials
    )
    starts = [each["model"].get("reference") for each in jobs]
    assert starts.count(None) == 2, "the first segments start from scratch"
    assert len(starts) - starts.count(None) == 2
    assert len({start for start in starts if start}) == 1, (
        "the second segments both continue from the model of the better member"
    )


def _nested(assignment: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("optimizer."): value for name, value in assignment.items()}


def _searched(job: dict[str, Any]) -> tuple[Any, ...]:
    """Returns the values of the searched parameters."""
    return tuple(job["optimizer"].get(name) for name in ("type", "learning_rate", "beta2"))


@pytest.mark.nightly
def test_a_search_whose_trials_all_fail_fails_with_the_first_error(ray_session: None, tmp_path: Path) -> None:
    # M3 supports only square budgets, so it has no score at 40 tokens.
    base = {
        "validation": {"samples": 1, "budgets": [16, 40]},
        "connector": {"type": "m3"},
        "budget": {"type": "uniform", "budgets": [16]},
    }
    job = _job(
        tmp_path,
        objectives=[{"metric": "val/score@40", "mode": "max"}],
        algorithm={"type": "random", "trials": 1},
        base=base,
    )
    with pytest.raises(
        SystemFailure,
        match=r"All 1 trials of rates failed, .*The objective val/score@40 was not measured; name one .*val/score@16",
    ):
        _run(job)
    (parent,) = MlflowClient(job.tracking.uri).search_runs(["1"], "attributes.run_name LIKE 'tune-%'")
    assert parent.info.status == "FAILED"
