"""The watchdog tells a search in which something computes from one in which nothing does."""

import pytest

from parcelray.errors import SystemFailure
from parcelray.tuning import trial_resources
from parcelray.tuning.trial_resources import TrialResources, Watchdog
from parcelray.tuning.tune_run import last_line


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 1.0})
    return now


def test_trials_that_run_without_their_workers_are_named(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    placed = [True]
    monkeypatch.setattr(trial_resources, "_has_worker_group", lambda resources: placed[0])
    dog = Watchdog(TrialResources(0.01, workers=2, worker_cpus=1.0), 60.0, clock=lambda: clock[0])
    for _ in range(30):
        clock[0] += 20.0
        dog.look(running=4, waiting=0)
    placed[0] = False
    clock[0] += 50.0
    dog.look(running=4, waiting=0)
    dog.feed()
    clock[0] += 50.0
    dog.look(running=4, waiting=0)
    clock[0] += 20.0
    with pytest.raises(
        SystemFailure,
        match=r"4 trials run, but for 60 s none of them has got its workers: each asks for 2 workers of 1 CPU",
    ):
        dog.look(running=4, waiting=0)


def test_trials_that_compute_by_themselves_may_take_long_and_waiting_ones_may_not(clock: list[float]) -> None:
    dog = Watchdog(TrialResources(1.0), 60.0, clock=lambda: clock[0])
    clock[0] += 500.0
    dog.look(running=1, waiting=3)
    clock[0] += 500.0
    dog.look(running=0, waiting=0)
    clock[0] += 61.0
    with pytest.raises(
        SystemFailure,
        match=(
            r"3 trials have waited for 60 s and none runs: each asks for 1 CPU, and of the cluster's 4 CPU are free"
            r" 1 CPU"
        ),
    ):
        dog.look(running=0, waiting=3)


def test_the_reason_of_a_failure_is_its_last_line() -> None:
    assert last_line("Traceback\n  here\nparcelray.errors.UserError: too large\n\n") == "UserError: too large"
    assert last_line("\n \n") == ""
