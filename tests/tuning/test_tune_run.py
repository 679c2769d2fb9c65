"""Searches on Ray Tune: shared processes, failures, a stalled search, and a killed or interrupted driver.

The trials only square a number. Their processes load this module, so it imports neither torch nor transformers, which
would take most of the time.
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
    """Squares a number; fails at one number, and waits from another number on until a file exists."""

    def __init__(self, fails_at: int | None = None, waits_from: int = 6, release: Path = Path()) -> None:
        self.fails_at = fails_at
        self.waits_from = waits_from
        self.release = release

    def measure(self, assignment: Assignment) -> Mapping[str, float]:
        if int(assignment["a"]) >= self.waits_from:
            wait_until(self.release.exists, f"{self.release} exists")
        if assignment["a"] == self.fails_at:
            raise UserError(f"the number {self.fails_at} is refused")
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
        raise AssertionError("trials with a single step report nothing before their end")

    def finished(self, trial: FinishedTrial) -> None:
        self.running.discard(trial.key)
        self.done.append(trial)


def _numbers(folder: Path, trial: Any, observer: _Observer, **options: Any) -> TrialRecord:
    record = TrialRecord(folder)
    planner = make_planner(NUMBERS, GridAlgorithm(), [SCORE], 0, record)
    settings: dict[str, Any] = {"folder": folder, "resources": TrialResources(1.0), "max_concurrent": 2} | options
    run_search(evaluation_trial(trial.measure, SCORE), planner, record, [observer], **settings)
    return record


def test_trials_share_processes_and_a_failed_trial_does_not_end_the_search(ray_session: None, tmp_path: Path) -> None:
    observer = _Observer()
    record = _numbers(tmp_path, _Square(fails_at=3), observer, reuse_actors=True)
    assert sorted(trial.assignment["a"] for trial in record.trials) == list(range(6))
    failed = next(trial for trial in record.trials if trial.error is not None)
    assert (failed.assignment, failed.metrics) == ({"a": 3}, {})
    assert failed.error is not None
    assert failed.error.endswith("the number 3 is refused")
    assert len({trial.metrics["process"] for trial in record.trials if trial.error is None}) <= 3, (
        "two, and one after the failure"
    )
    assert observer.most <= 2
    assert TrialRecord(tmp_path).trials == record.trials, "recorded on disk"


def test_a_search_in_which_nothing_runs_fails_with_the_reason(ray_session: None, tmp_path: Path) -> None:
    # This bypasses the check before the search, as if another job had taken the cluster in the meantime.
    with pytest.raises(
        SystemFailure,
        match=r"trials have waited for 2 s and none is running: each requests 40 CPU; the cluster has 4 CPU, of which",
    ):
        _numbers(tmp_path, _Square(), _Observer(), resources=TrialResources(40.0), stall_s=2.0)


def test_waiting_workers_are_distinguished_from_placed_ones(ray_session: None) -> None:
    needs = TrialResources(0.01, workers=1, worker_cpus=1.0)
    wait_until(lambda: not _has_worker_group(needs), "the workers of the previous tests have ended")
    own, waiting = placement_group([{"CPU": 0.01}]), placement_group([{"CPU": 40.0}])
    assert own.wait(LIMIT_S)
    assert not _has_worker_group(needs), "only a trial's own process, and workers that fit on no node"
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
    assert len(observer.done) == 6 - len(before), "no trial is run again"
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
    # The Ray processes of the driver survive it; they belong to the session that this test started, so it ends them.
    end_session(driver.pid)
    _check_resumed(tmp_path)


class _Interrupts(_Observer):
    """Sends SIGINT (Ctrl-C) to this process once a trial is finished, and then lets the running trials end."""

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
