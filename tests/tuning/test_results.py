"""Results, report and MLflow runs of a search, from made-up trials."""

import io
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from rich.console import Console

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import load_job, load_job_of
from parcelray.config.objectives import Objective
from parcelray.config.reducer import ClusterAggregateConfig
from parcelray.config.serve import FixedPolicyConfig, ServeJob
from parcelray.config.tune import TuneJob
from parcelray.errors import SystemFailure
from parcelray.serving.plan import serving_plan
from parcelray.tracking.mlflow_tracker import start_run
from parcelray.tracking.run_folder import RunFolder
from parcelray.tuning import progress as tuning_progress
from parcelray.tuning.progress import TrialRuns, best_of, bounds_of, volumes
from parcelray.tuning.report import show_findings
from parcelray.tuning.results import findings_of, select
from parcelray.tuning.trial_record import FinishedTrial, point_key

from ..stores import new_store


def _job(storage: Path, **changes: Any) -> TuneJob:
    data = {
        "kind": "tune",
        "name": "splits",
        "space": {
            "kind": "search_space",
            "name": "s",
            "job": "j",
            "parameters": {"budgets": {"type": "choice", "values": [[16], [64]]}},
        },
        "base": {
            "kind": "evaluate",
            "name": "b",
            "benchmarks": [{"name": "mini", "source": {"split": "validation", "samples": 9}}],
        },
        "algorithm": {"type": "grid"},
        "objectives": [{"metric": "retention", "mode": "max"}, {"metric": "tokens", "mode": "min"}],
        "storage": str(storage),
    }
    return TuneJob.model_validate(data | changes)


def _trial(budget: int, retention: float, **changes: Any) -> FinishedTrial:
    point = {"budgets": [budget]}
    return FinishedTrial(point_key(point), point, {"retention": retention, "tokens": float(budget)}, 1.0, **changes)


TRIALS = [_trial(16, 70.0), _trial(64, 90.0, stopped=True)]


def test_a_selected_evaluation_uses_the_test_split(tmp_path: Path) -> None:
    select(_job(tmp_path), TRIALS, "max retention subject to tokens <= 16", tmp_path / "chosen.yaml")
    written: Any = load_job(tmp_path / "chosen.yaml")
    assert written.benchmarks[0].source == {"split": "test", "samples": 9}


def test_a_selected_reducer_is_a_job_that_serves_and_an_evaluation(tmp_path: Path) -> None:
    parameters = {
        "budgets": {"type": "choice", "values": [[16], [64]]},
        "reducer.weighting": {"type": "choice", "values": ["mean", "norm"]},
    }
    base = {
        "kind": "evaluate",
        "name": "b",
        "model": {"reference": "mini_llava"},
        "reducer": {"type": "cluster_aggregate", "positions": "image"},
        "benchmarks": [{"name": "mini", "source": {"split": "validation", "samples": 9}}],
    }
    space = {"kind": "search_space", "name": "s", "job": "j", "parameters": parameters}
    point = {"budgets": [64], "reducer.weighting": "norm"}
    trial = FinishedTrial(point_key(point), point, {"retention": 70.0, "tokens": 64.0}, 1.0)
    chosen = select(_job(tmp_path, base=base, space=space), [trial], "max retention", tmp_path / "chosen.yaml")
    served, evaluated = load_job_of(ServeJob, chosen.job), load_job_of(EvaluateJob, str(chosen.evaluation))
    assert served.reducer == evaluated.reducer
    assert isinstance(served.reducer, ClusterAggregateConfig)
    assert (served.reducer.weighting, served.reducer.positions) == ("norm", "image")
    assert (served.budgets.offered, evaluated.budgets) == ((64,), (64,))
    assert served.budgets.policy == FixedPolicyConfig(visual_tokens=64)
    assert served.model.reference == "mini_llava"
    assert evaluated.benchmarks[0].source["split"] == "test"
    assert "# parcelray serve" in chosen.job.read_text()
    assert serving_plan(served).reducer == served.reducer.model_dump(mode="json")


def test_the_box_of_the_hypervolume_is_known_before_the_first_trial() -> None:
    objectives = _job(Path()).objectives
    bounds = bounds_of(objectives, {"tokens": (0.0, 256.0)})
    assert bounds == [(0.0, 100.0), (0.0, 256.0)]
    job = _job(Path())
    assert volumes(job, TRIALS, bounds)[0] == volumes(job, TRIALS[:1], bounds)[0] < volumes(job, TRIALS, bounds)[1] < 1
    assert bounds_of([*objectives, Objective(metric="latency_ms", mode="min")], {"tokens": (0.0, 256.0)}) is None, (
        "the latency has no upper bound"
    )
    assert bounds_of(
        [Objective(metric="latency_ms", mode="min", bounds=(0.0, 50.0)), Objective(metric="val/score@64", mode="max")],
        {},
    ) == [
        (0.0, 50.0),
        (0.0, 1.0),
    ]


def test_among_equal_trials_the_best_is_on_the_front(tmp_path: Path) -> None:
    job, trials, text = _job(tmp_path), [_trial(64, 90.0), _trial(16, 90.0)], io.StringIO()
    assert best_of(job, trials) == trials[1]
    show_findings(job, findings_of(job, trials, None, {}), RunFolder(job), Console(file=text, width=200))
    assert "Best retention: 90 at budgets 16\n" in text.getvalue()


def test_stopped_trials_are_marked(tmp_path: Path) -> None:
    job, text = _job(tmp_path), io.StringIO()
    show_findings(job, findings_of(job, TRIALS, None, {}), RunFolder(job), Console(file=text, width=200))
    assert f"{TRIALS[1].key} (stopped)" in text.getvalue()
    assert "1 trials were stopped early" in text.getvalue()
    assert "Model with this routing" not in text.getvalue()


def test_a_failing_tracking_store_is_reported_but_does_not_hide_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = new_store(tmp_path)
    parent = start_run(uri, "parcelray", "tune-s", params={})

    def broken(*_: object, **__: object) -> str:
        raise MlflowException("database is locked")

    monkeypatch.setattr(tuning_progress, "start_run", broken)
    with (
        pytest.raises(
            SystemFailure, match=r"failed to write a trial \(database is locked\). The trial itself is recorded"
        ),
        TrialRuns(_job(tmp_path), uri, parent) as runs,
    ):
        runs.started("k", {})
    runs = TrialRuns(_job(tmp_path), uri, parent)
    runs.started("k", {})
    runs.__exit__(KeyboardInterrupt, None, None)


def test_a_retried_trial_no_longer_shows_its_error(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = new_store(tmp_path)
    parent = start_run(uri, "parcelray", "tune-s", params={})
    for trial in (_trial(16, 0.0, error="it broke"), TRIALS[0]):
        with TrialRuns(_job(tmp_path), uri, parent) as runs:
            runs.started(trial.key, trial.assignment)
            runs.finished(trial)
        (run,) = MlflowClient(uri).search_runs(["1"], f"tags.`mlflow.parentRunId` = '{parent}'")
        assert (run.info.status, run.data.tags["parcel.outcome"]) == (
            ("FAILED", "failed: it broke") if trial.error else ("FINISHED", "finished")
        )
