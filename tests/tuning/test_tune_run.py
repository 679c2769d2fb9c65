"""How a search runs on Ray Tune: processes that are shared, failures, nothing that runs, a driver that is ended.

The trials measure nothing. Their processes load this module, so it needs neither torch nor transformers, which would
take most of the time.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ray.util.placement_group import placement_group, remove_placement_group

from parcelray.config.objectives import Objective
from parcelray.config.search_space import Assignment, SearchSpace
from parcelray.config.tune import GridAlgorithm
from parcelray.errors import SystemFailure, UserError
from parcelray.tuning.planner import make_planner
from parcelray.tuning.trial_record import FinishedTrial, TrialRecord
from parcelray.tuning.trial_resources import TrialResources, _has_worker_group
from parcelray.tuning.tune_run import evaluation_trial, run_search

from ..processes import LIMIT_S, end_session, wait_until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

NUMBERS = SearchSpace.model_validate(
    {"kind": "search_space", "name": "n", "job": "j", "parameters": {"a": {"type": "choice", "values": list(range(6))}}}
)
SCORE = Objective(metric="score", mode="max")


class _Square:
    """Measures a number at once, or fails at one, or waits from one on until a file exists."""

    def __init__(self, fails_at: int | None = None, waits_from: int = 6, release: Path = Path()) -> None:
        self.fails_at = fails_at
        self.waits_from = waits_from
        self.release = release

    def measure(self, assignment: Assignment) -> Mapping[str, float]:
        if int(assignment["a"]) >= self.waits_from:
            wait_until(self.release.exists, f"{self.release} exists")
        if assignment["a"] == self.fails_at:
            raise UserError(f"{self.fails_at} is not a number that this takes")
        return {"score": float(assignment["a"] ** 2), "process": float(os.getpid())}


class _Observer:
    def __init__(self) -> None:
        self.running: set[str] = set()
        self.most = 0
        self.done: list[FinishedTrial] = []

    def started(self, key: str, assignment: Assignment) -> None:
        self.running.add(key)
        self.most = max(self.most, len(self.running))

    def reported(self, key: str, metrics: Mapping[str, float], steps: int) -> None:
        raise AssertionError("trials that measure at once report nothing before their end")

    def finished(self, trial: FinishedTrial) -> None:
        self.running.discard(trial.key)
        self.done.append(trial)


def _numbers(folder: Path, trial: Any, observer: _Observer, **options: Any) -> TrialRecord:
    record = TrialRecord(folder)
    planner = make_planner(NUMBERS, GridAlgorithm(), [SCORE], 0, record)
    settings: dict[str, Any] = {"folder": folder, "resources": TrialResources(1.0), "max_concurrent": 2} | options
    run_search(evaluation_trial(trial.measure, SCORE), planner, record, observer, **settings)
    return record


def test_trials_share_processes_and_a_failed_one_ends_nothing(ray_session: None, tmp_path: Path) -> None:
    observer = _Observer()
    record = _numbers(tmp_path, _Square(fails_at=3), observer, reuse_actors=True)
    assert sorted(trial.assignment["a"] for trial in record.trials) == list(range(6))
    failed = next(trial for trial in record.trials if trial.error is not None)
    assert (failed.assignment, failed.metrics) == ({"a": 3}, {})
    assert failed.error is not None
    assert failed.error.endswith("3 is not a number that this takes")
    assert len({trial.metrics["process"] for trial in record.trials if trial.error is None}) <= 3, (
        "two, and one after the failure"
    )
    assert observer.most <= 2
    assert TrialRecord(tmp_path).trials == record.trials, "recorded when it was told"


def test_a_search_in_which_nothing_runs_says_so(ray_session: None, tmp_path: Path) -> None:
    # Asked for past the check, as where another job took the cluster in the meantime.
    with pytest.raises(
        SystemFailure,
        match=r"trials have waited for 2 s and none runs: each asks for 40 CPU, and of the cluster's 4 CPU are free",
    ):
        _numbers(tmp_path, _Square(), _Observer(), resources=TrialResources(40.0), stall_s=2.0)


def test_workers_that_wait_are_told_from_those_that_are_placed(ray_session: None) -> None:
    needs = TrialResources(0.01, workers=1, worker_cpus=1.0)
    wait_until(lambda: not _has_worker_group(needs), "the workers of the tests before this one are gone")
    own, waiting = placement_group([{"CPU": 0.01}]), placement_group([{"CPU": 40.0}])
    assert own.wait(LIMIT_S)
    assert not _has_worker_group(needs), "a trial's own process, and workers that no node can hold"
    placed = placement_group([{"CPU": 1.0}])
    assert placed.wait(LIMIT_S)
    assert _has_worker_group(needs)
    for group in (own, waiting, placed):
        remove_placement_group(group)


def _check_resumed(folder: Path) -> None:
    before = TrialRecord(folder).trials
    assert 0 < len(before) < 6
    observer = _Observer()
    record = _numbers(folder, _Square(), observer, reuse_actors=True)
    assert sorted(trial.assignment["a"] for trial in record.trials) == list(range(6))
    assert len(observer.done) == 6 - len(before), "none is run again"
    assert {trial.metrics["score"] for trial in record.trials} == {0.0, 1.0, 4.0, 9.0, 16.0, 25.0}


_DRIVER = """
import sys
from pathlib import Path
from parcelray.cluster.session import ray_session
sys.path.insert(0, {root!r})
from tests.tuning.test_tune_run import _Observer, _Square, _numbers
with ray_session("local", num_cpus=2, object_store_bytes=100 * 1024**2):
    trial = _Square(waits_from=2, release=Path({folder!r}, "never"))
    _numbers(Path({folder!r}), trial, _Observer(), reuse_actors=True)
"""


@pytest.mark.nightly
def test_a_search_whose_driver_is_killed_resumes(ray_session: None, tmp_path: Path, repo_root: Path) -> None:
    script = _DRIVER.format(root=str(repo_root), folder=str(tmp_path))
    driver = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_until(lambda: TrialRecord(tmp_path).trials, "a trial is recorded", driver)
    driver.kill()
    driver.wait()
    # Its Ray outlives it; what belongs to the session that we made is ours to end.
    end_session(driver.pid)
    _check_resumed(tmp_path)


class _Interrupts(_Observer):
    """Sends SIGINT, what Ctrl-C sends, to this process once a trial is finished, and then lets the trials that run end."""

    def __init__(self, release: Path) -> None:
        super().__init__()
        self._release = release

    def finished(self, trial: FinishedTrial) -> None:
        super().finished(trial)
        if not self._release.exists():
            os.kill(os.getpid(), signal.SIGINT)
            self._release.touch()


def test_a_search_that_is_interrupted_resumes(ray_session: None, tmp_path: Path) -> None:
    release = tmp_path / "release"
    with pytest.raises(KeyboardInterrupt):
        _numbers(tmp_path, _Square(waits_from=1, release=release), _Interrupts(release), reuse_actors=True)
    _check_resumed(tmp_path)
